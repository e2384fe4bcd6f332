"""Every command in README and the documentation: its options exist, and what needs no hub, GPU or cluster runs."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from search.cli.main import app

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(?:<!-- needs: (?P<needs>[^>]+) -->\n)?^```bash\n(?P<lines>.*?)^```", re.MULTILINE | re.DOTALL)
NEEDS = ("a cluster", "a fresh clone", "benchmarks alone", "SmolLM2", "the hub", "their files")
"""What a block may need that is not there when the tests run; it is written above the block."""
WAITING = ("uipe dashboard", "uipe watch")
"""Commands that end with Ctrl-C."""


def blocks(page):
    """Return what each block of commands needs, and its commands without comments."""
    found = []
    for match in BLOCK.finditer(page.read_text(encoding="utf-8")):
        text = match["lines"].replace("\\\n", " ")
        lines = [re.sub(r"\s+#\s.*$", "", line).strip() for line in text.splitlines()]
        found.append((match["needs"], [line for line in lines if line and not line.startswith("#")]))
    return found


EVERY = [(page, needs, line) for page in PAGES for needs, lines in blocks(page) for line in lines]


@pytest.mark.parametrize(
    ("page", "line"),
    [(page.name, line.strip()) for page, _, line in EVERY if line.strip().startswith("uipe ")],
)
def test_options_of_every_command_exist(page, line):
    words = shlex.split(re.split(r"\s[|>&]\s?", line)[0], comments=True)[1:]
    command, context = typer.main.get_command(app), None
    try:
        while hasattr(command, "commands"):
            context = command.make_context("uipe", list(words), parent=context)
            name, command, words = command.resolve_command(context, [*context._protected_args, *context.args])
        command.make_context(name, list(words), parent=context)
    except typer.Exit as ended:
        assert ended.exit_code == 0  # --help, --version


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_block_needs_is_one_of_a_few_things(page):
    assert {needs for needs, _ in blocks(page)} <= {None, *NEEDS}


@pytest.fixture
def environment(tmp_path):
    """Variables with which `uipe` is the one of this Python."""
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    return {**os.environ, "PATH": path, "UIPE_CACHE": str(tmp_path / "cache")}


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(need is None for need, _ in blocks(page))], ids=lambda page: page.name
)
def test_commands_run_as_written(page, tmp_path, environment):
    for name in ("studies", "benchmarks", "deploy", "docs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("ray_cluster.yaml", "README.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    if page.name != "tutorial.md":  # pages after the tutorial go on with its study
        subprocess.run(["uipe", "run"], cwd=tmp_path, env=environment, check=True, capture_output=True, timeout=600)
    for needs, lines in blocks(page):
        for line in lines if needs is None else ():
            waits = line.startswith(WAITING) or "--serve" in line
            command = f"timeout --preserve-status --signal=INT 25 {line}" if waits else line
            done = subprocess.run(
                ["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900
            )
            assert done.returncode in ((0, 130) if waits else (0,)), f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
