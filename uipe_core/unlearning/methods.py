"""Define unlearning methods: a loss function each, and hyperparameters with defaults and bounds.

Importing this module does not import torch, so that commands that only read a study start fast.

Losses are minimised, in nats (those on activations in squared units of these).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from uipe_core.unlearning.inputs import LossInputs as LossInputs
from uipe_core.unlearning.inputs import Shares as Shares

if TYPE_CHECKING:
    from torch import Tensor


Hyperparameters = Mapping[str, Any]
"""Numbers, and words where the bound has `Bound.choices`."""


def _needed(value: Tensor | None, name: str) -> Tensor:
    if value is None:
        raise ValueError(f"this objective needs {name}")
    return value


def _retain_term(inputs: LossInputs, hyper: Hyperparameters, name: str) -> Tensor | float:
    """Return a mean over retain answer tokens times its weight and share; 0 without weight."""
    weight = hyper["retain_weight"]
    return inputs.shares.retain_tokens * (weight * _needed(getattr(inputs, name), name)) if weight > 0 else 0.0


def _item_kl_term(inputs: LossInputs, hyper: Hyperparameters) -> Tensor | float:
    """Return the KL of retain items times its weight and share; 0 without weight. A step has as many as forget items."""
    weight = hyper["retain_weight"]
    return inputs.shares.items * (weight * _needed(inputs.retain_item_kl, "retain_item_kl")) if weight > 0 else 0.0


def grad_ascent(inputs: LossInputs, hyper: Hyperparameters) -> Tensor:
    """Gradient ascent on the forget set: -NLL(forget). TOFU (arXiv 2401.06121), section 4."""
    return -inputs.forget_nll


def grad_diff(inputs: LossInputs, hyper: Hyperparameters) -> Tensor:
    """Gradient difference: -NLL(forget) + retain_weight * NLL(retain). TOFU (arXiv 2401.06121), section 4."""
    return -inputs.forget_nll + _retain_term(inputs, hyper, "retain_nll")


def kl_min(inputs: LossInputs, hyper: Hyperparameters) -> Tensor:
    """KL minimisation: -NLL(forget) + retain_weight * KL(initial || current) on retain items.

    With ``over: item`` the KL is TOFU's equation (arXiv 2401.06121, section 4): a mean over items of each item's mean over all
    tokens, prompt and answer. With ``over: answer`` it is the mean over the batch's answer tokens.
    """
    if hyper["over"] == "answer":
        return -inputs.forget_nll + _retain_term(inputs, hyper, "retain_kl")
    return -inputs.forget_nll + _item_kl_term(inputs, hyper)


def memorize(inputs: LossInputs, hyper: Hyperparameters) -> Tensor:
    """Learn the forget set, to walk the other way: NLL(forget) + retain_weight * KL(initial || current) on retain items.

    Descent, so that nothing collapses in training. Huang et al., model extrapolation (MOX, arXiv 2602.06441): a memorisation
    model that predicts retained data as before, and from it an extrapolation through the initial model. The KL is that of
    `kl_min` with ``over: item``.
    """
    return inputs.forget_nll + _item_kl_term(inputs, hyper)


def task_vector(inputs: LossInputs, hyper: Hyperparameters) -> Tensor:
    """Learn the forget set, to walk the other way: NLL(forget). Ilharco et al., task arithmetic (arXiv 2212.04089)."""
    return inputs.forget_nll


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
    preferred = _needed(inputs.refusal_logp, "refusal_logp") - _needed(inputs.initial_refusal_logp, "initial_refusal_logp")
    forget = inputs.forget_logp - _needed(inputs.initial_forget_logp, "initial_forget_logp")
    preference = -(2 / beta) * F.logsigmoid(beta * (preferred - forget)).mean()
    return inputs.shares.items * preference + _retain_term(inputs, hyper, "retain_nll")


def alt_po(inputs: LossInputs, hyper: Hyperparameters) -> Tensor:
    """Direct preference optimisation of an alternate answer over the forget answer: `idk_dpo` with other facts in the place
    of a refusal.

    The alternates are given, or sampled from the initial model (`uipe_core.unlearning.alternates`). Mekala et al., alternate
    preference optimisation (arXiv 2409.13474), section 3.
    """
    return idk_dpo(inputs, hyper)


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


def pdu(inputs: LossInputs, hyper: Hyperparameters) -> Tensor:
    """Flatten the logits of forget answers under a limit on the retain loss: E (max - mean)^2 + retain_weight * NLL(retain).

    E is the mean over forget answer tokens, of the squared distance of the largest logit from their mean. `retain_weight` is a
    dual variable: this is its first value, and `dual_step` moves it. Entesari et al., constrained entropic unlearning (arXiv
    2506.05314), primal-dual. Open-unlearning's mean is over all positions of the padded batch.
    """
    rows = _needed(inputs.forget_rows, "forget_rows")
    flatness = (rows.amax(dim=1) - rows.mean(dim=1)).square().mean()
    return inputs.shares.tokens * flatness + _retain_term(inputs, hyper, "retain_nll")


def dual_step(hyper: Hyperparameters, retain_nll: float) -> Hyperparameters:
    """Return the hyperparameters of the next step: the weight rises where the retain loss is above its limit, else falls.

    Args:
        hyper: Of this step.
        retain_nll: Its mean NLL per retain answer token, in nats.
    """
    weight = hyper["retain_weight"] + hyper["dual_rate"] * (retain_nll - hyper["retain_limit"])
    return {**hyper, "retain_weight": max(weight, 0.0)}


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
        needs_by: Fields of `needs` it reads only where a hyperparameter has a value: field to (hyperparameter, value).
        reads_forget: It reads fields of the forget answers; where it does not, they take no forward pass, and these are empty.
        alternates: It reads alternate answers where other methods that need `refusal_logp` read refusals.
        after_step: Return the hyperparameters of the next step from those of this one and its mean retain NLL.
        walks_back: The update vector is the negative of what is trained: alpha = 0 is one whole step away from it.
        alpha: Range of alpha where a study names none for the method; None is that of the study.
    """

    loss: Callable[[LossInputs, Hyperparameters], Tensor]
    hyperparameters: Mapping[str, float | str] = field(default_factory=dict)
    needs: frozenset[str] = frozenset()
    needs_by: Mapping[str, tuple[str, float | str]] = field(default_factory=dict)
    reads_forget: bool = True
    alternates: bool = False
    after_step: Callable[[Hyperparameters, float], Hyperparameters] | None = None
    walks_back: bool = False
    alpha: tuple[float, float] | None = None

    @property
    def substitutes(self) -> bool:
        """Return True if the objective reads refusals or alternate answers in place of forget answers."""
        return "refusal_logp" in self.needs

    @property
    def refuses(self) -> bool:
        """Return True if the objective reads refusals in place of forget answers."""
        return self.substitutes and not self.alternates

    def needs_under(self, hyper: Hyperparameters) -> frozenset[str]:
        """Return the optional fields of `LossInputs` the objective reads under these hyperparameters."""
        return frozenset(
            name for name in self.needs if name not in self.needs_by or hyper[self.needs_by[name][0]] == self.needs_by[name][1]
        )

    def needs_retain(self, hyper: Hyperparameters) -> bool:
        """Return True if the objective has a retain term under these hyperparameters."""
        return self.after_step is not None or hyper.get("retain_weight", 0) > 0


