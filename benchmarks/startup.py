"""Processor seconds of the commands that only read: help, validate, and status, pareto and select of a finished study.

Each command is a process of its own; user and system time of the process are added, and the median over repeats is given.
`optuna --help`, `python -c "import optuna"` and `optuna studies` on the same database run in turn with them, as a baseline.
Prints one JSON object.

    python benchmarks/startup.py --out runs/quickstart        # a finished study; without --out a small one is run first
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from machine import machine

ROOT = Path(__file__).resolve().parents[1]
HUB_STUDY = ROOT / "studies" / "tofu_forget10_llama2_7b.yaml"


def commands(out: Path) -> dict[str, list[str]]:
    """Return the command lines that are measured, by name."""
    optuna = str(Path(sys.executable).with_name("optuna"))
    uipe = [sys.executable, "-m", "search"]
    return {
        "python -c 'import optuna'": [sys.executable, "-c", "import optuna"],
        "optuna --help": [optuna, "--help"],
        "optuna studies": [optuna, "studies", "--storage", f"sqlite:///{out / 'study.db'}"],
        "uipe --help": [*uipe, "--help"],
        "uipe status": [*uipe, "status", str(out)],
        "uipe pareto --json": [*uipe, "pareto", str(out), "--json"],
        "uipe select": [*uipe, "select", str(out)],
        "uipe validate": [*uipe, "validate", str(HUB_STUDY)],
    }


def processor_seconds(command: list[str]) -> float:
    """Run a command to its end and return its user and system time."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Measure every command in turn, several times, and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of a finished study")
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        out = given.out or Path(scratch, "study")
        if given.out is None:
            subprocess.run([sys.executable, "-m", "search", "run", "--out", str(out), "--trials", "4"], check=True, cwd=ROOT)
        measured = commands(out.resolve())
        seconds: dict[str, list[float]] = {name: [] for name in measured}
        for command in measured.values():
            processor_seconds(command)  # the first run compiles modules and fills the file cache
        for _ in range(given.repeats):
            for name, command in measured.items():
                seconds[name].append(processor_seconds(command))
    medians = {name: round(statistics.median(values), 3) for name, values in seconds.items()}
    print(json.dumps({"processor_seconds": medians, "repeats": given.repeats, "machine": machine()}))


if __name__ == "__main__":
    main()
