"""Find secrets that stand in files or commands with their values."""

import re
from collections.abc import Iterator

SECRET = re.compile(r"[A-Za-z0-9_]*(TOKEN|SECRET|PASSWORD|PASSWD|API_KEY|ACCESS_KEY|_KEY_ID)", re.IGNORECASE)
"""Names of variables whose values are for their owner alone: they end so."""


def is_secret(name: str) -> bool:
    """Return whether a variable of this name holds a secret."""
    return SECRET.fullmatch(name) is not None


def literal_secrets(command: str) -> Iterator[str]:
    """Yield the variables that a shell command sets to a secret itself, not to what another variable or command gives."""
    for name, value in re.findall(r"\b([A-Za-z_][A-Za-z0-9_]*)=[\"']?([^\s;\"']*)", command):
        if is_secret(name) and value and not value.startswith(("$", "`")):
            yield name
