"""Load and prompt causal language models.

gguf: GGUF files as model folders
likelihood: log-likelihoods of answers from logits
loading: models by name or folder, their identity
memory: out-of-memory errors of all devices
prompts: questions and answers as tokens
skeleton: a model without its weights: names, shapes, and where a folder stores them
tiny: small Llamas built and trained here
transformers_compat: internals of transformers, accelerate and peft
configurations (private): whether two configurations compute alike
"""

__all__ = ["gguf", "likelihood", "loading", "memory", "prompts", "skeleton", "tiny", "transformers_compat"]
