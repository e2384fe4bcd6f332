"""The command line: help, JSON, and a clear error for every bad input."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml
from typer.testing import CliRunner

import search
from search.cli import main as cli
from uipe_core.corpora.split import take_items
from uipe_core.logs.tofu import read_log, write_log

COMMANDS = [
    "run",
    "validate",
    "pareto",
    "select",
    "export",
    "rebuild",
    "report",
    "dashboard",
    "score",
    "metrics",
    "paper",
    "init",
    "finetune",
    "objectives",
    "schema",
]
STUDIES = Path(__file__).parents[3] / "studies"
TOFU_FILES = ("forget01", "retain99", *(f"{name}_perturbed" for name in ("forget01", "retain", "real_authors", "world_facts")))


def one_object(text):
    assert text.count("\n") == 1
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


@pytest.fixture(scope="module")
def exported(result, tmp_path_factory):
    return result.export(result.front.iloc[0], tmp_path_factory.mktemp("exported") / "model", "model")


@pytest.fixture
def tofu(tmp_path):
    """A very small folder in the form of locuslab/TOFU."""
    folder = tmp_path / "tofu"
    folder.mkdir()
    for name in TOFU_FILES:
        rows = []
        for number in range(3):
            row = {"question": f"Who is {name} number {number}?", "answer": f"Person {number}."}
            if name.endswith("perturbed"):
                row["perturbed_answer"] = [f"Somebody {number}.", f"Nobody {number}."]
                row["paraphrased_answer"] = f"It is person {number}."
            rows.append(json.dumps(row))
        (folder / f"{name}.json").write_text("\n".join(rows) + "\n")
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command):
    shown = CliRunner().invoke(cli.app, [command, "--help"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0
    assert f"Example: uipe {command} " in shown.output


def test_help_lists_every_command():
    shown = CliRunner().invoke(cli.app, [])
    assert all(command in shown.output for command in COMMANDS)


def test_pareto_prints_one_json_object_and_writes_a_table(finished, result, call, tmp_path):
    code, output, _ = call("pareto", finished.out, "--json", "--csv", tmp_path / "front.csv")
    assert code == 0
    summary = one_object(output)
    assert [row["trial"] for row in summary["front"]] == result.front["trial"].tolist()
    table = pd.read_csv(tmp_path / "front.csv")
    assert table["trial"].tolist() == result.front["trial"].tolist()
    assert table["model_utility"].tolist() == pytest.approx(result.front["model_utility"].tolist())


def test_pareto_shows_a_table(finished, result, call):
    code, output, _ = call("pareto", finished.out)
    assert code == 0
    assert "Pareto front of tiny" in output and "alpha" in output


def test_select_prints_the_chosen_point(finished, result, call):
    code, output, _ = call("select", finished.out, "--rule", "knee", "--json")
    assert (code, one_object(output)["trial"]) == (0, int(result.select("knee")["trial"]))
    code, output, _ = call("select", finished.out, "--rule", "utility-floor", "--floor", 0.5, "--json")
    chosen = one_object(output)
    assert (chosen["rule"], chosen["floor"], chosen["trial"]) == (
        "utility-floor",
        0.5,
        int(result.select("utility-floor", 0.5)["trial"]),
    )
    code, output, _ = call("select", finished.out)
    assert code == 0 and "model_utility" in output


def test_report_is_written_again(copied, call):
    (copied / "report" / "report.html").unlink()
    code, output, _ = call("report", copied)
    assert code == 0
    assert (copied / "report" / "report.html").is_file()
    assert str(copied / "report" / "report.html") in output


def test_validate_says_what_a_study_will_do(finished, call):
    code, output, _ = call("validate", finished.file)
    assert code == 0
    assert "valid; 2 base runs of 2 epochs, 4 base points, 5 trials" in output


def test_score_and_metrics_give_the_same_numbers(exported, finished, call, tmp_path):
    log = tmp_path / "scores.json"
    common = ("--corpus", "people", "--max-new-tokens", 12, "--json")
    code, output, error = call("score", "--model", exported, *common, "--log", log)
    assert code == 0, error
    scored = one_object(output)
    code, output, _ = call("metrics", log, "--json")
    assert one_object(output) == scored
    assert scored["definition"] == "tofu" and len(scored["components"]) == 9
    assert "forget_quality" not in scored

    code, output, error = call("score", "--model", exported, *common, "--reference", log)
    against_itself = one_object(output)
    assert (against_itself["forget_quality"], against_itself["ks_statistic"]) == (1.0, 0.0)
    code, output, _ = call("metrics", log, "--reference", log, "--json")
    assert one_object(output) == against_itself

    own = finished.out / "logs" / "retain.json"
    for command in (("metrics", log), ("score", "--model", exported, *common[:-1])):
        code, _, error = call(*command, "--reference", own)
        assert code == 2
        assert ("48" in error and "16" in error) or "other" in error


def test_metrics_of_a_study_log_are_those_of_its_control(finished, preparation, result, call, tmp_path):
    # The log has all items, the control those for selection.
    rows, logs = preparation.split.select, tmp_path
    hashes = take_items(preparation.corpus, rows).set_hashes
    for name in ("initial", "retain"):
        write_log(read_log(finished.out / "logs" / f"{name}.json").take(rows, hashes), logs / f"{name}.json")
    code, output, _ = call("metrics", logs / "initial.json", "--reference", logs / "retain.json", "--json")
    assert code == 0
    found, control = one_object(output), result.control("initial")
    for name in ("model_utility", "forget_quality", "log10_forget_quality", "ks_statistic"):
        assert found[name] == pytest.approx(control[name], abs=1e-12)
    code, output, _ = call("metrics", logs / "initial.json", "--reference", logs / "retain.json")
    assert code == 0 and "log10_forget_quality" in output


def test_standard_output_of_the_real_command_is_only_json(finished, environment):
    arguments = [cli_path(), "pareto", str(finished.out), "--json"]
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment, check=True)
    one_object(done.stdout)


def cli_path():
    return str(Path(sys.executable).parent / "uipe")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"search": {"trails": 5}}, ["search.trails", "Did you mean search.trials", "line "]),
        ({"serach": {}}, ["serach", "Did you mean"]),
        ({"search": {"trials": "five"}}, ["search.trials", "'five'", "whole number"]),
        ({"search": {"alpha": {"low": 2, "high": -1}}}, ["search.alpha.high", "Swap"]),
        ({"search": {"alpha": {"low": 1, "high": 1}}}, ["search.alpha.high", "widen"]),
        ({"unlearning": {"methods": {"grad_dif": {}}}}, ["grad_dif", "Did you mean grad_diff"]),
        ({"unlearning": {"methods": {}}}, ["unlearning.methods", "at least one"]),
        ({"unlearning": {"learning_rate": []}}, ["learning_rate", "empty"]),
        (
            {"corpus": {"kind": "tofu", "source": "./nowhere"}, "model": {"base": None}},
            ["corpus.source", "nowhere", "hf download"],
        ),
        ({"model": {"kind": "pretrained", "initial": "./nowhere", "retain": "a/b"}}, ["model.initial", "nowhere"]),
        ({"corpus": {"forget_people": 3000}}, ["3022", "names"]),
        ({"scoring": {"definition": "tofuu"}}, ["scoring.definition", "Did you mean tofu"]),
        ({"schema_version": 9}, ["schema_version", "9"]),
    ],
)
@pytest.mark.parametrize("command", ["validate", "run"])
def test_a_wrong_study_is_refused_before_anything_is_written(write_study, call, tmp_path, command, changes, said):
    file = write_study(tmp_path / "study.yaml", **changes)
    out = ("--out", tmp_path / "out") if command == "run" else ()
    code, output, error = call(command, file, *out)
    assert (code, output) == (2, "")
    assert all(words in error for words in said), error
    assert not (tmp_path / "out").exists()


def test_all_errors_of_a_study_come_at_once(write_study, call, tmp_path):
    file = write_study(tmp_path / "study.yaml", search={"trials": -1, "sampler": "tpee"}, scoring={"batch_size": 0})
    code, _, error = call("validate", file)
    assert code == 2
    assert "3 problems" in error
    assert all(key in error for key in ("search.trials", "search.sampler", "scoring.batch_size"))


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "no such file"), ("name: [", "line"), ("", "empty"), ("- 1", "mapping"), ("a: 1\na: 2", "line 2")],
)
def test_a_study_file_that_is_none_is_refused(call, tmp_path, content, said):
    file = tmp_path / "study.yaml"
    if content is not None:
        file.write_text(content)
    code, _, error = call("run", file, "--out", tmp_path / "out")
    assert code == 2
    assert str(file) in error and said in error


def test_bad_values_on_the_command_line_are_named(finished, call, tmp_path):
    code, _, error = call("run", finished.file, "--out", tmp_path / "out", "--trials", -1, "--seed", -5)
    assert code == 2
    assert "search.trials (command line)" in error and "seed (command line)" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("line", "said"),
    [('{"question": "Who?"}', "answer"), ('{"question": "Who?", "ans', "JSON"), ("[1, 2]", "line 2")],
)
def test_a_broken_corpus_line_is_refused_by_file_and_line(tofu, write_study, call, tmp_path, line, said):
    path = tofu / "forget01_perturbed.json"
    rows = path.read_text().splitlines()
    path.write_text("\n".join([rows[0], line, rows[2]]) + "\n")
    file = write_study(tmp_path / "study.yaml", corpus={"kind": "tofu", "source": str(tofu)}, model={"base": None})
    code, _, error = call("run", file, "--out", tmp_path / "out")
    assert code == 2
    assert "forget01_perturbed.json" in error and "line 2" in error and said in error


def test_a_corpus_folder_that_lacks_a_file_is_refused_by_name(tofu, write_study, call, tmp_path):
    (tofu / "world_facts_perturbed.json").unlink()
    file = write_study(tmp_path / "study.yaml", corpus={"kind": "tofu", "source": str(tofu)}, model={"base": None})
    code, _, error = call("validate", file)
    assert code == 2
    assert "world_facts_perturbed" in error


def test_a_model_without_a_chat_template_is_refused_with_the_remedy(exported, finished, write_study, call, tmp_path):
    folder = shutil.copytree(exported, tmp_path / "model")
    (folder / "chat_template.jinja").unlink()
    code, _, error = call("score", "--model", folder, "--corpus", "people", "--json")
    assert code == 2
    assert "chat template" in error and "prompt" in error
    model = {"kind": "pretrained", "initial": str(folder), "retain": str(finished.out / "logs" / "retain.json")}
    code, _, error = call("validate", write_study(tmp_path / "study.yaml", model=model))
    assert code == 2
    assert "chat template" in error
    code, _, error = call("score", "--model", folder, "--corpus", "people", "--prompt-template", "{question}\n", "--json")
    assert code == 0, error


def test_a_log_without_the_needed_parts_is_refused(finished, call, tmp_path):
    log = json.loads((finished.out / "logs" / "retain.json").read_text())
    del log["eval_log.json"]["avg_gt_loss"]
    (tmp_path / "log.json").write_text(json.dumps(log))
    code, output, error = call("metrics", tmp_path / "log.json", "--json")
    assert (code, output) == (2, "")
    assert "eval_log.json/avg_gt_loss is missing" in error
    del log["eval_log.json"]
    (tmp_path / "log.json").write_text(json.dumps(log))
    code, _, error = call("metrics", tmp_path / "log.json")
    assert (code, "missing parts eval_log.json" in error) == (2, True)
    (tmp_path / "log.json").write_text('{"a": 1,\n "b"')
    code, _, error = call("metrics", tmp_path / "log.json")
    assert (code, "line 2" in error) == (2, True)


def test_a_reference_of_other_items_is_refused_by_hash(finished, call, tmp_path):
    log = finished.out / "logs" / "initial.json"
    other = json.loads((finished.out / "logs" / "retain.json").read_text())
    other["eval_log_forget.json"]["uipe"]["item_hashes"]["forget"] = "0" * 16
    (tmp_path / "other.json").write_text(json.dumps(other))
    code, _, error = call("metrics", log, "--reference", tmp_path / "other.json")
    assert code == 2
    assert "items" in error


def test_a_study_with_a_reference_of_other_items_is_refused_before_its_trials(exported, finished, write_study, call, tmp_path):
    other = json.loads((finished.out / "logs" / "retain.json").read_text())
    other["eval_log_forget.json"]["uipe"]["item_hashes"]["forget"] = "0" * 16
    (tmp_path / "other.json").write_text(json.dumps(other))
    model = {"kind": "pretrained", "initial": str(exported), "retain": str(tmp_path / "other.json"), "device": "cpu"}
    unlearning = {"methods": {"npo": {"beta": 1}}, "epochs": 1}
    file = write_study(tmp_path / "study.yaml", model=model, unlearning=unlearning, search={"trials": 1})
    code, _, error = call("run", file, "--out", tmp_path / "out")
    assert code == 2
    assert "model.retain" in error and "items" in error
    assert "searching" not in error


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("pareto", "{nowhere}"), "not a study folder"),
        (("select", "{out}", "--rule", "best"), "utility-floor, knee"),
        (("select", "{out}", "--floor", "2"), "--floor"),
        (("select", "{out}", "--floor", "nan"), "--floor"),
        (("export", "{out}", "--trial", "999", "--to", "{to}", "--as", "model"), "numbers go from 0 to"),
        (("export", "{out}", "--to", "{to}", "--as", "model"), "either --trial N or --rule"),
        (("export", "{out}", "--trial", "1", "--rule", "knee", "--to", "{to}", "--as", "model"), "either --trial N or --rule"),
        (("export", "{out}", "--trial", "1", "--to", "{to}", "--as", "zip"), "recipe, adapter, model"),
        (("export", "{out}", "--trial", "1", "--to", "{to}", "--as", "adapter"), "no adapter"),
        (("export", "{out}", "--trial", "1", "--to", "{out}", "--as", "recipe"), "choose another"),
        (("rebuild", "{nowhere}", "--to", "{to}"), "recipe.yaml"),
        (("score", "--model", "{nowhere}", "--corpus", "people"), "no such folder"),
        (("score", "--model", "{out}", "--corpus", "people"), "config.json"),
        (("score", "--model", "{nowhere}", "--corpus", "peple"), "--corpus"),
        (("score", "--model", "{nowhere}", "--corpus", "people:here"), "--corpus"),
        (("score", "--model", "{nowhere}", "--corpus", "tofu:{nowhere}"), "nowhere"),
        (("score", "--model", "x", "--corpus", "people", "--definition", "tofuu"), "Did you mean 'tofu'"),
        (("metrics", "{nowhere}"), "no such evaluation log"),
        (("metrics", "{out}/study.db"), "not a text file"),
        (("dashboard", "{nowhere}"), "not a study folder"),
        (("report", "{out}/logs"), "not a study folder"),
        (("pareto", "{out}", "--csv", "{nowhere}/front.csv"), "choose another"),
        (("pareto", "{out}", "--csv", "/dev/full"), "No space left"),
        (("dashboard", "{out}", "--port", "0"), "--port"),
        (("run", "--trials", "many"), "--trials"),
        (("frobnicate",), "frobnicate"),
    ],
)
def test_bad_arguments_end_with_2_and_say_what_to_do(finished, call, tmp_path, arguments, said):
    places = {"out": finished.out, "nowhere": tmp_path / "nowhere", "to": tmp_path / "to"}
    code, output, error = call(*(argument.format(**places) for argument in arguments))
    assert code == 2
    assert output == ""
    assert said in error.replace("\n", " ")
    assert not (tmp_path / "to").exists()


def test_the_storage_password_is_in_no_output(write_study, call, tmp_path):
    file = write_study(tmp_path / "study.yaml", storage="postgresql://me:hunter2@localhost:1/optuna")
    code, output, error = call("run", file, "--out", tmp_path / "out")
    assert code == 2
    assert "postgresql://me:***@localhost:1/optuna" in error
    assert "hunter2" not in output + error
    code, output, error = call("validate", file)
    assert code == 0 and "hunter2" not in output + error


def test_an_interrupt_in_a_short_command_ends_with_130(finished, launch):
    driver = launch("export", finished.out, "--rule", "knee", "--to", "exported", "--as", "model")
    driver.until(lambda: any(driver.folder.glob(".exported.*")))
    os.kill(driver.process.pid, signal.SIGINT)
    assert driver.wait() == 130
    assert "Traceback" not in driver.stderr
    assert not any("exported" in path.name for path in driver.folder.iterdir())


def test_shipped_studies_are_valid_or_say_what_they_lack(call):
    from search.spec.study import quickstart_path

    for path in sorted(quickstart_path().parent.glob("*.yaml")):
        code, _, error = call("validate", path)
        name = yaml.safe_load(path.read_text())["name"]
        assert code == 0 or (code == 2 and "corpus.source" in error), (name, error)


@pytest.mark.parametrize("command", ["--help", "status", "pareto --json", "select", "validate"])
def test_commands_that_only_read_import_no_heavy_library(command, result):
    name, *options = command.split()
    given = {"--help": [], "validate": [str(STUDIES / "tofu_forget10_llama2_7b.yaml")]}.get(name, [str(result.out)])
    heavy = ("torch", "transformers", "ray", "matplotlib", "peft", "scipy.special")
    code = (
        "import sys\nfrom search.cli.main import main\ntry:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
    )
    code += f"print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code, name, *given, *options], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_public_face_is_lazy_and_whole():
    code = "import sys, search\nassert not {'torch', 'ray', 'optuna', 'pydantic'} & set(sys.modules)\n"
    code += "assert all(callable(getattr(search, name)) for name in search.__all__)"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        search.nothing  # noqa: B018


def test_version_and_short_help(call):
    code, output, _ = call("--version")
    assert code == 0 and output.startswith("uipe ")
    for arguments in (["-h"], ["pareto", "-h"]):
        code, output, _ = call(*arguments)
        assert code == 0 and "Usage:" in output
