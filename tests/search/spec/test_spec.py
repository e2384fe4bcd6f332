"""A study is right as a whole or refused as a whole, with every problem named."""

import json
import pickle
import time
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from search.spec.errors import StudyFileError, _all_keys
from search.spec.study import StudySpec, load_study, parse_study
from search.spec.study_file import quickstart_path, read_settings
from uipe_core.unlearning.methods import METHODS

STUDIES = Path(__file__).parents[3] / "studies"
STAGE = {"epochs": 2, "learning_rate": 0.01, "batch_size": 8}


def people() -> dict[str, Any]:
    return yaml.safe_load((STUDIES / "quickstart.yaml").read_text())


def pretrained() -> dict[str, Any]:
    study = people()
    study["corpus"] = {"kind": "tofu"}
    study["model"] = {
        "kind": "pretrained",
        "initial": "org/full",
        "retain": "org/retain",
        "prompt_template": "{question}\n",
    }
    return study


def tiny_tofu() -> dict[str, Any]:
    study = people()
    study["corpus"] = {"kind": "tofu"}
    study["model"] = {"kind": "tiny", "tokenizer": "bpe", "base": None, "finetune": dict(STAGE)}
    return study


def put(study: dict[str, Any], key: str, value: object) -> dict[str, Any]:
    *above, last = key.split(".")
    here = study
    for part in above:
        here = here.setdefault(part, {})
    here[last] = value
    return study


def deep(corner: dict[str, float]) -> dict[str, Any]:
    return put(people(), "hypervolume.reference_point", corner)


def problems(study: object, folder: Path | None = None) -> dict[str, str]:
    with pytest.raises(StudyFileError) as caught:
        parse_study(study, folder)  # type: ignore[arg-type]
    return {problem.key: problem.message for problem in caught.value.problems}


def write(folder: Path, text: str) -> Path:
    path = folder / "study.yaml"
    path.write_text(text)
    return path


# key, value, what the message must hold besides: the value found, what is allowed, the remedy
DEEP = {"log10_forget_quality": -28.0}
K2 = {"log10_forget_quality": -28.0, "related_log10_forget_quality": -2.0}

