"""What is scored beside the points of the search: jobs that follow from the study alone."""

import numpy as np

from search.evaluation.prepared import PreparedStudy
from search.problem.pareto import non_dominated
from search.problem.trial import TrialSpec
from search.store.study_store import StudyStore


def control_jobs(preparation: PreparedStudy) -> list[TrialSpec]:
    """The models trials are compared with, the initial one at other temperatures, and the next epoch of plain training."""
    spec = preparation.spec
    jobs = [TrialSpec(model.kind, model=model.name) for model in preparation.references]
    if spec.split is not None:
        kept = ("initial", "retain")
        jobs += [TrialSpec("held_out", model=model.name) for model in preparation.references if model.name in kept]
    # Which letter is likeliest does not depend on the temperature.
    temperatures = () if preparation.corpus.choices else spec.scoring.temperatures
    jobs += [TrialSpec("temperature", temperature=value) for value in temperatures]
    # Only what is trained here can be trained on.
    if spec.unlearning is not None and preparation.trained_epochs > spec.unlearning.epochs:
        next_epoch = spec.unlearning.epochs + 1
        jobs += [TrialSpec("next_epoch", run.label, next_epoch, 0.0) for run in spec.variants()]
    return jobs


def follow_up_trials(store: StudyStore) -> list[TrialSpec]:
    """What is still to be scored of the front: each point on the items kept for reporting (where items are split) and with its
    logits at the initial model's scale; and of each that left alpha = 0, a random direction of the same norm."""
    trials = store.trials_frame()
    if trials.empty:
        return []
    controls = store.controls_frame()
    done = set()
    if not controls.empty and "of_trial" in controls:
        known = controls.dropna(subset=["of_trial"])
        done = set(zip(known["kind"], known["of_trial"].astype(int), strict=True))
    front = trials[non_dominated(trials[[objective.name for objective in store.objectives]].to_numpy())]
    jobs = []
    for row in front.to_dict("records"):
        point = (row["base"], int(row["epoch"]), float(row["alpha"]))
        wanted = []
        if row["alpha"] != 0:
            wanted.append(TrialSpec("random_direction", *point, of_trial=int(row["trial"])))
        if store.spec.split is not None:
            wanted.append(TrialSpec("held_out", *point, of_trial=int(row["trial"])))
        scale = row.get("logit_scale")
        # Which letter is likeliest does not depend on the scale of the logits.
        matters = store.spec.corpus.kind != "multiple_choice"
        if matters and scale is not None and np.isfinite(scale) and scale > 0:
            wanted.append(TrialSpec("matched_scale", *point, temperature=float(scale), of_trial=int(row["trial"])))
        jobs += [job for job in wanted if (job.kind, job.of_trial) not in done]
    return jobs
