"""Gather what a plan needs: entries of the caches, size of the model, duration of steps on this machine."""

import math
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from search.evaluation.controls import CONTROLS, given_controls
from search.evaluation.inputs import check_items, require_trust
from search.evaluation.models import Build, FinetunedModels, PretrainedModels, ReferenceModel, model_cache
from search.evaluation.prepared import PreparedStudy, prepare
from search.evaluation.task import TASKS
from search.planning.fitting import model_sizes
from search.planning.plan import at_once, make_plan
from search.planning.quantities import Machine, Plan, Rates, Sizes, Work
from search.planning.timing import measured_rates, past_rates
from search.problem.trial import AUDITS
from search.spec.corpora import MULTIPLE_CHOICE, fetched_sources
from search.spec.models import FinetunedModel, TinyModel
from search.spec.sections import is_local
from search.spec.study import StudySpec
from uipe_core.corpora.types import Corpus
from uipe_core.deltas.adapters import is_adapter
from uipe_core.deltas.store import DeltaStore
from uipe_core.errors import UserError, first_line
from uipe_core.scoring.half_precision import faster_in_bfloat16
from uipe_core.storage.content_store import content_key
from uipe_core.storage.remote_store import RemoteLocation
from uipe_core.storage.safetensors_files import read_headers, weight_files
from uipe_core.unlearning.alternates import ASKED
from uipe_core.unlearning.methods import METHODS

FLOAT32_BYTES = 4


def plan_study(
    spec: StudySpec, out: Path, like: Path | None, say: Callable[[str], None], trust_remote_code: bool = False
) -> Plan:
    """Plan a study without running it.

    Models from the hub are not fetched: of those that are not on this machine only the configuration is read.

    Args:
        spec: The study.
        out: Where it would be run.
        like: Folder of a finished study of the same model and corpus, to take times from in place of timing them here.
        say: Called with each step, for progress.
        trust_remote_code: As `search.evaluation.prepared.prepare`.

    Raises:
        UserError: As `prepare`, for inputs on this machine; or `like` does not fit the study.
    """
    notes: list[str] = []
    require_trust(spec, trust_remote_code)
    preparation, whole = _prepared(spec, notes, trust_remote_code)
    builds, built = _builds(preparation)
    trains, imports = _base_runs(preparation, whole)
    work = _work(preparation, len(builds), built, trains, len(imports), whole)
    machine = machine_of(preparation.delta_root, out)
    sizes = _sizes(preparation, trains, imports, notes)
    notes += _faster_dtype(spec, sizes, machine)
    rates: Rates | None = None
    if like is not None:
        rates = past_rates(like, preparation, trains, len(builds))
    elif whole and (reason := _why_not_timed(spec, sizes, machine)) is None:
        try:
            rates = measured_rates(preparation, trains, builds, say, bool(work.samples))
        except (ArithmeticError, ValueError, RuntimeError, TypeError, IndexError, MemoryError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"a few steps of the study fail on this machine, as the study would ({type(error).__name__}: "
                f"{first_line(error)}); correct the values that make it fail, or give --like"
            ) from error
    elif whole:
        notes.append(f"times are not known: {reason}")
    return make_plan(spec, work, sizes, rates, machine, tuple(notes))


def _prepared(spec: StudySpec, notes: list[str], trust_remote_code: bool) -> tuple[PreparedStudy, bool]:
    """Prepare the study, with stand-ins for what is not on this machine; return it and whether all is there."""
    model = spec.model
    absent = _absent_models(spec)
    try:
        corpus = spec.corpus.load(spec.seed)
    except UserError as error:
        if isinstance(model, TinyModel) or not fetched_sources(spec.corpus):
            raise
        notes.append(f"the corpus is not known, and with it neither steps nor times: {error}")
        corpus = Corpus(spec.corpus.kind, {}, (), (), choices={"forget": ()} if spec.corpus.task == MULTIPLE_CHOICE else {})
        known = False
    else:
        known = True
    if absent:
        notes.append(
            f"{', '.join(absent)}: not on this machine and not fetched for a plan, so neither what the caches have "
            "nor how long steps take is known; plan again where the model is"
        )
    if known and not absent:
        prepared = prepare(spec, trust_remote_code)
        notes += check_items(spec, prepared.corpus)
        return prepared, True
    assert not isinstance(model, TinyModel)
    if isinstance(model, FinetunedModel):
        return PreparedStudy(spec, corpus, FinetunedModels.unseen(spec, model, corpus)), False
    return PreparedStudy(spec, corpus, PretrainedModels.unseen(model)), False


