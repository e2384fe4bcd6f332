"""Evaluation logs in the aggregated format of locuslab/tofu (``eval_log_aggregated.json``), read and written.

One JSON object with a part per evaluation set (`PARTS`); a part maps each measurement to values keyed "0", "1", ....
The scripts of locuslab/tofu walk over all parts and fail on one they do not know, but take from a part only what they
need. What is ours alone therefore stands inside the forget part, under `EXTRA_KEY`: item-set hashes, logit scale,
timings, metadata and our further sets (related, unrelated).
"""

import contextlib
import json
import math
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from uipe_core.errors import UserError
from uipe_core.metrics import CHOICE_SETS, truth_ratio
from uipe_core.score_report import FloatArray, IntArray, ScoreReport, SetScores

PARTS = {
    "retain": "eval_log.json",
    "real_authors": "eval_real_author_wo_options.json",
    "world_facts": "eval_real_world_wo_options.json",
    "forget": "eval_log_forget.json",
}
"""Evaluation set to its key in the log."""

EXTRA_KEY = "uipe"


def write_log(report: ScoreReport, path: str | Path, metadata: Mapping[str, Any] | None = None) -> None:
    """Write a report as an evaluation log: all of it or nothing, replacing what was there.

    Args:
        report: Must have the four sets of `PARTS`, none of them empty, all losses finite.
        path: Target file; missing folders are made.
        metadata: JSON-able description of what was scored, kept in the log for people to read.

    Raises:
        UserError: A missing or empty set, a loss that is not finite, or a file that cannot be written.
    """
    missing = [name for name in PARTS if name not in report.sets]
    if missing:
        raise UserError(f"cannot write {path}: the report lacks the sets {', '.join(missing)}, which a log needs")
    parts = {name: _write_set(scores, name, path) for name, scores in report.sets.items()}
    log: dict[str, Any] = {part: parts[name] for name, part in PARTS.items()}
    log[PARTS["forget"]][EXTRA_KEY] = {
        "item_hashes": {name: scores.item_hash for name, scores in report.sets.items() if scores.item_hash},
        "logit_scale": report.logit_scale,
        "seconds": dict(report.seconds),
        "metadata": dict(metadata or {}),
        "sets": {name: part for name, part in parts.items() if name not in PARTS},
    }
    _write_atomically(Path(path), json.dumps(log, indent=4) + "\n")


def read_log(path: str | Path) -> ScoreReport:
    """Read an evaluation log written by `write_log` or by locuslab/tofu.

    Losses and perturbed losses are needed. ROUGE and texts are None where the log lacks them, token counts 0.

    Raises:
        UserError: No such file, broken JSON, a missing part or measurement, or values that are not what they should be;
            names the file, the key and the remedy.
    """
    log = _load_object(Path(path))
    missing = [part for part in PARTS.values() if part not in log]
    if missing:
        found = ", ".join(list(log)[:8]) or "nothing"
        raise UserError(
            f"{path}: missing parts {', '.join(missing)} (found: {found}); give an aggregated evaluation log, "
            "written by `uipe score --log` or as eval_log_aggregated.json by locuslab/tofu"
        )
    extra = _Part(path, PARTS["forget"], log[PARTS["forget"]]).object(EXTRA_KEY)
    ours = _Part(path, f"{PARTS['forget']}/{EXTRA_KEY}", extra)
    hashes, seconds, logit_scale = ours.object("item_hashes"), ours.object("seconds"), extra.get("logit_scale")
    if not all(isinstance(value, str) for value in hashes.values()):
        raise ours.error("item_hashes", "holds something else than a hash per set")
    if logit_scale is not None and not _is_number(logit_scale):
        raise ours.error("logit_scale", f"is {logit_scale!r}, expected a finite number or null")
    sets = {name: _Part(path, part, log[part]).scores(hashes.get(name)) for name, part in PARTS.items()}
    for name, content in ours.object("sets").items():
        sets[name] = _Part(path, f"{ours.where}/sets/{name}", content).scores(hashes.get(name))
    return ScoreReport(sets=sets, logit_scale=logit_scale, seconds=seconds)


