"""One more alpha against training and scoring one more run; where the time of an alpha goes; what Tune adds to a trial.

Trains one base run as the quickstart does, scores its last epoch, and then scores further alphas of it, each from applying the
update to the numbers. The baseline of an alpha is the run: its training and one scoring. Tune's overhead is measured on trials
that do nothing, with everything else of a study real (`many_workers.py`), against a bare pool of as many actors;
where Ray is not installed it is left out. Prints one JSON object. But for that last part it needs `uipe_core` alone.

    python benchmarks/inner_loop.py                                    # the quickstart's model on the CPU, a few minutes
    python benchmarks/inner_loop.py --model 7b --device cuda           # 7B-shaped with random weights, LoRA
"""

import argparse
import gc
import json
import statistics
import time
from typing import Any

import torch
from machine import machine
from models import SHAPES, random_llama, small

from uipe_core.corpora.people import load_people
from uipe_core.corpora.tofu import load_tofu
from uipe_core.corpora.types import Corpus
from uipe_core.deltas.extrapolation import Extrapolator
from uipe_core.deltas.update_vectors import LOW_RANK
from uipe_core.metrics.tofu import evaluate
from uipe_core.models.loading import LoadedModel, resolve_device
from uipe_core.scoring.scorer import GENERATION, Scorer, ScoringConfig
from uipe_core.unlearning.training import AdapterConfig, UnlearningConfig, train_base_run

LORA = AdapterConfig(rank=8, alpha=16.0, target_modules="all-linear")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["small", *SHAPES], default="small")
    parser.add_argument("--tofu", help="folder or hub name of TOFU; the people corpus when left out")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--adapter", action="store_true", help="LoRA; always for models other than the small one")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=9, help="how many alphas")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2, help="of the trials that do nothing")
    parser.add_argument("--trials", type=int, default=120, help="that do nothing; 0 leaves Tune out")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    corpus = load_people() if options.tofu is None else load_tofu(options.tofu)
    print(json.dumps(benchmark(corpus, resolve_device(options.device), options), indent=1))


def loaded_anew(options: argparse.Namespace, corpus: Corpus, device: torch.device) -> LoadedModel:
    """The initial model; of a random one the tokenizer is the small one's."""
    found = small(corpus, device=str(device))
    if options.model != "small":
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        found.model = random_llama(options.model, device, dtype)
    return found


def benchmark(corpus: Corpus, device: torch.device, options: argparse.Namespace) -> dict[str, Any]:
    adapter = LORA if options.adapter or options.model != "small" else None
    loaded = loaded_anew(options, corpus, device)
    config = UnlearningConfig(
        "grad_diff", {"retain_weight": 2.0}, options.epochs, 1e-3 if adapter is None else 1e-4, adapter=adapter
    )
    started = time.perf_counter()
    *_, last = train_base_run(loaded, corpus, config)
    synchronize(device)
    training = time.perf_counter() - started
    update = last.update
    del loaded, last
    gc.collect()

    loaded = loaded_anew(options, corpus, device)
    walker = Extrapolator(loaded.model)
    scorer = Scorer(corpus, loaded.prompts, ScoringConfig(None, options.new_tokens))
    reference = scorer.score(loaded)
    runs = []
    for step in range(-1, options.repeats):
        scorer.forget_texts()
        runs.append(one_alpha(walker, scorer, loaded, update, reference, 0.25 * (step + 1), device))
    first, later = runs[0], runs[1:]
    typical = {key: statistics.median(run[key] for run in later) for key in first}
    return {
        "benchmark": "inner_loop",
        "baseline": f"one more run: {options.epochs} epochs of grad_diff, and one scoring",
        "model": {
            "shape": options.model,
            "parameters": sum(parameter.numel() for parameter in loaded.model.parameters()),
            "dtype": str(loaded.model.dtype),
            "update": "low-rank" if update.kind == LOW_RANK else "dense",
        },
        "answers": len(scorer.examples),
        "batch_size": scorer.batch_size,
        "one_more_run_seconds": {"training": round(training, 4), "scoring": round(first["all"], 4)},
        "one_more_alpha_seconds": {key: round(value, 5) for key, value in typical.items()},
        "shares_of_an_alpha": {key: round(value / typical["all"], 4) for key, value in typical.items() if key != "all"},
        "ratio": round((training + first["all"]) / typical["all"], 2),
        "tune": tune_overhead(options.workers, options.trials) if options.trials else "left out",
        "repeats": options.repeats,
        "machine": machine(device),
    }


def one_alpha(
    walker: Extrapolator, scorer: Scorer, loaded: LoadedModel, update: Any, reference: Any, alpha: float, device: torch.device
) -> dict[str, float]:
    """Seconds of one alpha, from the update to the numbers."""
    started = time.perf_counter()
    loaded.model = walker.apply(update, alpha)
    synchronize(device)
    applied = time.perf_counter() - started
    report = scorer.score(loaded)
    evaluate(report, reference)
    whole = time.perf_counter() - started
    generation = report.seconds[GENERATION]
    losses = sum(report.seconds.values()) - generation
    rest = whole - applied - losses - generation
    return {"all": whole, "applying": applied, "losses": losses, "generation": generation, "rest": rest}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def tune_overhead(workers: int, trials: int) -> dict[str, Any] | str:
    """Milliseconds that a study on Tune adds to a trial which does nothing, against a bare pool of actors."""
    try:
        import many_workers
    except ImportError as missing:
        return f"not measured: {missing.name} is not installed"
    settings = argparse.Namespace(workers=workers, trials=trials, seconds=0.0, sampler="random")
    with many_workers.local_ray(workers) as folder:
        pool = many_workers.pool_rate(workers, trials, 0.0, folder)
        study = many_workers.study_share(settings, folder)["trials_per_second"]
    return {
        "baseline": "bare pool of actors, no study",
        "workers": workers,
        "trials": trials,
        "milliseconds_per_trial": round(1e3 / study, 2),
        "pool_milliseconds_per_trial": round(1e3 / pool, 2),
        "overhead_milliseconds_per_trial": round(1e3 / study - 1e3 / pool, 2),
        "ratio": round(pool / study, 2),
    }


if __name__ == "__main__":
    main()
