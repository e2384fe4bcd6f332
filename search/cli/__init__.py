"""The `uipe` command. Nothing in `search` imports it.

cluster: submit, status, logs, stop, studies, cluster validate
draft: a study file for a model and data of one's own
finetune: finetune
front_table: the Pareto front as a table
init: init
main: the app, exit codes, --log-level, and the commands of a study (run, pareto, select, export, ...)
models: score, metrics
reference: objectives, schema
score_once: score one model, or read one evaluation log, outside any study
seen: a model without its weights, and data of one's own
tables: tables and JSON on standard output
upkeep: dial, plan, doctor
"""

__all__ = ["main"]
