"""What a study needs and lies on this machine, checked before anything is spent."""

from pathlib import Path

from search.evaluation.warm_start import earlier_fronts
from search.spec.corpora import fetched_sources, load_corpus
from search.spec.sections import PretrainedModel, TinyModel, is_local
from search.spec.study import StudySpec
from uipe_core.corpora.split import split_corpus
from uipe_core.deltas.checkpoints import check_checkpoint
from uipe_core.errors import UserError
from uipe_core.logs.tofu import read_log
from uipe_core.models.loading import check_model_folder, model_folder
from uipe_core.models.skeleton import open_initial
from uipe_core.unlearning.steering import check_layer, model_depth


def check_inputs(spec: StudySpec) -> list[str]:
    """Reads what a study needs and lies on this machine; returns notes on what only the run itself can check.

    Raises:
        UserError: If an input is missing or broken.
    """
    later = "is on the hub and is fetched when the study runs"
    notes = [f"corpus.{key}: {source} {later}" for key, source in fetched_sources(spec)]
    if not notes:
        split_corpus(load_corpus(spec), None if spec.split is None else spec.split.select, spec.seed)
    if isinstance(spec.model, PretrainedModel):
        given = {"initial": spec.model.initial}
        given |= {"retain": spec.model.retain} if spec.model.retain else {}
        given |= {f"other_retain[{place}]": value for place, value in enumerate(spec.model.other_retain)}
        given |= {"never_finetuned": spec.model.never_finetuned} if spec.model.never_finetuned else {}
        for key, value in given.items():
            if not is_local(value):
                notes.append(f"model.{key}: {value} {later}")
            elif value.endswith(".json"):
                read_log(value)
            else:
                check_model_folder(value, spec.model.prompt_template, spec.model.prompt_format, spec.model.trust_remote_code)
        remote = [place for places in spec.checkpoints.values() for place in places if not is_local(place)]
        notes += [f"checkpoints: {place} is on the hub and is fetched when the study runs" for place in remote]
        if spec.checkpoints and (remote or not is_local(spec.model.initial)):
            notes.append("checkpoints: they are held against model.initial when the study runs")
        elif spec.checkpoints:
            check_checkpoints(spec, Path(spec.model.initial))
    if isinstance(spec.model, TinyModel) or is_local(spec.model.initial):
        check_steered_layers(spec, None)
    return [*notes, *earlier_fronts(spec).notes]


def check_steered_layers(spec: StudySpec, revision: str | None) -> None:
    """Refuses layers the initial model does not have, where a method steers one and the depth is known before loading."""
    layers = sorted({run.hyperparameters["layer"] for run in spec.variants() if run.method == "rmu"})
    model = spec.model
    if not layers:
        return
    depth = model.layers if isinstance(model, TinyModel) else model_depth(model.initial, revision, model.trust_remote_code)
    if depth is not None:
        for layer in layers:
            check_layer(int(layer), depth)


def checkpoint_folder(place: str) -> Path:
    """The folder of a given checkpoint: its own, or the hub's copy on this machine, fetched where it is missing."""
    return Path(place) if is_local(place) else model_folder(place)


def check_checkpoints(spec: StudySpec, initial_folder: Path) -> None:
    """Holds every given checkpoint against the initial model by configurations and headers; no weights are read.

    Raises:
        UserError: With everything that does not fit.
    """
    trusted = isinstance(spec.model, PretrainedModel) and spec.model.trust_remote_code
    initial = open_initial(initial_folder, trusted)
    problems = []
    for label, folders in spec.checkpoints.items():
        for place, folder in enumerate(folders):
            try:
                check_checkpoint(initial, checkpoint_folder(folder))
            except UserError as error:
                problems.append(f"checkpoints.{label}[{place}]: {error}")
    if problems:
        raise UserError("\n  ".join(problems))
