"""Score one model, or compute the metrics of an evaluation log: `uipe score`, `uipe metrics`."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from search.cli.tables import Json, print_metrics, quieten
from search.report.progress import Bars
from uipe_core.corpora.multiple_choice import WMDP_AND_MMLU, load_multiple_choice, sets_in_folder
from uipe_core.corpora.people import load_people
from uipe_core.corpora.tofu import load_tofu
from uipe_core.corpora.types import RELATED_SETS, Corpus, ItemSet
from uipe_core.errors import UserError
from uipe_core.logs.multiple_choice import is_choice_log, read_choice_log, write_choice_log
from uipe_core.logs.open_unlearning import write_open_unlearning
from uipe_core.logs.tofu import is_log, read_log, write_log
from uipe_core.metrics.collapse import collapse_reason
from uipe_core.metrics.definitions import definition_named
from uipe_core.metrics.multiple_choice import evaluate_choices
from uipe_core.metrics.scores import ChoiceReport, ScoreReport
from uipe_core.metrics.tofu import evaluate
from uipe_core.models.loading import load_model
from uipe_core.scoring.multiple_choice import ChoiceScorer
from uipe_core.scoring.scorer import Scorer, ScoringConfig

LOG_FORMATS = ("tofu", "open-unlearning")


@dataclass(frozen=True)
class Loading:
    """How a model is loaded; see `uipe_core.models.loading.load_model`."""

    dtype: str
    device: str
    prompt_template: str | None
    prompt_format: str | None


def score_once(
    model: str,
    corpus: Corpus,
    loading: Loading,
    scoring: ScoringConfig,
    definition: str,
    reference: str | None,
    log: Path | None,
    log_format: str,
) -> dict[str, Any]:
    """Scores a model and returns its numbers as plain JSON values.

    Args:
        model: Folder or hub name.
        corpus: What it is scored on.
        loading, scoring: How.
        definition: Metric definition.
        reference: Evaluation log of either kind, or a model, which is then scored first, on what forget quality compares.
        log: Where to write the evaluation log, if at all: a file, or a folder for open-unlearning's two.
        log_format: One of `LOG_FORMATS`.

    Raises:
        UserError: An unknown format, a model or log that cannot be read, a reference of other items.
    """
    if log_format not in LOG_FORMATS:
        raise UserError(f"--log-format: {log_format!r} is unknown; give {' or '.join(LOG_FORMATS)}")
    if corpus.choices:
        return _choices_once(model, corpus, loading, scoring, reference, log)
    against = None
    if reference is not None and is_log(reference):
        against = read_log(reference, as_reference=True)
    elif reference is not None:
        compared = {name: items for name, items in corpus.sets.items() if name in ("forget", *RELATED_SETS)}
        against = _scored(reference, corpus, compared, loading, scoring, "scoring the reference")
    scores = _scored(model, corpus, corpus.sets, loading, scoring, "scoring")
    values = _values(scores, against, definition)
    if log is not None:
        facts = {"model": model, "corpus": corpus.name}
        if log_format == "tofu":
            write_log(scores, log, facts)
        else:
            write_open_unlearning(scores, log, facts, against)
    return values


def metrics_of_log(log: Path, reference: Path | None, definition: str) -> dict[str, Any]:
    """The numbers of an evaluation log as plain JSON values; raises as `score_once`."""
    definition_named(definition)
    if is_choice_log(log):
        return _choice_values(read_choice_log(log))
    against = None if reference is None else read_log(reference, as_reference=True)
    return _values(read_log(log), against, definition)


def corpus_named(name: str, split: str, seed: int, first_items: int | None) -> Corpus:
    """The corpus that ``--corpus`` means: people, tofu or choices (from the hub), tofu:FOLDER or choices:FOLDER.

    Of TOFU perhaps its first items only; choices from the hub are WMDP-Bio and MMLU.
    """
    kind, _, folder = name.partition(":")
    if kind == "choices":
        return load_multiple_choice(*(sets_in_folder(Path(folder)) if folder else WMDP_AND_MMLU))
    if kind not in ("people", "tofu") or (kind == "people" and folder):
        raise UserError(f"--corpus: {name!r} is unknown; give people, tofu, tofu:FOLDER, choices or choices:FOLDER")
    return load_people(seed) if kind == "people" else load_tofu(folder or "locuslab/TOFU", split, None, first_items)


def _values(scores: ScoreReport, against: ScoreReport | None, definition: str) -> dict[str, Any]:
    return {**evaluate(scores, against, definition).as_dict(), "collapsed": collapse_reason(scores)}


def _choices_once(
    model: str, corpus: Corpus, loading: Loading, scoring: ScoringConfig, reference: str | None, log: Path | None
) -> dict[str, Any]:
    if reference is not None:
        raise UserError(f"--reference: {reference!r} given, but multiple choice is held against chance; leave it out")
    loaded = load_model(model, **asdict(loading))
    with Bars() as bars:
        scorer = ChoiceScorer(corpus, loaded.prompts, scoring.batch_size)
        scores = scorer.score(loaded, progress=lambda done, total: bars.show("scoring", done, total))
    values = _choice_values(scores)
    if log is not None:
        write_choice_log(scores, log, {"model": model, "corpus": corpus.name})
    return values


def _choice_values(scores: ChoiceReport) -> dict[str, Any]:
    return {**evaluate_choices(scores).as_dict(), "collapsed": None}


def _scored(
    model: str, corpus: Corpus, sets: Mapping[str, ItemSet], loading: Loading, scoring: ScoringConfig, title: str
) -> ScoreReport:
    loaded = load_model(model, **asdict(loading))
    with Bars() as bars:
        scorer = Scorer(replace(corpus, sets=sets), loaded.prompts, scoring)
        return scorer.score(loaded, progress=lambda done, total: bars.show(title, done, total))


Definition = Annotated[str, typer.Option(help="Metric definition: tofu, tofu-utils or open-unlearning.")]


def score(
    model: Annotated[str, typer.Option(help="Folder or hub name of a causal language model.")],
    corpus: Annotated[
        str, typer.Option(help="people, tofu or choices (WMDP-Bio and MMLU), both from the hub, tofu:FOLDER or choices:FOLDER.")
    ],
    split: Annotated[str, typer.Option(help="TOFU's forget split.")] = "forget01",
    first_items: Annotated[
        int | None, typer.Option(min=1, help="TOFU: only so many items of every set, 300 as in locuslab/tofu's logs.")
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
    batch_size: Annotated[int, typer.Option(min=1, help="Answers per batch.")] = 32,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest generated answer; as the definition says when left out.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Score any model on a corpus: model utility, and forget quality against a reference."""
    from uipe_core.scoring.scorer import ScoringConfig

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

    print_metrics(metrics_of_log(log, reference, definition), as_json)


def register(app: typer.Typer) -> None:
    """Adds the commands to the command line."""
    app.command(epilog="Example: uipe score --model exported --corpus people --log scores.json")(score)
    app.command(epilog="Example: uipe metrics unlearned.json --reference retain.json")(metrics)
