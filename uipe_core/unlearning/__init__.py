"""Train base runs: unlearning methods, their losses and forward passes.

alternates: other answers to forget questions, sampled or given
distributed: one base run in several processes
finetuning: the initial and the retain model from a base model
gradients: cosines and projections of fact gradients
inputs (private): what a loss reads
loss_inputs: the forward passes a loss needs
methods: losses, hyperparameters and bounds of the methods; importing it does not import torch
steering: activations of one decoder layer
training: the training loop of a base run
"""

__all__ = ["alternates", "distributed", "finetuning", "gradients", "loss_inputs", "methods", "steering", "training"]
