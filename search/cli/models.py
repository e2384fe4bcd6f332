"""Score or fine-tune one model, or compute the metrics of an evaluation log: `uipe score`, `finetune`, `metrics`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from search.cli.tables import Json, echo, print_metrics, quieten
from uipe_core.errors import UserError

if TYPE_CHECKING:
    from uipe_core.corpora.types import Corpus, ItemSet
    from uipe_core.unlearning.finetuning import FinetuneConfig

Definition = Annotated[str, typer.Option(help="Metric definition: tofu, tofu-utils, open-unlearning or tofu-unicode.")]


def score(
    model: Annotated[str, typer.Option(help="Folder or hub name of a causal language model.")],
    corpus: Annotated[
        str, typer.Option(help="people, tofu or choices (WMDP-Bio and MMLU), both from the hub, tofu:FOLDER or choices:FOLDER.")
    ],
    split: Annotated[str, typer.Option(help="TOFU's forget split.")] = "forget01",
    first_items: Annotated[
        int | None, typer.Option(help="TOFU: only so many items of every set, 300 as in locuslab/tofu's logs.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the people corpus.")] = 0,
    reference: Annotated[
        str | None, typer.Option(help="Retain model, or an evaluation log of it in either format; gives forget quality.")
    ] = None,
    log: Annotated[
        Path | None, typer.Option(help="Write the evaluation log here: a file; for open-unlearning a folder.")
    ] = None,
    log_format: Annotated[str, typer.Option(help="Format of the log: tofu or open-unlearning.")] = "tofu",
    definition: Definition = "tofu",
    prompt_template: Annotated[str | None, typer.Option(help="Prompt with {question}, in place of --prompt-format.")] = None,
    prompt_format: Annotated[
        str | None, typer.Option(help="llama2, llama3, phi or chat; the tokenizer's chat template when left out.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    batch_size: Annotated[int, typer.Option(help="Answers per batch.")] = 32,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Longest generated answer; as the definition says when left out.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Score any model on a corpus: model utility, and forget quality against a reference."""
    from search.cli.score_once import Loading, corpus_named, score_once
    from search.spec.errors import require_count
    from uipe_core.scoring.scorer import ScoringConfig

    asked = {"--first-items": first_items, "--batch-size": batch_size, "--max-new-tokens": max_new_tokens}
    for option, value in asked.items():
        require_count(option, value)
    quieten()
    scoring = ScoringConfig.of(definition, batch_size, max_new_tokens)
    loading = Loading(dtype, device, prompt_template, prompt_format)
    items = corpus_named(corpus, split, seed, first_items)
    print_metrics(score_once(model, items, loading, scoring, definition, reference, log, log_format), as_json)


def metrics(
    log: Annotated[
        Path,
        typer.Argument(
            metavar="LOG", help="Evaluation log: locuslab/tofu's aggregated file, or open-unlearning's TOFU_EVAL.json."
        ),
    ],
    reference: Annotated[
        Path | None, typer.Option(help="Evaluation log of the retain model, in either format; gives forget quality.")
    ] = None,
    definition: Definition = "tofu",
    as_json: Json = False,
) -> None:
    """Compute the metrics of an evaluation log."""
    from search.cli.score_once import metrics_of_log

    print_metrics(metrics_of_log(log, reference, definition), as_json)


SETS = ("forget", "retain")
"""What a model can learn of a corpus, in the order in which a study has it learned."""


def finetune(
    base: Annotated[
        str, typer.Argument(metavar="BASE", help="Folder, hub name, GGUF file, or package:NAME/FILE of an installed package.")
    ],
    corpus: Annotated[
        str,
        typer.Option(
            help="people, tofu or choices (from the hub), tofu:FOLDER, choices:FOLDER, or questions:FORGET,RETAIN with two "
            "files, folders or hub names of your own data."
        ),
    ],
    to: Annotated[Path, typer.Option(help="Folder to write the model to; it must not exist.")],
    sets: Annotated[str, typer.Option(help="What it learns: forget,retain (an initial model) or retain (a retain model).")] = (
        "forget,retain"
    ),
    split: Annotated[str, typer.Option(help="TOFU's forget split.")] = "forget01",
    epochs: Annotated[int, typer.Option(min=1, max=10_000, help="Passes over the items.")] = 5,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 2e-5,
    batch_size: Annotated[int, typer.Option(help="Items a step.")] = 4,
    adapter_rank: Annotated[
        int | None, typer.Option(help="Train LoRA of this rank and merge it; all weights when left out.")
    ] = None,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="Dtype it is saved in; auto is that of the base.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    prompt_template: Annotated[str | None, typer.Option(help="Prompt with {question}, in place of --prompt-format.")] = None,
    prompt_format: Annotated[
        str | None, typer.Option(help="llama2, llama3, phi or chat; the tokenizer's chat template when left out.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of item order, adapter and dropout, and of the people corpus.")] = 0,
) -> None:
    """Fine-tune a base model on items of a corpus, into a folder that transformers loads.

    The recipe is TOFU's: loss on answers only, AdamW, a tenth of the steps as warm-up, linear decay. A study does the same by
    itself with model.kind: finetuned. Code that comes with a model is not run.
    """
    from search.spec.errors import require_count, require_rank

    chosen = _chosen_sets(sets)
    require_count("--batch-size", batch_size)
    require_rank("--adapter-rank", adapter_rank)
    if not 0 < learning_rate <= 1000:
        raise UserError(f"--learning-rate: {learning_rate:g} is not above 0 and at most 1000; give for example 2e-5")
    if to.exists() or to.is_symlink():
        raise UserError(f"--to {to}: it exists; choose a folder that does not")
    quieten()
    known = training_corpus(corpus, split, seed)
    items = tuple(item for name in chosen for item in (known.forget_train if name == "forget" else known.retain_train))
    if not items:
        raise UserError(f"--sets {sets}: {corpus} has no such items to learn; give {' or '.join(SETS)}")
    from uipe_core.unlearning.finetuning import FinetuneConfig
    from uipe_core.unlearning.training import AdapterConfig

    adapter = None if adapter_rank is None else AdapterConfig(adapter_rank, 2.0 * adapter_rank, "all-linear")
    config = FinetuneConfig(epochs, learning_rate, batch_size, adapter=adapter, seed=seed)
    _write(base, items, config, to, dtype, device, prompt_template, prompt_format)
    echo(f"{to}: {base} after {epochs} epochs on {len(items)} items ({', '.join(chosen)})")
    asked = f" --prompt-format {prompt_format}" if prompt_format else ""
    if not corpus.startswith("questions:"):
        echo(f"score it   uipe score --model {to} --corpus {corpus}{asked}")


