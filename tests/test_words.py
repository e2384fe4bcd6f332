"""The words of code, messages and documents are those of the field: no mannered ones, docstrings in the imperative."""

import ast
import re
from pathlib import Path

import pytest

HERE = Path(__file__).parents[1]
BANNED = (
    *("beside", "besides", "anew", "whoever", "nobody", "lies", "told", "mend", "mended", "likeliest"),
    *("of ours", "took us in", "certificate", "certificates"),
)
FIRST_WORDS = ("What ", "Whether ", "Who ")
"""Starts of docstrings that describe a question, not an action."""
EXEMPT = ("docs/log.md", "CHANGELOG.md")

CODE = [path for root in ("search", "uipe_core", "benchmarks") for path in sorted((HERE / root).rglob("*.py"))]
TEXTS = [HERE / "README.md", HERE / "ARCHITECTURE.md", *sorted((HERE / "docs").glob("*.md"))]


def relative(path):
    return path.relative_to(HERE).as_posix()


def is_checked(path):
    name = relative(path)
    return name not in EXEMPT


@pytest.mark.parametrize("path", filter(is_checked, [*CODE, *TEXTS]), ids=relative)
def test_no_banned_word(path):
    pattern = re.compile(rf"\b({'|'.join(BANNED)})\b", re.IGNORECASE)
    lines = enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
    assert [f"{relative(path)}:{number}: {found[0]}" for number, line in lines if (found := pattern.search(line))] == []


@pytest.mark.parametrize("path", filter(is_checked, CODE), ids=relative)
def test_docstrings_say_what_is_done(path):
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = [(node, text) for node in nodes if isinstance(node, kinds) and (text := ast.get_docstring(node))]
    assert [getattr(node, "name", "module") for node, text in docstrings if text.startswith(FIRST_WORDS)] == []
