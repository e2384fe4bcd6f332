"""A study's results: tables, front, hypervolumes, selection; the way from the store to report and export."""

import contextlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from search.evaluation.metrics import METRICS
from search.evaluation.pruning import pruned_table, savings
from search.problem.objectives import KNOWMEM, KNOWMEM_RETAIN, VERBMEM, Objective
from search.problem.pareto import DEFAULT_FLOOR, RULES
from search.problem.trial import INITIAL, TrialSpec
from search.results import audits, finalists
from search.results.recipe import recipe_of
from search.results.selection import chosen_row, reason_of
from search.results.uncertainty import beats_initial, certainty
from search.spec.study import StudySpec
from search.store.mirror import readable_folder
from search.store.study_store import StudyStore
from search.store.trials import collapsed, on_front, searched
from uipe_core.corpora.types import RELATED_SETS
from uipe_core.errors import UserError
from uipe_core.logs.parts import MEMORIZATION
from uipe_core.logs.tofu import read_log
from uipe_core.metrics.tofu import MEMORIZED_SETS

if TYPE_CHECKING:
    import optuna
    from matplotlib.figure import Figure

CONTROL_COLUMNS = ("kind", "base", "method", "epoch", "alpha", "temperature", "of_trial")
"""Columns that the table of controls always has."""

FORGET_NUMBERS = {"forget_rouge": "forget ROUGE", "forget_probability": "forget prob."}
"""Mean ROUGE-L recall and answer probability of the forget set, with their heads: whether answers are still given."""

_OLDER_NAMES = {"forget_rouge": "ROUGE Forget", "forget_probability": "Prob Forget"}

POINT_KEYS = ("trial", "method", "base", "epoch", "alpha", "walk")


def _names(store: StudyStore) -> list[str]:
    return [objective.name for objective in store.objectives]


