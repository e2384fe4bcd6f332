"""Read evaluation logs of either kind, and write locuslab/tofu's aggregated kind (``eval_log_aggregated.json``).

That is one JSON object with a part per evaluation set (`PARTS`); a part maps each measurement to values keyed "0", "1", ....
The scripts of locuslab/tofu fail on unknown parts, but ignore unknown measurements. Own measurements are therefore inside the
forget part, under `parts.EXTRA_KEY`. `open_unlearning` has the other kind.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from uipe_core.errors import UserError
from uipe_core.logs.open_unlearning import EVAL_FILE, is_open_unlearning, read_open_unlearning
from uipe_core.logs.parts import EXTRA_KEY, Part, check_writable, extra_part, load_object, tofu_part, with_extra, write_json
from uipe_core.metrics.scores import ScoreReport

PARTS = {
    "retain": "eval_log.json",
    "real_authors": "eval_real_author_wo_options.json",
    "world_facts": "eval_real_world_wo_options.json",
    "forget": "eval_log_forget.json",
}
"""Evaluation set to its key in the log."""


def write_log(report: ScoreReport, path: str | Path, metadata: Mapping[str, Any] | None = None) -> None:
    """Write a report as an evaluation log atomically, replacing what was there; missing folders are made.

    Args:
        report: Must have the forget set; no set empty, all losses finite. TOFU's scripts need all four sets of `PARTS`.
        path: Target file.
        metadata: JSON-able description of the scored model, for readers.

    Raises:
        UserError: A missing or empty set, a loss that is not finite, or a file that cannot be written.
    """
    check_writable(report, ("forget",), path)
    log = {part: tofu_part(report.sets[name], name) for name, part in PARTS.items() if name in report.sets}
    log[PARTS["forget"]][EXTRA_KEY] = extra_part(report, PARTS, metadata)
    write_json(Path(path), log)


def is_log(source: str | Path) -> bool:
    """Return True if a source names an evaluation log, not a model: a JSON file, or a folder with open-unlearning's files."""
    return str(source).endswith(".json") or Path(source).is_file() or (Path(source) / EVAL_FILE).is_file()


def read_log(path: str | Path, *, as_reference: bool = False) -> ScoreReport:
    """Read an evaluation log of either kind, recognised by its content.

    Losses and perturbed losses are required. ROUGE and texts are None if the log lacks them, token counts 0.

    Args:
        path: Log of locuslab/tofu or open-unlearning, or a folder with open-unlearning's two files.
        as_reference: Require only the forget set's paraphrase and perturbed losses, which forget quality compares. Missing
            losses of its gold answers become NaN, incomplete other sets are left out.

    Raises:
        UserError: No such file, broken JSON, a missing part or measurement, or wrong values; names file, key and remedy.
    """
    path = Path(path)
    if (path / EVAL_FILE).is_file():
        path = path / EVAL_FILE
    log = load_object(path)
    if is_open_unlearning(log):
        return read_open_unlearning(log, path, as_reference)
    needed = [PARTS["forget"]] if as_reference else _parts_of(log)
    missing = [part for part in needed if part not in log]
    if missing:
        found = ", ".join(list(log)[:8]) or "nothing"
        raise UserError(
            f"{path}: missing parts {', '.join(missing)} (found: {found}); give an aggregated evaluation log, "
            f"written by `uipe score --log` or as eval_log_aggregated.json by locuslab/tofu, or {EVAL_FILE} of open-unlearning"
        )
    parts = {name: Part(path, key, log[key]) for name, key in PARTS.items() if key in log}
    if as_reference:
        needed = ["avg_gt_loss", "avg_paraphrased_loss", "average_perturb_loss"]
        parts = {name: part for name, part in parts.items() if name == "forget" or part.content.keys() >= set(needed)}
    sets = {name: part.scores(losses_needed=not as_reference) for name, part in parts.items()}
    return with_extra(parts["forget"].part(EXTRA_KEY), sets)


def _parts_of(log: Mapping[str, Any]) -> list[str]:
    """Return the parts that a log must have: TOFU's, or those of the sets that a log of this project says it is of."""
    forget = log.get(PARTS["forget"])
    extra = forget.get(EXTRA_KEY) if isinstance(forget, dict) else None
    hashes = extra.get("item_hashes") if isinstance(extra, dict) else None
    if not isinstance(hashes, dict) or "forget" not in hashes:
        return list(PARTS.values())
    return [part for name, part in PARTS.items() if name in hashes]
