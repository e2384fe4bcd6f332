"""A study of models that exist already: Llama 3's chat template, folders of Hugging Face, a folder of TOFU's files."""

import json
from pathlib import Path

import pytest
import torch

from search.evaluation.inputs import check_inputs
from search.evaluation.prepared import prepare
from search.results.recipe import read_recipe
from search.results.study_result import StudyResult
from search.spec.study import load_study
from uipe_core.corpora.people import load_people
from uipe_core.corpora.types import UTILITY_SETS
from uipe_core.deltas.extrapolation import Extrapolator
from uipe_core.errors import UserError
from uipe_core.logs.tofu import read_log
from uipe_core.models.likelihood import mean_answer_nll
from uipe_core.models.prompts import CHAT_DATE, FORMATS, PromptFormat, pad_batch
from uipe_core.scoring.scorer import Scorer
from uipe_core.unlearning.training import train_base_run

TOFU_FILES = {
    "forget": "forget01_perturbed",
    "retain": "retain_perturbed",
    "real_authors": "real_authors_perturbed",
    "world_facts": "world_facts_perturbed",
}


@pytest.fixture(scope="module")
def sets():
    """A few items of every set of fictitious people."""
    people = load_people(seed=3, forget_people=1, retain_people=12, pretraining_people=10)
    return {name: people.sets[name][:12] for name in TOFU_FILES}


@pytest.fixture(scope="module")
def tofu_folder(sets, tmp_path_factory):
    """Those items in the files and fields of TOFU."""
    folder = tmp_path_factory.mktemp("tofu")

    def write(name, items, evaluated):
        rows = []
        for item in items:
            row = {"question": item.question, "answer": item.answer}
            if evaluated:
                row["perturbed_answer"] = list(item.perturbed_answers)
                if item.paraphrased_answer is not None:
                    row["paraphrased_answer"] = item.paraphrased_answer
            rows.append(json.dumps(row))
        (folder / f"{name}.json").write_text("\n".join(rows) + "\n")

    for name, file in TOFU_FILES.items():
        write(file, sets[name], evaluated=True)
    write("forget01", sets["forget"], evaluated=False)
    write("retain99", sets["retain"], evaluated=False)
    return folder