_TOKENS = frozenset({"forget_rows", "forget_targets", "retain_nll"})

METHODS: dict[str, Method] = {
    "grad_ascent": Method(grad_ascent),
    "grad_diff": Method(grad_diff, {"retain_weight": 1.0}, frozenset({"retain_nll"})),
    "kl_min": Method(
        kl_min,
        {"retain_weight": 1.0, "over": "item"},
        frozenset({"retain_kl", "retain_item_kl"}),
        {"retain_kl": ("over", "answer"), "retain_item_kl": ("over", "item")},
    ),
    "npo": Method(npo, {"beta": 0.1, "retain_weight": 0.0}, frozenset({"initial_forget_logp", "retain_nll"})),
    "simnpo": Method(simnpo, {"beta": 4.5, "gamma": 0.0, "retain_weight": 8.0}, frozenset({"retain_nll"})),
    "idk_dpo": Method(
        idk_dpo,
        {"beta": 0.1, "retain_weight": 1.0},
        frozenset({"initial_forget_logp", "refusal_logp", "initial_refusal_logp", "retain_nll"}),
    ),
    "alt_po": Method(
        alt_po,
        {"beta": 0.1, "retain_weight": 1.0},
        frozenset({"initial_forget_logp", "refusal_logp", "initial_refusal_logp", "retain_nll"}),
        alternates=True,
    ),
    "idk_nll": Method(
        idk_nll,
        {"retain_weight": 1.0},
        frozenset({"refusal_logp", "refusal_tokens", "retain_nll"}),
        reads_forget=False,
    ),
    "wga": Method(wga, {"beta": 1.0, "retain_weight": 1.0}, _TOKENS),
    "sat_imp": Method(sat_imp, {"beta1": 5.0, "beta2": 1.0, "retain_weight": 10.0}, _TOKENS),
    "ce_u": Method(ce_u, {"retain_weight": 0.0}, _TOKENS),
    "undial": Method(undial, {"beta": 10.0, "retain_weight": 0.0}, _TOKENS | {"initial_forget_rows"}),
    "pdu": Method(
        pdu,
        {"retain_weight": 1.0, "retain_limit": 0.3, "dual_rate": 1.0},
        _TOKENS,
        after_step=dual_step,
    ),
    "rmu": Method(
        rmu,
        {"layer": 7.0, "coefficient": 20.0, "retain_weight": 100.0},
        frozenset({"forget_activations", "direction", "retain_activations", "initial_retain_activations"}),
    ),
    # Ranges that fronts of the quickstart's worlds needed (docs/log.md).
    "memorize": Method(memorize, {"retain_weight": 1.0}, frozenset({"retain_item_kl"}), walks_back=True, alpha=(-1.0, 8.0)),
    "task_vector": Method(task_vector, walks_back=True, alpha=(-1.0, 4.0)),
}


