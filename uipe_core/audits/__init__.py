"""Test a model for what scores on its corpus do not show; each file says what its test costs, and what it cannot show.

fluency: shares of empty, repeated and garbled texts
membership: whether forget items look like training data, against holdout items, by their log-probabilities
prompts: items asked in other ways
quantisation: weights rounded to int8, int4 or NF4
relearning: a copy fine-tuned again, and how much comes back
texts: what texts of a model have of gold answers
token_scores: per-token log-probabilities of answers
"""

__all__ = ["fluency", "membership", "prompts", "quantisation", "relearning", "texts", "token_scores"]