@pytest.fixture(scope="module")
def model_folders(sets, llama3, tmp_path_factory):
    """An initial and a retain model, both really trained: small Llamas in bfloat16 with a Llama-3-like tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    learnt = {"retain": [item for name in UTILITY_SETS for item in sets[name]]}
    learnt["initial"] = [*sets["forget"], *learnt["retain"]]
    system = f"system user assistant\n\nToday Date: {CHAT_DATE}\n\n{FORMATS['llama3'].system}"
    texts = [text for item in learnt["initial"] for text in (item.question, item.answer, system)]
    tokenizer = llama3.of_bytes(texts, 700)
    prompts = PromptFormat(tokenizer, name="llama3")
    folders = {}
    for which, items in learnt.items():
        shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
        config = LlamaConfig(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, **shape)
        generator = torch.Generator().manual_seed(0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = LlamaForCausalLM(config)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        examples = [prompts.encode(item.question, item.answer) for item in items]
        for _ in range(25):
            order = torch.randperm(len(examples), generator=generator).tolist()
            for start in range(0, len(order), 8):
                batch = pad_batch([examples[row] for row in order[start : start + 8]], prompts.pad_id)
                logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
                mean_answer_nll(logits, batch.labels).backward()
                optimizer.step()
                optimizer.zero_grad()
        folders[which] = tmp_path_factory.mktemp("models") / which
        model.to(torch.bfloat16).save_pretrained(folders[which])
        tokenizer.save_pretrained(folders[which])
    return folders


@pytest.fixture(scope="module")
def study(write_study, tofu_folder, model_folders, tmp_path_factory):
    """Writes the study, with changes to its model or unlearning."""

    def write(unlearning=None, **model):
        settings = {"methods": {"npo": {"beta": 0.1, "retain_weight": 1}}, "epochs": 2, "learning_rate": 0.002}
        settings |= {"batch_size": 2, "gradient_accumulation": 2, "gradient_checkpointing": True, "schedule": "linear"}
        folders = {which: str(folder) for which, folder in model_folders.items()}
        return write_study(
            tmp_path_factory.mktemp("study") / "study.yaml",
            name="pretrained",
            corpus={"kind": "tofu", "source": str(tofu_folder)},
            model={"kind": "pretrained", **folders, "prompt_format": "llama3", "dtype": "bfloat16", "device": "cpu", **model},
            unlearning=settings | (unlearning or {}),
            scoring={"max_new_tokens": 16, "temperatures": []},
            split=None,
            search={"trials": 2},
        )

    return write


@pytest.fixture(scope="module")
def ran(place, study, tmp_path_factory):
    import search

    out = tmp_path_factory.mktemp("pretrained") / "out"
    return search.run_study(search.load_study(study()), out, quiet=True)


def test_a_study_of_given_models_runs_to_its_end(ran):
    assert ran.store.counts() == {"complete": 4, "pruned": 0, "failed": 0, "interrupted": 0, "running": 0}
    assert set(ran.trials["dtype"]) == {"bfloat16"}
    assert ran.trials["update_norm"].min() > 0


def test_the_initial_model_answers_and_stops_as_it_was_taught(ran, sets):
    scores = read_log(ran.out / "logs" / "initial.json").sets["forget"]
    known = [text == item.answer for text, item in zip(scores.generated, sets["forget"], strict=True)]
    assert sum(known) > len(known) / 2
    assert scores.answer_loss.mean() < read_log(ran.out / "logs" / "retain.json").sets["forget"].answer_loss.mean()


def test_an_export_scores_the_same_from_its_folder_alone(ran, tofu_folder, call, tmp_path):
    row = ran.trials[ran.trials["alpha"] != 0].iloc[0]
    folder = ran.export(row, tmp_path / "model", "model")
    common = ["--model", folder, "--corpus", f"tofu:{tofu_folder}", "--device", "cpu", "--max-new-tokens", 16, "--json"]
    reference = ["--reference", ran.out / "logs" / "retain.json"]
    code, output, error = call("score", *common, *reference, "--prompt-format", "llama3", "--batch-size", 64)
    assert code == 0, error
    scored = json.loads(output)
    assert scored["model_utility"] == pytest.approx(row["model_utility"], abs=1e-9)
    assert scored["ks_statistic"] == row["ks_statistic"]
    code, output, error = call("score", *common, *reference, "--batch-size", 64)
    assert code == 0, error
    assert json.loads(output)["model_utility"] != pytest.approx(row["model_utility"], abs=1e-3)
    # What a stranger needs to score it again comes with it.
    assert read_recipe(folder / "recipe.yaml").spec.model.prompt_format == "llama3"
    assert "- prompts: format `llama3` of UIPE Search" in (folder / "README.md").read_text()


def test_the_same_study_with_an_adapter_gives_low_rank_updates(study, model_folders):
    adapter = {"rank": 4, "alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    preparation = prepare(load_study(study({"adapter": adapter, "epochs": 1, "learning_rate": 0.02})))
    run = preparation.spec.variants()[0]
    source = preparation.models.source("initial")
    (epoch,) = train_base_run(source.load(dtype="auto"), preparation.corpus, preparation.unlearning(run))
    loaded = source.load()
    scorer = Scorer(preparation.corpus, loaded.prompts, preparation.scoring)
    before = scorer.score(loaded).sets["forget"].answer_loss.mean()
    loaded.model = Extrapolator(loaded.model).apply(epoch.update, 0.5)
    assert epoch.update.kind == "low_rank"
    assert scorer.score(loaded).sets["forget"].answer_loss.mean() > before


def test_the_prompt_format_is_part_of_what_identifies_study_and_base_runs(study):
    own, other = (prepare(load_study(study(prompt_format=name))) for name in ("llama3", None))
    run = own.spec.variants()[0]
    assert own.fingerprint != other.fingerprint
    assert own.base_run_inputs(own.unlearning(run)) != other.base_run_inputs(other.unlearning(run))
    assert (own.models.source("initial").prompt_format, other.models.source("initial").prompt_format) == ("llama3", None)


@pytest.mark.parametrize("name", ["llama3", None])
def test_a_tokenizer_without_the_chat_template_is_refused_before_anything_is_spent(name, study, model_folders, tmp_path):
    import shutil

    folder = shutil.copytree(model_folders["retain"], tmp_path / "bare")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match=r"no chat template.*model\.prompt_format: llama2 or phi"):
        check_inputs(load_study(study(retain=str(folder), prompt_format=name)))
    (note,) = check_inputs(load_study(study(retain=str(folder), prompt_format="llama2")))
    assert note.startswith("Forget quality on ")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--prompt-format", "llama4"], "Did you mean 'llama"),
        (["--prompt-format", "phi", "--prompt-template", "{question}"], "both given"),
    ],
)
def test_score_refuses_prompt_formats_that_cannot_be(options, said, tofu_folder, model_folders, call):
    code, output, error = call("score", "--model", model_folders["retain"], "--corpus", f"tofu:{tofu_folder}", *options)
    assert (code, output) == (2, "")
    assert said in error


@pytest.mark.slow
def test_a_reproduction_runs_with_the_same_files_and_is_set_next_to_published_numbers(
    tofu_folder, model_folders, run_command, call, tmp_path
):
    """The study file that reproduces a sweep, with other models and fewer of everything."""
    studies = Path(__file__).parents[3] / "studies" / "reproduce"
    out = tmp_path / "out"
    changes = {
        "corpus": {"source": str(tofu_folder), "split": "forget01", "retain_train": None},
        "model": {"initial": str(model_folders["initial"]), "retain": str(model_folders["retain"]), "device": "cpu"},
        "unlearning": {"epochs": 1, "learning_rate": "[0.001, 0.002]", "batch_size": 4, "gradient_accumulation": 1},
        "scoring": {"max_new_tokens": 8},
        "search": {"trials": 2},
        "resources.trial": {"cpus": 1, "gpus": 0, "threads": 1},
        "resources.base_run": {"cpus": 1, "gpus": 0, "threads": 1},
    }
    settings = []
    for section, keys in changes.items():
        for key, value in keys.items():
            settings += ["--set", f"{section}.{key}={'null' if value is None else value}"]
    file = studies / "tofu_forget10_llama32_1b_trained.yaml"
    run_command("run", file, "--out", out, *settings)
    code, output, error = call("compare-published", out, studies / "tofu_forget10_llama32_1b.csv", "--json")
    assert code == 0, error
    found = json.loads(output)
    assert (found["trainings"], found["published"]) == (2, 2) and found["objectives"] == [
        "log10_forget_quality",
        "model_utility",
    ]
    initial, *unlearned = found["models"]
    assert initial["ours"]["numbers"].keys() == {"log10_forget_quality", "model_utility"} and initial["matched"] is None
    trials = StudyResult.open(out).trials.set_index("trial")
    for row in unlearned:
        ours = trials.loc[row["ours"]["trial"]]
        assert ours["model_utility"] == row["ours"]["numbers"]["model_utility"]
        ceiling = StudyResult.open(out).objectives[0].ceiling(StudyResult.open(out).forget_quality_cap)
        better = (trials["model_utility"] >= row["numbers"]["model_utility"]) & (
            trials["log10_forget_quality"] >= min(row["numbers"]["log10_forget_quality"], ceiling)
        )
        assert row["matched"] == bool(better.any())
    code, output, _ = call("compare-published", out, studies / "tofu_forget10_llama32_1b.csv")
    assert code == 0 and "of 2 published models are matched" in output and "ours: trial" in output
