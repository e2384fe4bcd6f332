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
RETAIN_ELSEWHERE = "eval_log_retain.json"
"""Key of the retain set where repositories add tasks (rephrased, inverse, one-hop questions) to TOFU's four."""


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
    keys = _keys_of(log)
    needed = [PARTS["forget"]] if as_reference else _parts_of(log)
    missing = [part for name, part in PARTS.items() if part in needed and keys[name] not in log]
    if missing:
        found = ", ".join(list(log)[:12]) or "nothing"
        raise UserError(f"{path}: missing parts {', '.join(missing)} (found: {found}); {_remedy(log, keys)}")
    parts = {name: Part(path, key, log[key]) for name, key in keys.items() if key in log}
    if as_reference:
        needed = ["avg_gt_loss", "avg_paraphrased_loss", "average_perturb_loss"]
        parts = {name: part for name, part in parts.items() if name == "forget" or part.content.keys() >= set(needed)}
    sets = {name: part.scores(losses_needed=not as_reference) for name, part in parts.items()}
    return with_extra(parts["forget"].part(EXTRA_KEY), sets)


def unread_parts(path: str | Path) -> list[str]:
    """Return the keys of an aggregated log that hold sets which no metric is of; none for open-unlearning's."""
    if (Path(path) / EVAL_FILE).is_file() or is_open_unlearning(log := load_object(Path(path))):
        return []
    return [key for key in log if key not in _keys_of(log).values()]


def _keys_of(log: Mapping[str, Any]) -> dict[str, str]:
    """Return the key of each evaluation set, as this log writes it."""
    elsewhere = PARTS["retain"] not in log and RETAIN_ELSEWHERE in log
    return {**PARTS, "retain": RETAIN_ELSEWHERE} if elsewhere else PARTS


def _remedy(log: Mapping[str, Any], keys: Mapping[str, str]) -> str:
    """Return what to do about missing parts, which is another thing where the file is an aggregated log already."""
    if not log.keys() & set(keys.values()):
        return (
            "give an aggregated evaluation log, written by `uipe score --log` or as eval_log_aggregated.json by locuslab/tofu, "
            f"or {EVAL_FILE} of open-unlearning"
        )
    add = "add the evaluations of these sets under these keys, or score the model with `uipe score --log`"
    return f"this log was made without them: {add}"


def _parts_of(log: Mapping[str, Any]) -> list[str]:
    """Return the parts that a log must have: TOFU's, or those of the sets that a log of this project says it is of."""
    forget = log.get(PARTS["forget"])
    extra = forget.get(EXTRA_KEY) if isinstance(forget, dict) else None
    hashes = extra.get("item_hashes") if isinstance(extra, dict) else None
    if not isinstance(hashes, dict) or "forget" not in hashes:
        return list(PARTS.values())
    return [part for name, part in PARTS.items() if name in hashes]
