"""Every benchmark can be imported: what it takes of the packages is still where it was."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SCRIPTS = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py"))
RECORDED = sorted(path.stem for path in (ROOT / "benchmarks" / "recorded").glob("[!_]*.py"))


@pytest.mark.parametrize(("folder", "names"), [("benchmarks", SCRIPTS), ("", [f"benchmarks.recorded.{n}" for n in RECORDED])])
def test_benchmarks_can_be_imported(folder, names):
    code = f"import importlib; [importlib.import_module(name) for name in {names!r}]"
    paths = f"import sys; sys.path[:0] = [{str(ROOT / folder)!r}, {str(ROOT)!r}]; "
    done = subprocess.run([sys.executable, "-c", paths + code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
