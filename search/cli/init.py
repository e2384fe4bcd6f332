"""Write a study file for one's own model and data: `uipe init`."""

import sys
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from search.cli.tables import echo, quieten
from uipe_core.errors import UserError

if TYPE_CHECKING:
    from search.cli.draft import Draft, SeenModel
    from search.planning.fitting import Machine

Answer = TypeVar("Answer")


def init(
    model: Annotated[
        str | None, typer.Option(help="Model that is to forget: folder, hub name, GGUF file, or package:NAME/FILE.")
    ] = None,
    retain_model: Annotated[
        str | None, typer.Option(help="Model that never saw the forget data, or its evaluation log; not needed.")
    ] = None,
    forget: Annotated[str | None, typer.Option(help="Data to forget: a file, a folder, or a data set of the hub.")] = None,
    retain: Annotated[str | None, typer.Option(help="Data to keep, likewise.")] = None,
    to: Annotated[Path, typer.Option(help="Study file to write.")] = Path("study.yaml"),
    finetune: Annotated[
        bool, typer.Option("--finetune", help="The model does not know the data yet: the study fine-tunes it first.")
    ] = False,
    prompt_format: Annotated[
        str | None, typer.Option(help="llama2, llama3, phi or chat; the tokenizer's chat template where it has one.")
    ] = None,
    prompt_template: Annotated[str | None, typer.Option(help="Prompt with {question}, in place of --prompt-format.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Ask nothing: take defaults for what is not given.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")] = False,
) -> None:
    """Write a first study file for your own model and data, check it, and print its plan.

    Size, dtype and chat template are read from the model, lengths from the data; whether all weights are trained or LoRA
    follows from the memory of this machine, and the dtype on a processor from its speed. What cannot be seen is asked. A few
    steps are timed for the plan, as uipe plan does.
    """
    if to.exists() and not force:
        raise UserError(f"--to {to}: it exists; choose another file, or give --force to replace it")
    if to.is_dir() or not to.parent.is_dir():
        raise UserError(f"--to {to}: {'is a folder' if to.is_dir() else 'its folder does not exist'}; give a file")
    if finetune and retain_model is not None:
        raise UserError("--retain-model: with --finetune the study trains a retain model of its own; leave it out")
    if prompt_format is not None and prompt_template is not None:
        raise UserError("--prompt-format and --prompt-template are both given; remove one of them")
    asks = not yes and sys.stdin is not None and sys.stdin.isatty()
    if not asks:
        _require({"--model": model, "--forget": forget, "--retain": retain}, yes)
    quieten()
    machine = _machine(to)
    draft = _answered(model, retain_model, forget, retain, to, finetune, prompt_format, prompt_template, asks)
    draft = _in_fast_dtype(_that_fits(draft, machine), machine)
    _write(draft)
    _print_plan(to)
    echo(f"run      uipe run {to}")


def _print_plan(study: Path) -> None:
    """Print what the study will cost, as far as it can be known here; the file is written whatever comes of it."""
    from search.cli.upkeep import print_plan
    from search.planning.planner import plan_study
    from search.spec.study import load_study

    spec = load_study(study)
    try:
        print_plan(plan_study(spec, Path("runs", spec.name), None, lambda text: echo(f"{text} ...", err=True)))
    except UserError as error:
        echo(f"note: no plan: {error}; correct it, then: uipe plan {study}")


def _require(needed: dict[str, str | None], yes: bool) -> None:
    """Refuse to go on without a terminal to ask at, where something is missing."""
    meanings = {"--model": "the model that is to forget", "--forget": "the data to forget", "--retain": "the data to keep"}
    missing = [f"{option} ({meanings[option]})" for option, value in needed.items() if value is None]
    if missing:
        raise UserError(f"missing: {', '.join(missing)}; give {'them' if len(missing) > 1 else 'it'}, or run it on a terminal")
    if not yes:
        raise UserError("there is no terminal to ask on; give --yes to take defaults for what is not given")


def _machine(to: Path) -> "Machine":
    # Before a model is read: it measures the memory that libraries take, by this process's own.
    from search.planning.planner import machine_of
    from uipe_core.storage.files import cache_folder

    return machine_of(cache_folder("deltas"), to.absolute())


def _answered(
    model: str | None,
    retain_model: str | None,
    forget: str | None,
    retain: str | None,
    to: Path,
    finetune: bool,
    prompt_format: str | None,
    prompt_template: str | None,
    asks: bool,
) -> "Draft":
    """Look at what is given, ask for what is not, and return the draft."""
    from search.cli.draft import Draft, data_place, load_data, look_at
    from uipe_core.corpora.types import Corpus

    given, seen = _checked(model, lambda text: (text, look_at(text)), "Model that is to forget (folder, hub name or GGUF file)")
    if asks and not finetune and retain_model is None:
        finetune = not _agreed("Does it know already what it is to forget?")
    places = [
        _checked(forget, data_place, "Data to forget (file, folder or data set of the hub)"),
        _checked(retain, data_place, "Data to keep"),
    ]
    corpus: Corpus | None
    try:
        corpus = load_data(*places)
    except UserError:
        if all(Path(place).is_absolute() for place in places):
            raise
        corpus = None  # on the hub, and not to be had from here
    reference = None
    if retain_model is not None:
        reference = _model_or_log(retain_model)
    elif asks and not finetune:
        question = "Model that never saw the forget data, or its evaluation log (- for none)"
        reference = _checked(None, lambda text: None if text == "-" else _model_or_log(text), question, "-")
    chosen, template = _prompt(seen, prompt_format, prompt_template, asks)
    prompts = seen.prompts(chosen, template)
    longest = None
    if prompts is not None and corpus is not None and not any(item.plain for items in corpus.sets.values() for item in items):
        longest = max(prompts.encode_item(item).answer_length for items in corpus.sets.values() for item in items)
    items = 0 if corpus is None else len(corpus.sets["forget"])
    return Draft(to, seen, given, places[0], places[1], reference, finetune, chosen, template, items, longest)