@dataclass(frozen=True)
class Bound:
    """Allowed values of a hyperparameter: at least `low`, or above it; any number, or a whole one; or one of `choices`."""

    low: float = 0.0
    above: bool = False
    whole: bool = False
    choices: tuple[str, ...] = ()

    def holds(self, value: float | str) -> bool:
        """Return True if a value is allowed."""
        if self.choices or isinstance(value, str):
            return value in self.choices
        return (value > self.low or (value == self.low and not self.above)) and not (self.whole and value % 1)

    def __str__(self) -> str:
        """Return ``above 0``, ``at least 0``, ``a whole number, at least 0`` or ``one of item, answer``."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        return f"{'a whole number, ' if self.whole else ''}{'above' if self.above else 'at least'} {self.low:g}"


BOUNDS: dict[str, Bound] = {
    "beta": Bound(above=True),
    "beta1": Bound(),
    "beta2": Bound(),
    "gamma": Bound(),
    "retain_weight": Bound(),
    "retain_limit": Bound(),
    "dual_rate": Bound(above=True),
    "over": Bound(choices=("item", "answer")),
    "layer": Bound(whole=True),
    "coefficient": Bound(above=True),
}
"""Bound of every hyperparameter; a name means the same in all methods."""

FORMER: dict[str, float | str] = {"over": "answer"}
"""Hyperparameters that came later than their methods, and what was done before they could be named."""


def identifying(hyper: Hyperparameters) -> dict[str, Any]:
    """Leave out hyperparameters that have their `FORMER` values, so that what was made before keeps its identity."""
    return {name: value for name, value in hyper.items() if name not in FORMER or value != FORMER[name]}
