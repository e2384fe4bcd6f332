"""Entries at a URL: published whole, verified on the way in, kept within bounds on each node."""

import contextlib
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import uipe_core
from uipe_core.deltas.store import DeltaStore, EpochResult
from uipe_core.deltas.update_vectors import DENSE, UpdateVector
from uipe_core.errors import UserError
from uipe_core.storage import node_cache, remote_folder
from uipe_core.storage.content_store import BrokenEntryError, content_key, manifest_of
from uipe_core.storage.node_cache import NodeCache
from uipe_core.storage.remote_folder import open_url
from uipe_core.storage.remote_store import RemoteLocation, RemoteStore

INPUTS = {"what": "weights", "seed": 3}
KEY = content_key(INPUTS)

HOLDER = """
import sys, time
from pathlib import Path
from uipe_core.storage.node_cache import NodeCache
path, release = NodeCache(Path(sys.argv[1]), 3000).hold({"name": sys.argv[2]}, 1000, None)
print("held", flush=True)
time.sleep(600)
"""

READER = """
import sys
from uipe_core.storage.remote_store import RemoteLocation, RemoteStore
entry = RemoteStore(RemoteLocation(sys.argv[1], int(sys.argv[2]))).find(sys.argv[3])
print(len(set(entry.read("weights.bin"))))
"""


def make(folder):
    (folder / "deep").mkdir()
    (folder / "weights.bin").write_bytes(bytes(range(256)) * 20)
    (folder / "deep" / "config.json").write_text('{"a": 1}')


def never(folder):
    raise AssertionError("made a second time")


@pytest.fixture
def on_node(tmp_path, monkeypatch):
    """Moves this process to a node: its cache is that node's."""

    def move(name):
        monkeypatch.setenv("UIPE_CACHE", str(tmp_path / name))
        return tmp_path / name / "node"

    move("node-1")
    return move


@pytest.fixture
def root(tmp_path):
    return tmp_path / "remote"


@pytest.fixture
def place(root, on_node):
    return RemoteLocation(f"file://{root}", 10**6)


