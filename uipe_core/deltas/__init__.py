"""Make, keep and apply update vectors.

adapters: PEFT adapter folders as low-rank update vectors
checkpoints: unlearned checkpoints as base runs
extrapolation: theta(alpha) = theta_init + (1 + alpha) * delta
files: the safetensors file of an update vector
gram: inner products of update vectors
initial_weights: theta_init read from the model's files
store: content-addressed store of base runs
update_vectors: UpdateVector, its norms, random directions
device_copies (private): copies to a GPU through page-locked memory
"""

__all__ = ["adapters", "checkpoints", "extrapolation", "files", "gram", "initial_weights", "store", "update_vectors"]
