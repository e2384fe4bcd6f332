"""Read a study's folder: tables, front, selection, intervals, export, status.

audits (private): what audits are to be done, and what they found
comparison: studies next to each other, and to published numbers
constrained: search for the strongest forgetting at a utility floor
export: forms of export, one entry each
finalists: a front held against what is given, and what was scored of its points afterwards
recipe: everything needed to rebuild a trial's model, as a file
selection: choose a trial of the front by a rule
status: how far a study is
study_result: ``StudyResult``
uncertainty: bootstrap intervals and the probability of being on the front
verification (private): exports loaded afresh, scored, and compared with their trials
card (private): the model card of an export
"""

__all__ = ["comparison", "constrained", "export", "recipe", "selection", "status", "study_result", "uncertainty"]
