"""Define the settings of the experiments, and the tasks that they consist of."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from uipe_core.models.tiny import TINY_SCHEMA, Stage, TinyModelConfig
from uipe_core.scoring.scorer import ScoringConfig
from uipe_core.storage.content_store import content_key
from uipe_core.unlearning.methods import identifying
from uipe_core.unlearning.training import TRAINING_SCHEMA, AdapterConfig, UnlearningConfig

EXPERIMENT_SCHEMA = 1
"""Raised whenever a change in this package alters what an experiment yields, so that kept results are not taken for new."""

_SCHEMAS = {"experiment": EXPERIMENT_SCHEMA, "training": TRAINING_SCHEMA, "tiny_models": TINY_SCHEMA}

FULL, LORA = "full", "lora"
TUNINGS = {FULL: "full fine-tuning", LORA: "LoRA"}

PAPER_LORA = AdapterConfig(rank=4, alpha=16, target_modules=("q_proj", "v_proj"))
"""UIPE's LoRA: rank 4 on q_proj and v_proj. Its alpha is ours: at this size it only scales the learning rate."""

METHODS: Mapping[str, Mapping[str, float | str]] = {
    "grad_ascent": {},
    "grad_diff": {"retain_weight": 1.0},
    # Recorded figures of the experiments are those of the mean over answer tokens.
    "kl_min": {"retain_weight": 1.0, "over": "answer"},
    "npo": {"beta": 0.1, "retain_weight": 0.0},
}

MODELS = {
    "M1": ("full", ("forget",)),
    "M2": ("full_k1", ("forget",)),
    "M3": ("full", ("forget", "related")),
}
"""Table 1's models: the stage each starts from (see `PAPER_STAGES`), and the sets it unlearns."""


@dataclass(frozen=True)
class PaperSettings:
    """Everything that determines the experiments, but for the seed.

    Attributes:
        forget_people, retain_people, pretraining_people: Sizes of the world.
        hidden_size, layers, heads, base, finetune: The small Llama and its training.
        methods: Unlearning methods of M1, with their hyperparameters.
        table_methods: Those of them that M2 and M3 are unlearned by too: table 1 and figures 2, 3 and 8.
        epochs: Epochs that are walked from; one more is trained, the paper's comparison.
        learning_rate: Peak learning rate by fine-tuning.
        batch_size: Forget items per step.
        alphas: Extrapolations above 0, ascending.
        scoring: Batch size and generation length.
        definition: Metric definition of every number.
    """

    forget_people: int = 12
    retain_people: int = 34
    pretraining_people: int = 60
    hidden_size: int = 64
    layers: int = 2
    heads: int = 4
    base: Stage = field(default_factory=lambda: Stage(epochs=12, learning_rate=0.005, batch_size=64))
    finetune: Stage = field(default_factory=lambda: Stage(epochs=15, learning_rate=0.003, batch_size=32))
    methods: Mapping[str, Mapping[str, float | str]] = field(default_factory=lambda: METHODS)
    table_methods: tuple[str, ...] = ("grad_ascent", "grad_diff")
    epochs: int = 8
    learning_rate: Mapping[str, float] = field(default_factory=lambda: {FULL: 2e-4, LORA: 1e-3})
    batch_size: int = 8
    alphas: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0)
    scoring: ScoringConfig = field(default_factory=lambda: ScoringConfig(batch_size=128, generation_length=12))
    definition: str = "tofu"

    @classmethod
    def small(cls) -> "PaperSettings":
        """Return those of the paper's world."""
        return cls()

    def model(self, seed: int) -> TinyModelConfig:
        """Shape and training of the small models of a seed."""
        return TinyModelConfig(
            "word", None, self.hidden_size, self.layers, self.heads, base=self.base, finetune=self.finetune, seed=seed
        )

    def unlearning(self, method: str, tuning: str, seed: int) -> UnlearningConfig:
        """Configuration of a base run; the schedule is constant, so an epoch does not depend on how many follow."""
        return UnlearningConfig(
            method=method,
            hyperparameters=self.methods[method],
            epochs=self.epochs + 1,
            learning_rate=self.learning_rate[tuning],
            batch_size=self.batch_size,
            weight_decay=0.0,
            adapter=PAPER_LORA if tuning == LORA else None,
            seed=seed,
        )

    def tasks(self, seeds: int) -> list["Task"]:
        """Every task of seeds 0, 1, ...; those of one seed lie apart, so that two workers seldom wait for the same models."""
        return [Task(seed, tuning) for tuning in TUNINGS for seed in range(seeds)]

    def as_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        methods = {name: identifying(own) for name, own in self.methods.items()}
        return {**asdict(self), "methods": methods, "lora": asdict(PAPER_LORA), "models": MODELS, "schemas": _SCHEMAS}

    @property
    def key(self) -> str:
        """Identity of the settings: results with another one are other experiments."""
        return content_key(self.as_dict())


@dataclass(frozen=True)
class Task:
    """One part of an experiment: what is run in one go and kept in one file.

    Attributes:
        seed: The seed of its world.
        part: Key of `TUNINGS`; in the experiment on attacks the label of the base run that is attacked.
        attacks: True for the experiment on attacks.
    """

    seed: int
    part: str
    attacks: bool = False

    @property
    def name(self) -> str:
        """Name of its progress bar."""
        return f"seed {self.seed}, {f'attacks on {self.part}' if self.attacks else TUNINGS[self.part]}"

    @property
    def file_name(self) -> str:
        """Name of its file."""
        return f"seed-{self.seed}-{'attacks-' if self.attacks else ''}{self.part}.json"
