"""Tell which of several ways to run a study fits on a machine, by sizes alone: nothing is loaded, trained or timed."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

from search.evaluation.models import adapter_config
from search.planning.plan import at_once, disk_misfits, memory_misfits
from search.planning.quantities import Machine, Misfit, Sizes, Work
from search.spec.models import TinyModel
from search.spec.study import StudySpec
from uipe_core.models.loading import DTYPES
from uipe_core.models.skeleton import meta_model
from uipe_core.models.transformers_compat import adapter_state, wrap_adapter
from uipe_core.unlearning.loss_inputs import reads_initial
from uipe_core.unlearning.methods import METHODS

WEIGHTS_SHARE = 0.8
"""Share of a memory that weights and optimiser states may take: the rest is for activations, which are not counted."""


def first_fitting(specs: Sequence[StudySpec], folder: str, machine: Machine) -> tuple[int, list[Misfit]]:
    """Return the number of the first study that fits, or of the last, with what of it does not fit.

    Args:
        specs: The same study in several ways, the preferred one first; none with tiny models.
        folder: Folder or hub name of a model of their size; its configuration is read.
        machine: Where they would run.

    Raises:
        UserError: The configuration makes no model.
    """
    cautious = replace(
        machine,
        memory=int(WEIGHTS_SHARE * machine.memory),
        gpus=tuple(int(WEIGHTS_SHARE * memory) for memory in machine.gpus),
    )
    misfits: list[Misfit] = []
    for number, spec in enumerate(specs):
        misfits = _misfits(spec, meta_model(folder), cautious)
        if not misfits:
            return number, []
    return len(specs) - 1, misfits


def model_sizes(spec: StudySpec, skeleton: Any, trains: Collection[str], imports: Callable[[int], int] = lambda _: 0) -> Sizes:
    """Return the sizes of a study's model.

    Args:
        spec: The study.
        skeleton: The initial model without weights.
        trains: Labels of the base runs that are to be trained.
        imports: Bytes of the update vectors to be made of given checkpoints, by the number of parameters.
    """
    parameters = sum(parameter.numel() for parameter in skeleton.parameters())
    stored = (getattr(skeleton.config, "dtype", None) or next(skeleton.parameters()).dtype).itemsize
    dtype = "auto" if isinstance(spec.model, TinyModel) else spec.model.dtype
    lora, adapter = adapter_config(None if spec.unlearning is None else spec.unlearning.adapter), None
    if lora is not None:
        adapter = sum(tensor.numel() for tensor in adapter_state(wrap_adapter(skeleton, lora.as_peft())).values())
    second = {run.label for run in spec.variants() if reads_initial(METHODS[run.method].needs_under(run.hyperparameters))}
    scored = stored if dtype == "auto" else DTYPES[dtype].itemsize
    return Sizes(parameters, adapter, stored, scored, imports(parameters), bool(second & set(trains)))


def _misfits(spec: StudySpec, skeleton: Any, machine: Machine) -> list[Misfit]:
    """Return what does not fit of a study without entries in the caches."""
    assert spec.unlearning is not None and not isinstance(spec.model, TinyModel)
    sizes = model_sizes(spec, skeleton, [run.label for run in spec.variants()])
    # One epoch more than is searched is trained: the control.
    trains, epochs = tuple(run.label for run in spec.variants()), spec.unlearning.epochs + 1
    given_points, search = len(spec.given_points()), spec.search.trials
    work = Work(0, 0, trains, 0, 0, epochs, None, 0, 0, given_points, search, 0, 0)
    trials, runs, _ = at_once(spec, machine)
    memory = memory_misfits(spec, work, sizes, machine, trials, min(runs, len(trains)))
    return [*disk_misfits(work, sizes, None, machine), *memory]