def training_corpus(name: str, split: str, seed: int) -> "Corpus":
    """Load the corpus that ``--corpus`` names, with its training items.

    Raises:
        UserError: It is unknown, or its data cannot be read.
    """
    from search.cli.score_once import corpus_named
    from uipe_core.corpora.files import DataSet
    from uipe_core.corpora.questions import load_questions

    kind, _, rest = name.partition(":")
    if kind == "questions":
        forget, _, retain = rest.partition(",")
        if not forget or not retain or "," in retain:
            raise UserError(f"--corpus: {name!r} must name two data sets; write questions:FORGET.jsonl,RETAIN.jsonl")
        return load_questions({"forget": DataSet(forget, split="train"), "retain": DataSet(retain, split="train")}, seed=seed)
    try:
        return corpus_named(name, split, seed, None, for_training=True)
    except UserError as error:
        if str(error).startswith("--corpus"):
            raise UserError(f"{error}, or questions:FORGET,RETAIN") from error
        raise


def _chosen_sets(text: str) -> tuple[str, ...]:
    given = [name.strip() for name in text.split(",")]
    unknown = [name for name in given if name not in SETS]
    if unknown:
        raise UserError(f"--sets: {unknown[0]!r} is none of {', '.join(SETS)}; give one of them, or forget,retain")
    return tuple(name for name in SETS if name in given)


def _write(
    base: str,
    items: "ItemSet",
    config: "FinetuneConfig",
    to: Path,
    dtype: str,
    device: str,
    prompt_template: str | None,
    prompt_format: str | None,
) -> None:
    """Train a base model on items and write it, under a temporary name until it is whole."""
    from search.report.progress import Bars
    from search.spec.models import model_place
    from uipe_core.corpora.types import Corpus
    from uipe_core.models.gguf import gguf_folder, is_gguf
    from uipe_core.models.loading import load_model, model_folder
    from uipe_core.models.memory import is_out_of_memory
    from uipe_core.models.transformers_compat import position_limit
    from uipe_core.scoring.lengths import require_positions
    from uipe_core.scoring.scorer import ScoringConfig
    from uipe_core.storage.content_store import ContentStore
    from uipe_core.storage.files import cache_folder, whole_folder
    from uipe_core.unlearning import finetuning

    place = model_place(base)
    folder = gguf_folder(Path(place), ContentStore(cache_folder("models"))) if is_gguf(place) else model_folder(place)
    if (folder / "adapter_config.json").is_file():
        raise UserError(f"model {base}: is an adapter; merge it into its base model first, and give the merged model")
    loaded = load_model(str(folder), device=device, prompt_template=prompt_template, prompt_format=prompt_format)
    limit = position_limit(loaded.model.config)
    require_positions(Corpus(base, {}, items, ()), loaded.prompts, ScoringConfig(), limit, trains=True)
    try:
        with whole_folder(to) as written:  # made before hours of training
            with Bars() as bars:
                progress = lambda done, total: bars.show("fine-tuning", done, total)  # noqa: E731
                finetuning.finetune(loaded, items, config, dtype, progress)
            loaded.model.save_pretrained(written)
            loaded.tokenizer.save_pretrained(written)
    except OSError as error:
        raise UserError(f"--to {to}: {error.strerror or error}; choose another folder or free some space") from error
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise UserError("memory ran out; lower --batch-size, or train an adapter with --adapter-rank 8") from error


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command(epilog="Example: uipe score --model exported --corpus people --log scores.json")(score)
    app.command(epilog="Example: uipe metrics unlearned.json --reference retain.json")(metrics)
    app.command(epilog="Example: uipe finetune ./base --corpus questions:forget.jsonl,retain.jsonl --to initial")(finetune)
