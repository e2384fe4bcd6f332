"""Score one model, or compute the metrics of an evaluation log: `uipe score`, `uipe metrics`."""

from pathlib import Path
from typing import Annotated

import typer

from search.cli.tables import Json, print_metrics, quieten, within

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
    from search.spec.bounds import MOST
    from uipe_core.scoring.scorer import ScoringConfig

    within(MOST, **{"--first-items": first_items, "--batch-size": batch_size, "--max-new-tokens": max_new_tokens})
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


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command(epilog="Example: uipe score --model exported --corpus people --log scores.json")(score)
    app.command(epilog="Example: uipe metrics unlearned.json --reference retain.json")(metrics)
