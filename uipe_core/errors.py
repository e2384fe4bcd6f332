"""Errors a user meets, each saying what happened and what to do about it."""


class UserError(ValueError):
    """Bad input: names what is wrong, the value found, and the remedy. The command line exits with 2, without traceback."""


class StudyInterrupted(Exception):
    """A study was interrupted; what was done is kept. The command line exits with 130."""


class ExportMismatchError(Exception):
    """An export whose numbers, scored afresh, are not the trial's. The command line exits with 1, without traceback."""


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its type where it says nothing: never empty, and never an error of its own."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
