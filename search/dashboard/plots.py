"""Draw the front and the curves over alpha as figures of plotly, which the dashboard keeps with a study."""

from typing import TYPE_CHECKING, Any

import pandas as pd

from search.evaluation.controls import CONTROLS
from search.report.data import FORGETTING, UTILITY, ReportData
from search.report.figures import method_colours, shown_bases
from search.report.style import FAINT, INK, PALETTE, alpha, decimal, plain

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

MOST_POINTS = 1000
"""Trials that a figure shows, those of the front first: the dashboard reads it again with every look at the study."""

HEIGHT = 440
"""Pixels, what a figure's place in the dashboard has."""

SYMBOLS = {
    "extrapolation": "triangle-up",
    "unlearned epoch": "circle",
    "interpolation": "triangle-down",
    "initial model": "square",
}
SHAPES = {"D": "diamond-open", "*": "star-open", "P": "cross-open", "+": "cross-thin", "x": "x-thin", "1": "y-down"}
"""Plotly's symbol for each of matplotlib's markers of controls."""


def front_plot(view: ReportData) -> "Figure":
    """Utility over forgetting: trials by method and walk, the front, the controls; collapsed trials in grey."""
    from plotly.graph_objects import Figure, Scatter

    trials, controls = _most(view.by_role(view.trials)), view.by_role(view.controls)
    gone = trials["collapsed"].map(lambda reason: isinstance(reason, str)).astype(bool)
    figure = Figure()
    for kind, control in CONTROLS.items():
        group = controls[controls["kind"] == kind].dropna(subset=[FORGETTING, UTILITY])
        if control.marker is not None and len(group):
            size = 13 if control.marker.size is not None else 8
            look = {
                "symbol": SHAPES.get(control.marker.shape, "asterisk-open"),
                "size": size,
                "color": INK if size > 8 else FAINT,
            }
            look["line"] = {"width": 1.5, "color": look["color"]}
            figure.add_trace(_points(Scatter, group, control.title, look, view))
    for method, colour in method_colours(trials).items():
        group = trials[(trials["method"] == method) & ~gone]
        look = {"symbol": [SYMBOLS[str(walk)] for walk in group["walk"]], "color": colour, "size": 10}
        look["line"] = {"width": [1.2 if chosen else 0 for chosen in group["on_front"]], "color": INK}
        look["opacity"] = [1.0 if chosen else 0.45 for chosen in group["on_front"]]
        figure.add_trace(_points(Scatter, group, plain(method), look, view))
    if gone.any():
        figure.add_trace(_points(Scatter, trials[gone], "collapsed", {"symbol": "circle", "color": "#cccccc", "size": 9}, view))
    front = trials[trials["on_front"]].sort_values([FORGETTING, UTILITY], ascending=[True, False])
    line = {"shape": "vh", "color": INK, "width": 1.3}
    step = Scatter(x=_numbers(front[FORGETTING]), y=_numbers(front[UTILITY]), mode="lines", line=line, name="Pareto front")
    figure.add_trace(step.update(hoverinfo="skip"))
    first, second = view.objectives[:2]
    definition = view.summary["definition"]
    figure.update_layout(
        title="Front and controls",
        xaxis_title=f"{first.title} ({definition})",
        yaxis_title=f"{second.title} ({definition})",
        template="plotly_white",
        height=HEIGHT,
        legend={"font": {"size": 10}},
        margin={"l": 60, "r": 10, "t": 50, "b": 50},
    )
    return figure


def alpha_plot(view: ReportData) -> "Figure":
    """Forgetting and utility over alpha, a line per epoch; the base run is chosen from a list."""
    from plotly.graph_objects import Scatter
    from plotly.subplots import make_subplots

    trials = _most(view.by_role(view.trials))
    titles = [objective.title for objective in view.objectives[:2]]
    figure = make_subplots(rows=1, cols=2, subplot_titles=titles, horizontal_spacing=0.08)
    bases = sorted(shown_bases(trials), key=lambda base: -int(trials.loc[trials["base"] == base, "on_front"].sum()))
    owners = []
    epochs = sorted({int(epoch) for epoch in trials["epoch"].dropna()})
    for base in bases:
        for epoch, group in trials[trials["base"] == base].sort_values("alpha").groupby("epoch"):
            colour = PALETTE[epochs.index(int(str(epoch))) % len(PALETTE)]
            for column, metric in enumerate((FORGETTING, UTILITY), 1):
                look = {"symbol": "circle", "size": [9 if chosen else 6 for chosen in group["on_front"]], "color": colour}
                trace = _points(Scatter, group, f"epoch {epoch}", look, view)
                trace.update(x=_numbers(group["alpha"]), y=_numbers(group[metric]), mode="lines+markers")
                trace.update(line={"color": colour, "width": 1.4}, legendgroup=f"{epoch}", showlegend=column == 1)
                figure.add_trace(trace.update(visible=base == bases[0]), row=1, col=column)
                owners.append(base)
    buttons = [
        {"label": base, "method": "update", "args": [{"visible": [owner == base for owner in owners]}]} for base in bases
    ]
    for column in (1, 2):
        figure.update_xaxes(title_text="alpha", row=1, col=column)
        for place in (-1.0, 0.0):
            figure.add_vline(x=place, line={"color": FAINT, "dash": "dot", "width": 1}, row=1, col=column)
    figure.update_layout(
        title="Curves over alpha",
        template="plotly_white",
        height=HEIGHT,
        updatemenus=[{"buttons": buttons, "x": 0.3, "y": 1.36, "xanchor": "left"}],
        legend={"orientation": "h", "y": -0.18, "font": {"size": 10}},
        margin={"l": 50, "r": 10, "t": 95, "b": 50},
    )
    return figure


def _most(trials: pd.DataFrame) -> pd.DataFrame:
    known = trials.dropna(subset=[FORGETTING, UTILITY])
    return known.sort_values(["on_front", "trial"], ascending=False).head(MOST_POINTS).sort_values("trial", ignore_index=True)


def _points(scatter: Any, group: pd.DataFrame, name: str, look: dict[str, Any], view: ReportData) -> Any:
    return scatter(
        x=_numbers(group[FORGETTING]),
        y=_numbers(group[UTILITY]),
        mode="markers",
        name=name,
        marker=look,
        text=[_hover(row, view) for row in group.to_dict("records")],
        hovertemplate="%{text}<extra></extra>",
    )


def _hover(row: dict[Any, Any], view: ReportData) -> str:
    known = [f"{CONTROLS[row['kind']].title}" if row["kind"] in CONTROLS else f"trial {int(row['trial'])}"]
    if isinstance(row.get("base"), str):
        known.append(f"{row['base']}, epoch {int(row['epoch'])}, alpha {alpha(row['alpha'])}")
    known += [f"{objective.title} {decimal(row[objective.name], objective.places)}" for objective in view.objectives]
    return "<br>".join(each.replace("<", "&lt;") for each in known)


def _numbers(column: pd.Series) -> list[float]:
    """Return plain numbers: plotly would pack arrays in a way that older scripts cannot read."""
    return [round(float(value), 5) for value in column]
