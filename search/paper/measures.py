"""Measure the results of one task for the claims: curves, walks, and numbers taken from them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from search.paper.settings import PaperSettings
from search.paper.statistics import at, best_above, first_below, first_reached, nearest, stall_epoch

CEILING = 0.3
"""Forget quality above which differences are noise, as in studies: everywhere here it counts up to this."""

FLOOR = 0.95
"""Share of the initial model's utility that must be kept where one number is picked from a curve."""

STEP = {"k1": 1.0, "utility": 0.01}
"""What counts as one step in log10 forget quality of K1 and in utility; training within one step of a point matches it."""


class World:
    """The results of one task."""

    def __init__(self, settings: PaperSettings, result: dict[str, Any]) -> None:
        self.settings = settings
        self.seed, self.tuning = result["seed"], result["tuning"]
        self.items: dict[str, int] = result["items"]
        self.points = pd.DataFrame(result["points"])
        for name in ("k1", "k2", "k0"):
            self.points[name] = self.points[name].clip(upper=np.log10(CEILING))
        self.models: dict[str, dict[str, float]] = {row["name"]: row for row in result["models"]}
        self.cosines = {kind: float(np.mean(values)) for kind, values in result["cosines"].items()}
        self.projections = pd.DataFrame(result["projections"])

    def curve(self, model: str, method: str) -> pd.DataFrame:
        """Training curve: a row per epoch, 0 (the initial model) first."""
        rows = self.points[(self.points["model"] == model) & (self.points["method"] == method) & (self.points["alpha"] == 0)]
        return rows.sort_values("epoch").reset_index(drop=True)

    def walk(self, method: str, epoch: int) -> pd.DataFrame:
        """The walk from an epoch of M1: alpha = 0 and all above, ascending."""
        rows = self.points[(self.points["model"] == "M1") & (self.points["method"] == method)]
        return rows[rows["epoch"] == epoch].sort_values("alpha").reset_index(drop=True)

    def walks(self, methods: Sequence[str] | None = None) -> list[tuple[str, int, pd.DataFrame]]:
        """Every walk of M1 by the methods, None for all, as (method, epoch, rows)."""
        epochs = range(1, self.settings.epochs + 1)
        return [(method, epoch, self.walk(method, epoch)) for method in methods or self.settings.methods for epoch in epochs]

    def kept_until(self, model: str, method: str) -> float:
        """Fractional epoch up to which a model keeps `FLOOR` of its utility."""
        utility = self.curve(model, method)["utility"]
        return first_below(utility, FLOOR * float(utility.iloc[0]))

    def stall(self, method: str) -> int:
        """Epoch at which K2 forgetting of M1 stalls, among those walked from."""
        return min(stall_epoch(self.curve("M1", method)["k2"]), self.settings.epochs)


def mean(values: Sequence[float]) -> float:
    """Mean of the values there are; NaN without any."""
    return float(np.mean(values)) if len(values) else float("nan")


def over_m1(world: World, model: str) -> float:
    """Best K1 forget quality with the utility kept, of a model less that of M1; mean over the table's methods."""

    def best(name: str, method: str) -> float:
        curve = world.curve(name, method)
        return best_above(curve["k1"], curve["utility"], FLOOR * float(curve["utility"].iloc[0]))

    return mean([best(model, method) - best("M1", method) for method in world.settings.table_methods])


def inference(world: World) -> float:
    """Fall of the mean log truth ratio of K1, which no one of the two models saw, when K2 is learned."""
    return world.models["retain"]["k1_log_truth_ratio"] - world.models["full_k2"]["k1_log_truth_ratio"]


def rise(world: World, name: str) -> float:
    """Change of a quantity of M1 from the initial model to where the utility is used up; mean over the table's methods."""
    changes = []
    for method in world.settings.table_methods:
        curve = world.curve("M1", method)
        changes.append(at(curve[name], world.kept_until("M1", method)) - float(curve[name].iloc[0]))
    return mean(changes)


def lag(world: World) -> float:
    """Share of the way to the ceiling, K1 less K2; mean over M1's epochs and the table's methods."""

    def way(values: pd.Series) -> Any:
        known = values.to_numpy(dtype=float)
        return (known[1:] - known[0]) / (np.log10(CEILING) - known[0])

    curves = [world.curve("M1", method) for method in world.settings.table_methods]
    return mean([float(np.mean(way(curve["k1"]) - way(curve["k2"]))) for curve in curves])


