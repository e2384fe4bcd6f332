"""Pushes of exports, to a stand-in of the hub: what is sent, what is refused before it, and what is said when it fails."""

import pytest
import yaml
from hub_server import Hub

from search.publishing.hub import Destination
from search.results.card import CARD_FILE
from uipe_core.errors import UserError


@pytest.fixture
def hub(monkeypatch):
    from huggingface_hub import constants

    running = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", running.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", running.token)
    yield running
    running.close()


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "an export"
    (made / "base_model").mkdir(parents=True)
    (made / CARD_FILE).write_text("---\nlicense: mit\n---\n# A model\n")
    (made / "base_model" / "model.safetensors").write_bytes(bytes(range(256)) * 10)
    return made


def of(repository, public=False, dry_run=False):
    return Destination.of(repository, public=public, dry_run=dry_run)


@pytest.mark.parametrize("public", [False, True])
def test_all_files_arrive_in_a_repository_that_is_private_unless_asked(hub, folder, public):
    (said,) = of("me/model", public).send(folder)
    assert hub.repositories["me/model"] == {
        "visibility": "public" if public else "private",
        "files": {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()},
    }
    assert said == f"pushed 2 files, 2.6 kB to {hub.url}/me/model ({'public' if public else 'private'})"
    assert ("POST", "/api/validate-yaml") in hub.asked


def test_a_second_push_goes_into_the_same_repository(hub, folder):
    of("me/model").send(folder)
    (folder / "more.txt").write_text("more")
    of("me/model").send(folder)
    assert hub.repositories["me/model"]["files"]["more.txt"] == b"more"


@pytest.mark.parametrize("public", [False, True])
def test_a_repository_of_another_visibility_is_not_written_to(hub, folder, public):
    hub.repositories["me/model"] = {"visibility": "private" if public else "public", "files": {}}
    with pytest.raises(UserError, match=r"is private; leave --public out" if public else r"is public; give --public"):
        of("me/model", public).send(folder)
    assert hub.repositories["me/model"]["files"] == {}


def test_a_dry_run_lists_files_and_asks_the_hub_nothing(hub, folder, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    lines = of("me/model", dry_run=True).send(folder)
    assert lines[0] == f"would push 2 files, 2.6 kB to {hub.url}/me/model (private); nothing was sent:"
    assert [line.split() for line in lines[1:-1]] == [
        ["31", "bytes", "README.md"],
        ["2.6", "kB", "base_model/model.safetensors"],
    ]
    assert lines[-1] == f"send it with: hf upload me/model '{folder}' . --private"
    assert hub.asked == [] and hub.repositories == {}


def test_places_on_this_machine_that_would_be_shown_are_named(folder):
    study = {"model": {"initial": "/home/me/model"}, "checkpoints": {"mine": ["/home/me/one"]}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"study": study}))
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "/home/me/model"}')
    lines = of("me/model", dry_run=True).send(folder)
    assert [line for line in lines if line.startswith("note")] == [
        "note: /home/me/model is a place on this machine, and stands in adapter_config.json",
        "note: /home/me/model is a place on this machine, and stands in recipe.yaml",
        "note: /home/me/one is a place on this machine, and stands in recipe.yaml",
    ]


@pytest.mark.parametrize("name", ["a/b/c", "-x-/y", "", "me/a model", "me/..", "me/x.git", "../x", "me/\x1b[31m"])
def test_an_invalid_name_is_refused(name):
    with pytest.raises(UserError, match="no name of a repository; write OWNER/NAME") as caught:
        of(name)
    assert "\x1b" not in str(caught.value)


def test_what_cannot_go_is_refused_before_anything_is_exported(hub, monkeypatch, finished, call, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    export = ("export", finished.out, "--rule", "knee", "--to", tmp_path / "out", "--as", "recipe")
    for options, said in (
        (("--push", "model"), "names no owner; write OWNER/model"),
        (("--public",), "--public: nothing is pushed; add --push"),
        (("--dry-run",), "--dry-run: nothing is pushed; add --push"),
    ):
        code, _, error = call(*export, *options)
        assert code == 2 and said in error
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    code, _, error = call(*export, "--push", "me/model")
    assert code == 2 and "hf auth login" in error and "HF_TOKEN" in error
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    code, _, error = call(*export, "--push", "me/model")
    assert code == 2 and "HF_HUB_OFFLINE is set" in error
    assert not (tmp_path / "out").exists() and hub.asked == []


def test_a_refusal_leaves_the_export_and_says_how_to_push_it_again(hub, folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(UserError, match="401") as caught:
        of("me/model").send(folder)
    again = f"hf upload me/model '{folder}' . --private"
    assert str(caught.value).endswith(f"The export stays in {folder}; push it again with: {again}")
    monkeypatch.setenv("HF_TOKEN", hub.token)
    hub.refuses = "/api/models/me/model/commit"
    with pytest.raises(UserError, match="403"):
        of("me/model").send(folder)
    assert (folder / CARD_FILE).is_file()


def test_without_a_network_the_export_stays(hub, call, finished, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    out = tmp_path / "out"
    code, output, error = call("export", finished.out, "--rule", "knee", "--to", out, "--as", "recipe", "--push", "me/model")
    assert code == 2 and "ConnectError" in error and f"hf upload me/model {out} . --private" in error
    assert (out / "recipe.yaml").is_file() and f"as recipe: {out}" in output


@pytest.mark.slow
def test_the_command_pushes_an_export_whose_card_names_the_repository(finished, launch, tmp_path):
    hub = Hub()
    arguments = ("export", finished.out, "--rule", "knee", "--to", tmp_path / "out", "--as", "model", "--push", "me/model")
    try:
        driver = launch(*arguments, HF_ENDPOINT=hub.url, HF_TOKEN=hub.token, HF_HUB_OFFLINE="0")
        assert driver.wait(120) == 0, driver.stderr
    finally:
        hub.close()
    pushed = hub.repositories["me/model"]
    assert pushed["visibility"] == "private" and f"pushed {len(pushed['files'])} files" in driver.stdout
    assert {"README.md", "recipe.yaml", "config.json", "model.safetensors", "tokenizer.json"} <= set(pushed["files"])
    assert "place = 'me/model'\n" in pushed["files"]["README.md"].decode()
