"""Packages import from each other only through their faces: the modules in ``__all__`` of a package's ``__init__.py``."""

import ast
from pathlib import Path

import pytest

HERE = Path(__file__).parents[1]
ROOTS = ("search", "uipe_core")
PACKAGES = [folder for root in ROOTS for folder in sorted((HERE / root).iterdir()) if (folder / "__init__.py").is_file()]
LARGEST = 12
"""Files of a package, its ``__init__.py`` not counted."""


def face(package):
    """Return the names in ``__all__``."""
    text = (package / "__init__.py").read_text()
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["__all__"]:
            return ast.literal_eval(node.value)
    return []


def imports(path):
    """Yield (module, name) of every import of a file, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from ((node.module, alias.name) for alias in node.names)


def taken_from_others():
    """Yield (file, package, module, name) of every import from another package of the two roots."""
    for root in ROOTS:
        for path in sorted((HERE / root).rglob("*.py")):
            for module, name in imports(path):
                parts = module.split(".")
                package = HERE.joinpath(*parts[:2])
                if parts[0] not in ROOTS or not package.is_dir() or package in path.parents or len(parts) < 2:
                    continue
                if len(parts) == 2:
                    yield path, package, name, None
                else:
                    yield path, package, parts[2], name


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: f"{package.parent.name}.{package.name}")
def test_a_face_lists_at_most_eight_modules_of_its_package(package):
    names = face(package)
    assert 1 <= len(names) <= 8
    assert [name for name in names if not (package / f"{name}.py").is_file()] == []
    assert not any(name.startswith("_") for name in names)


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: f"{package.parent.name}.{package.name}")
def test_a_face_has_a_line_for_every_file(package):
    described = ast.get_docstring(ast.parse((package / "__init__.py").read_text()))
    lines = {line.partition(":")[0].removesuffix(" (private)") for line in described.splitlines() if ":" in line}
    assert {path.stem for path in package.glob("*.py")} - {"__init__"} <= lines


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: f"{package.parent.name}.{package.name}")
def test_a_package_imports_nothing_when_it_is_imported(package):
    assert list(imports(package / "__init__.py")) == []


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: f"{package.parent.name}.{package.name}")
def test_a_package_has_at_most_twelve_files(package):
    files = [path for path in package.iterdir() if path.is_file() and path.name != "__init__.py" and path.suffix != ".pyc"]
    assert len(files) <= LARGEST, sorted(path.name for path in files)


def test_other_packages_import_only_what_a_face_lists():
    faces = {package: face(package) for package in PACKAGES}
    wrong = [
        f"{path.relative_to(HERE)}: {package.parent.name}.{package.name}.{module}"
        for path, package, module, _ in taken_from_others()
        if module not in faces[package]
    ]
    assert wrong == []


def test_no_private_name_is_imported_from_another_package():
    wrong = [
        f"{path.relative_to(HERE)}: {module}.{name}"
        for path, _, module, name in taken_from_others()
        if (name or "").startswith("_")
    ]
    assert wrong == []
