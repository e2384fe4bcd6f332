"""Estimate what a study takes before it is run: `uipe plan`.

fitting: the first of several ways to run a study that fits on a machine
plan: arithmetic: time, memory and disk, compared with the machine
planner: gathers the inputs of a plan
quantities: inputs and entries of a plan
timing: durations, measured on this machine or taken from a finished study
"""

__all__ = ["fitting", "planner"]
