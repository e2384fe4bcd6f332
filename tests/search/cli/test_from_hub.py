"""Data and models that are named by the hub: the hub's own client fetches them from a stand-in of its API, once."""

import json
import os
import subprocess
import sys

import pytest
from hub_files import COMMIT, HubFiles

FORGET = [{"question": f"Where was Ada {number} born?", "answer": f"Ada {number} was born in Lund."} for number in range(6)]
RETAIN = [{"prompt": f"What does Bo {number} paint?", "completion": f"Bo {number} paints red boats."} for number in range(8)]


@pytest.fixture
def hub(tmp_path, save_llama):
    """Two data sets, one of them gated, and a model."""
    forget, retain, model = (tmp_path / "repositories" / name for name in ("forget", "retain", "model"))
    (forget / "data").mkdir(parents=True)
    (forget / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in FORGET))
    (forget / "README.md").write_text("# a card\n")
    retain.mkdir()
    (retain / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in RETAIN))
    save_llama(model)
    server = HubFiles(
        {"datasets/acme/forget": forget, "datasets/acme/retain": retain, "models/acme/llama": model},
        gated=("datasets/acme/retain",),
    )
    yield server
    server.close()


@pytest.fixture
def ask(hub, tmp_path):
    """Runs Python with this hub in the place of the real one, and an empty cache."""

    def run(*words, token="hf_right", **variables):
        given = {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_OFFLINE": "0",
            "UIPE_CACHE": str(tmp_path / "cache"),
        }
        proxies = ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "all_proxy")
        environment = {name: value for name, value in os.environ.items() if name not in proxies and not name.startswith("HF_")}
        environment |= given | ({"HF_TOKEN": token} if token else {}) | variables
        return subprocess.run(
            [sys.executable, *words], env=environment, capture_output=True, text=True, timeout=240, cwd=tmp_path
        )

    return run


@pytest.fixture
def study(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text(
        "schema_version: 1\nname: from_hub\n"
        "corpus: {kind: questions, forget: acme/forget, retain: acme/retain}\n"
        "model: {kind: pretrained, initial: acme/llama, prompt_format: chat, dtype: float32, device: cpu}\n"
        "unlearning: {methods: {grad_diff: {}}, epochs: 1, learning_rate: 0.001}\n"
        "scoring: {max_new_tokens: 8}\n"
    )
    return path


LOAD = """
import sys
import search
try:
    corpus = search.load_study(sys.argv[1]).corpus.load(0)
except search.UserError as error:
    sys.exit(str(error))
print({name: len(items) for name, items in corpus.sets.items()}, corpus.sets["retain"][1].answer)
"""


def test_data_sets_of_the_hub_are_fetched_once_and_read(ask, hub, study):
    done = ask("-c", LOAD, str(study))
    assert done.returncode == 0, done.stderr
    assert done.stdout == "{'forget': 6, 'retain': 8} Bo 1 paints red boats.\n"
    fetched = [each for each in hub.asked if each.startswith("GET") and "/resolve/" in each]
    assert sorted(fetched) == [
        f"GET datasets/acme/forget/resolve/{COMMIT}/data/train.jsonl",
        f"GET datasets/acme/retain/resolve/{COMMIT}/train.jsonl",
    ]  # and not the card
    hub.asked.clear()
    again = ask("-c", LOAD, str(study), HF_HUB_OFFLINE="1")
    assert again.stdout == done.stdout and hub.asked == []


@pytest.mark.parametrize(
    ("token", "source", "said"),
    [
        (None, "acme/forget", "cannot get the data set acme/retain from the hub"),
        ("hf_right", "acme/nothing", "cannot get the data set acme/nothing from the hub"),
    ],
)
def test_what_cannot_be_had_is_one_sentence(ask, study, token, source, said):
    study.write_text(study.read_text().replace("forget: acme/forget", f"forget: {source}"))
    done = ask("-c", LOAD, str(study), token=token)
    assert done.returncode == 1 and said in done.stderr and "check name, network" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_study_of_hub_names_runs(ask, hub, study, tmp_path):
    done = ask("-m", "search", "run", str(study), "--trials", "2", "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"GET acme/llama/resolve/{COMMIT}/model.safetensors" in hub.asked
    assert "Pareto front of from_hub" in done.stdout
