"""Define the optimisation problem. Pure: no disk, clock, environment or global random state.

objectives: what is maximised, reference point and noise ceiling
pareto: dominance, hypervolume, selection rules
space: the search space and the points known beforehand
stand_ins: numbers made with stand-ins, where a corpus lacks answers
trial: one thing to score
"""

__all__ = ["objectives", "pareto", "space", "stand_ins", "trial"]
