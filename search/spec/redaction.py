"""URLs of databases and object stores without the secrets in them: what is shown, logged and stored."""

import re
from urllib.parse import unquote, unquote_plus

HIDDEN = "***"
"""Stands for a password."""

_USER_SECRET = re.compile(r"(:/{1,2}[^:/@\s]*):(\S*)@")
"""One slash is what a path makes of two."""
_QUERY_SECRET = re.compile(r"([?&][^=&#\s]*(?:password|secret|token|key|sig|credential)[^=&#\s]*=)([^&#\s]*)", re.IGNORECASE)


def without_password(url: str) -> str:
    """A URL of a database or an object store that can be shown and stored: passwords, keys and tokens are hidden.

    Hides too much rather than too little where an ``@`` or a ``:`` stands unquoted.
    """
    hidden = _USER_SECRET.sub(rf"\1:{HIDDEN}@", url)
    return _QUERY_SECRET.sub(rf"\1{HIDDEN}", hidden)


def without_secrets_of(text: str, url: str) -> str:
    """A text of somebody else's, such as an error, without the secrets of a URL, written as in the URL or plainly."""
    secrets = [found[2] for pattern in (_USER_SECRET, _QUERY_SECRET) for found in pattern.finditer(url)]
    for form in {change(secret) for secret in secrets if secret for change in (str, unquote, unquote_plus)}:
        text = text.replace(form, HIDDEN)
    return without_password(text)
