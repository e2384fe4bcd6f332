"""Show a study in optuna-dashboard.

annotate: put notes, artifacts and figures into a study, once
artifacts: files of a trial, its curves, its item table and its recipe
notes: what the notes of a study, of its controls and of a trial say
plots: figures of plotly, the front and the curves over alpha
serving: serve the dashboard on loopback
view: a storage as the dashboard sees it
"""

__all__ = ["annotate", "serving"]
