"""Define the inputs of a plan (work, sizes, rates, machine) and its entries."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

COUNTED, CALCULATED, MEASURED, PAST, ASSUMED, UNKNOWN = (
    "counted",
    "calculated",
    "measured here",
    "past study",
    "assumed",
    "not known",
)

FRONT_SHARE = 1 / 6
"""Share of the scored points that ends on the front: 10, 18 and 25% in the studies of docs/log.md."""

START_SECONDS = 15.0
"""Start of Ray and writing of the report."""

TRIAL_ROW_BYTES = 16 * 1024
"""A trial with its evidence in SQLite."""

GB = 10**9
HOUR = 3600.0


@dataclass(frozen=True)
class Work:
    """Models, base runs and trials to do.

    Attributes:
        builds, built: Tiny models to build, and those the cache has.
        trains, trained: Base runs to train by label, and how many the cache has.
        imports: Update vectors to make of given checkpoints.
        epochs: Epochs each base run is trained for, the control epoch included.
        steps: Optimiser steps of one epoch; None where the corpus is not known.
        references: Models scored once on all items.
        controls, given, search: Trials by kind.
        from_logs: Controls whose scores are those of a reference model.
        walks: Controls of each front point: random direction, held-out items, matched scale, other seeds.
        audits: What audits of finalists take, in scorings of a trial.
        audit_steps: Training steps that they take in addition; a step costs what one of a base run costs.
        samples: Answers to sample from the initial model before training, as alternates.
    """

    builds: int
    built: int
    trains: tuple[str, ...]
    trained: int
    imports: int
    epochs: int
    steps: int | None
    references: int
    controls: int
    from_logs: int
    given: int
    search: int
    walks: int
    audits: int = 0
    audit_steps: int = 0
    samples: int = 0

    @property
    def front(self) -> int:
        """Points of the front, assumed."""
        return math.ceil(FRONT_SHARE * (self.given + self.search))

    @property
    def trials(self) -> int:
        """Everything that a worker of the search has to score."""
        return self.controls - self.from_logs + self.given + self.search + self.walks * self.front + self.audits


@dataclass(frozen=True)
class Sizes:
    """Size of the model and its update vectors.

    Attributes:
        parameters: Number of parameters; tied ones count once.
        adapter: Number of LoRA's parameters; None for full fine-tuning.
        stored, scored: Bytes of a weight as stored, and in the dtype it is scored in.
        imported: Bytes of the update vectors of given checkpoints that are still to be made.
        second_model: Whether a base run holds a frozen copy of the initial model, too.
    """

    parameters: int
    adapter: int | None
    stored: float
    scored: float
    imported: int = 0
    second_model: bool = False

    @property
    def delta_bytes(self) -> int:
        """Bytes of the update vector of one epoch: fp32, of every parameter or of LoRA's factors."""
        return 4 * (self.parameters if self.adapter is None else self.adapter)

    @property
    def scoring_bytes(self) -> tuple[int, int]:
        """Host and device memory of a worker's weights: pristine copy and one update vector; the model that is scored."""
        return round(self.parameters * self.stored) + self.delta_bytes, round(self.parameters * self.scored)

    @property
    def training_bytes(self) -> tuple[int, int]:
        """Host and device memory of a base run, without activations: fp32 weights, gradients and AdamW's two moments."""
        if self.adapter is not None:
            return self.delta_bytes, round(self.parameters * self.stored) + 16 * self.adapter
        copy = self.parameters * self.stored
        return round(copy) + self.delta_bytes, 16 * self.parameters + (round(copy) if self.second_model else 0)


@dataclass(frozen=True)
class Rates:
    """Durations of steps, in seconds.

    Attributes:
        how: `MEASURED` or `PAST`.
        epoch: Seconds of one epoch of a base run, by label.
        builds: Seconds of all tiny models that are to be built.
        trial: Seconds of one trial.
        reference: Seconds to score a model on all items.
        item_bytes: Size of the scores of every item that a trial keeps.
        load: Seconds to load the model; None where not known.
        sample: Seconds to sample one answer; None where not known.
    """

    how: str
    epoch: Mapping[str, float]
    builds: float
    trial: float
    reference: float
    item_bytes: float
    load: float | None = None
    sample: float | None = None


@dataclass(frozen=True)
class Machine:
    """Resources of this machine.

    Attributes:
        cpus: Cores this process may use.
        memory: Bytes of memory.
        libraries: Bytes that a worker holds before any model: Python, torch, transformers.
        gpus: Bytes of memory of each GPU.
        deltas_free, out_free: Bytes free where update vectors and the output folder go.
        same_disk: Whether these two are one file system.
    """

    cpus: int
    memory: int
    libraries: int
    gpus: tuple[int, ...]
    deltas_free: int
    out_free: int
    same_disk: bool


@dataclass(frozen=True)
class PlanEntry:
    """One number of a plan, None where it is not known. Units: ``""``, ``s``, ``bytes``, ``share`` or ``GPU-hours``."""

    section: str
    what: str
    value: float | None
    unit: str
    how: str


@dataclass(frozen=True)
class Misfit:
    """Something that cannot fit, and what to change."""

    what: str
    remedy: str


@dataclass(frozen=True)
class Plan:
    """Work, memory, disk and time a study takes.

    Attributes:
        study: Its name.
        lines: The numbers.
        misfits: What cannot fit.
        notes: What could not be known, and why.
    """

    study: str
    lines: tuple[PlanEntry, ...]
    misfits: tuple[Misfit, ...]
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**asdict(self), "fits": not self.misfits}


def delta_bytes(work: Work, sizes: Sizes) -> int:
    """Return bytes of the update vectors that are still to be stored."""
    return len(work.trains) * work.epochs * sizes.delta_bytes + sizes.imported


def out_bytes(work: Work, rates: Rates) -> float:
    """Return bytes written to the output folder, without Ray's files."""
    return work.trials * (rates.item_bytes + TRIAL_ROW_BYTES)