BAD_IN_PEOPLE = [
    ("schema_version", 2, ["found 2", "must be one of 1"]),
    ("name", "a/b", ["'a/b'", "letters, digits", "Choose such a name"]),
    ("name", "..", ["'..'", "Choose another name"]),
    ("name", "x" * 65, ["letters, digits"]),
    ("name", 7, ["found 7", "a text", "quotes"]),
    ("seed", -1, ["found -1", "at least 0"]),
    ("seed", 2**32, ["below 4294967296"]),
    ("corpus", ["people"], ["['people']", "mapping"]),
    ("corpus.forget_people", 0, ["found 0", "at least 1"]),
    ("corpus.forget_persons", 6, ["unknown", "Did you mean corpus.forget_people?"]),
    ("corpus.split", "forget01", ["unknown", "belongs to corpus.kind: tofu"]),
    ("model.tokenizer", "wordpiece", ["'wordpiece'", "'word' or 'bpe'", "Choose one"]),
    ("model.vocab_size", 3000, ["found 3000", "Remove vocab_size, or set tokenizer: bpe"]),
    ("model.heads", 3, ["found 3", "hidden_size (64)", "multiple of 6"]),
    ("model.base", None, ["found null", "base stage", "epochs: 12"]),
    ("model.base.epoch", 3, ["Did you mean model.base.epochs?"]),
    ("model.finetune.learning_rate", -0.1, ["found -0.1", "above 0"]),
    ("model.finetune.epochs", 2.0, ["found 2.0", "a whole number", "Write 2."]),
    ("unlearning.methods", {}, ["found {}", "at least one method", "grad_ascent, grad_diff, kl_min, npo"]),
    ("unlearning.methods.grad_asent", {}, ["no method grad_asent", "Did you mean grad_ascent?"]),
    ("unlearning.methods.npo.betta", 1, ["npo does not take betta", "Did you mean beta?"]),
    ("unlearning.methods.grad_ascent.beta", 1, ["grad_ascent does not take beta", "Remove it"]),
    ("unlearning.methods.npo.beta", 0, ["must be above 0", "Choose a value above 0"]),
    ("unlearning.methods.npo.beta", [], ["must not be empty", "at least one value"]),
    ("unlearning.methods.npo.beta", [1, 1.0], ["differ from each other", "Remove the repeated"]),
    ("unlearning.methods.npo.beta", "1", ["found '1'", "a number", "Remove the quotes: write 1."]),
    ("unlearning.methods.kl_min.retain_weight", -1, ["at least 0"]),
    ("unlearning.methods.kl_min.retain_weight", "item", ["found 'item'", "number"]),
    ("unlearning.methods.kl_min.over", "question", ["found 'question'", "one of item, answer"]),
    ("unlearning.methods.kl_min.over", ["item", "item"], ["differ from each other"]),
    ("unlearning.methods.kl_min.over", 1, ["found 1", "one of item, answer"]),
    ("unlearning.methods.simpno", {}, ["no method simpno", "Did you mean simnpo?"]),
    ("unlearning.methods.simnpo", {"delta": 1}, ["simnpo does not take delta", "Allowed: beta, gamma, retain_weight"]),
    ("unlearning.methods.simnpo", {"gamma": -0.5}, ["found -0.5", "must be at least 0"]),
    ("unlearning.methods.simnpo", {"beta": [1, 0]}, ["found 0", "must be above 0"]),
    ("unlearning.methods.idk_dpo", {"gamma": 1}, ["idk_dpo does not take gamma", "Allowed: beta, retain_weight"]),
    ("unlearning.methods.rmu", {"layers": 1}, ["rmu does not take layers", "Did you mean layer?"]),
    ("unlearning.methods.rmu", {"layer": 1.5}, ["found 1.5", "must be a whole number, at least 0", "Choose a whole number"]),
    ("unlearning.methods.rmu", {"layer": -1}, ["found -1", "at least 0"]),
    ("unlearning.methods.rmu", {"coefficient": 0}, ["found 0", "must be above 0"]),
    ("unlearning.methods.kl_min", 3, ["found 3", "mapping"]),
    ("unlearning.epochs", "6", ["found '6'", "a whole number", "Remove the quotes: write 6."]),
    ("unlearning.epochs", True, ["found true", "a whole number", "switches"]),
    ("unlearning.epochs", [5, 6], ["[5, 6]", "lists are for learning_rate"]),
    ("unlearning.epochs", None, ["found null", "a whole number"]),
    ("unlearning.learning_rate", [], ["must not be empty"]),
    ("unlearning.learning_rate", -1e-3, ["found -0.001", "above 0"]),
    ("unlearning.learning_rate", float("nan"), ["found nan", "finite"]),
    ("unlearning.gradient_checkpointing", "yes", ["found 'yes'", "true or false"]),
    ("unlearning.schedule", "cosine", ["'cosine'", "'constant' or 'linear'"]),
    ("unlearning.max_grad_norm", 0, ["above 0"]),
    ("unlearning.adapter", {"target_modules": "all"}, ["found 'all'", "all-linear", "[q_proj, v_proj]"]),
    ("unlearning.adapter", {"dropout": 1}, ["below 1"]),
    ("scoring.definition", "toffu", ["found 'toffu'", "no such definition", "Did you mean tofu? Allowed: tofu"]),
    *(
        ("scoring.batch_size", value, [f"found {said}", "at least 1, or auto", "Write for example 32"])
        for value, said in (
            (0, "0"),
            (-3, "-3"),
            (2.5, "2.5"),
            (True, "true"),
            ("many", "'many'"),
            (None, "null"),
            ([32], "[32]"),
        )
    ),
    ("search.prune", "often", ["'often'", "true or false"]),
    ("search.prune", 1, ["found 1", "true or false"]),
    ("scoring.temperatures", [1.5, 1.5], ["differ"]),
    ("scoring.temperatures", [1], ["initial model itself", "Remove the 1"]),
    ("search.sampler", "TPE", ["Did you mean tpe?"]),
    ("search.sampler", "nsga", ["found 'nsga'", "tpe, nsga2, gp, random", "Did you mean nsga2?"]),
    ("search.trials", -1, ["found -1", "at least 0"]),
    ("search.trails", 60, ["unknown", "Did you mean search.trials?"]),
    ("search.colour", 1, ["unknown", "Allowed here: alpha, trials, sampler"]),
    ("search.alpha.high", -1, ["found -1", "above low (-1)", "Swap the two"]),
    ("search.alpha.high", float("inf"), ["found inf", "finite"]),
    ("hypervolume.forget_quality_cap", 1.5, ["at most 1"]),
    ("split.select", 1.0, ["below 1"]),
    ("split.selct", 0.5, ["Did you mean split.select?"]),
    ("model.other_retain_seeds", [1, 1], ["differ from each other"]),
    ("model.other_retain_seeds", [-1], ["at least 0"]),
    ("search.third_objective", "model_utility", ["'related_log10_forget_quality'"]),
    ("hypervolume.reference_point.log10_forget_quality", 3, ["at most 0"]),
    ("resources.max_concurrent", 0, ["found 0", "at least 1"]),
    ("resources.trial.gpus", 1.5, ["whole GPUs", "Write 2"]),
    ("resources.workers", 2, ["unknown", "max_concurrent, trial, base_run"]),
    ("resources.trial.custom", {"a100": 0}, ["found 0", "above 0"]),
    ("resources.base_run.processes", 0, ["found 0", "at least 1"]),
    ("resources.base_run", {"processes": 2, "gpus": 0.5}, ["one GPU, not on 0.5", "Write gpus: 1, or processes: 1"]),
    ("resources.base_run", {"processes": 2, "gpus": 4}, ["one GPU, not on 4", "Write gpus: 1, or processes: 1"]),
    ("budget.hours", 0, ["found 0", "above 0"]),
    ("budget.plateau", {"trials": 2}, ["are chance", "Write trials: 10"]),
    ("budget.plateau", {"gain": 0.1}, ["missing"]),
    ("budget.failure_rate", 1.5, ["at most 1"]),
    ("search.trials", 10**12, ["found 1000000000000", "at most 1000000"]),
    ("search.trials", 10**400, ["at most 1000000"]),
    ("search.alpha.high", 1e308, ["found 1e+308", "at most 1000."]),
    ("search.alpha_by_method", {"npe": {"high": 3}}, ["trains no npe", "Did you mean npo?"]),
    ("search.alpha_by_method", {"npo": {"low": 1, "high": 0}}, ["found 0", "above low (1)"]),
    ("search.alpha_by_method", {"npo": 3}, ["found 3", "mapping"]),
    ("search.alpha", {"low": 1, "high": 1.0000000000000002}, ["at least 1e-06 above low (1.0)", "Widen"]),
    ("model.hidden_size", 10**400, ["at most 65536"]),
    ("model.layers", 10**400, ["at most 1000"]),
    ("model.other_retain_seeds", list(range(101)), ["101 entries, and 100 are the most", "Give fewer"]),
    ("unlearning.epochs", 10**400, ["at most 10000"]),
    (
        "unlearning",
        {"methods": {"npo": {"beta": list(range(1, 13))}}, "epochs": 9000, "learning_rate": 1e-3},
        ["108000 epochs together, and 100000 are the most"],
    ),
    ("unlearning.learning_rate", 1e30, ["found 1e+30", "at most 1000"]),
    ("unlearning.methods.npo.beta", 1e300, ["at most 1000000000"]),
    ("scoring.batch_size", 10**20, ["at most 1000000"]),
    ("scoring.temperatures", [5e-324], ["found 5e-324", "at least 0.01"]),
    ("resources.max_concurrent", 10**20, ["at most 100000"]),
    ("resources.trial.custom", {"a100": 1e300}, ["at most 1000000000"]),
    ("budget.trial_minutes", 1e-300, ["at least 0.001"]),
    ("hypervolume.reference_point.log10_forget_quality", -1e308, ["at least -1000000"]),
    ("warm_start", ["missing-folder"], ["no folder", "Correct the path"]),
    ("warm_start", 3, ["found 3"]),
    ("storage", "study.db", ["'study.db'", "sqlite:///"]),
    ("cache.models", "", ["must not be empty"]),
    ("trials", 60, ["unknown", "Did you mean search.trials?"]),
    ("Seed", 1, ["Did you mean seed?"]),
]


