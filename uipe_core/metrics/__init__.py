"""Compute metrics from scores: arrays in, numbers out, without torch.

answers: ROUGE, exact memorisation, extraction strength, Min-K% of one answer
collapse: detect broken models
composites: objectives that are harmonic means of item means, and their upper bounds; AUC and privacy
definitions: truth ratio and probability of each code base
multiple_choice: accuracies and forgetting to chance
scores: arrays that scoring yields, and the check for equal items
tofu: forget quality, model utility
uncertainty: permutation test, bootstrap intervals, front probability, power of forget quality
"""

__all__ = ["answers", "collapse", "composites", "definitions", "multiple_choice", "scores", "tofu", "uncertainty"]
