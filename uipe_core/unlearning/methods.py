"""Define unlearning methods: a loss function each, and hyperparameters with defaults and bounds.

Importing this module does not import torch, so that commands that only read a study start fast.

Symbols: b sequences, t positions, v vocabulary entries, d entries of a hidden state, k answer tokens of a whole batch. Losses
are minimised, in nats (those on activations in squared units of these).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Shares:
    """Shares of a whole batch that this process reads; 1 in a single process.

    A loss multiplies each mean by the share of its elements. The losses and gradients of all processes then add up to those of
    the whole batch, however it was split.

    Attributes:
        items: Of the forget items.
        tokens: Of the forget answers' tokens.
        retain_tokens: Of the retain answers' tokens.
        refusal_tokens: Of the refusals' tokens.
    """

    items: float = 1.0
    tokens: float = 1.0
    retain_tokens: float = 1.0
    refusal_tokens: float = 1.0


@dataclass(frozen=True)
class LossInputs:
    """Results of one step's forward passes: the first two always, the others if `Method.needs` names them.

    Attributes:
        forget_logp: (b,) log-probability of each forget answer, summed over its tokens.
        forget_tokens: (b,) number of answer tokens.
        forget_rows: (k, v) logits from which the forget answers' tokens are predicted, fp32.
        forget_targets: (k,) these tokens.
        initial_forget_rows: (k, v) `forget_rows` under the initial model.
        initial_forget_logp: (b,) `forget_logp` under the initial model.
        retain_nll: () mean negative log-likelihood per answer token of the retain batch.
        retain_kl: () mean over retain answer tokens of KL(initial || current).
        refusal_logp: (b,) log-probability of a refusal in place of each forget answer, summed over its tokens.
        refusal_tokens: (b,) number of the refusals' tokens.
        initial_refusal_logp: (b,) `refusal_logp` under the initial model.
        forget_activations: (k, d) outputs of the steered layer at positions that predict forget answer tokens.
        direction: (d,) direction of length 1 to steer to.
        retain_activations: (k, d) the same for the retain batch.
        initial_retain_activations: (k, d) `retain_activations` under the initial model.
        shares: Shares of the whole batch; a loss multiplies its means by them.
    """

    forget_logp: Tensor
    forget_tokens: Tensor
    forget_rows: Tensor | None = None
    forget_targets: Tensor | None = None
    initial_forget_rows: Tensor | None = None
    initial_forget_logp: Tensor | None = None
    retain_nll: Tensor | None = None
    retain_kl: Tensor | None = None
    refusal_logp: Tensor | None = None
    refusal_tokens: Tensor | None = None
    initial_refusal_logp: Tensor | None = None
    forget_activations: Tensor | None = None
    direction: Tensor | None = None
    retain_activations: Tensor | None = None
    initial_retain_activations: Tensor | None = None
    shares: Shares = Shares()

    @property
    def forget_nll(self) -> Tensor:
        """() mean negative log-likelihood per answer token of the forget batch, times its share of the tokens."""
        return self.shares.tokens * (-self.forget_logp.sum() / self.forget_tokens.sum())


Hyperparameters = Mapping[str, float]


def _needed(value: Tensor | None, name: str) -> Tensor:
    if value is None:
        raise ValueError(f"this objective needs {name}")
    return value


def _retain_term(inputs: LossInputs, hyper: Hyperparameters, name: str) -> Tensor | float:
    """Return a mean over retain answer tokens times its weight and share; 0 without weight."""
    weight = hyper["retain_weight"]
    return inputs.shares.retain_tokens * (weight * _needed(getattr(inputs, name), name)) if weight > 0 else 0.0


def grad_ascent(inputs: LossInputs, hyper: Hyperparameters) -> Tensor:
    """Gradient ascent on the forget set: -NLL(forget). TOFU (arXiv 2401.06121), section 4."""
    return -inputs.forget_nll


def grad_diff(inputs: LossInputs, hyper: Hyperparameters) -> Tensor:
    """Gradient difference: -NLL(forget) + retain_weight * NLL(retain). TOFU (arXiv 2401.06121), section 4."""
    return -inputs.forget_nll + _retain_term(inputs, hyper, "retain_nll")


def kl_min(inputs: LossInputs, hyper: Hyperparameters) -> Tensor:
    """KL minimisation: -NLL(forget) + retain_weight * KL(initial || current) on retain answers. TOFU, section 4."""
    return -inputs.forget_nll + _retain_term(inputs, hyper, "retain_kl")


def npo(inputs: LossInputs, hyper: Hyperparameters) -> Tensor:
    """Negative preference optimisation: -(2 / beta) E log sigmoid(-beta (log pi - log pi_init)) [+ retain term].

    Sequence log-probabilities are summed over answer tokens. Zhang et al. (arXiv 2404.05868), section 3; with
    ``retain_weight`` > 0 the variant with a retain term (NPO+RT).
    """
    from torch.nn import functional as F

    beta = hyper["beta"]
    log_ratio = inputs.forget_logp - _needed(inputs.initial_forget_logp, "initial_forget_logp")
    forget = -(2 / beta) * F.logsigmoid(-beta * log_ratio).mean()
    return inputs.shares.items * forget + _retain_term(inputs, hyper, "retain_nll")


def simnpo(inputs: LossInputs, hyper: Hyperparameters) -> Tensor:
    """NPO without a reference model: -(2 / beta) E log sigmoid(-(beta / tokens) log pi - gamma) [+ retain term].

    Log-probabilities are per token, so that short answers are not forgotten first; gamma is the margin by which an answer must
    be unlikely before its weight fades. Fan et al. (arXiv 2410.07163); the authors' code multiplies gamma by beta, their
    equation and this function do not. Defaults of open-unlearning (beta 4.5, gamma 0, forget term 0.125, retain term 1):
    `retain_weight` 8 is that ratio.
    """
    from torch.nn import functional as F

    beta = hyper["beta"]
    forget = -(2 / beta) * F.logsigmoid(-beta * inputs.forget_logp / inputs.forget_tokens - hyper["gamma"]).mean()
    return inputs.shares.items * forget + _retain_term(inputs, hyper, "retain_nll")


def idk_dpo(inputs: LossInputs, hyper: Hyperparameters) -> Tensor:
    """Direct preference optimisation of a refusal over the forget answer, both against the initial model.

    -(2 / beta) E log sigmoid(beta ((log pi - log pi_init)(refusal) - (log pi - log pi_init)(forget))) [+ retain term], on
    log-probabilities summed over tokens; without the first difference this is `npo`. TOFU (arXiv 2401.06121): preference
    optimisation; Zhang et al. (arXiv 2404.05868): IDK + DPO. Factor 2 / beta, beta 0.1 and retain weight 1 as in
    open-unlearning.
    """
    from torch.nn import functional as F

    beta = hyper["beta"]
    refusal = _needed(inputs.refusal_logp, "refusal_logp") - _needed(inputs.initial_refusal_logp, "initial_refusal_logp")
    forget = inputs.forget_logp - _needed(inputs.initial_forget_logp, "initial_forget_logp")
    preference = -(2 / beta) * F.logsigmoid(beta * (refusal - forget)).mean()
    return inputs.shares.items * preference + _retain_term(inputs, hyper, "retain_nll")


def idk_nll(inputs: LossInputs, hyper: Hyperparameters) -> Tensor:
    """Train on a refusal in place of the forget answer: NLL(refusal) + retain_weight * NLL(retain).

    The NLL is a mean per token. TOFU (arXiv 2401.06121), section 4; the retain term as in open-unlearning.
    """
    tokens = _needed(inputs.refusal_tokens, "refusal_tokens").sum()
    refusal = -_needed(inputs.refusal_logp, "refusal_logp").sum() / tokens
    return inputs.shares.refusal_tokens * refusal + _retain_term(inputs, hyper, "retain_nll")


def wga(inputs: LossInputs, hyper: Hyperparameters) -> Tensor:
    """Weighted gradient ascent: -E w NLL(token), w = p(token)^beta without gradient [+ retain term].

    E is the mean over forget answer tokens: tokens that are forgotten already weigh little, so ascent does not run away. With
    beta 0 it is `grad_diff`. Wang et al. (arXiv 2502.19301).
    """
    logp = _token_logp(inputs)
    return _weighted_ascent(inputs, hyper, logp, (hyper["beta"] * logp.detach()).exp())


def sat_imp(inputs: LossInputs, hyper: Hyperparameters) -> Tensor:
    """Gradient ascent weighted by saturation and importance: -E w NLL(token), w = p^beta1 (1 - p)^beta2 [+ retain term].

    The weight has no gradient; E is the mean over forget answer tokens. beta1 spares what is forgotten, beta2 what is surest.
    Yang et al. (arXiv 2505.11953); defaults of open-unlearning, whose forget term weighs 0.1 and retain term 1.
    """
    logp = _token_logp(inputs)
    known = logp.detach().exp()
    return _weighted_ascent(inputs, hyper, logp, known ** hyper["beta1"] * (1 - known) ** hyper["beta2"])


def ce_u(inputs: LossInputs, hyper: Hyperparameters) -> Tensor:
    """Cross-entropy unlearning: towards the model's own distribution without the answer's token [+ retain term].

    E CE(softmax of the logits with the token's at minus infinity, without gradient; softmax of the logits) over forget answer
    tokens. Its gradient is bounded, so it does not run away as ascent does. Yang (arXiv 2503.01224). Every answer token counts;
    open-unlearning leaves out the first of each by default.
    """
    from torch.nn import functional as F

    rows, targets = _needed(inputs.forget_rows, "forget_rows"), _needed(inputs.forget_targets, "forget_targets")
    aimed = rows.detach().scatter(1, targets[:, None], float("-inf")).softmax(dim=1)
    return inputs.shares.tokens * F.cross_entropy(rows, aimed) + _retain_term(inputs, hyper, "retain_nll")


def undial(inputs: LossInputs, hyper: Hyperparameters) -> Tensor:
    """Self-distillation on adjusted logits: towards the initial model with the answer tokens' logits lowered by beta.

    E CE(softmax of the adjusted initial logits; softmax of the logits) over forget answer tokens [+ retain term]. Dong et al.,
    UNDIAL (arXiv 2402.10052). Open-unlearning takes the mean over all positions of the padded batch.
    """
    from torch.nn import functional as F

    rows, targets = _needed(inputs.forget_rows, "forget_rows"), _needed(inputs.forget_targets, "forget_targets")
    initial = _needed(inputs.initial_forget_rows, "initial_forget_rows")
    lowered = initial.new_full((len(targets), 1), -hyper["beta"])
    aimed = initial.scatter_add(1, targets[:, None], lowered).softmax(dim=1)
    return inputs.shares.tokens * F.cross_entropy(rows, aimed) + _retain_term(inputs, hyper, "retain_nll")


def _token_logp(inputs: LossInputs) -> Tensor:
    """Return (k,) log-probabilities of the forget answers' tokens."""
    from torch.nn import functional as F

    rows, targets = _needed(inputs.forget_rows, "forget_rows"), _needed(inputs.forget_targets, "forget_targets")
    return -F.cross_entropy(rows, targets, reduction="none")


def _weighted_ascent(inputs: LossInputs, hyper: Hyperparameters, logp: Tensor, weights: Tensor) -> Tensor:
    return inputs.shares.tokens * (weights * logp).mean() + _retain_term(inputs, hyper, "retain_nll")


def rmu(inputs: LossInputs, hyper: Hyperparameters) -> Tensor:
    """Representation misdirection: steer forget activations to a fixed random vector, keep retain activations in place.

    MSE(activations, coefficient * direction) on forget answers + retain_weight * MSE(activations, initial activations) on
    retain answers, each a mean over tokens and entries. Li et al., WMDP (arXiv 2403.03218), section 4; `retain_weight` is its
    alpha. Activations are outputs of decoder layer `layer`, from 0. Full fine-tuning trains only the feed-forward down
    projections of this layer and the two before it, as in the authors' code; with LoRA all adapter weights are trained.

    Defaults of the authors' code (layer 7, coefficient 20, alpha 100): 7 is about a quarter of the depth of a 7B model, the
    paper's place in larger ones too. Paper and code read every token of plain text; of question and answer, the positions that
    predict answer tokens count (open-unlearning: those of the answer tokens).
    """
    from torch.nn import functional as F

    activations = _needed(inputs.forget_activations, "forget_activations")
    target = hyper["coefficient"] * _needed(inputs.direction, "direction")
    misdirection = inputs.shares.tokens * F.mse_loss(activations, target.expand_as(activations))
    if not hyper["retain_weight"] > 0:
        return misdirection
    initial = _needed(inputs.initial_retain_activations, "initial_retain_activations")
    drift = F.mse_loss(_needed(inputs.retain_activations, "retain_activations"), initial)
    return misdirection + inputs.shares.retain_tokens * (hyper["retain_weight"] * drift)


@dataclass(frozen=True)
class Method:
    """An unlearning objective and its inputs.

    Attributes:
        loss: The objective, its means weighted by `LossInputs.shares`.
        hyperparameters: Names and defaults of its hyperparameters.
        needs: Optional fields of `LossInputs` it reads; those of the retain batch only with a retain term.
    """

    loss: Callable[[LossInputs, Hyperparameters], Tensor]
    hyperparameters: Mapping[str, float] = field(default_factory=dict)
    needs: frozenset[str] = frozenset()

    @property
    def refuses(self) -> bool:
        """Return True if the objective reads refusals in place of forget answers."""
        return "refusal_logp" in self.needs

    def needs_retain(self, hyper: Hyperparameters) -> bool:
        """Return True if the objective has a retain term under these hyperparameters."""
        return hyper.get("retain_weight", 0) > 0


_TOKENS = frozenset({"forget_rows", "forget_targets", "retain_nll"})

METHODS: dict[str, Method] = {
    "grad_ascent": Method(grad_ascent),
    "grad_diff": Method(grad_diff, {"retain_weight": 1.0}, frozenset({"retain_nll"})),
    "kl_min": Method(kl_min, {"retain_weight": 1.0}, frozenset({"retain_kl"})),
    "npo": Method(npo, {"beta": 0.1, "retain_weight": 0.0}, frozenset({"initial_forget_logp", "retain_nll"})),
    "simnpo": Method(simnpo, {"beta": 4.5, "gamma": 0.0, "retain_weight": 8.0}, frozenset({"retain_nll"})),
    "idk_dpo": Method(
        idk_dpo,
        {"beta": 0.1, "retain_weight": 1.0},
        frozenset({"initial_forget_logp", "refusal_logp", "initial_refusal_logp", "retain_nll"}),
    ),
    "idk_nll": Method(idk_nll, {"retain_weight": 1.0}, frozenset({"refusal_logp", "refusal_tokens", "retain_nll"})),
    "wga": Method(wga, {"beta": 1.0, "retain_weight": 1.0}, _TOKENS),
    "sat_imp": Method(sat_imp, {"beta1": 5.0, "beta2": 1.0, "retain_weight": 10.0}, _TOKENS),
    "ce_u": Method(ce_u, {"retain_weight": 0.0}, _TOKENS),
    "undial": Method(undial, {"beta": 10.0, "retain_weight": 0.0}, _TOKENS | {"initial_forget_rows"}),
    "rmu": Method(
        rmu,
        {"layer": 7.0, "coefficient": 20.0, "retain_weight": 100.0},
        frozenset({"forget_activations", "direction", "retain_activations", "initial_retain_activations"}),
    ),
}


@dataclass(frozen=True)
class Bound:
    """Allowed values of a hyperparameter: at least `low`, or above it; any number, or a whole one."""

    low: float = 0.0
    above: bool = False
    whole: bool = False

    def holds(self, value: float) -> bool:
        """Return True if a value is allowed."""
        return (value > self.low or (value == self.low and not self.above)) and not (self.whole and value % 1)

    def __str__(self) -> str:
        """Return ``above 0``, ``at least 0`` or ``a whole number, at least 0``."""
        return f"{'a whole number, ' if self.whole else ''}{'above' if self.above else 'at least'} {self.low:g}"


BOUNDS: dict[str, Bound] = {
    "beta": Bound(above=True),
    "beta1": Bound(),
    "beta2": Bound(),
    "gamma": Bound(),
    "retain_weight": Bound(),
    "layer": Bound(whole=True),
    "coefficient": Bound(above=True),
}
"""Bound of every hyperparameter; a name means the same in all methods."""
