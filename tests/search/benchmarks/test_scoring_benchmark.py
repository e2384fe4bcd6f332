"""Recorded figures of other code: read, or refused with what is wrong."""

import argparse
import importlib
import json
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[3] / "benchmarks"


@pytest.fixture(scope="module")
def script():
    """The script as a module; its neighbours have names that others may use."""
    names = ("machine", "models", "straightforward", "scoring")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        for name in names:
            patch.delitem(sys.modules, name, raising=False)
        yield importlib.import_module("scoring")
        for name in names:
            sys.modules.pop(name, None)


def test_a_recorded_figure_of_this_processor_is_read(script, tmp_path):
    recorded = {"name": "other code", "cpu": script.machine()["cpu"], "processor_seconds": [3, 2.5]}
    (tmp_path / "figure.json").write_text(json.dumps(recorded))
    found = script.read_recorded(tmp_path / "figure.json", argparse.ArgumentParser())
    assert found == {"name": "other code", "processor_seconds": [3.0, 2.5]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no recorded figure"),
        ("{", "no recorded figure"),
        ("[]", "no recorded figure"),
        ('{"name": "a", "cpu": "b"}', "processor_seconds"),
        ('{"name": "a", "cpu": "b", "processor_seconds": ["fast"]}', "no recorded figure"),
        ('{"name": "a", "cpu": "b", "processor_seconds": []}', "give seconds above 0"),
        ('{"name": "a", "cpu": "b", "processor_seconds": [0]}', "give seconds above 0"),
        ('{"name": "a", "cpu": "b", "processor_seconds": [NaN]}', "give seconds above 0"),
        ('{"name": "a", "cpu": "another", "processor_seconds": [1]}', "is of 'another'"),
    ],
)
def test_what_is_no_figure_or_of_another_processor_ends_the_program(text, message, script, tmp_path, capsys):
    path = tmp_path / "figure.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit) as ended:
        script.read_recorded(path, argparse.ArgumentParser())
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
