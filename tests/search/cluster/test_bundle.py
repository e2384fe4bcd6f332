"""What travels to a cluster with a study: its small local inputs, no weights, no password."""

import json
import shutil

import pytest
import yaml

from search.cluster.bundle import STUDY_FILE, build_bundle, submission_id
from search.spec.study import load_study
from uipe_core.errors import UserError

SECRET = "s3cr3t-passw0rd"


def other_notes(parcel):
    """Notes but the one on the power of forget quality."""
    return [note for note in parcel.notes if not note.startswith("Forget quality on 8 items")]


@pytest.fixture
def packed(tmp_path):
    """Packs a study into a fresh folder."""
    count = iter(range(100))

    def pack_into(study):
        folder = tmp_path / f"parcel-{next(count)}"
        folder.mkdir()
        return build_bundle(study, folder)

    return pack_into


@pytest.fixture(scope="session")
def given_model(finished, place):
    """Folder of a small model, as the shared study built it."""
    models = [path.parent for path in place["cache"].rglob("config.json")]
    return models[0]


@pytest.fixture
def pretrained(given_model, finished, write_study, tmp_path):
    """Writes a study on a given model, with the log of its retain model beside it."""
    (tmp_path / "here").mkdir(exist_ok=True)
    shutil.copyfile(finished.out / "logs" / "retain.json", tmp_path / "here" / "retain.json")

    def write(**changes):
        model = {
            "kind": "pretrained",
            "initial": str(given_model),
            "retain": "retain.json",
            "prompt_template": "{question}",
            **changes.pop("model", {}),
        }
        return write_study(tmp_path / "here" / "study.yaml", model=model, **changes)

    return write


def sent(parcel):
    return {str(path.relative_to(parcel.folder)) for path in parcel.folder.rglob("*") if path.is_file()}


def test_a_study_without_inputs_travels_alone(packed, write_study, tmp_path):
    parcel = packed(write_study(tmp_path / "study.yaml"))
    assert sent(parcel) == {STUDY_FILE}
    assert load_study(parcel.folder / STUDY_FILE) == parcel.spec
    assert other_notes(parcel) == []


def test_logs_travel_and_weights_do_not(packed, pretrained, given_model):
    parcel = packed(pretrained(model={"other_retain": ["./retain.json"]}))
    assert sent(parcel) == {STUDY_FILE, "inputs/0-retain.json"}  # once, though two keys name it
    there = yaml.safe_load((parcel.folder / STUDY_FILE).read_text())["model"]
    assert (there["retain"], there["other_retain"]) == ("./inputs/0-retain.json", ["./inputs/0-retain.json"])
    assert there["initial"] == str(given_model)
    assert other_notes(parcel) == [f"model.initial: {given_model} does not travel; every node must see it there"]
    arrived = load_study(parcel.folder / STUDY_FILE)
    assert arrived.fingerprint_payload() == parcel.spec.fingerprint_payload()


def test_a_broken_input_is_found_before_anything_travels(packed, pretrained, tmp_path):
    study = pretrained()
    (tmp_path / "here" / "retain.json").write_text("{}")
    with pytest.raises(UserError, match=r"retain\.json"):
        packed(study)


def test_what_is_too_large_is_refused_before_it_is_copied(packed, pretrained, tmp_path, monkeypatch):
    monkeypatch.setattr("search.cluster.bundle.LIMIT_BYTES", 1000)
    study = pretrained()
    with pytest.raises(UserError, match=r"retain\.json: with it more than"):
        packed(study)
    assert not list(tmp_path.glob("parcel-*/inputs"))


def test_a_password_stays_here(packed, write_study, tmp_path):
    url = f"postgresql://me:{SECRET}@db.example.com/uipe?sslpassword={SECRET}"
    parcel = packed(write_study(tmp_path / "study.yaml", storage=url))
    for path in parcel.folder.rglob("*"):
        assert not path.is_file() or SECRET not in path.read_text()
    assert SECRET not in str(parcel.notes)
    assert "UIPE_STORAGE" in other_notes(parcel)[0]
    assert load_study(parcel.folder / STUDY_FILE).storage == "postgresql://me:***@db.example.com/uipe?sslpassword=***"


def test_on_the_cluster_the_password_comes_from_the_environment(new_store, tmp_path, monkeypatch):
    whole = f"sqlite:///{tmp_path}/study.db?password={SECRET}"
    hidden = whole.replace(SECRET, "***")
    monkeypatch.delenv("UIPE_STORAGE", raising=False)
    with pytest.raises(UserError, match="UIPE_STORAGE"):
        new_store(storage=hidden)
    monkeypatch.setenv("UIPE_STORAGE", f"sqlite:///{tmp_path}/other.db?password={SECRET}")
    with pytest.raises(UserError, match="another storage") as error:
        new_store(storage=hidden)
    assert SECRET not in str(error.value)


def test_a_password_elsewhere_is_refused(packed, write_study, tmp_path):
    study = write_study(tmp_path / "study.yaml", cache={"deltas": f"s3://key:{SECRET}@bucket/deltas"})
    with pytest.raises(UserError, match=r"cache\.deltas") as error:
        packed(study)
    assert SECRET not in str(error.value)


def test_the_id_follows_from_study_inputs_and_output_folder(packed, pretrained, write_study, tmp_path):
    study = write_study(tmp_path / "study.yaml")
    first = submission_id(packed(study), "/srv/a")
    assert first.startswith("tiny-")
    assert len(first) == len("tiny-") + 8
    assert submission_id(packed(study), "/srv/a") == first
    assert submission_id(packed(study), "/srv/b") != first
    more = write_study(
        tmp_path / "study.yaml", search={"trials": 50}, resources={"max_concurrent": 3}, cache={"deltas": str(tmp_path)}
    )
    assert submission_id(packed(more), "/srv/a") == first  # still the same study
    other = write_study(tmp_path / "study.yaml", unlearning={"epochs": 1})
    assert submission_id(packed(other), "/srv/a") != first


def test_another_log_makes_another_study(packed, pretrained, tmp_path):
    study = pretrained()
    first = packed(study).identity
    log = tmp_path / "here" / "retain.json"
    log.write_text(json.dumps(json.loads(log.read_text()), indent=2))
    assert packed(study).identity != first


def test_a_folder_that_cannot_be_read_is_refused(packed, pretrained, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("search.cluster.bundle.shutil.copyfile", refuse)
    with pytest.raises(UserError, match=r"retain\.json: cannot be copied"):
        packed(pretrained())
