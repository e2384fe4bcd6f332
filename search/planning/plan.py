"""Compute the time, memory and disk a study needs, and compare them with the machine."""

import math
from collections.abc import Iterator

from search.execution.capacity import fits, need_of
from search.planning.quantities import (
    ASSUMED,
    CALCULATED,
    COUNTED,
    GB,
    HOUR,
    MEASURED,
    START_SECONDS,
    UNKNOWN,
    Machine,
    Misfit,
    Plan,
    PlanEntry,
    Rates,
    Sizes,
    Work,
    delta_bytes,
    out_bytes,
)
from search.spec.study import StudySpec


def make_plan(
    spec: StudySpec, work: Work, sizes: Sizes | None, rates: Rates | None, machine: Machine, notes: tuple[str, ...] = ()
) -> Plan:
    """Return the plan of a study.

    Args:
        spec: The study.
        work: Models, base runs and trials to do.
        sizes: None where nothing is known of the model.
        rates: None where nothing could be timed.
        machine: Resources of this machine.
        notes: What is not known so far.
    """
    trials, runs, here = at_once(spec, machine)
    if not here:
        notes = (
            *notes,
            "this machine has not the CPUs, GPUs or custom resources that one base run or one trial asks for: planned for a "
            f"cluster that runs {trials} trials and {runs} base runs at once",
        )
    lines = [*_work_lines(work), *_size_lines(work, sizes, rates, machine)]
    hours, gpu_hours, time_lines = _time(spec, work, rates, trials, runs)
    misfits = [*disk_misfits(work, sizes, rates, machine)]
    if here and sizes is not None:
        misfits += memory_misfits(spec, work, sizes, machine, trials, min(runs, max(len(work.trains), 1)))
    misfits += budget_misfits(spec, work, rates, hours, gpu_hours)
    return Plan(spec.name, (*lines, *time_lines), tuple(misfits), notes)


def _work_lines(work: Work) -> list[PlanEntry]:
    counts = [
        ("small models to build", work.builds),
        ("small models in the cache", work.built),
        ("base runs to train", len(work.trains)),
        ("base runs in the cache", work.trained),
        ("epochs of each, with the control epoch", work.epochs),
        ("checkpoints to import", work.imports),
        ("alternate answers to sample", work.samples),
        ("reference models to score", work.references),
        ("trials: controls", work.controls),
        ("trials: given points at alpha = 0", work.given),
        ("trials: search", work.search),
    ]
    lines = [PlanEntry("work", what, count, "", COUNTED) for what, count in counts if count]
    steps = None if work.steps is None else work.steps * work.epochs * len(work.trains)
    if work.trains:
        lines.append(PlanEntry("work", "optimiser steps", steps, "", UNKNOWN if steps is None else CALCULATED))
    what = f"trials: {work.walks} controls of each of {work.front} front points"
    lines.append(PlanEntry("work", what, work.walks * work.front, "", ASSUMED))
    if work.audits:
        lines.append(PlanEntry("work", "audits of finalists, in scorings", work.audits, "", CALCULATED))
    if work.audit_steps:
        lines.append(PlanEntry("work", "audits of finalists, in training steps", work.audit_steps, "", CALCULATED))
    return lines


def _size_lines(work: Work, sizes: Sizes | None, rates: Rates | None, machine: Machine) -> list[PlanEntry]:
    out = None if rates is None else out_bytes(work, rates)
    scores = PlanEntry("disk", "output folder: item scores, database", out, "bytes", UNKNOWN if out is None else CALCULATED)
    free = [
        PlanEntry("disk", "free for update vectors", machine.deltas_free, "bytes", MEASURED),
        PlanEntry("disk", "free for the output folder", machine.out_free, "bytes", MEASURED),
    ]
    if sizes is None:
        return [PlanEntry("disk", "update vectors", None, "bytes", UNKNOWN), scores, *free]
    scoring, training = sizes.scoring_bytes, sizes.training_bytes
    lines = [PlanEntry("model", "parameters", sizes.parameters, "", COUNTED)]
    if sizes.adapter is not None:
        lines.append(PlanEntry("model", "parameters of the adapter", sizes.adapter, "", COUNTED))
    lines += [
        PlanEntry("memory", "libraries of one worker", machine.libraries, "bytes", MEASURED),
        PlanEntry("memory", "a trial's weights, host", scoring[0], "bytes", CALCULATED),
        PlanEntry("memory", "a trial's weights, device", scoring[1], "bytes", CALCULATED),
    ]
    if work.trains:
        lines.append(PlanEntry("memory", "a base run, host", training[0], "bytes", CALCULATED))
        lines.append(PlanEntry("memory", "a base run, device, without activations", training[1], "bytes", CALCULATED))
    lines.append(PlanEntry("disk", "update vector of one epoch", sizes.delta_bytes, "bytes", CALCULATED))
    return [*lines, PlanEntry("disk", "update vectors to store", delta_bytes(work, sizes), "bytes", CALCULATED), scores, *free]


