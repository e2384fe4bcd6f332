"""What is scored beside the points of the search: jobs that follow from the study alone."""

from search.evaluation.prepared import Preparation
from search.problem.trial import Job


def control_jobs(preparation: Preparation) -> list[Job]:
    """The models trials are compared with, the initial one at other temperatures, and the next epoch of plain training."""
    spec = preparation.spec
    jobs = [Job(model.kind, model=model.name) for model in preparation.references]
    if spec.split is not None:
        kept = ("initial", "retain")
        jobs += [Job("held_out", model=model.name) for model in preparation.references if model.name in kept]
    # Which letter is likeliest does not depend on the temperature.
    temperatures = () if preparation.corpus.choices else spec.scoring.temperatures
    jobs += [Job("temperature", temperature=value) for value in temperatures]
    # Only what is trained here can be trained on.
    if spec.unlearning is not None and preparation.trained_epochs > spec.unlearning.epochs:
        next_epoch = spec.unlearning.epochs + 1
        jobs += [Job("next_epoch", run.label, next_epoch, 0.0) for run in spec.variants()]
    return jobs
