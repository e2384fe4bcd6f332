"""Where a command meets Ray: on a cluster it is given, with its token; or on this machine alone, kept from the network."""

import os

from search.execution.ray_environment import settle_authentication

RAY_CLUSTERS = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""Ray's switch for clusters of several nodes, named after the systems on which it is off to begin with."""


def stay_on_loopback() -> None:
    """Makes a Ray that this process starts listen on loopback only.

    Ray takes 127.0.0.1 for "the address others reach me by" and then listens on every interface, token or not; with clusters
    switched off it does not. Ray looks at the switch when it is imported, so this comes first, and only where no cluster is
    to be reached.
    """
    os.environ.setdefault(RAY_CLUSTERS, "0")


def meet_ray(address: str | None) -> None:
    """Settles, before Ray is imported, how it is met: a cluster by address and token, or one of its own on loopback."""
    if address is None:
        stay_on_loopback()
    else:
        settle_authentication()
