"""Hand results to services outside: models to the Hugging Face hub, studies to experiment trackers.

hub: push an export to a repository of the hub
"""

__all__ = ["hub"]
