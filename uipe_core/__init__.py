"""Unlearning by parameter extrapolation: corpora, models, training, update vectors, scoring, metrics.

Layers, each importing only what is below it:
    audits: tests of a model that scores do not show
    unlearning: train base runs
    scoring, logs, deltas: score models, evaluation logs, update vectors
    metrics, models: metrics from scores (pure), loading and prompting models
    corpora, storage: items to forget and to keep, files and stores
    errors: user-facing errors
"""