def _write_set(scores: SetScores, name: str, path: str | Path) -> dict[str, Any]:
    if not len(scores):
        raise UserError(f"cannot write {path}: set {name!r} has no items")
    numbers = (scores.answer_loss, scores.paraphrase_loss, scores.perturbed_loss)
    recalls = [values for values in (scores.rouge_l_recall, scores.rouge_1_recall) if values is not None]
    if not all(np.isfinite(values).all() for values in (*numbers, *recalls)):
        raise UserError(f"cannot write {path}: set {name!r} has numbers that are not finite; has the model collapsed?")
    part: dict[str, Any] = {"avg_gt_loss": _keyed(scores.answer_loss)}
    if scores.answer_tokens.any():
        part["gt_loss"] = _keyed(scores.answer_loss * scores.answer_tokens)
        part["num_token_gt"] = _keyed(scores.answer_tokens)
    texts = (scores.questions, scores.generated, scores.answers)
    if any(column is not None for column in texts):
        columns = [column if column is not None else (None,) * len(scores) for column in texts]
        part["generated_text"] = {str(i): list(row) for i, row in enumerate(zip(*columns, strict=True))}
    if scores.rouge_1_recall is not None:
        part["rouge1_recall"] = _keyed(scores.rouge_1_recall)
    if scores.rouge_l_recall is not None:
        part["rougeL_recall"] = _keyed(scores.rouge_l_recall)
    part["average_perturb_loss"] = _keyed(scores.perturbed_loss)
    part["avg_paraphrased_loss"] = _keyed(scores.paraphrase_loss)
    part["truth_ratio"] = _keyed(truth_ratio(scores.paraphrase_loss, scores.perturbed_loss))
    if scores.paraphrase_tokens.any():
        part["paraphrased_loss"] = _keyed(scores.paraphrase_loss * scores.paraphrase_tokens)
        part["num_token_paraphrased"] = _keyed(scores.paraphrase_tokens)
    if scores.perturbed_tokens.any():
        part["perturb_loss"] = _keyed(scores.perturbed_loss * scores.perturbed_tokens)
        part["num_token_perturb"] = _keyed(scores.perturbed_tokens)
    if name in CHOICE_SETS:
        choices = np.concatenate([-scores.answer_loss[:, None], -scores.perturbed_loss], axis=1)
        part["normalized_gt_loss"] = _keyed(scores.answer_loss + np.logaddexp.reduce(choices, axis=1))
    return part


def _keyed(values: FloatArray | IntArray) -> dict[str, Any]:
    return {str(index): value for index, value in enumerate(values.tolist())}


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("x", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; give a file in a writable folder") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _load_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such evaluation log; write one with `uipe score --log`") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give the path of an evaluation log") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: not valid JSON ({error.msg}); write the log again") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file (byte {error.start}); give a JSON evaluation log") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a JSON {type(content).__name__}, an evaluation log is a JSON object")
    return content


def _is_number(value: object) -> bool:
    # JSON's true would pass for 1, since bool is an int in Python.
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


