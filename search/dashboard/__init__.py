"""Serve a study on loopback: in optuna-dashboard, and its report while it runs.

annotate: put notes, artifacts and figures into a study, once
artifacts: files of a trial, its curves, its item table and its recipe
live_report: the report over HTTP, live while the study runs
notes: what the notes of a study, of its controls and of a trial say
plots: figures of plotly, the front and the curves over alpha
serving: serve the dashboard on loopback
view: a storage as the dashboard sees it
"""

__all__ = ["annotate", "live_report", "serving"]
