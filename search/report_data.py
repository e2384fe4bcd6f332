"""The tables and the summary that a report is made of."""

from dataclasses import dataclass
from typing import Any

import pandas as pd

METRIC_COLUMNS = ["log10_forget_quality", "forget_quality", "ks_statistic", "model_utility", "logit_scale"]
TRIAL_COLUMNS = [
    "trial",
    "kind",
    "base",
    "method",
    "epoch",
    "alpha",
    "walk",
    *METRIC_COLUMNS,
    "flagged",
    "seconds",
    "on_front",
]
CONTROL_COLUMNS = ["kind", "base", "method", "epoch", "alpha", "temperature", "of_trial", *METRIC_COLUMNS]


@dataclass(frozen=True, eq=False)
class ReportData:
    """All that a report shows, read from a study by the caller.

    Attributes:
        trials: a row per complete point of the search space with the columns of `TRIAL_COLUMNS`. `kind` is
            "alpha_zero" or "search"; `walk` is "initial model", "interpolation", "unlearned epoch" or "extrapolation";
            `seconds` is the time of the trial. Optional: `related_log10_forget_quality`,
            `unrelated_log10_forget_quality` and the components of utility.
        controls: a row per scored control with the columns of `CONTROL_COLUMNS`, NaN or None where one does not apply.
            `kind` is a key of `CONTROLS`; `of_trial` is the trial that a random direction mirrors.
        summary: study, definition, corpus, model, seed, dtype, forget_items, log10_floor, reference_point,
            forget_quality_cap, alpha {low, high}, trials {complete, pruned, failed, running}, hypervolume, gain
            {all, extrapolation_only, random_direction}, seconds by stage, base_run_seconds [training only], storage,
            created (ISO time), versions; and,
            where there are any, selections [{rule, trial, ...}], notes [text], failures [{trial, reason}].
    """

    trials: pd.DataFrame
    controls: pd.DataFrame
    summary: dict[str, Any]
