"""Search at a floor of utility: `uipe dial`."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from search.cli.tables import Address, Floor, Json, Trust, echo, print_json, quieten
from search.execution.ray_compat import configure_ray

if TYPE_CHECKING:
    from search.results.constrained import Answer, ScoredPoint
    from search.results.study_result import StudyResult

MEANINGS = {
    "crossed": "the floor is between the two",
    "peak": "forgetting grows no further before the floor",
    "ceiling": "forgetting is at its noise ceiling",
    "always": "the highest alpha keeps the floor",
    "never": "the lowest alpha does not keep the floor",
    "open": "not settled within its scores",
}


def dial_facts(result: "StudyResult", answer: "Answer") -> dict[str, Any]:
    """Return the answer of a constrained search for JSON; intervals as in `search.results.uncertainty`."""
    names = [objective.name for objective in result.objectives[:2]]
    scored_trials = {int(row["trial"]): row for row in result.trials.to_dict("records")}
    intervals = {int(row["trial"]): row for row in result.certainty.to_dict("records")}

    def point(scored: "ScoredPoint | None") -> dict[str, Any] | None:
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
    best = export = None
    if answer.best is not None:
        best = result.rows(result.trials[result.trials["trial"] == answer.best])[0]
        best["beats_initial"] = intervals.get(answer.best, {}).get("beats_initial")
        export = f"uipe export {result.out} --trial {answer.best} --to {result.out}/export/dial --as model"
    facts = {"study": result.store.record.name, "definition": result.spec.definition, "objectives": names}
    asked = {"floor": answer.floor, "least_utility": answer.question.floor}
    return {**facts, **asked, "best": best, "lines": lines, "export": export}


def print_dial(answer: dict[str, Any]) -> None:
    """Print the answer of a constrained search."""
    from search.results.selection import sureness

    forgetting, utility = answer["objectives"]
    share = f"{answer['floor']:g} of the initial model's ({answer['definition']})"
    echo(f"{utility} of at least {answer['least_utility']:.4f}, {share}")
    for line in answer["lines"]:
        echo(f"\n{line['base']}, epoch {line['epoch']}: {MEANINGS[line['state']]} ({line['scores']} scores)")
        for title in ("best", "last_feasible", "first_infeasible"):
            point = line[title]
            if point is None or (title == "last_feasible" and point == line["best"]):
                continue
            named = "initial model" if point["trial"] is None else f"trial {point['trial']}"
            numbers = "  ".join(
                f"{name} {point[name]:.4f}{_interval(point.get(f'{name}_interval'))}" for name in (forgetting, utility)
            )
            echo(f"  {title.replace('_', ' '):17} alpha {point['alpha']:7.4f}  {numbers}  {named}")
    if answer["best"] is None:
        noise = any(line["state"] == "ceiling" for line in answer["lines"])
        why = ": that one is at the noise ceiling itself" if noise else "; give a lower --floor"
        echo(f"\nno trial that keeps so much utility forgets more than the initial model{why}")
        return
    best = answer["best"]
    where = f"trial {best['trial']} ({best['base']}, epoch {best['epoch']}, alpha {best['alpha']:.4f})"
    numbers = f"{forgetting} {best[forgetting]:.4f}, {utility} {best[utility]:.4f}"
    echo(f"\nstrongest forgetting: {where}, {numbers}{sureness(best['beats_initial'])}")
    echo(f"export   {answer['export']}")


def _interval(ends: list[float] | None) -> str:
    return "" if ends is None else f" [{ends[0]:.4f}, {ends[1]:.4f}]"


def dial(
    out: Annotated[str, typer.Argument(metavar="OUT", help="Folder or URL of a study, as given to `uipe run`.")],
    floor: Floor = None,
    address: Address = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Search for the strongest forgetting at a floor of utility.

    The three most promising base epochs get at most six scores each: alpha is bracketed between the last point that keeps
    the floor and the first that does not. The points become trials of the study; the same command resumes.
    """
    configure_ray(address)
    from search.execution.run import dial_study

    quieten()
    result, answer = dial_study(out, floor, address=address, trust_remote_code=trust_remote_code)
    facts = dial_facts(result, answer)
    print_json(facts) if as_json else print_dial(facts)


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command(epilog="Example: uipe dial runs/quickstart --floor 0.95")(dial)
