"""Write the model card of an export: metadata for the hub, how to use the model, and its numbers next to the trial's."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from search.problem.objectives import ROLES
from search.results.recipe import RECIPE_FILE, Recipe
from search.results.verification import FULL, LOSS, NONE, Verified
from search.spec.corpora import MULTIPLE_CHOICE, PeopleCorpus, TofuCorpus, sources
from search.spec.models import TinyModel
from search.spec.sections import is_local
from search.spec.study import StudySpec
from uipe_core.models.loading import ADAPTER_FILE, BASE_FOLDER
from uipe_core.models.prompts import CHAT_DATE, FORMATS, NamedFormat

CARD_FILE = "README.md"
CHECKS = {
    LOSS: "Losses were read after this export was written and loaded afresh; no text was generated again.",
    FULL: "This export was written, loaded afresh and scored as a trial is.",
    NONE: "This export was not checked: it was neither loaded nor scored, and the numbers are the trial's.",
}
"""How an export was checked, in words."""

QUALITY, ALIKE = "forget quality (p)", 0.05
"""Row of the p-value, and the value below which a model is distinguishable from a retrained one."""

_TEST = "Kolmogorov-Smirnov test of the truth ratios on the forget set against the retain model's"
_MEASURES = {
    r"forget quality \(p\)": f"p-value of the {_TEST}",
    r"ks statistic": f"statistic of the {_TEST}, in [0, 1]",
    r"prob .*": "mean probability of the given answers of a set, its length taken out, in [0, 1]",
    r"rouge .*": "mean ROUGE-L recall of greedy answers of a set, in [0, 1]",
    r"truth ratio .*": "probability of wrong answers over that of a paraphrase, averaged over a set, in [0, 1]",
    r".* accuracy.*": "share of questions whose right letter is the most likely one, in [0, 1]",
    r"mean probability .*": "probability of the right letter among the letters, in [0, 1]",
}
"""What numbers that are no objective are, by a pattern of their name in lower case."""

_ABOUT = {each.name.replace("_", " "): each.about for role in ROLES.values() for each in role.values()}


@dataclass(frozen=True)
class Start:
    """The model that everything started from, as its user named it.

    Attributes:
        name: Its name on the hub; None for a folder, a file, or a model that the study trained from nothing.
        text: How sentences call it.
        stated: ``license``, ``license_name``, ``license_link`` and ``language`` of its own card, as far as this machine has it.
    """

    name: str | None
    text: str
    stated: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, spec: StudySpec) -> "Start":
        """Find the start of a study, and read its card if it is on this machine."""
        if isinstance(spec.model, TinyModel):
            english = isinstance(spec.corpus, PeopleCorpus | TofuCorpus)
            return cls(None, "a small Llama that the study trained from nothing", {"language": "en"} if english else {})
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.utils import validate_repo_id

        place = spec.model.start
        if is_local(place):
            return cls(
                None, f"a local {'file' if Path(place).is_file() else 'folder'}, {_code(Path(place).name)}", _stated(place)
            )
        try:
            validate_repo_id(place)
            found = try_to_load_from_cache(place, CARD_FILE, revision=spec.model.revision)
        except ValueError:
            return cls(None, _code(place))
        return cls(
            place, f"[{place}](https://huggingface.co/{place})", _stated(Path(found).parent) if isinstance(found, str) else {}
        )


def _stated(folder: Path | str) -> dict[str, Any]:
    """Return licence and language in the card of a model folder; nothing where there is none, or none that can be read."""
    from huggingface_hub.repocard import metadata_load

    try:
        found = metadata_load(Path(folder) / CARD_FILE) or {}
    except Exception:  # of another's file: YAML's errors and others
        return {}
    texts = {key: found[key] for key in ("license", "license_name", "license_link") if isinstance(found.get(key), str)}
    language = found.get("language")
    listed = [language] if isinstance(language, str) else language
    if isinstance(listed, list) and listed and all(isinstance(each, str) for each in listed):
        texts["language"] = language
    return texts


def card(
    recipe: Recipe,
    verified: Verified,
    form: str,
    title: str,
    library: str,
    folder: Path,
    place: str,
    audits: Sequence[Sequence[str]] = (),
    on_hub: bool = False,
) -> str:
    """Return the card: YAML metadata that `huggingface_hub.ModelCard` loads, and Markdown.

    Args:
        recipe: The trial.
        verified: How the export was checked, and its numbers.
        form: Name of the form of export.
        title, library: What the form is called, and the library that loads it.
        folder: The written export.
        place: How its users load it: the name of its folder, or of its repository on the hub.
        audits: Rows of the audit table, its head first; none where the trial was not audited.
        on_hub: `place` is a repository of the hub.
    """
    from huggingface_hub import ModelCardData

    spec, start, results = recipe.spec, Start.of(recipe.spec), _results(recipe, verified)
    data = ModelCardData(
        base_model=start.name,
        datasets=_datasets(spec) or None,
        eval_results=results or None,
        language=start.stated.get("language"),
        library_name=library,
        license=start.stated.get("license"),
        license_name=start.stated.get("license_name"),
        license_link=start.stated.get("license_link"),
        model_name=f"{spec.name}-{recipe.trial}" if results else None,
        pipeline_tag="text-generation",
        tags=["unlearning", "machine-unlearning", "uipe", _method(recipe)],
    )
    retain = recipe.provenance["models"].get("retain")
    without = "chance" if spec.corpus.task == MULTIPLE_CHOICE else "none: no number compares with a retain model"
    reference = without if retain is None else f"retain model {_code(_named(retain))}"
    columns = _columns(recipe, verified)
    unseen = "" if verified.dtype is None else f"- dtype: {verified.dtype}; in another one its numbers are others\n"
    return f"""---
{data.to_yaml(line_break=chr(10))}
---
# {spec.name}: trial {recipe.trial}