@pytest.mark.parametrize(("key", "value", "expected"), BAD_IN_PEOPLE, ids=lambda item: str(item)[:40])
def test_bad_value_is_named_with_allowed_values_and_remedy(key: str, value: object, expected: list[str]) -> None:
    found = problems(put(people(), key, value))
    told = {name.split("[")[0]: message for name, message in found.items()}
    assert len(told) == 1
    assert next(iter(told)).startswith(key)
    for part in expected:
        assert part in next(iter(told.values()))


@pytest.mark.parametrize(
    ("study", "key", "value", "expected"),
    [
        (tiny_tofu(), "model.base", STAGE, ["TOFU has no texts", "base: null"]),
        (tiny_tofu(), "model.vocab_size", 10, ["at least 300"]),
        (tiny_tofu(), "corpus.split", "forget02", ["'forget02'", "'forget01', 'forget05' or 'forget10'"]),
        (tiny_tofu(), "corpus.retain_train", "all", ["'retain_perturbed'"]),
        (pretrained(), "model.prompt_template", "[INST] question", ["{question}", "Write for example"]),
        (put(pretrained(), "model.prompt_template", None), "model.prompt_format", "lama3", ["Did you mean llama3?", "phi"]),
        (put(pretrained(), "model.prompt_format", "phi"), "model.prompt_template", "{question}", ["(phi) is given too"]),
        (tiny_tofu(), "model.prompt_format", "phi", ["belongs to model.kind: pretrained"]),
        (tiny_tofu(), "corpus.first_items", 0, ["at least 1"]),
        (
            put(people(), "hypervolume.reference_point", DEEP),
            "hypervolume.forget_quality_cap",
            1e-30,
            ["reference point (-28)"],
        ),
        (
            put(people(), "hypervolume.reference_point", K2),
            "hypervolume.forget_quality_cap",
            1e-3,
            ["Lower the reference point"],
        ),
        (pretrained(), "model.never_finetuned", "", ["must not be empty"]),
        (pretrained(), "model.dtype", "int8", ["'bfloat16'"]),
        (pretrained(), "model.layers", 2, ["belongs to model.kind: tiny"]),
        (pretrained(), "model.revison", "main", ["Did you mean model.revision?"]),
        (pretrained(), "model.kind", "big", ["found 'big'", "tiny, pretrained"]),
        (pretrained(), "model.initial", "", ["must not be empty"]),
    ],
)
def test_bad_value_in_other_kinds(study: dict[str, Any], key: str, value: object, expected: list[str]) -> None:
    found = problems(put(deepcopy(study), key, value))
    assert list(found) == [key]
    for part in expected:
        assert part in found[key]