@dataclass(eq=False, repr=False)
class StudyResult:
    """A finished (or interrupted) study, read from its folder.

    Attributes:
        out: The study's folder.
        store: Its open store.
        trials: A row per complete trial, by number, with all evidence; column ``on_front`` marks the Pareto front: what neither
            another trial nor the initial model beats (`search.store.trials.on_front`).
        controls: A row per scored control.
    """

    out: Path
    store: StudyStore
    trials: pd.DataFrame
    controls: pd.DataFrame

    @classmethod
    def open(cls, out: Path | str) -> "StudyResult":
        """Read a study folder, or a copy of the one at a URL.

        Raises:
            UserError: If it is none, or holds no complete trial yet.
        """
        return cls.of(StudyStore.open(readable_folder(out)))

    @classmethod
    def of(cls, store: StudyStore) -> "StudyResult":
        """Read an open study.

        Raises:
            UserError: If it holds no complete trial yet.
        """
        trials, controls = store.trials_frame(), store.controls_frame()
        if trials.empty:
            failed = store.failures()
            why = f" ({len(failed)} failed, the first because: {failed[0]['reason']})" if failed else ""
            raise UserError(f"{store.out}: no trial of this study is complete yet{why}; run it with `uipe run`")
        for frame in (trials, controls):
            for column in (*CONTROL_COLUMNS, *_names(store), "logit_scale", "walk", "collapsed"):
                if column not in frame:
                    frame[column] = None
            for column, older in _OLDER_NAMES.items():
                if older in frame:
                    frame[column] = frame[column].fillna(frame[older]) if column in frame else frame[older]
        trials["on_front"] = on_front(trials, controls, _names(store))
        return cls(store.out, store, trials.sort_values("trial", ignore_index=True), controls)

    def __repr__(self) -> str:
        return f"StudyResult({str(self.out)!r}: {len(self.trials)} trials, {len(self.front)} on the front)"

    @property
    def study(self) -> "optuna.Study":
        """The Optuna study behind it."""
        return self.store.study

    @property
    def spec(self) -> StudySpec:
        """The study's spec, as recorded."""
        return self.store.spec

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """Return what the study maximises: forgetting, utility, and perhaps a third."""
        return self.store.objectives

    @property
    def forget_quality_cap(self) -> float:
        """The noise ceiling (`search.problem.objectives`)."""
        return self.store.noise_ceiling(self.controls)

    def runnable_spec(self) -> StudySpec:
        """The spec with its storage as it can be opened: the record keeps no password."""
        if self.spec.storage is None:
            return self.spec
        return self.spec.model_copy(update={"storage": os.environ.get("UIPE_STORAGE") or self.spec.storage})

    def finalists(self, top: int) -> pd.DataFrame:
        """Up to `top` points, none of them collapsed: what rules select, then by the hypervolume that only they add. In a study
        of several seeds they are points that hold over all, if any do."""
        front, chosen = self._holding(self.healthy_front)[0], []
        for rule in RULES:
            with contextlib.suppress(UserError):
                chosen.append(int(self.select(rule)["trial"]))
        order = finalists.best_first(front, self.objectives, *self._corner_and_ceilings())
        numbers = list(dict.fromkeys([*chosen, *order]))[:top]
        return front.set_index("trial", drop=False).loc[numbers].reset_index(drop=True)

    @cached_property
    def held_out(self) -> pd.DataFrame:
        """The front on the items for selection and on those for reporting (`search.results.finalists.held_out`)."""
        return finalists.held_out(self.front, self.controls, self.objectives)

    @cached_property
    def matched_scale(self) -> pd.DataFrame:
        """The front's utility as it is and with logits at the initial model's scale
        (`search.results.finalists.matched_scale`)."""
        return finalists.matched_scale(self.front, self.controls, self.objectives)

    @cached_property
    def certainty(self) -> pd.DataFrame:
        """How sure every trial's objectives are (`search.results.uncertainty.certainty`)."""
        return certainty(self.store, self.trials, self.controls)

    @cached_property
    def confirmations(self) -> pd.DataFrame:
        """Finalists over several training seeds (`search.results.finalists.confirmations`)."""
        return finalists.confirmations(self.trials, self.controls, self.objectives)

    @cached_property
    def over_seeds(self) -> pd.DataFrame:
        """The front over the seeds that base runs are trained from (`search.results.finalists.over_seeds`)."""
        initial, names = self.control(INITIAL), _names(self.store)
        start = None if initial is None else initial[names].to_numpy(dtype=float)
        return finalists.over_seeds(self.front, self._walked, self.objectives, self.spec.siblings, start)

    @property
    def _walked(self) -> pd.DataFrame:
        """All points that were scored on the items of trials: trials, and front points from other seeds."""
        others = self.controls[self.controls["kind"] == "other_seed"]
        return pd.concat([self.trials, others], ignore_index=True) if len(others) else self.trials

    @property
    def attainment(self) -> dict[str, list[list[float]]]:
        """Corners of what 25, 50 and 75% of the seeds attain in the first two objectives
        (`search.results.finalists.attainment`); empty in a study of one seed."""
        several = self.spec.unlearning is not None and self.spec.unlearning.seeds
        seeds = {run.label: run.seed for run in self.spec.variants()} if several else {}
        return finalists.attainment(self._walked, _names(self.store)[:2], seeds)

    def _holding(self, front: pd.DataFrame) -> tuple[pd.DataFrame, str | None]:
        """Return the points of a front that hold over the seeds, and a note on it (`search.results.finalists.holding`)."""
        return finalists.holding(front, self.over_seeds)

    @cached_property
    def pruned(self) -> pd.DataFrame:
        """Trials that were not scored to their end, and why (`search.evaluation.pruning.pruned_table`)."""
        return pruned_table(self.store.pruned_frame(), _names(self.store))

    @property
    def saved(self) -> dict[str, Any] | None:
        """Return what pruning saved (`search.evaluation.pruning.savings`)."""
        own = searched(self.trials)
        return savings(self.store.pruned_frame(), own if len(own) else self.trials)

    @cached_property
    def front(self) -> pd.DataFrame:
        """The Pareto front, strongest forgetting first."""
        chosen = self.trials[self.trials["on_front"]]
        return chosen.sort_values(_names(self.store), ascending=False, ignore_index=True)

    @cached_property
    def healthy_front(self) -> pd.DataFrame:
        """The Pareto front among the trials that have not collapsed: what one of those dominated may be on it again."""
        if not collapsed(self.trials).any():
            return self.front
        healthy = self.trials[~collapsed(self.trials)]
        chosen = healthy[on_front(healthy, self.controls, _names(self.store))] if len(healthy) else healthy
        return chosen.sort_values(_names(self.store), ascending=False, ignore_index=True)

    def control(self, kind: str) -> pd.Series | None:
        """The first control of a kind (``initial``, ``retain``), or None."""
        if self.controls.empty:
            return None
        rows = self.controls[self.controls["kind"] == kind]
        return None if rows.empty else rows.iloc[0]

    def trial(self, number: int) -> pd.Series:
        """A complete trial by number.

        Raises:
            UserError: If there is none.
        """
        rows = self.trials[self.trials["trial"] == number]
        if rows.empty:
            last = int(self.trials["trial"].max())
            raise UserError(f"--trial: {number} is not a complete trial of {self.out}; numbers go from 0 to {last}")
        return rows.iloc[0]

    @property
    def floor(self) -> float:
        """Least share of the initial model's utility where none is given: the study's own, or `DEFAULT_FLOOR`."""
        return self.spec.objectives.floor or DEFAULT_FLOOR

    def select(self, rule: str, floor: float | None = None, *, allow_collapsed: bool = False) -> pd.Series:
        """One trial of the front by a rule, as `choose`."""
        return self.choose(rule, floor, allow_collapsed=allow_collapsed)[0]

    def choose(self, rule: str, floor: float | None = None, *, allow_collapsed: bool = False) -> tuple[pd.Series, str | None]:
        """One trial of the front by a rule, and what is to be said of the choice; of the front without collapsed trials, unless
        they are allowed.

        Args:
            rule: ``utility-floor`` (strongest forgetting with at least `floor` of the initial model's utility), ``knee``
                (farthest from the chord between the front's ends) or ``chance`` (nearest to a model that cannot tell true
                answers from false ones, at the utility it keeps) or ``robust`` (as utility-floor, after the worst attack of an
                audit). A front of fewer than three points has no knee: then the
                utility floor chooses, and where no point reaches it, the highest utility.
            floor: Share of the initial model's utility, above 0 and at most 1; None is the study's own.
            allow_collapsed: Whether a collapsed model (`uipe_core.metrics.collapse`) may be chosen.

        Raises:
            UserError: If the rule is unknown, no trial beats the initial model, none that forgets more than it has so much
                utility, or every trial has collapsed.
        """
        front = self.front if allow_collapsed else self.healthy_front
        if not allow_collapsed and collapsed(self.trials).all():
            raise UserError(f"{self.out}: every trial has collapsed; choose one all the same with --allow-collapsed")
        front, held = self._holding(front)
        share = self.floor if floor is None else floor
        attacked = self.after_attacks if rule == "robust" else {}
        row, note = chosen_row(front, self.control(INITIAL), self.objectives, rule, share, attacked)
        unlike = audits.unlike_attacks(self, front["trial"]) if rule == "robust" else None
        return front.iloc[row], "; ".join(each for each in (held, note, unlike) if each is not None) or None

    def audit_jobs(self, trials: Sequence[int], top: int | None, tests: Sequence[str]) -> list[TrialSpec]:
        """List the audits of some trials and of the reference models (`search.results.audits.audit_jobs`)."""
        return audits.audit_jobs(self, trials, top, tests)

    @cached_property
    def audits(self) -> dict[str, Any] | None:
        """Findings of audits (`search.results.audits.audit_facts`); None where nothing was audited."""
        return audits.audit_facts(self) if self.controls["kind"].isin(audits.AUDITS).any() else None

    def audits_of(self, number: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Return the audits of a trial that were done, and those that were not (`search.results.audits.of_trial`)."""
        return audits.of_trial(self.audits, number)

    @cached_property
    def after_attacks(self) -> dict[int, float]:
        """Forgetting after the worst attack that changed weights, of each trial that was audited (`search.results.audits`)."""
        return {int(row["trial"]): float(row["worst"]) for row in audits.after_attacks(self).to_dict("records")}

    def reason(self, row: pd.Series, rule: str, floor: float | None = None) -> str:
        """Why a rule chose a trial, in a line, and whether it beats the initial model beyond noise where that is known."""
        beats = beats_initial(self.store, self.trials, self.controls).get(int(row["trial"]))
        share = self.floor if floor is None else floor
        attacked = self.after_attacks.get(int(row["trial"])) if rule == "robust" else None
        return reason_of(row, self.control(INITIAL), self.objectives, rule, share, beats, attacked)

    def reference_point(self) -> dict[str, float]:
        """Return the reference point of hypervolume, by objective (`search.problem.objectives`)."""
        return self.store.reference_point()

    @cached_property
    def hypervolume(self) -> dict[str, float]:
        """Hypervolumes, with forget quality capped at the noise ceiling, of what is given (the initial model and every epoch at
        alpha = 0) and of that together with all trials, trials of alpha >= 0, or random directions."""
        return finalists.volumes(self.trials, self.controls, self.objectives, *self._corner_and_ceilings())

    def _corner_and_ceilings(self) -> tuple[np.ndarray[Any, Any], list[float]]:
        reference = self.reference_point()
        ceilings = [objective.ceiling(self.forget_quality_cap) for objective in self.objectives]
        return np.array([reference[name] for name in _names(self.store)]), ceilings

    @property
    def gain(self) -> dict[str, float]:
        """Hypervolume gained over what is given; never negative, though sums in another order may differ in the last digit."""
        base = self.hypervolume["alpha_zero"]
        names = {"all": "front", "extrapolation_only": "extrapolation_only", "random_direction": "random_direction"}
        return {name: max(0.0, self.hypervolume[key] - base) for name, key in names.items()}

    def summary(self) -> dict[str, Any]:
        """Return what ``uipe run --json`` prints."""
        record = self.store.record
        return {
            "study": record.name,
            "out": str(self.out),
            "definition": self.spec.definition,
            "trials": self.store.counts(),
            "saved": self.saved,
            "front": self.rows(self.front),
            "hypervolume": self.hypervolume,
            "gain": self.gain,
            "reference_point": self.reference_point(),
            "forget_quality_cap": self.forget_quality_cap,
            "seconds": record.seconds,
            "usage": record.usage,
            "stopped": record.stopped,
            "report": str(self.report_path),
            "storage": record.storage,
        }

    def rows(self, table: pd.DataFrame) -> list[dict[str, Any]]:
        """Rows of `trials` or `front` as plain JSON values: point, objectives and their definition, and what qualifies them."""
        p_values = [objective.p_value for objective in self.objectives if objective.p_value is not None]
        more = [key for objective in self.objectives for key, _ in objective.companions]
        more += [*FORGET_NUMBERS, *METRICS, "ks_statistic", "membership_auc", "privleak", "privleak_auc"]
        more += [objective.name for objective in (VERBMEM, KNOWMEM, KNOWMEM_RETAIN)]
        more += ["logit_scale", "flagged", "collapsed", "definition"]
        more += [f"{name}_log10_forget_quality" for name in RELATED_SETS]
        more += [f"{name}_{key}" for name in MEMORIZED_SETS for key in MEMORIZATION]
        keys = [key for key in dict.fromkeys([*POINT_KEYS, *_names(self.store), *p_values, *more]) if key in table]
        return self.rows_of(table[keys])

    def rows_of(self, table: pd.DataFrame) -> list[dict[str, Any]]:
        """Every row of a table as plain JSON values."""
        return [{str(key): _plain(value) for key, value in row.items()} for row in table.to_dict("records")]

    @property
    def report_path(self) -> Path:
        """Where `search.report.html.write_report` writes the page."""
        return self.out / "report" / "report.html"

    def plot(self) -> "Figure":
        """Draw the front."""
        from search.report.display import draw_front  # upward, so that a notebook can ask the result itself

        return draw_front(self)

    def _repr_html_(self) -> str:
        from search.report.display import front_html

        return front_html(self)

    def export(
        self,
        row: pd.Series,
        to: Path | str,
        form: str,
        trust_remote_code: bool = False,
        verify: str = "loss",
        watch: Any = None,
        repository: str | None = None,
    ) -> Path:
        """Export a trial (a row of `trials` or `front`) as ``recipe``, ``adapter`` or ``model``; see
        `search.results.export`."""
        from search.results.export import export  # only exporting needs torch, which takes a second to import

        log = self.out / "logs" / "retain.json"
        recipe = recipe_of(self.store.record, self.spec, row.to_dict())
        reference, items = read_log(log) if log.is_file() else None, self.store.items(int(row["trial"]))
        table = audits.card_table(self, recipe.trial)
        written = partial(export, verify=verify, items=items, watch=watch, audits=table, repository=repository)
        return written(recipe, Path(to), form, reference, trust_remote_code)


def _plain(value: Any) -> Any:
    """A value as JSON has it, which knows no infinity: the logits of a collapsed model may have no finite scale."""
    plain = value.item() if hasattr(value, "item") else value
    return None if isinstance(plain, float) and not math.isfinite(plain) else plain
