"""Parts of the experiment on attacks with known effects: everything is straight in the distance from the initial model."""

import pytest

from search.paper.attacks import ATTACKS, PUSHED, RANDOM, WALK, AttackSettings
from search.spec.runtime import Audit, Relearning
from search.spec.study import load_study

TRAINED = 4
"""Epochs of training: one more than are walked from."""

FAR = 1.0


@pytest.fixture(scope="session")
def attack_settings(place, write_study, tmp_path_factory):
    """Settings of the tiny study: three walked epochs, three values of alpha."""
    study = load_study(write_study(tmp_path_factory.mktemp("attacks") / "tiny.yaml", unlearning={"epochs": 3}))
    relearning = Relearning(learning_rate=0.002, few=2)
    return AttackSettings(
        study.model_copy(update={"audit": Audit(relearning=relearning)}), dict.fromkeys((1, 2, 3), (-0.5, 0.5, FAR)), FAR
    )


@pytest.fixture(scope="session")
def made_up_parts():
    """Makes the parts of a seed.

    A model as far as `along` epochs of training forgets 0.2 and loses 0.05 of utility for each, and an attack undoes 0.5 of it,
    less 0.1 for each; of walks above 0 `above` less, of walks below 0 `below` more, of random steps `pushed` less.
    """

    def make(seed, bases=("grad_diff", "npo"), above=0.0, below=0.0, pushed=0.0, start=0.1):
        def row(kind, epoch, alpha, along, effect):
            forgetting = start + 0.2 * along
            share = 0.5 - 0.1 * along + effect
            distance = epoch * (1 + alpha)
            return {
                "kind": kind,
                "epoch": epoch,
                "alpha": alpha,
                "distance": float(distance),
                "forgetting": forgetting,
                "utility": 0.8 - 0.05 * along,
                "one_minus_truth_share": 0.2 + 0.05 * along,
                "log10_forget_quality": None,
                "collapsed": None,
                "after": dict.fromkeys(ATTACKS, forgetting - share * 0.2 * along) if kind != RANDOM else {},
                "problems": {},
            }

        points = [row(WALK, epoch, 0.0, epoch, 0.0) for epoch in range(1, TRAINED + 1)]
        for epoch in (1, 2, 3):
            points.append(row(WALK, epoch, -0.5, epoch / 2, below))
            points += [row(WALK, epoch, alpha, epoch * (1 + alpha), -above) for alpha in (0.5, FAR)]
            points += [row(PUSHED, epoch, FAR, epoch, -pushed), row(RANDOM, epoch, FAR, 0, 0.0)]
        initial = {"forgetting": start, "utility": 0.8, "one_minus_truth_share": 0.2, "log10_forget_quality": None}
        retain = {**initial, "forgetting": 0.6, "collapsed": None, "after": dict.fromkeys(ATTACKS, 0.55), "problems": {}}
        common = {"seed": seed, "items": {"forget": 20, "retain": 40}, "initial": initial, "problem": None, "seconds": 2.0}
        return [{"base": base, **common, "retain": retain if base == bases[0] else None, "points": points} for base in bases]

    return make
