"""Define the optimisation problem. Pure: no disk, clock, environment or global random state.

hypervolume: reference point and noise ceiling
objectives: what is maximised
pareto: dominance, hypervolume, selection rules
space: the search space and the points known beforehand
stand_ins: numbers made with stand-ins, where a corpus lacks answers
trial: one thing to score
"""

__all__ = ["hypervolume", "objectives", "pareto", "space", "stand_ins", "trial"]
