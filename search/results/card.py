"""Write the model card of an export: what it is, where it comes from, and its numbers next to the trial's."""

from collections.abc import Sequence
from pathlib import Path

from search.results.recipe import RECIPE_FILE, Recipe
from search.results.verification import FULL, LOSS, NONE, Verified
from search.spec.corpora import MULTIPLE_CHOICE
from search.spec.models import TinyModel
from search.spec.study import StudySpec

CHECKS = {
    LOSS: "Losses were read after this export was written and loaded afresh; no text was generated again.",
    FULL: "This export was written, loaded afresh and scored as a trial is.",
    NONE: "This export was not checked: it was neither loaded nor scored, and the numbers are the trial's.",
}
"""How an export was checked, in words."""


def card(recipe: Recipe, verified: Verified, form: str, title: str, library: str, audits: Sequence[Sequence[str]] = ()) -> str:
    """Return the card as Markdown.

    Args:
        recipe: The trial.
        verified: How the export was checked, and its numbers.
        form: Name of the form of export.
        title, library: What the form is called, and the library that loads it.
        audits: Rows of the audit table, its head first; none where the trial was not audited.
    """
    retain = recipe.provenance["models"].get("retain")
    without = "chance" if recipe.spec.corpus.task == MULTIPLE_CHOICE else "none: no number compares with a retain model"
    reference = without if retain is None else f"retain model `{retain}`"
    return f"""---
tags: [unlearning, uipe]
library_name: {library}
---
# {recipe.spec.name}: trial {recipe.trial}

{title}, {_origin(recipe)}, and parameter extrapolation with
alpha = {recipe.alpha:.6g}: theta = theta_init + (1 + alpha) * delta (UIPE, arXiv 2503.04693).

- initial model: `{recipe.provenance["models"]["initial"]}`
- reference: {reference}
- corpus: {recipe.provenance["corpus"]}
- prompts: {_prompts(recipe.spec)}
{"" if verified.dtype is None else f"- dtype: {verified.dtype}; in another one its numbers are others"}

Numbers by the metric definition `{recipe.spec.definition}`. {CHECKS[verified.how]}

{_table(recipe, verified)}
{_comparison(verified)}
{_audits(audits)}
Rebuild it from `{RECIPE_FILE}`: `uipe rebuild {RECIPE_FILE} --to DIR --as {form}`.
"""


def _audits(rows: Sequence[Sequence[str]]) -> str:
    """Return the audits of the trial as a table; a sentence where there are none."""
    if not rows:
        return "Audits (4 bits, relearning, other prompts, membership): not tested.\n"
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "Audits of the trial:\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _table(recipe: Recipe, verified: Verified) -> str:
    """Return a row per metric: of the trial, of the export, and of the export on held-out items."""
    expected = {name: f"{value:.6g}" for name, value in recipe.expected.items() if isinstance(value, float)}
    trial = expected if verified.how == NONE else verified.trial
    columns = {"trial": trial} if trial else {}
    columns |= {"this export": verified.export} if verified.export else {}
    columns |= {"this export, held-out items": verified.held_out} if verified.held_out else {}
    names = dict.fromkeys(name for column in columns.values() for name in column)
    rows = [[name, *(column.get(name, "not read") for column in columns.values())] for name in names]
    lines = [["metric", *columns], ["---"] * (1 + len(columns)), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _comparison(verified: Verified) -> str:
    """Return what was compared, with the allowed differences; nothing where nothing was."""
    if not verified.compared:
        return ""
    lines = [["compared", "trial", "this export", "apart by", "allowed"], ["---"] * 5]
    for each in verified.compared:
        values = ["" if value is None else f"{value:.6g}" for value in (each.trial, each.export)]
        allowed = "numbers of its own" if each.allowed is None else f"{each.allowed:.2g}"
        lines.append([each.name, *values, f"{each.apart:.2g}", allowed])
    unread = "" if verified.unread is None else f"; {verified.unread}"
    note = (
        "\nMerging an adapter rounds the sums, so this model has numbers of its own. Its item losses may be away from the "
        f"trial's by twice what rounding the same sums up or down at random does{unread}.\n"
    )
    return "\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n" + (note if verified.merged else "")


def _prompts(spec: StudySpec) -> str:
    """How questions reach the model: what anyone needs who wants the same numbers."""
    if isinstance(spec.model, TinyModel):
        return "the tokenizer's chat template"
    if spec.model.prompt_template is not None:
        return f"`{spec.model.prompt_template!r}`"
    return f"format `{spec.model.prompt_format or 'chat'}` of UIPE Search"


def _origin(recipe: Recipe) -> str:
    """Where the update vector comes from, in words."""
    if recipe.base in recipe.spec.checkpoints:
        folder = Path(recipe.spec.checkpoints[recipe.base][recipe.epoch - 1])
        return f"from the given checkpoint {recipe.epoch} of {recipe.base} (`{folder.name}`)"
    run = next(run for run in recipe.spec.variants() if run.label == recipe.base)
    hyperparameters = ", ".join(
        f"{name} {value if isinstance(value, str) else f'{value:g}'}" for name, value in run.hyperparameters.items()
    )
    return f"unlearned with {recipe.base} ({hyperparameters}), epoch {recipe.epoch}"