class _Part:
    """One part of a log being read; knows where it stands, so that every error can say so."""

    def __init__(self, path: str | Path, where: str, content: Any) -> None:
        self.path, self.where = path, where
        if not isinstance(content, dict):
            raise self.error("", f"is a {type(content).__name__}, expected an object of measurements")
        self.content = content

    def error(self, key: str, problem: str) -> UserError:
        """An error that names file and key."""
        where = f"{self.where}/{key}" if key else self.where
        return UserError(f"{self.path}: {where} {problem}; write the log again, for example with `uipe score --log`")

    def object(self, key: str) -> dict[str, Any]:
        """The object under a key, empty where the key is missing."""
        value = self.content.get(key, {})
        if not isinstance(value, dict):
            raise self.error(key, f"is a {type(value).__name__}, expected an object")
        return value

    def scores(self, item_hash: str | None) -> SetScores:
        """The whole part as scores of one set."""
        answer_loss = self.required("avg_gt_loss")
        n = len(answer_loss)
        perturbed_loss = self.required("average_perturb_loss", n, nested=True)
        tokens = {
            key: self.counts(key, shape)
            for key, shape in (
                ("num_token_gt", (n,)),
                ("num_token_paraphrased", (n,)),
                ("num_token_perturb", perturbed_loss.shape),
            )
        }
        questions, generated, answers = self.texts(n)
        return SetScores(
            answer_loss=answer_loss,
            answer_tokens=tokens["num_token_gt"],
            paraphrase_loss=self.required("avg_paraphrased_loss", n),
            paraphrase_tokens=tokens["num_token_paraphrased"],
            perturbed_loss=perturbed_loss,
            perturbed_tokens=tokens["num_token_perturb"],
            rouge_l_recall=self.required("rougeL_recall", n) if "rougeL_recall" in self.content else None,
            rouge_1_recall=self.required("rouge1_recall", n) if "rouge1_recall" in self.content else None,
            generated=generated,
            questions=questions,
            answers=answers,
            item_hash=item_hash,
        )

    def rows(self, key: str, n: int | None = None) -> list[Any]:
        """Values of one measurement in index order; indexes must be 0 to n - 1."""
        if key not in self.content:
            raise self.error(key, "is missing")
        values = self.object(key)
        if not values:
            raise self.error(key, "is empty")
        expected = [str(index) for index in range(len(values) if n is None else n)]
        differing = sorted(set(expected) ^ set(values))
        if differing:
            problem = "is missing" if differing[0] in expected else "is unexpected"
            raise self.error(key, f"has other indexes than 0 to {len(expected) - 1}: {differing[0]!r} {problem}")
        return [values[index] for index in expected]

    def required(self, key: str, n: int | None = None, nested: bool = False) -> FloatArray:
        """Finite numbers: (n,), or (n, k) where each value is a list."""
        rows = self.rows(key, n)
        for index, row in enumerate(rows):
            if nested and (not isinstance(row, list) or not row):
                raise self.error(f"{key}/{index}", "is not a list with a number per perturbed answer")
            if nested and len(row) != len(rows[0]):
                raise self.error(f"{key}/{index}", f"has {len(row)} numbers where item 0 has {len(rows[0])}")
            for value in row if nested else [row]:
                if not _is_number(value):
                    raise self.error(f"{key}/{index}", f"is {value!r}, expected a finite number")
        return np.array(rows, dtype=np.float64)

    def counts(self, key: str, shape: tuple[int, ...]) -> NDArray[np.int64]:
        """Token counts of that shape, all 0 where the log has none."""
        if key not in self.content:
            return np.zeros(shape, dtype=np.int64)
        values = self.required(key, shape[0], nested=len(shape) == 2)
        if values.shape != shape:
            raise self.error(key, f"has {values.shape[1]} counts per item where average_perturb_loss has {shape[1]}")
        if (values != np.floor(values)).any() or (values < 0).any():
            raise self.error(key, "has token counts that are not whole numbers")
        return values.astype(np.int64)

    def texts(self, n: int) -> tuple[tuple[str, ...] | None, ...]:
        """Questions, generations and answers, each None where the log does not have it."""
        if "generated_text" not in self.content:
            return None, None, None
        rows = self.rows("generated_text", n)
        for index, row in enumerate(rows):
            if not isinstance(row, list) or len(row) != 3 or not all(isinstance(text, str | None) for text in row):
                raise self.error(f"generated_text/{index}", "is not a list of question, generation and answer")
        return tuple(None if None in column else tuple(column) for column in zip(*rows, strict=True))