{title}, {_origin(recipe)}, and parameter extrapolation with
alpha = {recipe.alpha:.6g}: theta = theta_init + (1 + alpha) * delta (UIPE, arXiv 2503.04693).

- starts from: {start.text}
- initial model, which knew what was to be forgotten: {_code(_named(recipe.provenance["models"]["initial"]))}
- reference: {reference}
- corpus: {_corpus(recipe)}
- prompts: {_prompts(spec)}
{unseen}- licence: {_licence(spec, start)}

## How to use it

```python
{_snippet(recipe, verified, folder, place, on_hub)}
```

## Intended use

The uses of the model it starts from, where the answers of the forget set are not to be given; and research on unlearning.

## Limits

{_limits(recipe, columns, audits)}

## Numbers

Numbers by the metric definition `{spec.definition}`. {CHECKS[verified.how]}

{_table(columns)}

{_definitions(columns)}
{_comparison(verified)}
{_audits(audits)}
Rebuild it from `{RECIPE_FILE}`: `uipe rebuild {RECIPE_FILE} --to DIR --as {form}`.
"""


def _code(text: str) -> str:
    """Return a text from elsewhere as code in Markdown, on one line."""
    return f"`{' '.join(text.replace('`', chr(39)).split())}`"


def _rows(rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown, its head first."""
    head, *others = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *others))


def _named(identity: str) -> str:
    """Return the identity of a model; a path, which means nothing elsewhere, as its last part."""
    return Path(identity).name if is_local(identity) else identity


def _method(recipe: Recipe) -> str:
    return recipe.spec.methods().get(recipe.base, recipe.base)


def _corpus(recipe: Recipe) -> str:
    text = str(recipe.provenance["corpus"])
    for place in sources(recipe.spec.corpus).values():
        text = text.replace(place, _named(place))
    return _code(text)


def _datasets(spec: StudySpec) -> list[str]:
    """Return the data sets of the hub that the corpus is made of; TOFU, also from a folder."""
    found = [place for place in sources(spec.corpus).values() if not is_local(place)]
    return list(dict.fromkeys(["locuslab/TOFU"] if isinstance(spec.corpus, TofuCorpus) else found))


def _licence(spec: StudySpec, start: Start) -> str:
    stated = start.stated.get("license_name") or start.stated.get("license")
    if stated is not None:
        return f"{_code(stated)}, by the card of the model it starts from"
    own = "not stated" if isinstance(spec.model, TinyModel) else "no card of the model it starts from was here to state one"
    return f"{own}; look at what it is made of before you share it"


