"""The answer of `uipe dial` as facts and as text: every line with its certificate, and how to export the best point."""

from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from search.results.constrained import Scored
    from search.results.dial import Answer
    from search.results.study_result import StudyResult

MEANINGS = {
    "crossed": "the floor lies between the two",
    "peak": "forgetting grows no further before the floor",
    "ceiling": "forgetting is at its noise ceiling",
    "always": "the highest alpha keeps the floor",
    "never": "the lowest alpha does not keep the floor",
    "open": "not settled within its scores",
}


def dial_facts(result: "StudyResult", answer: "Answer") -> dict[str, Any]:
    """The answer ready for JSON; intervals are those of resampled people or authors (`search.results.uncertainty`)."""
    names = [objective.name for objective in result.objectives[:2]]
    scored_trials = {int(row["trial"]): row for row in result.trials.to_dict("records")}
    intervals = {int(row["trial"]): row for row in result.certainty.to_dict("records")}

    def point(scored: "Scored | None") -> dict[str, Any] | None:
        if scored is None:
            return None
        if scored.trial is None:
            return {"trial": None, "alpha": scored.alpha, names[0]: scored.forgetting, names[1]: scored.utility}
        facts: dict[str, Any] = {"trial": scored.trial, "alpha": scored.alpha}
        for name in names:
            facts[name] = float(scored_trials[scored.trial][name])
            sure = intervals.get(scored.trial, {})
            if f"{name}_low" in sure:
                facts[f"{name}_interval"] = [float(sure[f"{name}_{end}"]) for end in ("low", "high")]
        return facts

    lines = [
        {
            "base": line.base,
            "epoch": line.epoch,
            "state": line.standing.state,
            "scores": line.scores,
            "best": point(line.standing.best),
            "last_feasible": point(line.standing.last_feasible),
            "first_infeasible": point(line.standing.first_infeasible),
        }
        for line in answer.lines
    ]
    best = None if answer.best is None else result.rows(result.trials[result.trials["trial"] == answer.best])[0]
    export = (
        None
        if answer.best is None
        else f"uipe export {result.out} --trial {answer.best} --to {result.out}/export/dial --as model"
    )
    facts = {"study": result.store.record["name"], "definition": result.spec.definition, "objectives": names}
    asked = {"floor": answer.floor, "least_utility": answer.question.floor}
    return {**facts, **asked, "best": best, "lines": lines, "export": export}


def print_dial(told: dict[str, Any]) -> None:
    """The answer as text."""
    forgetting, utility = told["objectives"]
    typer.echo(
        f"{utility} of at least {told['least_utility']:.4f}, {told['floor']:g} of the initial model's ({told['definition']})"
    )
    for line in told["lines"]:
        typer.echo(f"\n{line['base']}, epoch {line['epoch']}: {MEANINGS[line['state']]} ({line['scores']} scores)")
        for title in ("best", "last_feasible", "first_infeasible"):
            point = line[title]
            if point is None or (title == "last_feasible" and point == line["best"]):
                continue
            named = "initial model" if point["trial"] is None else f"trial {point['trial']}"
            numbers = "  ".join(
                f"{name} {point[name]:.4f}{_interval(point.get(f'{name}_interval'))}" for name in (forgetting, utility)
            )
            typer.echo(f"  {title.replace('_', ' '):17} alpha {point['alpha']:7.4f}  {numbers}  {named}")
    if told["best"] is None:
        typer.echo("\nno trial keeps so much utility; give a lower --floor")
        return
    best = told["best"]
    where = f"trial {best['trial']} ({best['base']}, epoch {best['epoch']}, alpha {best['alpha']:.4f})"
    typer.echo(f"\nstrongest forgetting: {where}, {forgetting} {best[forgetting]:.4f}, {utility} {best[utility]:.4f}")
    typer.echo(f"export   {told['export']}")


def _interval(ends: list[float] | None) -> str:
    return "" if ends is None else f" [{ends[0]:.4f}, {ends[1]:.4f}]"