def _time(
    spec: StudySpec, work: Work, rates: Rates | None, trials: int, runs: int
) -> tuple[float | None, float | None, list[PlanEntry]]:
    """Return hours from start to end, GPU-hours, and their entries in the plan."""
    if rates is None:
        unknown = [PlanEntry("time", "from start to end", None, "s", UNKNOWN)]
        return None, None, [*unknown, PlanEntry("time", "GPUs held", None, "GPU-hours", UNKNOWN)]
    training = sum(rates.epoch[label] for label in work.trains) * work.epochs
    scoring = rates.reference * work.references
    base = (training + scoring) / min(runs, max(len(work.trains) + work.references, 1))
    longest = max([rates.epoch[label] * work.epochs for label in work.trains], default=0.0)
    base = max(base, longest)
    searching = rates.trial * math.ceil(work.trials / trials)
    relearning = _relearning(work, rates)
    builds = rates.builds / min(runs, max(work.builds, 1))
    sampling = work.samples * (rates.sample or 0.0)
    total = START_SECONDS + 2 * (rates.load or 0.0) + builds + sampling + base + searching + (relearning or 0.0) / trials
    run, trial = spec.resources.base_run, spec.resources.trial
    gpu_seconds = run.gpus * (run.processes * (training + scoring) + sampling)
    gpu_seconds += trial.gpus * (rates.trial * work.trials + (relearning or 0.0))
    lines = []
    if work.trains:
        mean = training / (work.epochs * len(work.trains))
        lines.append(PlanEntry("time", "one epoch of a base run, on average", mean, "s", rates.how))
        if spec.unlearning is not None:
            epochs = spec.unlearning.epochs
            what = f"one more alpha, as a share of training {epochs} epochs and scoring"
            lines.append(PlanEntry("time", what, rates.trial / (epochs * mean + rates.trial), "share", CALCULATED))
    lines += [
        PlanEntry("time", "one trial", rates.trial, "s", rates.how),
        PlanEntry("time", "one reference model, all items", rates.reference, "s", rates.how),
        *(
            []
            if rates.load is None
            else [PlanEntry("time", "loading the model, once for each stage", rates.load, "s", rates.how)]
        ),
        PlanEntry("time", "start of Ray, report", START_SECONDS, "s", ASSUMED),
    ]
    if work.builds:
        lines.append(PlanEntry("time", "small models", builds, "s", CALCULATED))
    if work.samples:
        known = rates.sample is not None
        what = "sampling alternate answers, at the first temperature"
        lines.append(PlanEntry("time", what, sampling if known else None, "s", CALCULATED if known else UNKNOWN))
    lines += [
        PlanEntry("time", f"base runs and references, {runs} at once", base, "s", CALCULATED),
        PlanEntry("time", f"trials, {trials} at once", searching, "s", CALCULATED),
        *(
            []
            if not work.audit_steps
            else [
                PlanEntry(
                    "time",
                    f"training steps of audits, {trials} at once",
                    None if relearning is None else relearning / trials,
                    "s",
                    UNKNOWN if relearning is None else ASSUMED,
                )
            ]
        ),
        PlanEntry("time", "from start to end", total, "s", CALCULATED),
        PlanEntry("time", "GPUs held", gpu_seconds / HOUR, "GPU-hours", CALCULATED),
    ]
    return total / HOUR, gpu_seconds / HOUR, lines


def _relearning(work: Work, rates: Rates) -> float | None:
    """Return seconds of all training steps of audits, each as long as the base runs' on average; None where these are not
    timed."""
    if not work.audit_steps:
        return 0.0
    if not work.trains or not work.steps:
        return None
    return work.audit_steps * sum(rates.epoch[label] for label in work.trains) / (len(work.trains) * work.steps)


