"""The experiments of UIPE (arXiv 2503.04693) on small models: `uipe paper`. Needs no Ray.

claims: which claims of the paper hold, with thresholds
experiment: train and measure one seed
measures: what is measured of a model
page: the HTML page, with paper.html.j2
panels: the data of its figures
pictures: its figures
runner: run seeds in parallel, resume, write the page
settings: sizes, stages and methods of the experiments
statistics: intervals over seeds
weights: distances between update vectors
"""

__all__ = ["page", "runner", "settings"]
