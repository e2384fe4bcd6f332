"""Write the dossier of one trial: what was to be forgotten, how, with what effect, what was tested and what was not.

One HTML page, which prints well, and the same facts as JSON. It holds counts and hashes of the data, and their texts only where
that is asked for. It records a procedure and claims no certification.
"""

import json
from pathlib import Path
from typing import Any

import pandas as pd

from search.problem.trial import INITIAL, RETAIN
from search.report.html import environment
from search.report.style import page_style
from search.results.recipe import recipe_of
from search.results.study_result import StudyResult
from uipe_core.errors import UserError
from uipe_core.storage.files import write_atomic

NO_CERTIFICATE = (
    "This page records what was done and measured. It certifies nothing: that a model gives an answer in none of these tests "
    "does not prove that the knowledge is gone."
)


def dossier_facts(result: StudyResult, number: int, texts: bool = False, trust_remote_code: bool = False) -> dict[str, Any]:
    """Return the facts of a trial's dossier, ready for JSON.

    Args:
        result: The study.
        number: The trial.
        texts: Whether the items to forget are listed, for which the corpus is loaded.
        trust_remote_code: For these texts, as `search.evaluation.prepared.prepare`.

    Raises:
        UserError: There is no such trial; or texts are asked for, and the corpus cannot be loaded.
    """
    row = result.trial(number)
    record, spec = result.store.record, result.spec
    recipe = recipe_of(record, spec, row.to_dict())
    run = record.base_runs.get(str(row["base"]))
    epochs = [] if run is None else [dict(epoch) for epoch in run.epochs]
    done, missing = result.audits_of(number)
    return {
        "dossier": 1,
        "study": record.name,
        "trial": number,
        "written": pd.Timestamp.now(tz="UTC").isoformat(timespec="seconds"),
        "claim": NO_CERTIFICATE,
        "request": _request(result, texts, trust_remote_code),
        "models": {"identities": dict(record.models), "update_vector": None if run is None else run.delta},
        "procedure": {
            "method": str(row["method"]),
            "base_run": str(row["base"]),
            "epoch": int(row["epoch"]),
            "alpha": float(row["alpha"]),
            "formula": "theta = theta_init + (1 + alpha) * delta (UIPE, arXiv 2503.04693)",
            "dtype": str(row["dtype"]),
            "trained_epochs": epochs,
            "study": recipe.spec.model_dump(mode="json", exclude={"storage", "cache"}),
            "fingerprint": recipe.fingerprint,
            "versions": dict(record.versions),
            "begun": record.created,
        },
        "numbers": _numbers(result, row),
        "audits": _audits(done, number),
        "not_tested": [{key: each[key] for key in ("title", "shows", "reason")} for each in missing],
        "again": {
            "commands": [
                f"uipe export {result.out} --trial {number} --to exported --as recipe",
                "uipe rebuild exported/recipe.yaml --to rebuilt --as model --verify full",
            ],
            "recipe": recipe.as_yaml(),
        },
    }


def write_dossier(
    result: StudyResult, number: int, to: Path, texts: bool = False, trust_remote_code: bool = False
) -> tuple[Path, Path]:
    """Write a trial's dossier as HTML, and next to it as JSON.

    Args:
        result, number, texts, trust_remote_code: As `dossier_facts`.
        to: The page; the JSON has its name with another ending.

    Returns:
        Both paths.

    Raises:
        UserError: As `dossier_facts`, or the files cannot be written.
    """
    facts = dossier_facts(result, number, texts, trust_remote_code)
    page = to if to.suffix == ".html" else to.with_suffix(".html")
    plain = page.with_suffix(".json")
    rendered = environment().get_template("dossier.html.j2").render(style=page_style(), **facts)
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(page, rendered.encode())
        write_atomic(plain, json.dumps(facts, indent=1, ensure_ascii=False).encode())
    except OSError as error:
        raise UserError(f"--to {to}: {error.strerror}; choose another file") from error
    return page, plain


def _request(result: StudyResult, texts: bool, trust_remote_code: bool) -> dict[str, Any]:
    corpus = result.store.record.corpus
    sets = {
        name: {
            "hash": corpus.sets.get(name),
            "items_scored": corpus.items["select"].get(name, 0),
            "items_kept_for_reporting": corpus.items.get("report", {}).get(name, 0),
            "people_or_documents": len({group for group in corpus.groups.get(name, []) if group is not None}) or None,
        }
        for name in corpus.items["select"]
    }
    found: dict[str, Any] = {"corpus": corpus.name, "hash": corpus.hash, "sets": sets}
    if texts:
        from search.evaluation.prepared import prepare

        loaded = prepare(result.runnable_spec(), trust_remote_code).corpus
        found["forget_texts"] = [[item.question, item.answer] for item in loaded.sets.get("forget", ())]
        found["forget_texts"] += [[item.question, item.choices[item.answer]] for item in loaded.choices.get("forget", ())]
    return found


def _numbers(result: StudyResult, row: pd.Series) -> list[dict[str, Any]]:
    """Return each number of initial model, trial and retain model, with 95% intervals where they are known."""
    sure = result.certainty[result.certainty["trial"] == row["trial"]]
    held = result.held_out[result.held_out["trial"] == row["trial"]] if len(result.held_out) else result.held_out
    initial, retain = result.control(INITIAL), result.control(RETAIN)
    found = []
    names = [(objective.name, objective.title, objective.places) for objective in result.objectives]
    names += [
        ("forget_rouge", "ROUGE-L recall of forget answers", 3),
        ("forget_probability", "probability of forget answers", 3),
    ]
    for name, title, places in names:
        if name not in row or pd.isna(row[name]):
            continue
        interval = None
        if f"{name}_low" in sure and len(sure):
            interval = [float(sure[f"{name}_{end}"].iloc[0]) for end in ("low", "high")]
        found.append(
            {
                "name": name,
                "title": title,
                "places": places,
                "initial": _of(initial, name),
                "trial": float(row[name]),
                "interval": interval,
                "held_out": _of(held.iloc[0], f"{name}_held_out") if len(held) else None,
                "retain": _of(retain, name),
            }
        )
    return found


def _of(row: pd.Series | None, name: str) -> float | None:
    return None if row is None or name not in row or pd.isna(row[name]) else float(row[name])


def _audits(done: list[dict[str, Any]], number: int) -> list[dict[str, Any]]:
    """Return the audits of the trial: what each shows, its settings, and its rows with the texts of the three models."""
    names = {INITIAL: INITIAL, "trial": str(number), RETAIN: RETAIN}
    return [
        {
            **{key: audit[key] for key in ("title", "shows", "cannot_show", "settings", "settings_text")},
            "numbers": [
                {**{key: each["values"][name] for key, name in names.items()}, "title": each["title"]}
                for each in audit["numbers"]
            ],
            "rows": [
                {"title": row["title"], **{key: row["texts"][name] for key, name in names.items()}} for row in audit["rows"]
            ],
        }
        for audit in done
    ]
