"""The study folder and its database. The driver of a study is the only writer.

ask_tell: the study in memory that a sampler proposes with
checks: one check of a study folder each, some with a repair
database: open a database, retry while it is locked or gone, lock it for one writer
doctor: run all checks of a folder and its caches, and repair
folder: lock of a study's folder, tracebacks in it
item_scores: scores of every item, a file per trial
mirror: an output folder at a URL
optuna_compat: queries of the tables of Optuna's databases
record: ``study.json``
sqlite_reading: read an SQLite file without Optuna's storage
study_store: a study's folder, record and trials
trials: write and read a study's trials
"""

__all__ = ["database", "doctor", "folder", "mirror", "record", "sqlite_reading", "study_store", "trials"]