@pytest.mark.parametrize("key", ["name", "corpus", "model.finetune", "unlearning.methods", "model.finetune.epochs"])
def test_missing_key_is_named(key: str) -> None:
    study = people()
    *above, last = key.split(".")
    here = study
    for part in above:
        here = here[part]
    del here[last]
    assert "missing" in problems(study)[key]


def multiple_choice() -> dict[str, Any]:
    study = put(people(), "corpus", {"kind": "multiple_choice"})
    study["model"] = {"kind": "pretrained", "initial": "org/full", "prompt_template": "{question}\n"}
    return study


@pytest.mark.parametrize("make", [people, tiny_tofu, pretrained, multiple_choice])
def test_every_number_of_a_study_has_a_bound(make: Any) -> None:
    tried = 0
    for path in sorted(set(_all_keys(StudySpec))):
        said = problems_of(make(), path, 1)
        if "unknown" in said or "belongs to" in said:
            continue  # of another kind
        for value in (10**13, 1e300):
            found = problems_of(make(), path, value)
            assert ".".join(path) in found, (path, value, found)
        tried += 1
    assert tried > 40


def problems_of(study: dict[str, Any], path: tuple[str, ...], value: object) -> str:
    here = study
    for part in path[:-1]:
        if not isinstance(here.get(part), dict):
            here[part] = {}
        here = here[part]
    here[path[-1]] = value
    try:
        parse_study(study)
    except StudyFileError as error:
        return str(error)
    return ""


def test_thousands_of_unknown_keys_are_all_named_and_soon(tmp_path: Path) -> None:
    study = people() | {f"key_{number}": number for number in range(5000)}
    started = time.process_time()
    found = problems(study)
    assert time.process_time() - started < 2
    assert len(found) == 5000 and "Allowed here" in found["key_0"] and found["key_4999"].endswith("unknown. Remove it.")


def test_missing_kind_lists_the_kinds() -> None:
    study = people()
    del study["model"]["kind"]
    assert "tiny, pretrained" in problems(study)["model.kind"]


