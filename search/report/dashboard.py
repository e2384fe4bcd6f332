"""optuna-dashboard on a study: on loopback only, because it has no authentication."""

import optuna

from search.report.conclusions import conclusions
from search.results.study_result import StudyResult


def write_notes(result: StudyResult) -> None:
    """Put the summary into the study's note, and says in the controls' note what they are."""
    from optuna_dashboard import save_note

    record = result.store.record
    names = {objective.name: objective for objective in result.objectives}
    heads = ["trial", "base run", "epoch", "alpha", *(objective.title for objective in names.values())]
    rows = [
        f"| {row['trial']} | {row['base']} | {row['epoch']} | {row['alpha']:.3f} | "
        + " | ".join(f"{row[name]:.{objective.places}f}" for name, objective in names.items())
        + " |"
        for row in result.front.to_dict("records")
    ]
    table = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}", *rows]
    lines = [
        f"# {record.name}",
        *conclusions(result),
        f"Corpus: {record.corpus.name}. Metric definition: {result.spec.definition}.",
        f"Report: {result.report_path}",
        "\n".join(table),
        f"Controls are in the study **{record.name}.controls**.",
    ]
    save_note(result.study, "\n\n".join(lines))
    save_note(
        result.store.controls,
        f"# Controls of {record.name}\n\nWhat its trials are compared with: the initial and the retain model, the next "
        "epoch of plain training, random directions of the same size, and the initial model at other logit temperatures. "
        "None of them can be chosen, so they are kept out of the study and its Pareto front.",
    )


def serve(storage: optuna.storages.BaseStorage, port: int) -> None:
    """Serve the dashboard on 127.0.0.1 until interrupted."""
    from optuna_dashboard import run_server

    run_server(storage, host="127.0.0.1", port=port)
