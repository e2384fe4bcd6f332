"""The `uipe` command. Nothing in `search` imports it.

cluster: submit, status, logs, stop, studies, cluster validate
front_table: the Pareto front as a table
main: the app, exit codes, --log-level, and the commands of a study (run, pareto, select, export, ...)
models: score, metrics
score_once: score one model, or read one evaluation log, outside any study
tables: tables and JSON on standard output
upkeep: dial, plan, doctor
"""

__all__ = ["main"]
