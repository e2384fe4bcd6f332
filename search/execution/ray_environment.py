"""Set the environment variables Ray reads on import: token authentication, loopback addresses. Import before Ray."""

import os
from pathlib import Path

from uipe_core.errors import UserError

MODE, TOKEN, TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"

DEFAULT_PATH = "~/.ray/auth_token"

ADVICE = (
    f"put the cluster's token into {DEFAULT_PATH} (or name its file in {TOKEN_PATH}) and set {MODE}=token; a cluster that was "
    f"started without authentication needs {MODE}=disabled"
)


def cluster_token() -> str | None:
    """The token to show a cluster; None where RAY_AUTH_MODE says that it asks for none.

    Looked for where Ray does: RAY_AUTH_TOKEN, the file named by RAY_AUTH_TOKEN_PATH, ``~/.ray/auth_token``. Without
    RAY_AUTH_MODE a token is asked for, and used.

    Raises:
        UserError: If there is none, it cannot be read, or the mode is unknown.
    """
    mode = os.environ.get(MODE, "token").lower()
    if mode == "disabled":
        return None
    if mode != "token":
        raise UserError(f"{MODE}: {mode!r} is unknown; set token or disabled")
    value = os.environ.get(TOKEN, "").strip()
    if value:
        return value
    named = os.environ.get(TOKEN_PATH)
    path = Path(named or DEFAULT_PATH).expanduser()
    try:
        value = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        if named or not isinstance(error, FileNotFoundError):
            raise UserError(f"{path}: the cluster's token cannot be read ({type(error).__name__}); {ADVICE}") from error
    if not value:
        raise UserError(f"no token for the Ray cluster was found; {ADVICE}")
    return value


def settle_authentication() -> None:
    """Makes sure that joining a cluster can authenticate, and says how. Before Ray is imported: it reads its mode only once.

    Raises:
        UserError: As `cluster_token`.
    """
    if cluster_token() is not None:
        os.environ[MODE] = "token"


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
