"""Load extensions from other packages: methods, metric definitions, metrics, corpora, samplers, objectives, controls, exports.

A package names a module under the entry-point group ``uipe_search``. Importing that module adds entries to the registries
(docs/extending.md). It is imported before a study file is read, on the driver and on every worker.
"""

from functools import cache
from importlib.metadata import entry_points

from uipe_core.errors import UserError, first_line

GROUP = "uipe_search"


@cache
def load_plugins() -> tuple[str, ...]:
    """Import the modules of the entry-point group once per process; return their names.

    Raises:
        UserError: A module cannot be imported.
    """
    found = entry_points(group=GROUP)
    for entry in found:
        try:
            entry.load()
        except Exception as error:
            where = "" if entry.dist is None else f" of the package {entry.dist.name}"
            raise UserError(
                f"extension {entry.value!r}{where} cannot be imported: {first_line(error)}; correct or uninstall the package"
            ) from error
    return tuple(entry.value for entry in found)
