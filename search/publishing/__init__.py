"""Hand results to services outside: models to the Hugging Face hub, studies to experiment trackers.

hub: push an export to a repository of the hub
trackers (private): runs of mlflow, wandb and trackio, one entry each
tracking: tell trackers of a study while it runs
"""

__all__ = ["hub", "tracking"]
