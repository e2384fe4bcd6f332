"""Compute metrics from scores: arrays in, numbers out, without torch.

collapse: detect broken models
definitions: truth ratio and probability of each code base
memorization: exact memorisation, extraction strength
multiple_choice: accuracies and forgetting to chance
rouge: ROUGE of the field's tokens, or of words of any script
scores: arrays that scoring yields, and the check for equal items
tofu: forget quality, model utility and its upper bound
uncertainty: permutation test, bootstrap intervals, front probability, power of forget quality
"""

__all__ = ["collapse", "definitions", "memorization", "multiple_choice", "rouge", "scores", "tofu", "uncertainty"]