def _model_or_log(value: str) -> str:
    from search.spec.models import model_place

    if value.endswith(".json") and Path(value).expanduser().is_file():
        return str(Path(value).expanduser().resolve())
    return model_place(value)


def _prompt(seen: "SeenModel", name: str | None, template: str | None, asks: bool) -> tuple[str | None, str | None]:
    """Return prompt format and template; both None for the chat template."""
    if name is not None or template is not None or seen.has_chat_template:
        return name, template

    def chosen(text: str) -> tuple[str | None, str | None]:
        found = (None, text) if "{question}" in text else (text, None)
        seen.prompts(*found)
        return found

    if asks:
        question = "It has no usable chat template. Prompt it was trained with: llama2, llama3, phi, or a text with {question}"
        return _checked(None, chosen, question)
    raise UserError(
        "missing: --prompt-format or --prompt-template; the model's tokenizer has no usable chat template, so that its prompt "
        "cannot be seen; give llama2, llama3 or phi, or a template such as '[INST] {question} [/INST]'"
    )


def _checked(given: str | None, check: Callable[[str], Answer], question: str, default: str = "") -> Answer:
    """Return a checked answer: of the command line, or asked for until it is right."""
    if given is not None:
        return check(given)
    while True:
        answer = _asked(f"{question}{f' [{default}]' if default else ''}: ") or default
        try:
            if answer:
                return check(answer)
        except UserError as error:
            echo(f"  {error}", err=True)


def _agreed(question: str) -> bool:
    while True:
        answer = _asked(f"{question} [Y/n]: ").lower()
        if answer in ("", "y", "yes", "n", "no"):
            return not answer.startswith("n")


def _asked(question: str) -> str:
    echo(question, err=True, nl=False)
    line = sys.stdin.readline()
    if not line:
        raise UserError("the input ended before all was answered; nothing was written")
    return line.strip()


def _that_fits(draft: "Draft", machine: "Machine") -> "Draft":
    """Choose full fine-tuning or LoRA, and resources, by the memory of this machine."""
    from search.planning.fitting import first_fitting
    from search.spec.study import parse_study

    variants = draft.variants(machine.cpus, len(machine.gpus))
    if draft.model.folder is None:
        return variants[-1]
    studies = [parse_study(_content(each), draft.to.parent) for each in variants]
    number, misfits = first_fitting(studies, draft.model.folder, machine)
    return replace(variants[number], misfits=tuple(f"{each.what}; {each.remedy}" for each in misfits))


def _in_fast_dtype(draft: "Draft", machine: "Machine") -> "Draft":
    """Choose bfloat16 for a model stored in float32 where a processor computes, and multiplies it clearly faster."""
    from uipe_core.scoring.half_precision import faster_in_bfloat16

    if machine.gpus or draft.model.dtype != "float32":
        return draft
    return replace(draft, bfloat16_speed=faster_in_bfloat16(draft.model.parameters))


def _content(draft: "Draft") -> dict[str, object]:
    from ruamel.yaml import YAML

    found: dict[str, object] = YAML(typ="safe", pure=True).load(draft.text())
    return found


def _write(draft: "Draft") -> None:
    """Write the file under a temporary name, read and check it as `uipe validate` does, and put it in place."""
    from search.evaluation.inputs import check_inputs
    from search.spec.errors import StudyFileError
    from search.spec.study import load_study

    to = draft.to
    temporary = to.with_name(f".{to.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.write_text(draft.text(), encoding="utf-8")
        notes = check_inputs(load_study(temporary))
        temporary.replace(to)
    except StudyFileError as error:
        raise UserError(str(error).replace(str(temporary), str(to))) from error
    except OSError as error:
        raise UserError(f"--to {to}: {error.strerror or error}; choose another file") from error
    finally:
        temporary.unlink(missing_ok=True)
    seen = draft.model
    size = f"{seen.architecture}, {seen.parameters:,} parameters, {seen.dtype}" if seen.folder else "not on this machine"
    trained = "LoRA" if draft.adapter else "all weights"
    held = "1 GPU" if draft.gpus else f"{draft.cores} CPU core{'s' if draft.cores > 1 else ''}"
    echo(f"model    {draft.given}: {size}")
    echo(f"trains   {trained}; each base run and each trial holds {held}")
    for note in [*(f"does not fit here: {text}" for text in draft.misfits), *notes]:
        echo(f"note: {note}")
    echo(f"{to}: written, and valid")


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command(epilog="Example: uipe init --model ./model --forget forget.jsonl --retain retain.jsonl --to study.yaml")(init)
