"""Hide the secrets in URLs of databases and object stores before they are shown, logged or stored."""

import re
from urllib.parse import unquote, unquote_plus

HIDDEN = "***"
"""Stands for a password."""

_USER_SECRET = re.compile(r"(:/{1,2}[^:/@\s]*):(\S*)@")
"""One slash is what a path makes of two."""
_QUERY_SECRET = re.compile(r"([?&][^=&#\s]*(?:password|secret|token|key|sig|credential)[^=&#\s]*=)([^&#\s]*)", re.IGNORECASE)


def without_password(url: str) -> str:
    """Hide passwords, keys and tokens in a URL of a database or an object store.

    Hides too much rather than too little where an ``@`` or a ``:`` stands unquoted.
    """
    hidden = _USER_SECRET.sub(rf"\1:{HIDDEN}@", url)
    return _QUERY_SECRET.sub(rf"\1{HIDDEN}", hidden)


def without_secrets_of(text: str, url: str) -> str:
    """Hide the secrets of a URL in a text such as an error, encoded as in the URL or plain."""
    secrets = [found[2] for pattern in (_USER_SECRET, _QUERY_SECRET) for found in pattern.finditer(url)]
    for form in {change(secret) for secret in secrets if secret for change in (str, unquote, unquote_plus)}:
        text = text.replace(form, HIDDEN)
    return without_password(text)
