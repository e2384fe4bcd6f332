"""Prepare and score trials. Knows no Ray; everything here runs on the driver or on a worker.

audits (private): attacks on models, one entry each
controls: what trials are compared with, one entry each
data_notes (private): counts, lengths, repetitions and stand-ins of a user's own data
evaluator: score one trial on a resident model
harness (private): tasks of lm-evaluation-harness, the objective ``lm_eval``
inputs: check local inputs, items and reference models, load warm-start points
metrics: the numbers of a trial, and metrics that are added
model_checks (private): layers, modules, positions and checkpoints of a study's models
models: tiny and pretrained models: references, sources, identities
prepared: a study with everything that identifies it
pruning: bounds on objectives, and the rivals that dominate them
task: free text and multiple choice
"""

__all__ = ["controls", "evaluator", "inputs", "metrics", "models", "prepared", "pruning", "task"]
