"""The experiments of UIPE (arXiv 2503.04693) on small models, and attacks on what was forgotten: `uipe paper`. Needs no Ray.

attacks: train, walk and attack one base run of a seed
claims: which claims of the paper hold, with thresholds
experiment: train and measure one seed, and compare gradients with updates
measures: what is measured of a model
page: the HTML page, with paper.html.j2
panels: the data of its figures
pictures: its figures
runner: run seeds in parallel, resume, write the page
settings: sizes, stages and methods of the experiments
statistics: intervals over seeds
survival: which forgetting survives attacks: questions, effects, verdicts
"""

__all__ = ["page", "runner", "settings"]
