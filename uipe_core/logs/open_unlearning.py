"""Read and write logs of open-unlearning: ``TOFU_EVAL.json`` with every value, ``TOFU_SUMMARY.json`` with the aggregates.

``TOFU_EVAL.json`` maps each metric to an object with ``agg_value`` and, for metrics per item, ``value_by_index``:

    forget_Q_A_Prob, forget_Q_A_PARA_Prob    {"prob", "avg_loss"}: gold answer, paraphrased answer
    forget_Q_A_PERT_Prob                     {"prob", "avg_loss"}: lists with an entry per perturbed answer
    forget_Q_A_ROUGE                         {"rouge1_recall", "rougeL_recall", "rougeL_f1"}, and "input", "ground_truth",
                                             "generation"
    forget_truth_ratio                       {"score"}: truth ratio, compared by forget quality
    forget_quality, model_utility            ``agg_value`` only
    exact_memorization, extraction_strength  {"score"}, of the forget set, in open-unlearning's convention

Prefixes of the other sets are ``retain``, ``ra`` (real authors) and ``wf`` (world facts). The latter two have no paraphrase
(the gold answer stands in), and their probability among the choices is ``ra_Q_A_Prob_normalised``. Logs written here also have
``ra_Q_A_PARA_Prob`` if a corpus has such paraphrases, and own measurements under `parts.EXTRA_KEY`; open-unlearning ignores
both.

Sources: ``src/evals/base.py``, ``src/evals/metrics`` and ``configs/eval/tofu_metrics`` of locuslab/open-unlearning.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from uipe_core.errors import UserError
from uipe_core.logs.parts import EXTRA_KEY, MEMORIZATION, Part, check_writable, extra_part, with_extra, write_json
from uipe_core.metrics.answers import has_latin_word, rouge_l_f1
from uipe_core.metrics.scores import FloatArray, ScoreReport, SetScores
from uipe_core.metrics.tofu import CHOICE_SETS, SET_TITLES, evaluate, truth_ratio

EVAL_FILE, SUMMARY_FILE = "TOFU_EVAL.json", "TOFU_SUMMARY.json"
DEFINITION = "open-unlearning"
PREFIXES = {"forget": "forget", "retain": "retain", "real_authors": "ra", "world_facts": "wf"}
"""Evaluation set to the prefix of its metrics."""

TRUTH_RATIOS = {
    "forget": "forget_truth_ratio",
    "retain": "retain_Truth_Ratio",
    "real_authors": "ra_Truth_Ratio",
    "world_facts": "wf_Truth_Ratio",
}


def is_open_unlearning(log: Mapping[str, Any]) -> bool:
    """Return True if a JSON object is one of the two files of open-unlearning."""
    return any("_Q_A_" in key or key in ("forget_truth_ratio", "forget_quality", "model_utility") for key in log)


def write_open_unlearning(
    report: ScoreReport, folder: str | Path, metadata: Mapping[str, Any] | None = None, reference: ScoreReport | None = None
) -> None:
    """Write a report as the two files of open-unlearning, each atomically, replacing what was there.

    Args:
        report: Must have the four sets of `PREFIXES`, none empty, all losses finite, and ROUGE.
        folder: Target folder; made if missing.
        metadata: JSON-able description of the scored model, for readers.
        reference: Scores of the retain model; gives ``forget_quality``.

    Raises:
        UserError: A missing or empty set, a loss that is not finite, no ROUGE, or files that cannot be written.
    """
    folder = Path(folder)
    check_writable(report, PREFIXES, folder / EVAL_FILE)
    metrics = evaluate(report, reference, DEFINITION)
    log: dict[str, Any] = {}
    for name, prefix in PREFIXES.items():
        components = metrics.forget if name == "forget" else metrics.components
        log.update(_set_metrics(report.sets[name], name, prefix, components))
    log["model_utility"] = {"agg_value": metrics.model_utility}
    if metrics.forget_quality is not None:
        log["forget_quality"] = {"agg_value": metrics.forget_quality.p_value}
    summary = {name: metric["agg_value"] for name, metric in sorted(log.items())}
    log[EXTRA_KEY] = extra_part(report, PREFIXES, metadata)
    write_json(folder / EVAL_FILE, dict(sorted(log.items())))
    write_json(folder / SUMMARY_FILE, summary)


def read_open_unlearning(log: Mapping[str, Any], path: Path, as_reference: bool) -> ScoreReport:
    """Return the report of a parsed ``TOFU_EVAL.json``; see `uipe_core.logs.tofu.read_log`."""
    if not any(isinstance(metric, dict) for metric in log.values()):
        raise UserError(f"{path}: holds aggregates only, as {SUMMARY_FILE} does; give the {EVAL_FILE} of the same folder")
    reader = _Reader(log, path)
    names = [name for name in PREFIXES if name == "forget" or not as_reference or reader.is_whole(name)]
    sets = {name: reader.scores(name, losses_needed=not as_reference) for name in names}
    # open-unlearning has memorisation for the forget set alone; the part under EXTRA_KEY has every set.
    memorization: dict[str, Any] = {key: reader.scores_of(key, len(sets["forget"])) for key in MEMORIZATION if key in log}
    theirs = memorization.pop("extraction_strength", None)
    sets["forget"] = replace(sets["forget"], **memorization)
    report = with_extra(Part(path, EXTRA_KEY, log.get(EXTRA_KEY, {})), sets)
    if report.sets["forget"].extraction_strength is not None:
        return report
    forget = replace(report.sets["forget"], extraction_strength_open_unlearning=theirs)
    return replace(report, sets={**report.sets, "forget": forget})


def _set_metrics(scores: SetScores, name: str, prefix: str, components: Mapping[str, float]) -> dict[str, Any]:
    title = SET_TITLES[name]
    metrics = {f"{prefix}_Q_A_Prob": _probability(scores.answer_loss)}
    if name not in CHOICE_SETS or not np.array_equal(scores.paraphrase_loss, scores.answer_loss):
        metrics[f"{prefix}_Q_A_PARA_Prob"] = _probability(scores.paraphrase_loss)
    metrics[f"{prefix}_Q_A_PERT_Prob"] = _probability(scores.perturbed_loss)
    if name in CHOICE_SETS:
        metrics[f"{prefix}_Q_A_Prob_normalised"] = {
            "agg_value": components[f"Prob {title}"],
            "value_by_index": _by_index(prob=_among_choices(scores)),
        }
    rouge: dict[str, Any] = {"rougeL_recall": scores.rouge_l_recall, "rouge1_recall": scores.rouge_1_recall}
    rouge["rougeL_f1"] = _rouge_l_f1(scores)
    texts = {"input": scores.questions, "ground_truth": scores.answers, "generation": scores.generated}
    metrics[f"{prefix}_Q_A_ROUGE"] = {
        "agg_value": components[f"ROUGE {title}"],
        "value_by_index": _by_index(**{key: column for key, column in {**rouge, **texts}.items() if column is not None}),
    }
    metrics[TRUTH_RATIOS[name]] = {
        "agg_value": components[f"Truth Ratio {title}"],
        "value_by_index": _by_index(score=truth_ratio(scores.paraphrase_loss, scores.perturbed_loss, DEFINITION)),
    }
    if name == "forget":
        for key, values in (
            ("exact_memorization", scores.exact_memorization),
            ("extraction_strength", _their_strength(scores)),
        ):
            if values is not None:
                metrics[key] = {"agg_value": float(values.mean()), "value_by_index": _by_index(score=values)}
    return metrics


def _their_strength(scores: SetScores) -> FloatArray | None:
    """Return extraction strength as open-unlearning has it: an answer of t tokens whose last token is missed counts 1 / t.

    Its search for the shortest prefix (``src/evals/metrics/memorization.py``) ends one token short of the whole answer.
    """
    if scores.extraction_strength is None or not scores.answer_tokens.any():
        return scores.extraction_strength_open_unlearning
    tokens = scores.answer_tokens - 1  # without the end token
    return np.maximum(scores.extraction_strength, np.where(tokens > 0, 1.0 / np.maximum(tokens, 1), 0.0))


def _rouge_l_f1(scores: SetScores) -> list[float] | None:
    """Return ROUGE-L F1 per item, which open-unlearning logs next to recall; None without the texts, or in other scripts."""
    if scores.generated is None or scores.answers is None or not all(map(has_latin_word, scores.answers)):
        return None
    return [rouge_l_f1(answer, generated) for answer, generated in zip(scores.answers, scores.generated, strict=True)]


def _probability(losses: FloatArray) -> dict[str, Any]:
    probabilities = np.exp(-losses)
    return {"agg_value": float(probabilities.mean()), "value_by_index": _by_index(prob=probabilities, avg_loss=losses)}


def _among_choices(scores: SetScores) -> FloatArray:
    probability = np.exp(-scores.answer_loss)
    return probability / (probability + np.exp(-scores.perturbed_loss).sum(axis=1) + 1e-10)


def _by_index(**columns: Any) -> dict[str, dict[str, Any]]:
    """Return columns of n values each as one object per index."""
    lists = [column.tolist() if isinstance(column, np.ndarray) else list(column) for column in columns.values()]
    return {str(index): dict(zip(columns, row, strict=True)) for index, row in enumerate(zip(*lists, strict=True))}


class _Reader:
    """Read sets of a parsed log."""

    def __init__(self, log: Mapping[str, Any], path: Path) -> None:
        self.log, self.path = log, path

    def is_whole(self, name: str) -> bool:
        """Return True if the log has the losses of a set."""
        return all(key in self.log for key in (f"{PREFIXES[name]}_Q_A_Prob", f"{PREFIXES[name]}_Q_A_PERT_Prob"))

    def scores(self, name: str, losses_needed: bool) -> SetScores:
        prefix = PREFIXES[name]
        gold, paraphrase = f"{prefix}_Q_A_Prob", f"{prefix}_Q_A_PARA_Prob"
        if name in CHOICE_SETS and paraphrase not in self.log:
            paraphrase = gold
        paraphrase_loss = self.column(paraphrase, "avg_loss")
        n = len(paraphrase_loss)
        unknown = not losses_needed and gold not in self.log
        perturbed_loss = self.column(f"{prefix}_Q_A_PERT_Prob", "avg_loss", n, nested=True)
        rouge = f"{prefix}_Q_A_ROUGE"
        generated = rouge in self.log
        rows = self.rows(rouge, n) if generated else []
        return SetScores(
            answer_loss=np.full(n, np.nan) if unknown else self.column(gold, "avg_loss", n),
            answer_tokens=np.zeros(n, dtype=np.int64),
            paraphrase_loss=paraphrase_loss,
            paraphrase_tokens=np.zeros(n, dtype=np.int64),
            perturbed_loss=perturbed_loss,
            perturbed_tokens=np.zeros(perturbed_loss.shape, dtype=np.int64),
            rouge_l_recall=self.column(rouge, "rougeL_recall", n) if generated else None,
            rouge_1_recall=self.column(rouge, "rouge1_recall", n) if generated and "rouge1_recall" in rows[0] else None,
            generated=self.texts(rouge, rows, "generation"),
            questions=self.texts(rouge, rows, "input"),
            answers=self.texts(rouge, rows, "ground_truth"),
        )

    def rows(self, metric: str, n: int | None = None) -> list[dict[str, Any]]:
        """Return the objects of one metric in index order; indexes must be 0 to n - 1."""
        part = self.part(metric)
        rows = part.rows("value_by_index", n)
        for index, row in enumerate(rows):
            if not isinstance(row, dict):
                raise part.error(f"value_by_index/{index}", f"is {row!r}, expected an object")
        return rows

    def column(self, metric: str, field: str, n: int | None = None, nested: bool = False) -> FloatArray:
        """Return finite numbers of one field: (n,), or (n, k) if each value is a list."""
        part, rows = self.part(metric), self.rows(metric, n)
        keys = [f"value_by_index/{index}/{field}" for index in range(len(rows))]
        for key, row in zip(keys, rows, strict=True):
            if field not in row:
                raise part.error(key, "is missing")
        values = [row[field] for row in rows]
        if nested and not isinstance(values[0], list):
            # With one perturbed answer per item, open-unlearning writes a bare number.
            values = [[value] for value in values]
        return part.array(values, keys, nested)

    def scores_of(self, metric: str, n: int) -> FloatArray | None:
        """Return the score of each item, None if one has none (open-unlearning writes null for items without answer tokens)."""
        if any(row.get("score", 0) is None for row in self.rows(metric, n)):
            return None
        return self.column(metric, "score", n)

    def texts(self, metric: str, rows: list[dict[str, Any]], field: str) -> tuple[str, ...] | None:
        """Return texts of one field, None if the log lacks it."""
        texts = [row.get(field) for row in rows]
        for index, text in enumerate(texts):
            if text is not None and not isinstance(text, str):
                raise self.part(metric).error(f"value_by_index/{index}/{field}", f"is {text!r}, expected a text")
        known = [text for text in texts if text is not None]
        return tuple(known) if known and len(known) == len(rows) else None

    def part(self, metric: str) -> Part:
        if metric not in self.log:
            raise UserError(
                f"{self.path}: {metric} is missing; evaluate the model again with open-unlearning's tofu metrics, "
                "model_utility and forget_quality included (forget_Q_A_PARA_Prob and forget_Q_A_PERT_Prob give forget quality "
                "alone), or with `uipe score --log-format open-unlearning`"
            )
        return Part(self.path, metric, self.log[metric])
