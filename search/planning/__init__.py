"""Estimate what a study takes before it is run: `uipe plan`.

plan: arithmetic: time, memory and disk, compared with the machine
planner: gathers the inputs of a plan
quantities: inputs and entries of a plan
timing: durations, measured on this machine or taken from a finished study
"""

__all__ = ["planner"]
