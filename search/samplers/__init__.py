"""Propose points: samplers of Optuna, and a Gaussian process over the update vectors.

acquisition: expected growth of hypervolume, and its maximum
gaussian_process: errors of the scores, fit, prediction
gram: Gram matrix of a study's update vectors
kernels: covariances of points from the Gram matrix, and the fit of their settings
line: the Optuna sampler ``line``
outcomes: item scores to smooth curves, and back to objectives
registry: the samplers a study may name
"""

__all__ = ["gram", "line", "outcomes", "registry"]
