"""Files that come from elsewhere: pipes, devices, deep nesting and byte order marks neither hang nor raise something else."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from uipe_core.storage.content_store import ContentStore
from uipe_core.storage.files import parse_json, read_json, read_regular, whole_folder

DEEP = 100_000


@pytest.fixture
def pipe(tmp_path):
    path = tmp_path / "pipe.json"
    os.mkfifo(path)
    return path


def test_a_pipe_is_refused_at_once(pipe):
    with pytest.raises(OSError, match="is a pipe or a device"):
        read_regular(pipe)


def test_a_device_and_a_folder_are_refused(tmp_path):
    with pytest.raises(OSError, match="is a pipe or a device"):
        read_regular(Path("/dev/zero"))
    with pytest.raises(IsADirectoryError):
        read_regular(tmp_path)


@pytest.mark.parametrize("text", ["[" * DEEP, "[" * DEEP + "]" * DEEP, '{"a":' * DEEP + "1" + "}" * DEEP])
def test_deep_nesting_is_a_value_error(text):
    with pytest.raises(ValueError, match=r"nested too deeply|Expecting"):
        parse_json(text)


def test_a_byte_order_mark_is_no_part_of_the_content(tmp_path):
    path = tmp_path / "bom.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({"a": "ü"}, ensure_ascii=False).encode())
    assert read_json(path) == {"a": "ü"}


def test_what_is_no_json_keeps_its_line():
    with pytest.raises(json.JSONDecodeError) as caught:
        parse_json('{"a": 1,\n "b": }')
    assert caught.value.lineno == 2


def test_half_of_a_surrogate_pair_is_a_value_error_and_a_whole_pair_is_text(tmp_path):
    path = tmp_path / "x.json"
    path.write_text(r'{"name": "\ud83d\ude00", "path": "a\\ud800"}')
    assert read_json(path) == {"name": "\U0001f600", "path": r"a\ud800"}
    for text in (r'{"name": "\ud800"}', r'{"\uDC00x": 1}', r'["\ude00\ud83d"]'):
        path.write_text(text)
        with pytest.raises(ValueError, match="half of a surrogate pair"):
            read_json(path)


def test_files_of_a_whole_folder_are_as_readable_as_the_umask_says(tmp_path):
    for umask, mode in ((0o022, 0o644), (0o077, 0o600), (0o002, 0o664)):
        before = os.umask(umask)
        try:
            with whole_folder(tmp_path / f"{mode:o}") as folder:
                (folder / "inner").mkdir()
                save_file({"a": np.zeros(2)}, folder / "inner" / "weights.safetensors")
                (folder / "README.md").write_text("")
            entry = ContentStore(tmp_path / "store").get_or_make(
                {"mode": mode}, lambda made: save_file({"a": np.zeros(2)}, made / "weights.safetensors")
            )
        finally:
            os.umask(before)
        written = [path for root in (tmp_path / f"{mode:o}", entry) for path in root.rglob("*") if path.is_file()]
        assert {path.name: path.stat().st_mode & 0o777 for path in written} == {path.name: mode for path in written}
        assert len(written) == 4


def test_a_whole_folder_is_there_at_its_end_or_not_at_all(tmp_path):
    with pytest.raises(RuntimeError), whole_folder(tmp_path / "a") as folder:
        (folder / "file").write_text("")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "mine").write_text("")
    with pytest.raises(OSError), whole_folder(tmp_path / "used") as folder:
        (folder / "file").write_text("")
    assert [path.name for path in tmp_path.rglob("*")] == ["used", "mine"]
