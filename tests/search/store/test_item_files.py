"""Item scores of trials: readable at once, on the disk by the end, and what goes wrong is said."""

import errno
import io
import shutil
import threading

import numpy as np
import pytest

from search.execution import run as runner
from search.results.study_result import StudyResult
from search.store import item_scores as item_files
from search.store.item_scores import ItemFiles
from uipe_core.errors import UserError


def content(value):
    buffer = io.BytesIO()
    np.savez(buffer, **{"forget/answer_loss": np.full(3, value)})
    return buffer.getvalue()


@pytest.fixture
def flushed(monkeypatch):
    """Paths in the order in which they were flushed."""
    paths = []
    real = item_files.fsync_path
    monkeypatch.setattr(item_files, "fsync_path", lambda path: (real(path), paths.append(path.name)))
    return paths


def test_scores_can_be_read_while_the_disk_is_still_at_work(tmp_path, monkeypatch):
    goes_on = threading.Event()
    monkeypatch.setattr(item_files, "fsync_path", lambda path: goes_on.wait(30))
    files = ItemFiles(tmp_path)
    for number in range(5):
        files.write(number, content(number))
        assert files.read(number)["forget/answer_loss"].tolist() == [number] * 3
    goes_on.set()
    files.close()


def test_all_is_on_the_disk_once_it_is_closed(tmp_path, flushed):
    files = ItemFiles(tmp_path)
    for number in range(20):
        files.write(number, content(number), control=number % 2 == 1)
    files.close()
    assert flushed == [f"{number:05d}.npz" for number in range(20)]
    assert len(list((tmp_path / "items/controls").iterdir())) == 10


def test_trials_and_controls_of_one_number_are_kept_apart(tmp_path):
    files = ItemFiles(tmp_path)
    files.write(3, content(1.0))
    files.write(3, content(2.0), control=True)
    assert (files.read(3)["forget/answer_loss"] == 1).all()
    assert (files.read(3, control=True)["forget/answer_loss"] == 2).all()
    assert files.read(4) is None
    files.close()


def broken_disk(path):
    raise OSError(errno.EIO, "Input/output error")


def test_a_disk_that_does_not_take_them_is_an_error_of_the_next(tmp_path, monkeypatch):
    monkeypatch.setattr(item_files, "fsync_path", broken_disk)
    files = ItemFiles(tmp_path)
    files.write(0, content(0.0))
    files._pending[0].exception(timeout=30)
    with pytest.raises(OSError, match="Input/output error"):
        files.write(1, content(1.0))
    files.close()


def test_a_disk_that_does_not_take_the_last_is_an_error_of_settling(tmp_path, monkeypatch):
    monkeypatch.setattr(item_files, "fsync_path", broken_disk)
    files = ItemFiles(tmp_path)
    files.write(0, content(0.0))
    with pytest.raises(OSError, match="Input/output error"):
        files.flush()
    files.close()


def test_a_run_whose_scores_did_not_reach_the_disk_says_so(finished, tmp_path, monkeypatch):
    out = shutil.copytree(finished.out, tmp_path / "out", ignore=shutil.ignore_patterns("ray"))
    monkeypatch.setattr(item_files, "fsync_path", broken_disk)
    spec = StudyResult.open(out).runnable_spec()
    with pytest.raises(UserError, match=r"Input/output error.*; correct that .* the same command resumes"):
        runner._at_work(spec, out, True, None, False, lambda run: run.store._items.write(99, content(0.0)))
    monkeypatch.undo()
    assert runner._at_work(spec, out, True, None, False, lambda run: None).report_path.is_file()


def test_a_file_that_somebody_deleted_meanwhile_is_no_error(tmp_path, monkeypatch):
    real = item_files.fsync_path
    monkeypatch.setattr(item_files, "fsync_path", lambda path: (path.unlink(), real(path)))
    files = ItemFiles(tmp_path)
    files.write(0, content(0.0))
    files.close()
    assert files.read(0) is None


def test_a_closed_study_gives_its_folder_back_also_where_the_disk_fails(new_store, made_up_evidence, monkeypatch, caplog):
    monkeypatch.setattr(item_files, "fsync_path", broken_disk)
    store = new_store()
    number, job = store.ask_point(store.spec.search_space())
    store.complete(job, number, made_up_evidence(job), content(0.0))
    store.close()
    assert "did not reach the disk: [Errno 5] Input/output error" in caplog.text
    assert store._lock is not None and not store._lock.is_locked


def test_whatever_byte_of_a_file_is_another_its_scores_are_right_or_said_to_be_damaged(tmp_path):
    whole = io.BytesIO()
    np.savez_compressed(whole, **{"forget/answer_loss": np.arange(3.0), "retain/rouge": np.ones(4)})
    files, said = ItemFiles(tmp_path), 0
    for place in range(len(whole.getvalue())):
        damaged = bytearray(whole.getvalue())
        damaged[place] ^= 0x21
        (tmp_path / "items/trials").mkdir(parents=True, exist_ok=True)
        (tmp_path / "items/trials/00000.npz").write_bytes(damaged)
        try:
            found = files.read(0)
        except UserError as error:
            assert "00000.npz" in str(error) and "delete the file" in str(error)
            said += 1
        else:
            assert all(array.dtype == float and array.tolist() in ([0, 1, 2], [1] * 4) for array in found.values())
    files.close()
    assert said > 50


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 torn", content(1.0)[:-30]])
def test_a_damaged_file_is_named_with_what_to_do(tmp_path, damage):
    files = ItemFiles(tmp_path)
    files.write(7, damage)
    files.close()
    with pytest.raises(UserError, match=r"00007\.npz: the item scores of trial 7 are damaged .*; delete the file"):
        files.read(7)


def test_a_file_that_unpacks_to_gigabytes_is_not_unpacked(tmp_path, monkeypatch):
    files = ItemFiles(tmp_path)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, zeros=np.zeros(2_000_000))
    files.write(3, buffer.getvalue())
    assert len(buffer.getvalue()) < 20_000 and files.read(3)["zeros"].nbytes == 16_000_000
    monkeypatch.setattr(item_files, "MOST_BYTES", 15_000_000)
    monkeypatch.setattr(np, "load", lambda *given, **named: pytest.fail("unpacked"))
    with pytest.raises(UserError, match=r"00003\.npz: .*unpacks to more than"):
        files.read(3)
    files.close()