def _absent_models(spec: StudySpec) -> list[str]:
    """Return the models of the hub that are not on this machine."""
    model = spec.model
    if isinstance(model, TinyModel):
        return []
    if isinstance(model, FinetunedModel):
        places = [(model.base, model.revision)]
    else:
        places = [(model.initial, model.revision)]
        places += [(model.retain, model.retain_revision)] if model.retain else []
    places += [(place, None) for folders in spec.checkpoints.values() for place in folders]
    return list(dict.fromkeys(place for place, revision in places if not is_local(place) and not _is_fetched(place, revision)))


def _is_fetched(name: str, revision: str | None) -> bool:
    """Return True if the hub's copy of a model is on this machine with its weights."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, revision=revision, local_files_only=True))
    except (OSError, ValueError):
        return False
    return any(folder.glob("*.safetensors"))


def _builds(preparation: PreparedStudy) -> tuple[list[Build], int]:
    """Return the models to build, and how many the cache has."""
    models = preparation.models
    if isinstance(models, PretrainedModels):
        return [], 0
    wanted = [model.build for model in models.references() if model.build is not None]
    missing = [build for build in wanted if not models.store.holds(build.key)]
    return missing, len(wanted) - len(missing)


def _base_runs(preparation: PreparedStudy, whole: bool) -> tuple[tuple[str, ...], list[Path | None]]:
    """Return labels of the base runs to train, and checkpoints to import: None for one that is not on this machine."""
    spec = preparation.spec
    if not whole:
        places = [place for folders in spec.checkpoints.values() for place in folders]
        return tuple(run.label for run in spec.variants()), [Path(place) if is_local(place) else None for place in places]
    deltas = DeltaStore(preparation.delta_root)
    inputs = {run.label: preparation.base_run_inputs(preparation.unlearning(run)) for run in spec.variants()}
    given = [pair for label in spec.checkpoints for pair in preparation.checkpoints_of(label)]
    return (
        tuple(label for label, needed in inputs.items() if not deltas.holds(needed)),
        [folder for folder, needed in given if not deltas.holds(needed)],
    )


def _work(preparation: PreparedStudy, builds: int, built: int, trains: tuple[str, ...], imports: int, whole: bool) -> Work:
    spec = preparation.spec
    steps = None
    if spec.unlearning is not None and preparation.corpus.forget_train:
        per_step = spec.unlearning.batch_size * spec.unlearning.gradient_accumulation
        steps = -(-len(preparation.corpus.forget_train) // per_step)
    # A random direction of most points, the held-out items where there are some, and the matched scale of free text.
    seeds = () if spec.unlearning is None else spec.unlearning.seeds
    walks = 1 + (spec.split is not None) + TASKS[spec.corpus.task].reads_logits + max(len(seeds) - 1, 0)
    controls = given_controls(preparation)
    return Work(
        builds=builds,
        built=built,
        trains=trains,
        trained=len(spec.variants()) - len(trains),
        imports=imports,
        epochs=preparation.trained_epochs,
        steps=steps,
        references=sum(_is_to_be_scored(preparation, model) for model in preparation.models.references()),
        controls=len(controls),
        from_logs=sum(job.model is not None for job in controls),
        given=len(spec.given_points()),
        search=spec.search.trials,
        walks=walks,
        audits=_audits(preparation)[0],
        audit_steps=_audits(preparation)[1],
        samples=_samples(preparation, trains, whole),
    )


def _samples(preparation: PreparedStudy, trains: tuple[str, ...], whole: bool) -> int:
    """Return how many answers are sampled as alternates; 0 where they are given, cached or not needed."""
    asks = any(METHODS[run.method].alternates for run in preparation.spec.variants() if run.label in trains)
    if preparation.corpus.alternates or not asks:
        return 0
    kept = whole and model_cache(preparation.spec).holds(content_key(preparation.alternates_inputs()))
    return 0 if kept else ASKED * len(preparation.corpus.forget_train)


def _is_to_be_scored(preparation: PreparedStudy, model: ReferenceModel) -> bool:
    """Return True for a reference model without a log whose scores the cache lacks."""
    inputs = None if model.log is not None else preparation.score_inputs(model)
    return model.log is None and (inputs is None or not model_cache(preparation.spec).holds(content_key(inputs)))


def _audits(preparation: PreparedStudy) -> tuple[int, int]:
    """Return the scorings and the training steps that the study's audits take: of its finalists, the initial and the retain
    model."""
    section = preparation.spec.audit
    if section is None:
        return 0, 0
    sets, task = preparation.corpus.sets, preparation.spec.corpus.task
    kinds = [CONTROLS[kind].audit for test in section.tests for kind in AUDITS[test]]
    known = [audit for audit in kinds if audit is not None and task in audit.tasks]
    done = [audit for audit in known if all(name in sets for name in audit.needs)]
    models = section.top + 1 + preparation.spec.has_retain_model
    steps = sum(audit.steps(section, preparation.corpus) for audit in done if audit.steps is not None)
    return math.ceil(sum(audit.cost(section) for audit in done) * models), steps * models


def _sizes(preparation: PreparedStudy, trains: tuple[str, ...], imports: list[Path | None], notes: list[str]) -> Sizes | None:
    """Return the size of the model; None without its configuration."""
    spec = preparation.spec
    try:
        skeleton = _skeleton(preparation)
    except UserError as error:
        notes.append(f"memory and disk are not known: {error}")
        return None
    return model_sizes(spec, skeleton, trains, lambda parameters: sum(_import_bytes(folder, parameters) for folder in imports))


def _faster_dtype(spec: StudySpec, sizes: Sizes | None, machine: Machine) -> list[str]:
    """Say where a processor would take less time in bfloat16; `dtype: auto` keeps what is stored, so that every machine
    computes the same numbers."""
    if sizes is None or machine.gpus or spec.resources.trial.gpus or sizes.scored != FLOAT32_BYTES:
        return []
    speed = faster_in_bfloat16(sizes.parameters)
    if speed is None:
        return []
    return [
        f"model.dtype: this processor multiplies bfloat16 {speed:.1f} times as fast as the float32 of this study; bfloat16 "
        "would take less time, and round its numbers"
    ]


def _import_bytes(folder: Path | None, parameters: int) -> int:
    """Return bytes of a checkpoint's update vector: fp32 of every parameter, or of an adapter's factors."""
    if folder is None or not is_adapter(folder):
        return 4 * parameters
    stored = read_headers(weight_files(folder, "adapter_model"))
    return 4 * sum(math.prod(tensor.shape) for tensor in stored.values())


def _skeleton(preparation: PreparedStudy) -> Any:
    return preparation.models.skeleton()


def _why_not_timed(spec: StudySpec, sizes: Sizes | None, machine: Machine) -> str | None:
    """Return why a study's steps cannot be timed on this machine; None if they can."""
    if not at_once(spec, machine)[2]:
        return "this machine has not what one base run or trial asks for; plan on one that has, or give --like"
    if sizes is None:
        return None
    on_gpu = bool(machine.gpus) and not isinstance(spec.model, TinyModel) and spec.model.device != "cpu"
    needs = [sizes.scoring_bytes, *([sizes.training_bytes] if spec.unlearning is not None else [])]
    host = max(host + (0 if on_gpu else device) for host, device in needs)
    if host + machine.libraries > machine.memory or (on_gpu and max(device for _, device in needs) > machine.gpus[0]):
        return "the model does not fit in this machine's memory; plan on a larger one, or give --like"
    return None


def machine_of(deltas: Path | RemoteLocation, out: Path) -> Machine:
    """Return the resources of this machine; update vectors go to `deltas`, results to `out`."""
    import torch

    # Of a store at a URL this machine has its node cache.
    there, here = _nearest(deltas.node_root if isinstance(deltas, RemoteLocation) else deltas), _nearest(out)
    return Machine(
        cpus=len(os.sched_getaffinity(0)),
        memory=_memory(),
        libraries=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        gpus=tuple(torch.cuda.get_device_properties(index).total_memory for index in range(torch.cuda.device_count())),
        deltas_free=shutil.disk_usage(there).free,
        out_free=shutil.disk_usage(here).free,
        same_disk=there.stat().st_dev == here.stat().st_dev,
    )


def _nearest(folder: Path) -> Path:
    """Return the folder, or its nearest parent that exists."""
    found = folder.absolute()
    while not found.is_dir():
        found = found.parent
    return found


def _memory() -> int:
    """Return bytes of memory this process may use: the machine's, or the limit of its container."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
    except (OSError, ValueError):
        return physical
    return min(physical, limit)
