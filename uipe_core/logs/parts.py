"""Share between the kinds of evaluation log: JSON files, numbers by index, and sets in the format of locuslab/tofu.

Errors of a log name file, key and remedy. Measurements that other code bases lack are under `EXTRA_KEY`: item-set hashes,
memorisation, logit scale, timings, metadata, and the sets that TOFU does not have (related, unrelated).
"""

import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from uipe_core.errors import UserError, first_line
from uipe_core.metrics.scores import FloatArray, IntArray, ScoreReport, SetScores
from uipe_core.metrics.tofu import CHOICE_SETS, truth_ratio
from uipe_core.storage.files import read_json, write_atomic

EXTRA_KEY = "uipe"
MEMORIZATION = ("exact_memorization", "extraction_strength")
_FLOAT_INDEX = re.compile(r"\.0+$")
MOST_TOKENS = 10**9
"""Tokens of one answer; more cannot be, and beyond 2**63 the count would be another number."""
OWN_MEASUREMENTS = (*MEMORIZATION, "logit_spread", "min_k", "rouge_l_f1")
"""Fields of `SetScores` under `EXTRA_KEY`."""


def check_writable(report: ScoreReport, needed: Collection[str], path: str | Path) -> None:
    """Raise UserError for a report that a log cannot hold: a missing or empty set, or a number that is not finite."""
    missing = [name for name in needed if name not in report.sets]
    if missing:
        raise UserError(f"cannot write {path}: the report lacks the sets {', '.join(missing)}, which a log needs")
    for name, scores in report.sets.items():
        if not len(scores):
            raise UserError(f"cannot write {path}: set {name!r} has no items")
        losses = (scores.answer_loss, scores.paraphrase_loss, scores.perturbed_loss)
        shares = (scores.rouge_l_recall, scores.rouge_1_recall, scores.exact_memorization, scores.extraction_strength)
        if not all(np.isfinite(values).all() for values in (*losses, *shares) if values is not None):
            raise UserError(f"cannot write {path}: set {name!r} has numbers that are not finite; has the model collapsed?")


def tofu_part(scores: SetScores, name: str) -> dict[str, Any]:
    """Return one set in the format of locuslab/tofu: measurement to values by index."""
    part: dict[str, Any] = {"avg_gt_loss": by_index(scores.answer_loss)}
    if scores.answer_tokens.any():
        part["gt_loss"] = by_index(scores.answer_loss * scores.answer_tokens)
        part["num_token_gt"] = by_index(scores.answer_tokens)
    texts = (scores.questions, scores.generated, scores.answers)
    if any(column is not None for column in texts):
        columns = [column if column is not None else (None,) * len(scores) for column in texts]
        part["generated_text"] = {str(i): list(row) for i, row in enumerate(zip(*columns, strict=True))}
    if scores.rouge_1_recall is not None:
        part["rouge1_recall"] = by_index(scores.rouge_1_recall)
    if scores.rouge_l_recall is not None:
        part["rougeL_recall"] = by_index(scores.rouge_l_recall)
    part["average_perturb_loss"] = by_index(scores.perturbed_loss)
    part["avg_paraphrased_loss"] = by_index(scores.paraphrase_loss)
    part["truth_ratio"] = by_index(truth_ratio(scores.paraphrase_loss, scores.perturbed_loss))
    if scores.paraphrase_tokens.any():
        part["paraphrased_loss"] = by_index(scores.paraphrase_loss * scores.paraphrase_tokens)
        part["num_token_paraphrased"] = by_index(scores.paraphrase_tokens)
    if scores.perturbed_tokens.any():
        part["perturb_loss"] = by_index(scores.perturbed_loss * scores.perturbed_tokens)
        part["num_token_perturb"] = by_index(scores.perturbed_tokens)
    if name in CHOICE_SETS:
        choices = np.concatenate([-scores.answer_loss[:, None], -scores.perturbed_loss], axis=1)
        part["normalized_gt_loss"] = by_index(scores.answer_loss + np.logaddexp.reduce(choices, axis=1))
    return part


