"""Tracebacks in a study's folder: written without secrets and colours, logged, and read back in order."""

import logging

import pytest

from search.store.folder import keep_traceback, read_tracebacks
from uipe_core.errors import UserError


def test_a_traceback_is_kept_without_colours_and_passwords(tmp_path):
    text = "\x1b[36mray::train()\x1b[39m\nValueError: postgresql://me:hunter2@host/db\n"
    place = keep_traceback(tmp_path, "base-run-npo[beta=0.1]", text)
    assert place == "errors/base-run-npo[beta=0.1].txt"
    assert (tmp_path / place).read_text() == "ray::train()\nValueError: postgresql://me:***@host/db\n"


def test_tracebacks_are_read_by_number(tmp_path):
    assert read_tracebacks(tmp_path) == {}
    for name in ("trial-10", "trial-9", "control-2", "base-run-npo"):
        keep_traceback(tmp_path, name, f"{name} raised")
    assert list(read_tracebacks(tmp_path)) == ["base-run-npo", "control-2", "trial-9", "trial-10"]
    assert read_tracebacks(tmp_path, 9) == {"trial-9": "trial-9 raised\n"}
    with pytest.raises(UserError, match=r"--trial: 2 has no traceback in .*errors; kept there: base-run-npo, control-2"):
        read_tracebacks(tmp_path, 2)


def test_the_log_level_decides_whether_tracebacks_are_printed(tmp_path, call, capsys):
    study = tmp_path / "none.yaml"
    for level, shown in (("warning", False), ("info", True), ("error", False)):
        assert call("--log-level", level, "validate", study)[0] == 2
        capsys.readouterr()
        keep_traceback(tmp_path, "trial-1", "KeyError: 'missing'")
        assert ("trial-1 failed:\nKeyError: 'missing'" in capsys.readouterr().err) is shown
    assert "--log-level" in call("--log-level", "loud", "validate", study)[2]
    logging.getLogger("search").setLevel(logging.NOTSET)
    logging.getLogger("uipe_core").setLevel(logging.NOTSET)