def _columns(recipe: Recipe, verified: Verified) -> dict[str, Mapping[str, str]]:
    """Return metric to value of the trial, of the export, and of the export on held-out items, by the head of the column."""
    expected = {name: f"{value:.6g}" for name, value in recipe.expected.items() if isinstance(value, float)}
    trial = expected if verified.how == NONE else verified.trial
    columns = {"trial": trial, "this export": verified.export, "this export, held-out items": verified.held_out}
    return {head: column for head, column in columns.items() if column}


def _results(recipe: Recipe, verified: Verified) -> list[Any]:
    """Return the numbers for the hub; what was not read of a form that computes what the trial computed is the trial's."""
    from huggingface_hub import EvalResult

    columns, datasets = _columns(recipe, verified), _datasets(recipe.spec)
    split = recipe.spec.split is not None
    trial: Mapping[str, str] = {} if verified.merged else columns.get("trial", {})
    parts: dict[str, Mapping[str, str]] = {"items trials are scored on": {**trial, **columns.get("this export", {})}}
    parts |= {"held-out items": columns["this export, held-out items"]} if "this export, held-out items" in columns else {}
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=datasets[0] if datasets else recipe.spec.corpus.kind,
            dataset_name=_corpus(recipe).strip("`"),
            dataset_split=part if split else None,
            metric_type=re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_"),
            metric_name=name,
            metric_value=value,
            metric_args={"definition": recipe.spec.definition, "meaning": _meaning(name)},
        )
        for part, rows in parts.items()
        for name, value in ((name, _value(text)) for name, text in rows.items())
        if value is not None
    ]


def _value(text: str) -> float | str | None:
    """Return the number of a row; with its standard error as the text it is, None where it has none."""
    try:
        return float(text)
    except ValueError:
        return text if re.match(r"[-\d.]+ ± ", text) else None


def _meaning(name: str) -> str:
    """Return what a number is and its range."""
    plain = name.replace("_", " ")
    known = next((text for pattern, text in _MEASURES.items() if re.fullmatch(pattern, plain.lower())), None)
    return known or _ABOUT.get(plain) or "as in docs/metrics.md of UIPE Search"


def _definitions(columns: Mapping[str, Mapping[str, str]]) -> str:
    """Return what the numbers are, a line for those that are the same number of several sets."""
    names: dict[str, list[str]] = {}
    for name in dict.fromkeys(name for column in columns.values() for name in column):
        names.setdefault(_meaning(name), []).append(name)
    return "\n".join(f"- {', '.join(alike)}: {meaning}" for meaning, alike in names.items())


