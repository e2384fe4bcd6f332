"""The error a user can mend: it names what is wrong, the value found, and the remedy."""


class UserError(ValueError):
    """Bad input. The command line prints it without a traceback and exits with 2."""