def test_all_problems_come_at_once() -> None:
    study = people()
    bad = {
        "unlearning.epochs": "6",
        "search.trails": 1,
        "search.sampler": "best",
        "model.base": None,
        "model.layers": 0,
        "unlearning.methods.magic": {},
        "corpus.forget_people": True,
    }
    for key, value in bad.items():
        put(study, key, value)
    study["search"]["alpha"] = {"low": 2, "high": -1}
    assert set(problems(study)) == {*bad, "search.alpha.high"}


def test_position_in_a_list_is_named() -> None:
    assert set(problems(put(people(), "unlearning.learning_rate", [1e-3, -1.0]))) == {"unlearning.learning_rate[1]"}


@pytest.mark.parametrize("value", [[], "text", None, 3])
def test_study_that_is_no_mapping_is_refused(value: object) -> None:
    assert "mapping" in problems(value)[""]


def test_whole_numbers_do_for_numbers_and_lists_for_scalars() -> None:
    one, other = people(), people()
    put(one, "unlearning.learning_rate", 1)
    put(other, "unlearning.learning_rate", [1.0])
    assert parse_study(one) == parse_study(other)


class TestFile:
    def test_lines_and_scientific_notation(self, tmp_path: Path) -> None:
        text = (STUDIES / "quickstart.yaml").read_text().replace("learning_rate: 0.001", "learning_rate: 1e-3")
        assert load_study(write(tmp_path, text)).unlearning.learning_rate == (0.001,)
        wrong = text.replace("sampler: line", "smpler: line").replace("epochs: 6", "epochs: six")
        lines = wrong.splitlines()
        places = [next(n for n, line in enumerate(lines, 1) if key in line) for key in ("epochs: six", "smpler: line")]
        with pytest.raises(StudyFileError) as caught:
            load_study(write(tmp_path, wrong))
        assert [problem.place for problem in caught.value.problems] == [f"line {place}" for place in places]
        assert "2 problems" in str(caught.value)
        assert f"unlearning.epochs (line {places[0]}): found 'six'" in str(caught.value)

    @pytest.mark.parametrize(
        ("content", "expected"),
        [
            (b"", "empty"),
            (b"# only a comment\n", "empty"),
            (b"- a\n- b\n", "mapping"),
            (b"just text", "mapping"),
            (b"name: [a\nseed: 1\n", "line 2, column"),
            (b"a: 1\n\tb: 2\n", "line 2"),
            (b"a: 1\n---\nb: 2\n", "single document"),
            (b"name: a\nname: b\n", "name (line 2): this key stands twice, first on line 1. Keep one"),
            (b"search: {trials: 1, trials: 2}\n", "search.trials (line 1): this key stands twice"),
            (b"\x80\x04\x95\x00", "byte 1 is not UTF-8"),
            (b"a: \x00\x01", "not valid YAML"),
            (b"a: !!python/object:os.system x\n", "not valid YAML"),
            (b"a: !!int x\n", "a (line 1): found 'x', which is not what its form or its tag"),
            (b"a: 2024-99-99\n", "a (line 1): found '2024-99-99', which is not"),
            (b"a: &x [*x]\n", "alias contains itself"),
            (b"[" * 5000, "nested too deeply"),
            (b"a" * (2**20 + 1), "text file of at most"),
        ],
    )
    def test_what_is_no_study(self, tmp_path: Path, content: bytes, expected: str) -> None:
        path = tmp_path / "study.yaml"
        path.write_bytes(content)
        with pytest.raises(StudyFileError) as caught:
            load_study(path)
        assert expected in str(caught.value)
        assert str(path) in str(caught.value)

    def test_missing_file_and_folder(self, tmp_path: Path) -> None:
        with pytest.raises(StudyFileError, match="no such file"):
            load_study(tmp_path / "none.yaml")
        with pytest.raises(StudyFileError, match="this is a folder"):
            load_study(tmp_path)
        with pytest.raises(StudyFileError, match="cannot be read"):
            load_study(Path("x" * 5000))

    def test_overrides(self, tmp_path: Path) -> None:
        path = write(tmp_path, yaml.safe_dump(people()))
        spec = load_study(path, {"seed": 3, "trials": 5})
        assert (spec.seed, spec.search.trials) == (3, 5)
        assert load_study(path, {"seed": None, "trials": None}) == load_study(path)
        with pytest.raises(StudyFileError, match=r"unlearning\.seeds\[0\] \(command line\): found -1"):
            load_study(path, {"unlearning.seeds": [-1, 2]})
        with pytest.raises(StudyFileError, match=r"search\.trials \(command line\): found -5"):
            load_study(path, {"trials": -5})

    def test_error_survives_pickling(self, tmp_path: Path) -> None:
        with pytest.raises(StudyFileError) as caught:
            load_study(tmp_path)
        assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


