"""Load and prompt causal language models.

likelihood: log-likelihoods of answers from logits
loading: models by name or folder, their identity
memory: out-of-memory errors of all devices
prompts: questions and answers as tokens
skeleton: names and shapes of a model without its weights
tiny: small Llamas built and trained here
transformers_compat: internals of transformers, accelerate and peft
weights: where a folder stores a model's parameters
configurations (private): whether two configurations compute alike
"""

__all__ = ["likelihood", "loading", "memory", "prompts", "skeleton", "tiny", "transformers_compat", "weights"]
