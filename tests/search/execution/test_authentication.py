"""Which token a cluster is shown, and that none is made up."""

import os

import pytest

from search.execution.ray_compat import PASSED, cluster_token, require_token, seal, take_passed
from uipe_core.errors import UserError


@pytest.fixture(autouse=True)
def nobody(monkeypatch, tmp_path):
    """A home without a token, and no variables."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)


def test_without_a_token_nothing_goes_on():
    with pytest.raises(UserError, match=r"no token .* RAY_AUTH_MODE=disabled"):
        cluster_token()


def test_a_cluster_without_authentication_must_be_named_as_such(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert cluster_token() is None


def test_the_token_is_looked_for_where_ray_does(monkeypatch, tmp_path):
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("of the home\n")
    assert cluster_token() == "of the home"
    (tmp_path / "other").write_text("of the file")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "other"))
    assert cluster_token() == "of the file"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "of the variable")
    assert cluster_token() == "of the variable"


@pytest.mark.parametrize("mode", ["tokens", "yes", ""])
def test_an_unknown_mode_is_refused(mode, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", mode)
    with pytest.raises(UserError, match="set token or disabled"):
        cluster_token()


def test_a_named_file_that_cannot_be_read_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(UserError, match="none: the cluster's token cannot be read"):
        cluster_token()
    (tmp_path / "none").write_text("")
    with pytest.raises(UserError, match="no token"):
        cluster_token()


def test_ray_is_told_the_mode(monkeypatch):
    import os

    monkeypatch.setenv("RAY_AUTH_TOKEN", "abc")
    monkeypatch.setenv("RAY_AUTH_MODE", "Token")
    require_token()
    assert os.environ["RAY_AUTH_MODE"] == "token"


def test_what_is_passed_is_sealed_with_the_clusters_token(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "of the cluster")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    sealed = seal(["HF_TOKEN"])
    assert "hf_secret" not in sealed and seal(["HF_TOKEN"]) != sealed and seal([]) is None
    monkeypatch.delenv("HF_TOKEN")
    take_passed()  # nothing was passed
    monkeypatch.setenv(PASSED, sealed)
    take_passed()
    assert os.environ["HF_TOKEN"] == "hf_secret"
    for token, text in (("of another cluster", sealed), ("of the cluster", sealed[:-9]), ("of the cluster", "no such thing")):
        monkeypatch.setenv("RAY_AUTH_TOKEN", token)
        monkeypatch.setenv(PASSED, text)
        with pytest.raises(UserError, match="another token than this node has"):
            take_passed()


def test_nothing_is_passed_to_a_cluster_without_a_token(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with pytest.raises(UserError, match="all could read it"):
        seal(["HF_TOKEN"])
