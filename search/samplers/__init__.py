"""Propose points: samplers of Optuna, and a Gaussian process over the update vectors.

acquisition: expected growth of hypervolume, and its maximum
gaussian_process: kernel from the Gram matrix, fit, prediction
gram: Gram matrix of a study's update vectors
line: the Optuna sampler ``line``
outcomes: item scores to smooth curves, and back to objectives
registry: the samplers a study may name
"""

__all__ = ["gram", "line", "outcomes", "registry"]
