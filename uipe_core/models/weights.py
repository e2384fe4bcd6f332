"""Find where a folder stores the parameters of a model: under their names, or as loading converts them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from uipe_core.errors import UserError, first_line
from uipe_core.models.transformers_compat import StoredGroup, stored_groups, tied_names
from uipe_core.storage.safetensors_files import ShardReader, StoredTensor


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
