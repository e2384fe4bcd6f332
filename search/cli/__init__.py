"""The `uipe` command. Nothing in `search` imports it.

cluster: submit, status, logs, stop, studies, cluster validate
draft: a model without its weights, data of one's own, and a study file for them
goals: dial, compare, compare-published, audit
init: init
main: the app, exit codes, --log-level, and the commands of a study (run, pareto, select, export, ...)
models: score, metrics, finetune
pages: report, watch, dashboard, dossier
reference: objectives, schema
score_once: score one model, or read one evaluation log, outside any study
streams: standard streams that are closed, full or gone
tables: tables, the Pareto front among them, and JSON on standard output
upkeep: plan, doctor
"""

__all__ = ["main"]
