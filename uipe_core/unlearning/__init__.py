"""Train base runs: unlearning methods, their losses and forward passes.

distributed: one base run in several processes
finetuning: the initial and the retain model from a base model
gradients: cosines and projections of fact gradients
loss_inputs: the forward passes a loss needs
methods: losses, hyperparameters and bounds of the methods; importing it does not import torch
steering: activations of one decoder layer
training: the training loop of a base run
"""

__all__ = ["distributed", "finetuning", "gradients", "loss_inputs", "methods", "steering", "training"]
