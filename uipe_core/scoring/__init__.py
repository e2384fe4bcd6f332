"""Score models on a corpus.

batch_sizes: batches that shrink when memory runs out, search for the best size
generation: greedy text by draft and verify
lengths: items that a model has too few positions for
multiple_choice: log-likelihood of every letter
scorer: losses, greedy text, ROUGE recall and logit scale of a corpus
divergence (private): divergence of a model from the initial one
half_precision (private): bf16 and fp16 products on processors without instructions for them
packing (private): a tree of answers in one row, each common beginning once
"""

__all__ = ["batch_sizes", "generation", "lengths", "multiple_choice", "scorer"]
