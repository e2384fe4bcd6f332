"""What cannot fit: disk, memory, GPUs and budgets against what a study needs, with what to change."""

from search.execution.capacity import fits, need_of
from search.planning.quantities import GB, Machine, Misfit, Rates, Sizes, Work, delta_bytes, out_bytes
from search.spec.study import StudySpec


def at_once(spec: StudySpec, machine: Machine) -> tuple[int, int, bool]:
    """Trials and base runs at once, and whether this machine has what one of each asks for.

    Where it has not, the study is for a cluster, and one at a time is assumed unless it says `max_concurrent`.
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


def disk_misfits(work: Work, sizes: Sizes | None, rates: Rates | None, machine: Machine) -> list[Misfit]:
    deltas = 0 if sizes is None else delta_bytes(work, sizes)
    out = 0.0 if rates is None else out_bytes(work, rates)
    fewer = "fewer unlearning.epochs or methods" + (
        "" if sizes and sizes.adapter else ", or a LoRA adapter (unlearning.adapter)"
    )
    if machine.same_disk:
        deltas, out = deltas + round(out), 0.0
    found = []
    if deltas > machine.deltas_free:
        found.append(
            Misfit(
                f"update vectors need {deltas / GB:.1f} GB, and {machine.deltas_free / GB:.1f} GB are free",
                f"set cache.deltas to a larger disk, free some space, or take {fewer}",
            )
        )
    if out > machine.out_free:
        found.append(
            Misfit(
                f"the output folder needs {out / GB:.1f} GB, and {machine.out_free / GB:.1f} GB are free",
                "choose another folder with --out, free some space, or lower search.trials",
            )
        )
    return found


def memory_misfits(spec: StudySpec, work: Work, sizes: Sizes | None, machine: Machine, trials: int, runs: int) -> list[Misfit]:
    if sizes is None:
        return []
    found = []
    trial, run = spec.resources.trial, spec.resources.base_run
    kinds = [("trial", sizes.scoring_bytes, trial.gpus, trials, "lower resources.max_concurrent or raise resources.trial.cpus")]
    if work.trains:
        less = "raise resources.base_run.cpus, so that fewer run at once, or use a LoRA adapter (unlearning.adapter)"
        kinds.append(("base run", sizes.training_bytes, run.gpus, runs * run.processes, less))
    for name, (host, device), gpus, count, remedy in kinds:
        needed = count * (machine.libraries + host + (0 if gpus else device))
        if needed > machine.memory:
            found.append(
                Misfit(
                    f"{count} {name}s at once need {needed / GB:.1f} GB of memory, and this machine has "
                    f"{machine.memory / GB:.1f} GB",
                    remedy if count > 1 else "run it on a machine with more memory",
                )
            )
        if gpus and machine.gpus:
            sharing = 1 if gpus >= 1 else int(1 // gpus)
            per_gpu = sharing * device / max(gpus, 1)
            if per_gpu > min(machine.gpus):
                found.append(
                    Misfit(
                        f"a GPU would hold {per_gpu / GB:.1f} GB of weights for {sharing} {name}s, and has "
                        f"{min(machine.gpus) / GB:.1f} GB",
                        f"raise resources.{name.replace(' ', '_')}.gpus"
                        + (", or use a LoRA adapter (unlearning.adapter)" if name == "base run" else ""),
                    )
                )
    return found


def budget_misfits(
    spec: StudySpec, work: Work, rates: Rates | None, hours: float | None, gpu_hours: float | None
) -> list[Misfit]:
    found = []
    for key, limit, needed in (("hours", spec.budget.hours, hours), ("gpu_hours", spec.budget.gpu_hours, gpu_hours)):
        if limit is not None and needed is not None and needed > limit:
            found.append(
                Misfit(
                    f"budget.{key} is {limit:g}, and the study is estimated to take {needed:.2g}: it will stop early",
                    f"raise budget.{key}, or lower search.trials ({work.search}) or unlearning.epochs",
                )
            )
    minutes = spec.budget.trial_minutes
    if minutes is not None and rates is not None and rates.trial > 60 * minutes:
        found.append(
            Misfit(
                f"budget.trial_minutes is {minutes:g}; a trial takes {rates.trial / 60:.2g} minutes, so that each would fail",
                "raise budget.trial_minutes",
            )
        )
    return found
