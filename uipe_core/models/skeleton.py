"""Know a model without reading its weights: names and shapes of its parameters, and where a folder stores them.

Parameters are stored under their names, or as loading converts them.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from uipe_core.errors import UserError, first_line
from uipe_core.models.configurations import differences
from uipe_core.models.loading import UNREADABLE
from uipe_core.models.transformers_compat import StoredGroup, no_weights, stored_groups, tied_names
from uipe_core.storage.safetensors_files import FLOATS, ShardReader, StoredTensor, read_headers, weight_files

SHOWN = 3
"""Names shown of each kind of mismatch."""


@dataclass(frozen=True)
class Weight:
    """Where a parameter is stored.

    Attributes:
        name: Its name in the model.
        shape: Its shape in the model.
        places: The stored tensors it is made of, by their names; usually one, which is the parameter.
    """

    name: str
    shape: tuple[int, ...]
    places: Mapping[str, StoredTensor]
    _group: StoredGroup
    _made: str

    @property
    def dtypes(self) -> set[str]:
        """Dtypes of the stored tensors, by safetensors' names."""
        return {place.dtype for place in self.places.values()}

    def read(self, reader: ShardReader) -> Tensor:
        """Return the parameter as stored, mapped where it is one tensor; raise UserError as `ShardReader.read`."""
        return self._group.make({name: reader.read(place) for name, place in self.places.items()})[self._made]


@dataclass(frozen=True)
class FoundWeights:
    """Hold where the parameters of a model are in a folder, and what else is there.

    Attributes:
        weights: Parameters by name, in the order of fastest reading.
        twice: Pairs that loading takes for one parameter: what `weights` has, and another.
        others: Everything else: buffers, and names that the model has not.
    """

    weights: Mapping[str, Weight]
    twice: Sequence[tuple[Weight, Weight]]
    others: Mapping[str, Weight]


def find_weights(model: Any, stored: Mapping[str, StoredTensor]) -> FoundWeights:
    """Find the parameters of a model among stored tensors, by transformers' own key mapping; reads no tensor.

    Args:
        model: A transformers model, also without weights.
        stored: Tensors by name (`uipe_core.storage.safetensors_files.read_headers`).

    Raises:
        UserError: If the stored tensors cannot be converted to what the model has.
    """
    names = dict(model.named_parameters()).keys()
    tied = tied_names(model, dict.fromkeys(names))
    weights: dict[str, Weight] = {}
    others: dict[str, Weight] = {}
    twice = []
    for weight in _in_order(model, stored):
        name = tied.get(weight.name, weight.name)
        if name not in names:
            others[weight.name] = weight
        elif name in weights:
            twice.append((weights[name], weight))
        else:
            weights[name] = replace(weight, name=name)
    return FoundWeights(weights, twice, others)


def _in_order(model: Any, stored: Mapping[str, StoredTensor]) -> Iterator[Weight]:
    """Yield what loading makes of stored tensors, in their order."""
    order = {name: number for number, name in enumerate(stored)}
    for group in sorted(stored_groups(model, stored), key=lambda group: order[group.names[0]]):
        places = {name: stored[name] for name in group.names}
        for name, shape in _shapes(model, group, places).items():
            yield Weight(name, shape, places, group, name)


def _shapes(model: Any, group: StoredGroup, places: Mapping[str, StoredTensor]) -> dict[str, tuple[int, ...]]:
    empty = {name: torch.empty(place.shape, device="meta") for name, place in places.items()}
    try:
        return {name: tuple(tensor.shape) for name, tensor in group.make(empty).items()}
    except Exception as error:  # an operation may raise anything for tensors that do not fit together
        first = next(iter(places.values()))
        raise UserError(
            f"{first.path.parent}: {len(places)} tensors, first {first.name}, cannot be made into {group.target} of model type "
            f"{model.config.model_type} as loading it would ({first_line(error)}); fetch or save it again"
        ) from error


@dataclass(frozen=True)
class InitialModel:
    """Names, shapes and files of the initial model's parameters.

    Attributes:
        folder: Folder of the model.
        skeleton: The model on torch's meta device, without weights.
        shapes: Shape of every parameter by name; tied weights once.
        weights: Where each parameter is stored.
        buffers: Where the files store what the model computes with but does not train.
        trust_remote_code: Run code that comes with a model.
    """

    folder: Path
    skeleton: Any
    shapes: Mapping[str, tuple[int, ...]]
    weights: Mapping[str, Weight]
    buffers: Mapping[str, Weight]
    trust_remote_code: bool = False