def extra_part(report: ScoreReport, known: Collection[str], metadata: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the content of `EXTRA_KEY`; sets not in `known` are included whole."""
    own = {
        name: {field: by_index(values) for field in OWN_MEASUREMENTS if is_finite(values := getattr(scores, field))}
        for name, scores in report.sets.items()
    }
    return {
        "item_hashes": {name: scores.item_hash for name, scores in report.sets.items() if scores.item_hash},
        "per_item": {name: fields for name, fields in own.items() if fields},
        "logit_scale": report.logit_scale,
        "seconds": dict(report.seconds),
        "metadata": dict(metadata or {}),
        "sets": {name: tofu_part(scores, name) for name, scores in report.sets.items() if name not in known},
    }


def with_extra(extra: "Part", sets: Mapping[str, SetScores]) -> ScoreReport:
    """Return the report of a log: its sets, and the measurements under `EXTRA_KEY`."""
    hashes, scale = extra.object("item_hashes"), extra.content.get("logit_scale")
    if not all(isinstance(value, str) for value in hashes.values()):
        raise extra.error("item_hashes", "holds something else than a hash per set")
    if scale is not None and not is_number(scale):
        raise extra.error("logit_scale", f"is {scale!r}, expected a finite number or null")
    further, own = extra.part("sets"), extra.part("per_item")
    every = {**sets, **{name: further.part(name).scores() for name in further.content}}
    for name, scores in every.items():
        part = own.part(name)
        fields: dict[str, Any] = {
            field: part.numbers(field, len(scores)) for field in OWN_MEASUREMENTS if field in part.content
        }
        every[name] = replace(scores, item_hash=hashes.get(name), **fields)
    return ScoreReport(sets=every, logit_scale=scale, seconds=extra.object("seconds"))


def is_finite(values: FloatArray | None) -> bool:
    """Return True if there are values, all finite, as JSON requires."""
    return values is not None and bool(np.isfinite(values).all())


def by_index(values: FloatArray | IntArray) -> dict[str, Any]:
    """Return an array as JSON: values, or lists of them, by index."""
    return {str(index): value for index, value in enumerate(values.tolist())}


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file atomically, replacing what was there."""
    try:
        write_atomic(path, (json.dumps(content, indent=4) + "\n").encode())
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; give a file in a writable folder") from error


def load_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file."""
    try:
        content = read_json(path)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such evaluation log; write one with `uipe score --log`") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give the path of an evaluation log") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: not valid JSON ({error.msg}); fetch or write the file again") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file (byte {error.start}); give a JSON evaluation log") from error
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({first_line(error)}); give a JSON evaluation log") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a JSON {type(content).__name__}, an evaluation log is a JSON object")
    return content


def is_number(value: object) -> bool:
    """Return True if a JSON value is a finite number; booleans, ints in Python, are none."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the largest float
        return False


class Part:
    """A section of a log being read, with its position for error messages."""

    def __init__(self, path: str | Path, where: str, content: Any) -> None:
        self.path, self.where = path, where
        if not isinstance(content, dict):
            raise self.error("", f"is a {type(content).__name__}, expected an object of measurements")
        self.content = content

    def error(self, key: str, problem: str) -> UserError:
        """Return an error that names file and key."""
        where = f"{self.where}/{key}" if key else self.where
        return UserError(f"{self.path}: {where} {problem}; correct the file, or score the model again with `uipe score --log`")

    def object(self, key: str) -> dict[str, Any]:
        """Return the object under a key, empty if the key is missing."""
        return self.part(key).content

    def part(self, key: str) -> "Part":
        """Return the object under a key as a section of its own, empty if the key is missing."""
        value = self.content.get(key, {})
        if not isinstance(value, dict):
            raise self.error(key, f"is a {type(value).__name__}, expected an object")
        return Part(self.path, f"{self.where}/{key}", value)

    def scores(self, losses_needed: bool = True) -> SetScores:
        """Return the section (in the format of locuslab/tofu) as one set; unneeded losses of gold answers may be NaN."""
        paraphrase_loss = self.numbers("avg_paraphrased_loss")
        n = len(paraphrase_loss)
        unknown = not losses_needed and "avg_gt_loss" not in self.content
        perturbed_loss = self.numbers("average_perturb_loss", n, nested=True)
        questions, generated, answers = self.texts(n)
        return SetScores(
            answer_loss=np.full(n, np.nan) if unknown else self.numbers("avg_gt_loss", n),
            answer_tokens=self.counts("num_token_gt", (n,)),
            paraphrase_loss=paraphrase_loss,
            paraphrase_tokens=self.counts("num_token_paraphrased", (n,)),
            perturbed_loss=perturbed_loss,
            perturbed_tokens=self.counts("num_token_perturb", perturbed_loss.shape),
            rouge_l_recall=self.numbers("rougeL_recall", n) if "rougeL_recall" in self.content else None,
            rouge_1_recall=self.numbers("rouge1_recall", n) if "rouge1_recall" in self.content else None,
            generated=generated,
            questions=questions,
            answers=answers,
        )

    def rows(self, key: str, n: int | None = None) -> list[Any]:
        """Return values of one measurement in index order; indexes must be 0 to n - 1."""
        if key not in self.content:
            raise self.error(key, "is missing")
        values = self._by_index(key)
        if not values:
            raise self.error(key, "is empty")
        expected = [str(index) for index in range(len(values) if n is None else n)]
        differing = sorted(set(expected) ^ set(values))
        if differing:
            problem = "is missing" if differing[0] in expected else "is unexpected"
            raise self.error(key, f"has other indexes than 0 to {len(expected) - 1}: {differing[0]!r} {problem}")
        return [values[index] for index in expected]

    def _by_index(self, key: str) -> dict[str, Any]:
        """Return values by index. Other writers have plain lists, or indexes that pandas made floats (``"0.0"``)."""
        values = self.content[key]
        if isinstance(values, list):
            return {str(index): value for index, value in enumerate(values)}
        return {_FLOAT_INDEX.sub("", index): value for index, value in self.object(key).items()}

    def numbers(self, key: str, n: int | None = None, nested: bool = False) -> FloatArray:
        """Return finite numbers by index: (n,), or (n, k) if each value is a list."""
        rows = self.rows(key, n)
        return self.array(rows, [f"{key}/{index}" for index in range(len(rows))], nested)

    def array(self, rows: Sequence[Any], keys: Sequence[str], nested: bool) -> FloatArray:
        """Return finite numbers: (n,), or (n, k) if each row is a list; `keys` are the positions of the rows."""
        for key, row in zip(keys, rows, strict=True):
            if nested and (not isinstance(row, list) or not row):
                raise self.error(key, "is not a list with a number per perturbed answer")
            if nested and len(row) != len(rows[0]):
                raise self.error(key, f"has {len(row)} numbers where item 0 has {len(rows[0])}")
            for value in row if nested else [row]:
                if not is_number(value):
                    raise self.error(key, f"is {value!r}, expected a finite number")
        return np.array(rows, dtype=np.float64)

    def counts(self, key: str, shape: tuple[int, ...]) -> NDArray[np.int64]:
        """Return token counts of that shape, all 0 if the log has none."""
        if key not in self.content:
            return np.zeros(shape, dtype=np.int64)
        values = self.numbers(key, shape[0], nested=len(shape) == 2)
        if values.shape != shape:
            raise self.error(key, f"has {values.shape[1]} counts per item where average_perturb_loss has {shape[1]}")
        if (values != np.floor(values)).any() or (values < 0).any() or (values > MOST_TOKENS).any():
            raise self.error(key, f"has token counts that are not whole numbers from 0 to {MOST_TOKENS:,}")
        return values.astype(np.int64)

    def texts(self, n: int) -> tuple[tuple[str, ...] | None, ...]:
        """Return questions, generations and answers, each None if the log lacks it."""
        if "generated_text" not in self.content:
            return None, None, None
        rows = self.rows("generated_text", n)
        for index, row in enumerate(rows):
            if not isinstance(row, list) or len(row) != 3 or not all(isinstance(text, str | None) for text in row):
                raise self.error(f"generated_text/{index}", "is not a list of question, generation and answer")
        return tuple(None if None in column else tuple(column) for column in zip(*rows, strict=True))