def projected(world: World, column: str, extrapolated: bool = False, per_length: bool = False) -> float:
    """Mean of a column of the projections on K2 gradients over methods and epochs, at alpha = 0 or over alpha above 0."""
    rows = world.projections[world.projections["set"] == "related"]
    rows = rows[rows["alpha"] > 0] if extrapolated else rows[rows["alpha"] == 0]
    values = rows[column].astype(float)
    return float((values / rows["norm"] if per_length else values).mean())


def doubled(world: World, name: str) -> float:
    """Return what doubling the update adds, mean over walks: the value at alpha = 1 less that at alpha = 0."""
    return mean([_doubled(rows, name) for _, _, rows in world.walks()])


def doubled_from_stall(world: World, name: str) -> float:
    """The same from the epoch at which K2 forgetting stalls, mean over the table's methods."""
    walks = [world.walk(method, world.stall(method)) for method in world.settings.table_methods]
    return mean([_doubled(rows, name) for rows in walks])


def _doubled(rows: pd.DataFrame, name: str) -> float:
    return float(rows.loc[rows["alpha"] == 1.0, name].iloc[0] - rows[name].iloc[0])


def beyond_next(world: World) -> float:
    """Best K1 forget quality along alpha above 0, less that of the next epoch; mean over walks."""
    gains = []
    for method, epoch, rows in world.walks():
        following = world.curve("M1", method)["k1"].iloc[epoch + 1]
        gains.append(float(rows.loc[rows["alpha"] > 0, "k1"].max() - following))
    return mean(gains)


def as_next(world: World, name: str) -> float:
    """A quantity where a walk forgets K1 as well as the next epoch, less that of the next epoch.

    Mean over the walks whose next epoch forgets K1 better than their own and that get as far.
    """
    gains = []
    for method, epoch, rows in world.walks():
        following = world.curve("M1", method).iloc[epoch + 1]
        place = first_reached(rows["k1"], float(following["k1"]))
        if np.isfinite(place) and following["k1"] > rows["k1"].iloc[0]:
            gains.append(at(rows[name], place) - float(following[name]))
    return mean(gains)


def at_same_k1(world: World, name: str, methods: Sequence[str] | None = None) -> float:
    """A quantity of the points with alpha above 0, less that of plain training where it first forgets K1 as well.

    Mean over the points of the methods, None for all, that training gets as far as.
    """
    gains = []
    for method, _, rows in world.walks(methods):
        curve = world.curve("M1", method)
        for point in rows[rows["alpha"] > 0].to_dict("records"):
            place = first_reached(curve["k1"], float(point["k1"]))
            if np.isfinite(place):
                gains.append(float(point[name]) - at(curve[name], place))
    return mean(gains)


def matched_points(world: World) -> list[dict[Any, Any]]:
    """Points with alpha above 0 that plain training matches in K1 and utility, with ``k2_gain`` over training there.

    Matched is a point that the training curve of its method passes within one `STEP`; it is compared with the nearest
    place of that curve, between two epochs by a straight line.
    """
    found = []
    for method, _, rows in world.walks():
        curve = world.curve("M1", method)
        for point in rows[rows["alpha"] > 0].to_dict("records"):
            gain = _gain_over(curve, point)
            if gain is not None:
                found.append({**point, "k2_gain": gain})
    return found


def left_out_gains(world: World) -> list[float]:
    """The same for every trained epoch against its neighbours: what straight lines between epochs get wrong by themselves."""
    gains = []
    for method in world.settings.methods:
        curve = world.curve("M1", method)
        inner = range(1, len(curve) - 1)
        gains += [_gain_over(curve.drop(index=epoch), curve.iloc[epoch].to_dict()) for epoch in inner]
    return [gain for gain in gains if gain is not None]


def _gain_over(curve: pd.DataFrame, point: dict[Any, Any]) -> float | None:
    match = nearest(curve[list(STEP)], [point[name] for name in STEP], list(STEP.values()))
    return float(point["k2"]) - at(curve["k2"], match.position) if match.distance <= 1.0 else None