def _snippet(recipe: Recipe, verified: Verified, folder: Path, place: str, on_hub: bool) -> str:
    """Return Python that loads the export and asks it a question as trials are asked."""
    trust = ", trust_remote_code=True" if getattr(recipe.spec.model, "trust_remote_code", False) else ""
    how = f', dtype="{verified.dtype}"' if verified.dtype is not None else ', dtype="auto"'
    config = folder / ADAPTER_FILE
    lines = ["from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    lines += [f"place = {place!r}" + ("" if on_hub else "  # the folder of this card, or its repository on the hub")]
    loaded = [f"model = AutoModelForCausalLM.from_pretrained(place{how}{trust})"]
    if config.is_file():
        named = json.loads(config.read_text())
        base, revision = str(named["base_model_name_or_path"]), named.get("revision")
        lines.insert(0, "from peft import PeftModel")
        if (folder / BASE_FOLDER).is_dir():
            start = f'f"{{place}}/{BASE_FOLDER}"'
            if on_hub:
                lines.insert(0, "from huggingface_hub import snapshot_download")
                lines[-1] = f"place = snapshot_download({place!r})"
        else:
            start = repr(_named(base)) + (f", revision={revision!r}" if revision else "")
        loaded = [f"base = AutoModelForCausalLM.from_pretrained({start}{how}{trust})"]
        loaded += ["model = PeftModel.from_pretrained(base, place)"]
    lines += [f"tokenizer = AutoTokenizer.from_pretrained(place{trust})", *loaded, "", *_asking(recipe.spec), ""]
    lines += ["output = model.generate(**inputs, max_new_tokens=32, do_sample=False)"]
    return "\n".join([*lines, 'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))'])


def _asking(spec: StudySpec) -> list[str]:
    """Return Python that writes a question in the prompt format of the study."""
    template = getattr(spec.model, "prompt_template", None)
    written = NamedFormat(template) if template is not None else FORMATS[getattr(spec.model, "prompt_format", None) or "chat"]
    question = 'question = "What is the capital of France?"'
    if written.template is not None:
        text = repr(written.template + written.answer_tag)
        return [question, f'text = {text}.replace("{{question}}", question)', 'inputs = tokenizer(text, return_tensors="pt")']
    system = "" if written.system is None else f'{{"role": "system", "content": {written.system!r}}}, '
    dated = "" if isinstance(spec.model, TinyModel) else f", date_string={CHAT_DATE!r}"
    return [
        question,
        f'messages = [{system}{{"role": "user", "content": question}}]',
        "inputs = tokenizer.apply_chat_template(",
        f'    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True{dated}',
        ")",
    ]


def _limits(recipe: Recipe, columns: Mapping[str, Mapping[str, str]], audits: Sequence[Sequence[str]]) -> str:
    """Return what the numbers do not show."""
    lines = ["- Unlearning makes answers unlikely. That nothing of them remains in the weights is not shown."]
    shown = [column[QUALITY] for head, column in columns.items() if QUALITY in column and head != "trial"]
    p_value = float(shown[0]) if shown else recipe.expected.get("forget_quality")
    if isinstance(p_value, float):
        known = f"(p = {p_value:.3g}; {_TEST})"
        lines.append(
            f"- **Distinguishable from a retrained model {known}.**"
            if p_value < ALIKE
            else f"- Not distinguished from a retrained model {known}: few items show large differences only."
        )
    lines.append(
        "- Attacks were tried as the table of audits says; where it says not tested, nothing is known."
        if audits
        else "- No attack was tried: not weights in 4 bits, nor relearning, nor other prompts, nor membership."
    )
    lines.append("- The numbers are of the items, the prompts and the dtype named above.")
    return "\n".join(lines)


def _audits(rows: Sequence[Sequence[str]]) -> str:
    """Return the audits of the trial as a table; a sentence where there are none."""
    if not rows:
        return "Audits (4 bits, relearning, other prompts, membership): not tested.\n"
    return f"Audits of the trial:\n\n{_rows(rows)}\n"


def _table(columns: Mapping[str, Mapping[str, str]]) -> str:
    """Return a row per metric: of the trial, of the export, and of the export on held-out items."""
    names = dict.fromkeys(name for column in columns.values() for name in column)
    rows = [[name, *(column.get(name, "not read") for column in columns.values())] for name in names]
    return _rows([["metric", *columns], *rows])


def _comparison(verified: Verified) -> str:
    """Return what was compared, with the allowed differences; nothing where nothing was."""
    if not verified.compared:
        return ""
    lines = [["compared", "trial", "this export", "apart by", "allowed"]]
    for each in verified.compared:
        values = ["" if value is None else f"{value:.6g}" for value in (each.trial, each.export)]
        allowed = "numbers of its own" if each.allowed is None else f"{each.allowed:.2g}"
        lines.append([each.name, *values, f"{each.apart:.2g}", allowed])
    unread = "" if verified.unread is None else f"; {verified.unread}"
    note = (
        "\nMerging an adapter rounds the sums, so this model has numbers of its own. Its item losses may be away from the "
        f"trial's by twice what rounding the same sums up or down at random does{unread}.\n"
    )
    return f"\n{_rows(lines)}\n{note if verified.merged else ''}"


def _prompts(spec: StudySpec) -> str:
    """How questions reach the model: what anyone needs who wants the same numbers."""
    if isinstance(spec.model, TinyModel):
        return "the tokenizer's chat template"
    if spec.model.prompt_template is not None:
        return _code(repr(spec.model.prompt_template))
    return f"format `{spec.model.prompt_format or 'chat'}` of UIPE Search"


def _origin(recipe: Recipe) -> str:
    """Where the update vector comes from, in words."""
    if recipe.base in recipe.spec.checkpoints:
        folder = Path(recipe.spec.checkpoints[recipe.base][recipe.epoch - 1])
        return f"from the given checkpoint {recipe.epoch} of {recipe.base} ({_code(folder.name)})"
    run = next(run for run in recipe.spec.variants() if run.label == recipe.base)
    hyperparameters = ", ".join(
        f"{name} {value if isinstance(value, str) else f'{value:g}'}" for name, value in run.hyperparameters.items()
    )
    return f"unlearned with {recipe.base} ({hyperparameters}), epoch {recipe.epoch}"
