"""Count the structure of the code: files, lines, imports, arrows between packages, longest chain. Prints one JSON object.

Imports are import-linter's (grimp), those inside functions and for type checking included. A package is a folder below
`search` or `uipe_core`; files in the two roots count as a package of their own. Run in the root of a checkout.
"""

import json
import sys
from functools import cache
from pathlib import Path

import grimp

ROOTS = ("search", "uipe_core")


def main() -> None:
    """Print the counts of the checkout in the current directory."""
    sys.path.insert(0, str(Path.cwd()))
    graph = grimp.build_graph(*ROOTS, include_external_packages=False, cache_dir=None)
    files = {
        ".".join(path.with_suffix("").parts).removesuffix(".__init__"): path
        for root in ROOTS
        for path in Path(root).rglob("*.py")
    }
    edges = {name: sorted(graph.find_modules_directly_imported_by(name)) for name in files}

    def package(name: str) -> str:
        parts = name.split(".")
        return ".".join(parts[:2]) if Path(*parts[:2]).is_dir() else parts[0]

    on_path: set[str] = set()

    @cache
    def chain(name: str) -> int:
        on_path.add(name)
        longest = max((chain(other) for other in edges[name] if other not in on_path), default=0)
        on_path.discard(name)
        return 1 + longest

    arrows = {(package(name), package(other)) for name, others in edges.items() for other in others}
    texts = {name: path.read_text() for name, path in files.items()}
    counts = {
        "files": sum(bool(text.strip()) for text in texts.values()),
        "package_faces": sum(path.name == "__init__.py" for path in files.values()),
        "lines": sum(len(text.splitlines()) for text in texts.values()),
        "imports_between_files": sum(map(len, edges.values())),
        "packages": len({package(name) for name in files}),
        "package_arrows": sum(one != other for one, other in arrows),
        "longest_import_chain": max(map(chain, files)),
        "most_files_in_a_folder": max(len(list(folder.glob("*.py"))) for folder in {path.parent for path in files.values()}),
    }
    print(json.dumps(counts, indent=1))


if __name__ == "__main__":
    main()