def at_once(spec: StudySpec, machine: Machine) -> tuple[int, int, bool]:
    """Return trials and base runs at once, and whether one of each fits on this machine.

    Where it does not, the study is for a cluster: one at a time is assumed unless `max_concurrent` is set.
    """
    resources = spec.resources
    node = {"CPU": float(machine.cpus), "GPU": float(len(machine.gpus))}
    trials = fits(need_of(resources.trial), node)
    runs = fits(need_of(resources.base_run), node) // resources.base_run.processes
    needs_run = spec.unlearning is not None
    here = trials >= 1 and (runs >= 1 or not needs_run)
    trials = max(trials, 1)
    if resources.max_concurrent is not None:
        trials = resources.max_concurrent if not here else min(trials, resources.max_concurrent)
    return trials, max(runs, 1), here


def disk_misfits(work: Work, sizes: Sizes | None, rates: Rates | None, machine: Machine) -> Iterator[Misfit]:
    """Yield what does not fit on the disks."""
    deltas = 0 if sizes is None else delta_bytes(work, sizes)
    out = 0.0 if rates is None else out_bytes(work, rates)
    if machine.same_disk:
        deltas, out = deltas + round(out), 0.0
    if deltas > machine.deltas_free:
        adapter = "" if sizes and sizes.adapter else ", or a LoRA adapter (unlearning.adapter)"
        yield Misfit(
            f"update vectors need {deltas / GB:.1f} GB, and {machine.deltas_free / GB:.1f} GB are free",
            f"set cache.deltas to a larger disk, free some space, or take fewer unlearning.epochs or methods{adapter}",
        )
    if out > machine.out_free:
        yield Misfit(
            f"the output folder needs {out / GB:.1f} GB, and {machine.out_free / GB:.1f} GB are free",
            "choose another folder with --out, free some space, or lower search.trials",
        )


def memory_misfits(spec: StudySpec, work: Work, sizes: Sizes, machine: Machine, trials: int, runs: int) -> Iterator[Misfit]:
    """Yield what does not fit in the memory of this machine and its GPUs."""
    trial, run = spec.resources.trial, spec.resources.base_run
    kinds = [("trial", sizes.scoring_bytes, trial.gpus, trials, "lower resources.max_concurrent or raise resources.trial.cpus")]
    if work.trains:
        less = "raise resources.base_run.cpus, so that fewer run at once, or use a LoRA adapter (unlearning.adapter)"
        kinds.append(("base run", sizes.training_bytes, run.gpus, runs * run.processes, less))
    for name, (host, device), gpus, count, remedy in kinds:
        needed = count * (machine.libraries + host + (0 if gpus else device))
        if needed > machine.memory:
            have = f"this machine has {machine.memory / GB:.1f} GB"
            yield Misfit(
                f"{count} {name}s at once need {needed / GB:.1f} GB of memory, and {have}",
                remedy if count > 1 else "run it on a machine with more memory",
            )
        if gpus and machine.gpus:
            sharing = 1 if gpus >= 1 else int(1 // gpus)
            per_gpu, least = sharing * device / max(gpus, 1), min(machine.gpus)
            adapter = ", or use a LoRA adapter (unlearning.adapter)" if name == "base run" else ""
            if per_gpu > least:
                yield Misfit(
                    f"a GPU would hold {per_gpu / GB:.1f} GB of weights for {sharing} {name}s, and has {least / GB:.1f} GB",
                    f"raise resources.{name.replace(' ', '_')}.gpus{adapter}",
                )


def budget_misfits(
    spec: StudySpec, work: Work, rates: Rates | None, hours: float | None, gpu_hours: float | None
) -> Iterator[Misfit]:
    """Yield the limits of the budget that the study is estimated to exceed."""
    for key, limit, needed in (("hours", spec.budget.hours, hours), ("gpu_hours", spec.budget.gpu_hours, gpu_hours)):
        if limit is not None and needed is not None and needed > limit:
            yield Misfit(
                f"budget.{key} is {limit:g}, and the study is estimated to take {needed:.2g}: it will stop early",
                f"raise budget.{key}, or lower search.trials ({work.search}) or unlearning.epochs",
            )
    minutes = spec.budget.trial_minutes
    if minutes is not None and rates is not None and rates.trial > 60 * minutes:
        yield Misfit(
            f"budget.trial_minutes is {minutes:g}; a trial takes {rates.trial / 60:.2g} minutes, so that each would fail",
            "raise budget.trial_minutes",
        )
