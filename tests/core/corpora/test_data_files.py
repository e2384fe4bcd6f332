"""Rows of data files as other programs write them."""

import os

import pytest

from uipe_core.corpora.rows import read_rows
from uipe_core.errors import UserError


def written(tmp_path, content):
    path = tmp_path / "items.jsonl"
    path.write_bytes(content)
    return path


def test_a_byte_order_mark_at_the_head_is_ignored(tmp_path):
    path = written(tmp_path, b'\xef\xbb\xbf{"question": "Who?", "answer": "Ann."}\n')
    assert [dict(row.fields) for row in read_rows(path)] == [{"question": "Who?", "answer": "Ann."}]


def test_half_a_character_is_named_with_its_line_and_field(tmp_path):
    path = written(tmp_path, b'{"question": "Who?", "answer": "Ann."}\n{"question": "Who?", "answer": ["Ann \\ud800."]}\n')
    with pytest.raises(UserError, match=r"line 2: field 'answer' has \\ud800, half of a character"):
        list(read_rows(path))


def test_whole_pairs_are_taken(tmp_path):
    path = written(tmp_path, b'{"question": "Who?", "answer": "\\ud83d\\ude00"}\n')
    assert next(read_rows(path)).text("answer") == "\U0001f600"


def test_deep_nesting_and_pipes_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"line 1: not valid JSON \(nested too deeply\)"):
        list(read_rows(written(tmp_path, b'{"question": ' + b"[" * 100_000 + b"\n")))
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(UserError, match="is a pipe or a device"):
        list(read_rows(tmp_path / "pipe.jsonl"))