def open_initial(folder: Path, trust_remote_code: bool = False) -> InitialModel:
    """Open the initial model of a folder without its weights.

    Raises:
        UserError: If the folder is no saved model, or its files do not hold its parameters.
    """
    skeleton = meta_model(str(folder), trust_remote_code=trust_remote_code)
    shapes = {name: tuple(parameter.shape) for name, parameter in skeleton.named_parameters()}
    weights, buffers = _match(folder, skeleton, shapes, "its own configuration asks for")
    return InitialModel(folder, skeleton, shapes, weights, buffers, trust_remote_code)


def meta_model(source: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """Build a causal language model on torch's meta device, without weights, from its configuration.

    Raises:
        UserError: If there is no readable configuration, or it makes no causal language model.
    """
    from transformers import AutoModelForCausalLM

    config = read_config(source, trust_remote_code, revision)
    try:
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        skeleton.tie_weights()
    except (*UNREADABLE, RuntimeError) as error:
        raise UserError(f"{source}: its configuration makes no causal language model: {first_line(error)}") from error
    return skeleton


def dense_weights(initial: InitialModel, folder: Path) -> Mapping[str, Weight]:
    """Return where a checkpoint stores each parameter of the initial model, in the order of its files.

    Only headers are read, and tensors of which the folder holds two, or that no update vector covers.

    Raises:
        UserError: If the configurations compute differently, or names, shapes or dtypes do not match; says what differs.
    """
    theirs = read_config(str(folder), initial.trust_remote_code)
    differing = differences(initial.skeleton, theirs)
    if differing:
        raise UserError(
            f"{folder}: its config.json is not that of the initial model: {_some(differing, '; ')}; both must "
            "compute in the same way, so give checkpoints of this initial model"
        )
    weights, buffers = _match(folder, initial.skeleton, initial.shapes, "the initial model has")
    moved = [name for name in initial.buffers.keys() & buffers.keys() if not _equal(initial.buffers[name], buffers[name])]
    if moved:
        raise UserError(
            f"{folder}: {len(moved)} buffers are not those of the initial model ({_some(sorted(moved))}); update vectors hold "
            "parameters only, so give checkpoints with the initial model's buffers"
        )
    return weights


def _match(
    folder: Path, skeleton: Any, shapes: Mapping[str, tuple[int, ...]], owner: str
) -> tuple[Mapping[str, Weight], Mapping[str, Weight]]:
    """Return where each parameter and each saved buffer of the model is stored in a folder, in the order of its files."""
    found = find_weights(skeleton, read_headers(weight_files(folder)))
    for first, second in found.twice:
        _require_equal(folder, first, second)
    weights, buffers, unexpected = found.weights, *_others(skeleton, found)
    parts = []
    if missing := sorted(shapes.keys() - weights.keys()):
        parts.append(f"{len(missing)} missing ({_some(missing)})")
    if unexpected:
        parts.append(f"{len(unexpected)} unexpected ({_some(unexpected)})")
    other = [
        f"{name} {list(weight.shape)}, {owner} {list(shapes[name])}"
        for name, weight in weights.items()
        if weight.shape != shapes[name]
    ]
    if other:
        parts.append(f"{len(other)} of another shape ({_some(other, '; ')})")
    if parts:
        kind = skeleton.config.model_type
        raise UserError(f"{folder}: its tensors are not what {owner}: {', '.join(parts)}; model type {kind}")
    packed = sorted({dtype for weight in weights.values() for dtype in weight.dtypes} - set(FLOATS))
    if packed:
        raise UserError(f"{folder}: it holds weights as {', '.join(packed)}; save it again as float32, bfloat16 or float16")
    return weights, buffers


def _others(skeleton: Any, found: FoundWeights) -> tuple[dict[str, Weight], list[str]]:
    """Return the saved buffers among what is no parameter, and the names that the model has not."""
    state, no_weight = skeleton.state_dict().keys(), no_weights(skeleton)
    buffers = {name: weight for name, weight in found.others.items() if name in state}
    return buffers, sorted(name for name in found.others if name not in state and not no_weight.search(name))


def _require_equal(folder: Path, first: Weight, second: Weight) -> None:
    if not _equal(first, second):
        one, other = (" and ".join(weight.places) for weight in (first, second))
        raise UserError(
            f"{folder}: {one} and {other} are tied by config.json but differ in its files; "
            "set tie_word_embeddings: false in config.json if they were trained apart"
        )


def _equal(first: Weight, second: Weight) -> bool:
    return first.shape == second.shape and torch.equal(first.read(ShardReader()), second.read(ShardReader()))


def read_config(source: str, trust_remote_code: bool, revision: str | None = None) -> Any:
    """Read a model's configuration; raise UserError if there is none that can be read."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
    except UNREADABLE as error:
        raise UserError(f"{source}: its config.json cannot be read: {first_line(error)}") from error


def _some(names: Sequence[str], separator: str = ", ") -> str:
    rest = len(names) - SHOWN
    return separator.join(names[:SHOWN]) + (f"{separator}and {rest} more" if rest > 0 else "")
