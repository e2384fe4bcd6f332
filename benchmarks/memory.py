"""Peak memory of a trial against the size of the model: streamed, against theta_init and the whole update in memory.

Builds synthetic Llamas (fp32, in shards) and an update vector of each, and loads, walks, draws a random direction, scores a
few items and exports, each in a child process of its own, both ways. Prints one JSON object. Two peaks are given, both less
what the process had after imports: `anonymous`, memory that the process itself filled (RssAnon, sampled every 2 ms), and
`resident`, which counts pages of mapped files too (VmHWM); those the system can take back at any time. Further down: seconds of
a walk at another alpha, also of a model of the quickstart's size. Linux only. Everything written is deleted. Needs `uipe_core`
alone, and 4 times the largest model on disk (8 GB as it stands).

    python benchmarks/memory.py
    python benchmarks/memory.py --hidden 512 --layers 4                  # a small one, in a minute
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from machine import machine
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from uipe_core.corpora.people import load_people
from uipe_core.deltas import files as update_files
from uipe_core.deltas import initial_weights
from uipe_core.deltas.extrapolation import Extrapolator
from uipe_core.deltas.files import load_update, save_streamed
from uipe_core.deltas.initial_weights import read_initial_weights
from uipe_core.deltas.update_vectors import UpdateVector, random_direction, snapshot
from uipe_core.models.loading import LoadedModel, load_model
from uipe_core.models.tiny import Stage, TinyModelConfig, tiny_model
from uipe_core.scoring.scorer import Scorer, ScoringConfig
from uipe_core.storage.content_store import ContentStore

CASES = ("load", "apply", "random_direction", "score", "export")
STAGE = Stage(epochs=1, learning_rate=1e-3, batch_size=16)
QUICKSTART = TinyModelConfig("word", None, hidden_size=64, layers=2, heads=4, base=None, finetune=STAGE, seed=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1536)
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 7, 14], help="one model for each number")
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--dir", type=Path, help="where to write the models; a temporary folder when left out")
    parser.add_argument("--child", nargs=2, metavar=("CASE", "WAY"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measured(*options.child, options.dir)))
        return
    folder = Path(tempfile.mkdtemp(prefix="memory-", dir=options.dir))
    try:
        small = tiny_model(QUICKSTART, load_people(seed=0), "full", ContentStore(folder / "small"))
        write_update(small, folder / "small.safetensors")
        result = {
            "baseline": "whole: with the model a copy of theta_init, and all tensors of the update at once (its file mapped)",
            "models": [against_size(options, layers, folder, small) for layers in options.layers],
            "small_model": seconds_of_a_walk(small, folder / "small.safetensors"),
            "machine": machine(),
        }
        print(json.dumps(result, indent=1))
    finally:
        shutil.rmtree(folder)


def against_size(options: argparse.Namespace, layers: int, folder: Path, small: Path) -> dict[str, object]:
    """All cases both ways on one model."""
    config = LlamaConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.hidden,
        intermediate_size=8 * options.hidden // 3,
        num_hidden_layers=layers,
        num_attention_heads=options.hidden // 64,
        num_key_value_heads=options.hidden // 64,
        dtype="float32",
    )
    place = folder / "model"
    weights = write_model(place / "initial", config, options.shards)
    for path in small.glob("*token*"):
        shutil.copy(path, place / "initial")
    for path in small.glob("*.jinja"):
        shutil.copy(path, place / "initial")
    write_update(place / "initial", place / "update.safetensors")
    found: dict[str, dict[str, dict[str, float]]] = {}
    for case in CASES:
        found[case] = {}
        for way in ("streamed", "whole"):
            command = [sys.executable, __file__, "--dir", str(place), "--child", case, way]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found[case][way] = json.loads(done.stdout)
            shutil.rmtree(place / "export", ignore_errors=True)
    shutil.rmtree(place)
    return {
        "weights_bytes": weights,
        "largest_tensor_bytes": 4 * options.vocabulary * options.hidden,
        "cases": found,
        **{f"{kind}_in_models": shares(found, kind, weights) for kind in ("anonymous", "resident")},
        "apply_seconds_streamed_to_whole": ratio(found["apply"], "seconds_of_a_walk"),
    }


def shares(found: Mapping[str, Mapping[str, Mapping[str, float]]], kind: str, weights: int) -> dict[str, dict[str, float]]:
    return {
        case: {**{way: round(ways[way][kind] / weights, 3) for way in ways}, "streamed_to_whole": ratio(ways, kind)}
        for case, ways in found.items()
    }


def ratio(ways: Mapping[str, Mapping[str, float]], kind: str) -> float:
    return round(ways["streamed"][kind] / ways["whole"][kind], 3)


def write_model(folder: Path, config: LlamaConfig, shards: int) -> int:
    """A model folder of fp32 numbers, a shard at a time; returns the bytes of its weights."""
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in LlamaForCausalLM(config).named_parameters()}
    total, written, where = sum(shape.numel() for shape in shapes.values()), 0, {}
    shard: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(0)
    for name, shape in shapes.items():
        shard[name] = torch.randn(shape, generator=generator).mul_(0.02)
        written += shape.numel()
        file = f"model-{len(set(where.values())):05d}.safetensors"
        if written * shards >= total * (len(set(where.values())) + 1) or written == total:
            save_file(shard, folder / file, metadata={"format": "pt"})
            where.update(dict.fromkeys(shard, file))
            shard = {}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return 4 * total


def write_update(model: Path, path: Path) -> None:
    """An update vector of the model in a folder, a thousandth of the size of its weights."""
    loaded = load_model(str(model), device="cpu").model
    shapes = dict(sorted((name, tuple(parameter.shape)) for name, parameter in loaded.named_parameters()))
    generator = torch.Generator().manual_seed(1)
    save_streamed(path, shapes, ((n, torch.randn(s, generator=generator).mul_(2e-5)) for n, s in shapes.items()))


def measured(case: str, way: str, folder: Path) -> dict[str, float]:
    """Run one case in this process: bytes of peak memory over what imports took, and seconds."""
    torch.set_num_threads(1)
    with peaks() as found:
        started = time.perf_counter()
        loaded = load_model(str(folder / "initial"), device="cpu")
        walker = Extrapolator(loaded.model, initial(loaded, folder / "initial", way))
        if case != "load":
            update = read(folder / "update.safetensors", way)
            if case == "random_direction":
                update = random_direction(update, 0)
                if way == "whole":
                    update = UpdateVector(update.kind, dict(update.tensors))
            walker.apply(update, 0.5)
            again = time.perf_counter()
            walker.apply(update, 1.5)
            found["seconds_of_a_walk"] = time.perf_counter() - again
        if case == "score":
            corpus = load_people(seed=0)
            few = replace(corpus, sets={name: items[:1] for name, items in corpus.sets.items() if name in ("forget", "retain")})
            Scorer(few, loaded.prompts, ScoringConfig(batch_size=4, generation_length=4)).score(loaded)
        if case == "export":
            loaded.model.save_pretrained(folder / "export")
        found["seconds"] = time.perf_counter() - started
    return found


def initial(loaded: LoadedModel, folder: Path, way: str) -> Mapping[str, Tensor]:
    return snapshot(loaded.model) if way == "whole" else read_initial_weights(loaded.model, folder)


def read(path: Path, way: str) -> UpdateVector:
    update = load_update(path)
    if way == "whole":
        return UpdateVector(update.kind, dict(update.tensors))
    return update


def seconds_of_a_walk(folder: Path, update: Path) -> dict[str, float]:
    """Milliseconds of a walk of a small model at another alpha: as it is, and if small models and updates were streamed too."""
    torch.set_num_threads(1)
    walks = {}
    for way in ("whole", "as_it_is", "streamed"):
        update_files.RESIDENT = initial_weights.RESIDENT = 0 if way == "streamed" else 1 << 26
        loaded = load_model(str(folder), device="cpu")
        walks[way] = (Extrapolator(loaded.model, initial(loaded, folder, way)), read(update, way))
    best = dict.fromkeys(walks, float("inf"))
    for step in range(100):
        for way, (walker, vector) in walks.items():
            started = time.perf_counter()
            walker.apply(vector, 0.01 * step)
            best[way] = min(best[way], time.perf_counter() - started)
    return {
        "weights_bytes": sum(parameter.nbytes for parameter in loaded.model.parameters()),
        **{f"{way}_ms": round(1e3 * seconds, 4) for way, seconds in best.items()},
        "as_it_is_to_whole": round(best["as_it_is"] / best["whole"], 3),
        "streamed_to_whole": round(best["streamed"] / best["whole"], 3),
    }


@contextmanager
def peaks() -> Iterator[dict[str, float]]:
    """Fill in the peaks of anonymous and of resident memory of this process, in bytes over what it has on entry."""
    found: dict[str, float] = {}
    before, highest, over = memory("RssAnon"), 0, threading.Event()

    def sample() -> None:
        nonlocal highest
        while not over.wait(0.002):
            highest = max(highest, memory("RssAnon"))

    resident, sampler = memory("VmRSS"), threading.Thread(target=sample)
    sampler.start()
    try:
        yield found
    finally:
        over.set()
        sampler.join()
    found.update(anonymous=highest - before, resident=memory("VmHWM") - resident)


def memory(kind: str) -> int:
    """A line of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{kind}:")).split()[1])


if __name__ == "__main__":
    main()
