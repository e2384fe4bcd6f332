"""Score models on a corpus.

batch_sizes: batches that shrink when memory runs out, search for the best size
generation: greedy text by draft and verify
half_precision: bf16 and fp16 products on processors without instructions for them, and how fast bf16 is
lengths: items that a model has too few positions for
multiple_choice: log-likelihood of every letter
packing: a tree of answers in one row, each common beginning once
sampling: texts of a model, greedy or sampled
scorer: losses, greedy text, ROUGE recall and logit scale of a corpus
teacher_forced (private): what is taken of the logits of teacher-forced passes
divergence (private): divergence of a model from the initial one
"""

__all__ = ["batch_sizes", "generation", "half_precision", "lengths", "multiple_choice", "packing", "sampling", "scorer"]