class TestPaths:
    def test_hub_names_stay_and_paths_become_absolute(self, tmp_path: Path) -> None:
        (tmp_path / "files").mkdir()
        (tmp_path / "models" / "full").mkdir(parents=True)
        (tmp_path / "retain.json").write_text("{}")
        study = pretrained()
        study["corpus"]["source"] = "./files"
        study["model"].update(initial="models/full", retain="retain.json")
        study["cache"] = {"models": "not/there/yet"}
        spec = parse_study(study, tmp_path)
        assert spec.corpus.kind == "tofu"
        assert spec.corpus.source == str(tmp_path / "files")
        assert spec.model.kind == "pretrained"
        assert (spec.model.initial, spec.model.retain) == (str(tmp_path / "models/full"), str(tmp_path / "retain.json"))
        assert spec.cache.models == str(tmp_path / "not/there/yet")
        hub = parse_study(pretrained(), tmp_path)
        assert hub.model.kind == "pretrained"
        assert (hub.model.initial, hub.corpus.source) == ("org/full", "locuslab/TOFU")  # type: ignore[union-attr]

    @pytest.mark.parametrize("value", ["./none", "../none", "/none/at/all", "~/none-at-all", "a/b/c", "with space"])
    def test_missing_folder_is_named_with_the_remedy(self, tmp_path: Path, value: str) -> None:
        study = put(put(pretrained(), "corpus.source", value), "model.initial", value)
        found = problems(study, tmp_path)
        assert set(found) == {"corpus.source", "model.initial"}
        assert all(repr(value) in message and "no folder" in message for message in found.values())
        assert "hf download locuslab/TOFU" in found["corpus.source"]
        assert "give a hub name" in found["model.initial"]

    def test_missing_evaluation_log(self, tmp_path: Path) -> None:
        assert "no file" in problems(put(pretrained(), "model.retain", "logs/retain.json"), tmp_path)["model.retain"]

    def test_revision_of_a_folder_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "full").mkdir()
        study = put(put(pretrained(), "model.initial", "./full"), "model.revision", "main")
        assert "Remove it" in problems(study, tmp_path)["model.revision"]