@pytest.fixture(scope="module")
def s3():
    """URL of a bucket of a server that speaks S3."""
    command = shutil.which("moto_server")
    if command is None:
        pytest.skip("no server that speaks S3 is installed (moto_server)")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "testing")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        options = f"endpoint_override=127.0.0.1:{port}&scheme=http&region=us-east-1"
        server = subprocess.Popen(
            [command, "-H", "127.0.0.1", "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            ends = time.monotonic() + 60
            while time.monotonic() < ends:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                    break
                time.sleep(0.1)
            system, _ = open_url(f"s3://bucket/deltas?{options}&allow_bucket_creation=true")
            system.create_dir("bucket")
            yield f"s3://bucket/{{}}?{options}"
        finally:
            server.terminate()
            server.wait(20)


@contextlib.contextmanager
def small_disk(folder, options="size=64k"):
    folder.mkdir(exist_ok=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, check=False)
    if mounted.returncode != 0:
        pytest.skip("may not mount a small file system here")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def uploads(root, key=KEY):
    return [path for path in (root / key).iterdir() if path.is_dir()] if (root / key).is_dir() else []


def test_what_one_node_publishes_another_reads(place, root, on_node):
    entry = RemoteStore(place).get_or_make(INPUTS, make)
    assert set(entry.files) == {"weights.bin", "deep/config.json"}
    assert list((on_node("node-1") / "staging").glob(KEY)) == []
    other = on_node("node-2")
    found = RemoteStore(place).find(KEY)
    assert found == entry == RemoteStore(place).get_or_make(INPUTS, never)
    with found.reading("weights.bin", "deep/config.json") as folder:
        assert other in folder.parents
        assert (folder / "weights.bin").read_bytes() == bytes(range(256)) * 20
        assert (folder / "deep" / "config.json").read_text() == '{"a": 1}'


def test_finding_in_a_store_that_is_not_there_finds_nothing_and_writes_nothing(place, root):
    assert RemoteStore(place).find(KEY) is None
    assert not root.exists()


def test_threads_of_a_node_make_an_entry_once(place, root):
    calls = []

    def slow(folder):
        calls.append(folder)
        time.sleep(0.1)
        make(folder)

    with ThreadPoolExecutor(4) as pool:
        entries = list(pool.map(lambda _: RemoteStore(place).get_or_make(INPUTS, slow), range(4)))
    assert len(calls) == 1
    assert all(entry == entries[0] for entry in entries)
    assert len(uploads(root)) == 1


def test_of_two_that_publish_at_once_the_first_is_kept(place, root, on_node):
    def while_another_does(folder):
        make(folder)
        on_node("node-2")
        published.append(RemoteStore(place).get_or_make(INPUTS, make))
        on_node("node-1")

    published = []
    assert RemoteStore(place).get_or_make(INPUTS, while_another_does) == published[0]
    assert [path.name for path in uploads(root)] == [published[0].upload]


def test_who_read_a_manifest_goes_on_reading_its_upload(place, root, on_node):
    first = RemoteStore(place).get_or_make(INPUTS, make)
    manifest = root / KEY / "manifest.json"
    manifest.unlink()

    def other(folder):
        (folder / "weights.bin").write_bytes(b"trained elsewhere")

    second = RemoteStore(place).get_or_make(INPUTS, other)
    on_node("node-2")
    assert second.read("weights.bin") == b"trained elsewhere"
    assert first.read("weights.bin") == bytes(range(256)) * 20


def change_manifest(root, **changes):
    path = root / KEY / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest.pop("checksum")
    path.write_text(json.dumps({**manifest_of(**manifest), **changes}))


def resealed(root, **changes):
    path = root / KEY / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest.pop("checksum")
    path.write_text(json.dumps(manifest_of(**{**manifest, **changes})))


FOUND_AT_ONCE = {
    "torn manifest": (lambda root: (root / KEY / "manifest.json").write_text('{"key": '), "manifest is not JSON"),
    "binary manifest": (lambda root: (root / KEY / "manifest.json").write_bytes(b"\xff\xfe"), "manifest is not JSON"),
    "altered manifest": (lambda root: change_manifest(root, files={}), "manifest was altered"),
    "foreign manifest": (lambda root: resealed(root, inputs={"seed": 4}), "entry belongs to another key"),
    "manifest without upload": (lambda root: resealed(root, upload="../../elsewhere"), "manifest names no upload"),
    "escaping name": (
        lambda root: resealed(root, files={"../../stolen": {"bytes": 1, "sha256": "0"}}),
        "names a file outside its entry",
    ),
    "missing file": (lambda root: (uploads(root)[0] / "weights.bin").unlink(), "weights.bin is missing"),
    "truncated file": (lambda root: (uploads(root)[0] / "weights.bin").write_bytes(b"short"), "has 5 bytes, expected 5120"),
}


@pytest.mark.parametrize("case", FOUND_AT_ONCE)
def test_what_is_torn_or_foreign_is_put_aside_and_made_again(case, place, root, caplog):
    spoil, reason = FOUND_AT_ONCE[case]
    RemoteStore(place).get_or_make(INPUTS, make)
    spoil(root)
    with caplog.at_level(logging.WARNING):
        assert RemoteStore(place).find(KEY) is None
    assert reason in caplog.text and "in quarantine" in caplog.text
    assert len(list((root / "quarantine").iterdir())) == 1
    again = RemoteStore(place).get_or_make(INPUTS, make)
    assert again.read("weights.bin") == bytes(range(256)) * 20


def test_a_flipped_bit_is_found_by_who_fetches_and_made_again(place, root, on_node, caplog):
    entry = RemoteStore(place).get_or_make(INPUTS, make)
    path = uploads(root)[0] / "weights.bin"
    content = bytearray(path.read_bytes())
    content[2000] ^= 1
    path.write_bytes(content)
    with pytest.raises(BrokenEntryError, match=r"weights\.bin does not match its checksum"):
        entry.read("weights.bin")
    assert RemoteStore(place).find(KEY) is None
    assert RemoteStore(place).get_or_make(INPUTS, make).read("weights.bin") == bytes(range(256)) * 20
    assert not list((on_node("node-1") / "entries" / "tmp").iterdir())


def test_a_copy_that_goes_bad_on_a_node_is_fetched_again(place, on_node, caplog):
    entry = RemoteStore(place).get_or_make(INPUTS, make)
    with entry.reading("weights.bin") as folder:
        pass
    (folder / "weights.bin").write_bytes(b"x" * 5120)
    # Another process: this one has looked at its copy already.
    command = [sys.executable, "-c", READER, place.url, str(place.node_bytes), KEY]
    environment = {**os.environ, "PYTHONPATH": str(Path(uipe_core.__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.stdout == "256\n", done.stderr
    assert "does not match its checksum" in done.stderr


def test_what_could_not_be_published_is_published_later_and_not_made_again(root, on_node):
    place = RemoteLocation(f"file://{root}", 10**6)

    def big(folder):
        (folder / "weights.bin").write_bytes(os.urandom(200_000))

    with small_disk(root):
        with pytest.raises(UserError, match="No space left on device"):
            RemoteStore(place).get_or_make(INPUTS, big)
        assert RemoteStore(place).find(KEY) is None
        assert uploads(root) == []
    entry = RemoteStore(place).get_or_make(INPUTS, never)
    assert len(entry.read("weights.bin")) == 200_000


def test_a_full_disk_of_the_node_is_said_to_be_the_nodes(place, root, on_node, tmp_path):
    def big(folder):
        (folder / "weights.bin").write_bytes(os.urandom(200_000))

    entry = RemoteStore(place).get_or_make(INPUTS, big)
    on_node("node-2")
    with small_disk(tmp_path / "node-2"), pytest.raises(UserError, match=r"cache folder .*node-2.*No space left"):
        entry.read("weights.bin")
    on_node("node-3")
    assert len(entry.read("weights.bin")) == 200_000


def test_a_read_only_store_is_read_and_not_written(place, root, on_node):
    with small_disk(root, "size=1m"):
        RemoteStore(place).get_or_make(INPUTS, make)
        subprocess.run(["mount", "-o", "remount,ro", root], check=True)
        on_node("node-2")
        assert RemoteStore(place).get_or_make(INPUTS, never).read("deep/config.json") == b'{"a": 1}'
        with pytest.raises(UserError, match="Read-only file system"):
            RemoteStore(place).get_or_make({"seed": 4}, make)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("ftp://host/deltas", "no store that can be used"),
        ("s3://bucket/deltas?nonsense=1", "write it as pyarrow has it"),
        ("file://relative/deltas", "write it as pyarrow has it"),
    ],
)
def test_a_url_that_is_none_is_the_users_error(url, said, on_node):
    with pytest.raises(UserError, match=said):
        RemoteStore(RemoteLocation(url, 1))


def test_a_store_out_of_reach_is_waited_for_and_then_said(on_node, monkeypatch):
    monkeypatch.setattr(remote_folder, "PATIENCE_SECONDS", 0.5)
    calls = []

    def away():
        calls.append(1)
        raise OSError("When reading: AWS Error NETWORK_CONNECTION during GetObject operation: curlCode: 7")

    with pytest.raises(UserError, match=r"NETWORK_CONNECTION.*out of reach for 0 s.*run the same command again"):
        remote_folder.with_retry("s3://bucket/a", away)
    assert len(calls) > 1
    calls.clear()

    def refused():
        calls.append(1)
        raise OSError("When reading: AWS Error ACCESS_DENIED during HeadObject operation: No response body.")

    with pytest.raises(UserError, match="ACCESS_DENIED"):
        remote_folder.with_retry("s3://bucket/a", refused)
    assert len(calls) == 1


class Cache:
    """A cache of three thousand bytes, and entries of a thousand."""

    def __init__(self, root):
        self.cache, self.fetched = NodeCache(root, 3000), []

    def hold(self, name, size=1000):
        def fetch(folder):
            self.fetched.append(name)
            (folder / "file").write_bytes(b"x" * size)

        return self.cache.hold({"name": name}, size, fetch)

    def use(self, name):
        path, release = self.hold(name)
        release()
        time.sleep(0.01)
        return path

    def fetched_anew(self, name):
        before = len(self.fetched)
        self.use(name)
        return len(self.fetched) > before


def test_the_cache_gives_up_what_was_longest_unused(tmp_path):
    cache = Cache(tmp_path)
    # A manifest of some hundred bytes counts too, so two fit.
    first = cache.use("a")
    cache.use("b")
    cache.use("a")
    cache.use("c")
    assert first.is_dir()
    assert cache.fetched == ["a", "b", "c"]
    assert not cache.fetched_anew("a")
    assert cache.fetched_anew("b")
    held = sum(path.stat().st_size for path in (tmp_path / "entries").rglob("*") if path.is_file())
    assert held <= 3000


def test_what_is_in_use_is_never_given_up_not_even_for_another_process(tmp_path):
    cache = Cache(tmp_path)
    cache.use("a")
    command = [sys.executable, "-c", HOLDER, str(tmp_path), "a"]
    environment = {**os.environ, "PYTHONPATH": str(Path(uipe_core.__file__).parents[1])}
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert holder.stdout.readline() == "held\n"
        cache.use("b")
        cache.use("c")
        assert not cache.fetched_anew("a")
    finally:
        holder.kill()
        holder.communicate()
    cache.use("b")
    cache.use("c")
    assert cache.fetched_anew("a")


def test_who_needs_room_waits_until_somebody_lets_go(tmp_path, monkeypatch):
    cache = Cache(tmp_path)
    releases = [cache.hold(name)[1] for name in "ab"]
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(cache.use, "c")
        time.sleep(0.5)
        assert not waiting.done()
        releases[0]()
        waiting.result(20)
    assert cache.fetched == ["a", "b", "c"]
    monkeypatch.setattr(node_cache, "ROOM_SECONDS", 0.3)
    held = cache.hold("c")[1]
    with pytest.raises(UserError, match="full of what other workers of this node are reading"):
        cache.use("d")
    held()
    releases[1]()
    cache.use("d")


def test_what_can_never_fit_is_refused_by_the_name_of_its_key(tmp_path):
    with pytest.raises(UserError, match=r"cache\.node_gigabytes: 3e-06 is too little for an update vector of 4e-06 GB"):
        Cache(tmp_path).hold("huge", 4000)


def training(epochs=2):
    for epoch in range(1, epochs + 1):
        generator = torch.Generator().manual_seed(epoch)
        yield EpochResult(epoch, UpdateVector(DENSE, {"a.weight": torch.randn(20, 30, generator=generator)}), loss=-0.5)


def refused():
    raise AssertionError("trained a second time")
    yield


def test_a_base_run_at_a_url_is_trained_once_and_loaded_on_any_node(place, on_node):
    run = DeltaStore(place).get_or_train(INPUTS, training())
    assert run.folder is None
    on_node("node-2")
    again = DeltaStore(place).get_or_train(INPUTS, refused())
    assert again == run == DeltaStore(place).find(INPUTS)
    expected = [result.update for result in training()]
    for epoch in (1, 2):
        assert torch.equal(again.load(epoch).tensors["a.weight"], expected[epoch - 1].tensors["a.weight"])
    assert [record["norm"] for record in again.epochs] == pytest.approx([update.norm for update in expected])
    with pytest.raises(KeyError):
        again.load(3)


def test_an_update_vector_keeps_its_file_until_it_is_gone(place, on_node):
    run = DeltaStore(RemoteLocation(place.url, 8000)).get_or_train(INPUTS, training(3))
    node = on_node("node-2")

    def kept():
        return {path.stem for path in (node / "entries").glob("*/*.safetensors")}

    update = run.load(1)
    run.load(2)
    run.load(3)
    assert kept() == {"epoch-001", "epoch-003"}
    assert torch.isfinite(update.tensors["a.weight"]).all()
    del update
    run.load(2)
    assert kept() == {"epoch-002", "epoch-003"}


@pytest.mark.slow
def test_an_object_store_does_the_same(s3, on_node, caplog):
    place = RemoteLocation(s3.format("deltas"), 10**6)
    entry = RemoteStore(place).get_or_make(INPUTS, make)
    on_node("node-2")
    assert RemoteStore(place).get_or_make(INPUTS, never) == entry
    assert entry.read("weights.bin") == bytes(range(256)) * 20
    assert RemoteStore(place).find("0" * 32) is None
    run = DeltaStore(place).get_or_train({"seed": 9}, training())
    on_node("node-3")
    assert torch.isfinite(run.load(2).tensors["a.weight"]).all()
    system, root = open_url(place.url)
    with system.open_output_stream(f"{root}/{KEY}/manifest.json") as stream:
        stream.write(b"{")
    assert RemoteStore(place).find(KEY) is None
    assert "manifest is not JSON; its manifest is now in quarantine" in caplog.text
    assert RemoteStore(place).get_or_make(INPUTS, make).upload != entry.upload


@pytest.mark.slow
def test_a_bucket_that_is_not_there_is_the_users_error(s3, on_node):
    with pytest.raises(UserError, match=r"store s3://nobody.*(NO_SUCH_BUCKET|bucket)"):
        RemoteStore(RemoteLocation(s3.format("x").replace("bucket", "nobody"), 1)).get_or_make(INPUTS, make)
