"""optuna-dashboard on a study: on loopback only, because it has no authentication."""

import optuna

from search.results import StudyResult


def write_notes(result: StudyResult) -> None:
    """Puts the summary into the study's note, and says in the controls' note what they are."""
    from optuna_dashboard import save_note

    record = result.store.record
    front = result.front[["trial", "base", "epoch", "alpha", "log10_forget_quality", "model_utility"]]
    rows = [
        f"| {row['trial']} | {row['base']} | {row['epoch']} | {row['alpha']:.3f} | {row['log10_forget_quality']:.2f} | "
        f"{row['model_utility']:.4f} |"
        for row in front.to_dict("records")
    ]
    lines = [
        f"# {record['name']}",
        *result.verdict(),
        f"Corpus: {record['corpus']['name']}. Metric definition: {record['spec']['scoring']['definition']}.",
        f"Report: {result.report_path}",
        "| trial | base run | epoch | alpha | log10 forget quality | model utility |\n|---|---|---|---|---|---|\n"
        + "\n".join(rows),
        f"Controls are in the study **{record['name']}.controls**.",
    ]
    save_note(result.study, "\n\n".join(lines))
    save_note(
        result.store.controls,
        f"# Controls of {record['name']}\n\nWhat its trials are compared with: the initial and the retain model, the next "
        "epoch of plain training, random directions of the same size, and the initial model at other logit temperatures. "
        "None of them can be chosen, so they are kept out of the study and its Pareto front.",
    )


def serve(storage: optuna.storages.BaseStorage, port: int) -> None:
    """Serves the dashboard on 127.0.0.1 until interrupted."""
    from optuna_dashboard import run_server

    run_server(storage, host="127.0.0.1", port=port)