class TestFingerprint:
    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("search.trials", 7),
            ("resources", {"max_concurrent": 3}),
            ("budget", {"hours": 3}),
            ("warm_start", ["."]),
            ("storage", "sqlite:////data/x.db"),
            ("cache", {"models": "elsewhere"}),
            ("tracking", {"mlflow": {"uri": "http://host:5000"}}),
            ("unlearning.methods.kl_min", {"retain_weight": 1, "over": "answer"}),
            ("unlearning.learning_rate", [0.001]),
            ("unlearning.gradient_accumulation", 1),
        ],
    )
    def test_unchanged(self, key: str, value: object) -> None:
        assert parse_study(put(people(), key, value)).fingerprint_payload() == parse_study(people()).fingerprint_payload()

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("seed", 1),
            ("name", "other"),
            ("search.alpha.high", 3),
            ("search.sampler", "random"),
            ("unlearning.methods.kl_min", {"retain_weight": 2, "over": "answer"}),
            ("unlearning.methods.kl_min", {"retain_weight": [1, 2], "over": "answer"}),
            ("unlearning.methods.kl_min", {"over": "item"}),
            ("unlearning.methods.kl_min", {}),
            ("unlearning.methods.kl_min", {"over": ["item", "answer"]}),
            ("scoring.temperatures", []),
            ("model.layers", 3),
            ("hypervolume.forget_quality_cap", 0.2),
        ],
    )
    def test_changed(self, key: str, value: object) -> None:
        assert parse_study(put(people(), key, value)).fingerprint_payload() != parse_study(people()).fingerprint_payload()

    def test_order_in_the_file_does_not_matter(self) -> None:
        study = people()
        study["unlearning"]["methods"] = dict(reversed(study["unlearning"]["methods"].items()))
        turned = parse_study(dict(reversed(study.items())))
        assert turned.variants() == parse_study(people()).variants()
        assert turned.fingerprint_payload() == parse_study(people()).fingerprint_payload()

    def test_local_paths_stay_out_and_hub_names_in(self, tmp_path: Path) -> None:
        payloads = []
        for name in ("one", "two"):
            folder = tmp_path / name
            (folder / "files").mkdir(parents=True)
            study = put(put(pretrained(), "corpus.source", "./files"), "model.initial", "./files")
            payloads.append(parse_study(study, folder).fingerprint_payload())
        assert payloads[0] == payloads[1]
        assert "source" not in payloads[0]["corpus"]
        assert "initial" not in payloads[0]["model"]
        assert payloads[0]["model"]["retain"] == "org/retain"

    def test_a_study_from_before_kl_over_items_goes_on_over_answers(self) -> None:
        study = put(people(), "unlearning.methods.kl_min", {})
        spec = parse_study(study)
        former = spec.model_dump(mode="json")  # as records from before hold it: no word of `over`
        assert former["unlearning"]["methods"]["kl_min"] == {"retain_weight": [1.0]}
        recorded = StudySpec.recorded(former)
        assert recorded.unlearning is not None
        assert recorded.unlearning.methods["kl_min"] == {"retain_weight": (1.0,), "over": ("answer",)}
        payload = recorded.fingerprint_payload()
        assert payload["unlearning"]["methods"]["kl_min"] == {"retain_weight": [1.0]}
        assert spec.continuing(recorded).fingerprint_payload() == payload
        assert spec.continuing(None).fingerprint_payload() == spec.fingerprint_payload() != payload
        named = parse_study(put(study, "unlearning.methods.kl_min", {"over": "item"}))
        assert named.continuing(recorded).fingerprint_payload() == spec.fingerprint_payload()
        again = StudySpec.recorded(json.loads(json.dumps(spec.continuing(None).model_dump(mode="json"))))
        assert again.fingerprint_payload() == spec.fingerprint_payload()

    def test_ranges_of_methods_are_part_of_a_study_only_where_there_are_some(self) -> None:
        assert "alpha_by_method" not in parse_study(people()).fingerprint_payload()["search"]
        study = put(people(), "unlearning.methods", {"npo": {}, "memorize": {}})
        payload = parse_study(study).fingerprint_payload()
        assert payload["search"]["alpha_by_method"] == {"memorize": list(METHODS["memorize"].alpha or ())}
        study["search"]["alpha_by_method"] = {"memorize": {"low": -1, "high": 9}, "npo": {"high": 1}}
        found = parse_study(study).fingerprint_payload()["search"]["alpha_by_method"]
        assert found == {"memorize": [-1.0, 9.0], "npo": [-1.0, 1.0]}

    def test_survives_json(self) -> None:
        payload = parse_study(people()).fingerprint_payload()
        assert json.loads(json.dumps(payload, allow_nan=False)) == payload


class TestVariants:
    def test_single_values_keep_the_name_of_the_method(self) -> None:
        runs = parse_study(people()).variants()
        assert [run.label for run in runs] == ["grad_ascent", "grad_diff", "kl_min", "npo"]
        assert runs[3].hyperparameters == {"beta": 1.0, "retain_weight": 0.0, "learning_rate": 0.001}
        assert runs[3].loss_hyperparameters == {"beta": 1.0, "retain_weight": 0.0}
        assert runs[3].learning_rate == 0.001
        assert runs[2].loss_hyperparameters == {"retain_weight": 1.0, "over": "answer"}

    def test_words_vary_as_numbers_do(self) -> None:
        study = put(people(), "unlearning.methods", {"kl_min": {"over": ["answer", "item"]}})
        assert [run.label for run in parse_study(study).variants()] == ["kl_min[over=answer]", "kl_min[over=item]"]
        (run,) = parse_study(put(study, "unlearning.methods", {"kl_min": {}})).variants()
        assert run.label == "kl_min" and run.loss_hyperparameters == {"retain_weight": 1.0, "over": "item"}

    def test_lists_expand_and_only_what_varies_is_told(self) -> None:
        study = put(people(), "unlearning.methods", {"npo": {"beta": [0.1, 1], "retain_weight": 1}, "grad_ascent": None})
        study["unlearning"]["learning_rate"] = [1e-5, 0.001]
        labels = [run.label for run in parse_study(study).variants()]
        assert labels == [
            "grad_ascent[learning_rate=1e-05]",
            "grad_ascent[learning_rate=0.001]",
            "npo[beta=0.1,learning_rate=1e-05]",
            "npo[beta=0.1,learning_rate=0.001]",
            "npo[beta=1,learning_rate=1e-05]",
            "npo[beta=1,learning_rate=0.001]",
        ]

    def test_labels_tell_close_values_apart(self) -> None:
        study = put(people(), "unlearning.learning_rate", [0.12345678, 0.12345679])
        labels = [run.label for run in parse_study(study).variants()]
        assert len(set(labels)) == 8


class TestShippedStudies:
    def test_quickstart(self) -> None:
        spec = load_study(quickstart_path())
        assert spec.name == "quickstart"
        assert spec.search.trials == 40

    def test_llama_needs_no_network(self) -> None:
        spec = load_study(STUDIES / "tofu_forget01_llama2_7b.yaml")
        # One on each of the two GPUs of the paper.
        assert spec.unlearning.batch_size * spec.unlearning.gradient_accumulation == 2
        assert spec.unlearning.learning_rate == (1e-5,)

    def test_small_names_the_command_until_its_data_is_there(self, tmp_path: Path) -> None:
        copy = tmp_path / "studies" / "tofu_forget01_small.yaml"
        copy.parent.mkdir()
        copy.write_text((STUDIES / copy.name).read_text())
        with pytest.raises(StudyFileError, match=r"corpus\.source \(line \d+\).*hf download locuslab/TOFU"):
            load_study(copy)
        (tmp_path / "data" / "tofu").mkdir(parents=True)
        assert load_study(copy).model.kind == "tiny"


JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(), max_size=8)
    | st.sampled_from(["people", "tofu", "tiny", "bpe", "npo", "./x", "~nobody/x", "\ud800", "\0", "~", 10**400]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=3),
    max_leaves=5,
)


def paths_in(value: object, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [above, *(path for key, inner in entries for path in paths_in(inner, (*above, key)))]


@st.composite
def mutated(draw: st.DrawFn) -> object:
    study = draw(st.sampled_from([people, tiny_tofu, pretrained]))()
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(paths_in(study)[1:] or [()]))
        if not path:
            break
        here: Any = study
        for part in path[:-1]:
            here = here[part]
        what = draw(st.sampled_from(["replace", "delete", "add"]))
        if what == "delete":
            del here[path[-1]]
        elif what == "add" and isinstance(here, dict):
            here[draw(st.text(max_size=6) | st.sampled_from(["kind", "[key]", "tiny", "beta"]))] = draw(JUNK)
        else:
            here[path[-1]] = draw(JUNK)
    return study


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(mutated())
def test_any_mutation_validates_or_is_explained(study: object) -> None:
    try:
        spec = parse_study(study)  # type: ignore[arg-type]
    except StudyFileError as error:
        assert error.problems
        assert str(error).encode(errors="strict")
        return
    assert isinstance(spec, StudySpec)
    assert json.dumps(spec.fingerprint_payload(), allow_nan=False)
    assert len({run.label for run in spec.variants()}) == len(spec.variants()) > 0


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=80) | st.text(max_size=80).map(lambda text: text.encode(errors="surrogatepass")))
def test_any_bytes_are_explained(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "bytes.yaml"
    path.write_bytes(content)
    with pytest.raises(StudyFileError):
        load_study(path)


def test_a_batch_size_may_be_left_to_the_machine():
    study = people()
    study["scoring"] = {**study.get("scoring", {}), "batch_size": "auto"}
    spec = parse_study(study)
    assert (spec.scoring.batch_size, spec.scoring.rows) == ("auto", None)
    assert StudySpec.model_validate(spec.model_dump(mode="json"), strict=False) == spec
    study["scoring"]["batch_size"] = 7
    assert parse_study(study).scoring.rows == 7


def test_a_setting_of_null_takes_a_section_away_and_an_option_that_was_not_given_changes_nothing():
    settings = read_settings(["audit=null", "corpus.retain_people=30"])
    changed, as_it_is = (load_study(quickstart_path(), given) for given in (settings, {"audit": None, "seed": None}))
    assert changed.audit is None and changed.corpus.retain_people == 30
    assert as_it_is == load_study(quickstart_path()) and as_it_is.audit is not None
