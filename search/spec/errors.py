"""Explain what is wrong with a study: key, value found, what is allowed, remedy; without the secrets in its URLs."""

import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, get_args
from urllib.parse import unquote, unquote_plus

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticCustomError

from search.spec.bounds import MOST, MOST_ASKED, MOST_RANK
from uipe_core.errors import UserError, closest

KeyPath = tuple[str | int, ...]
"""Where a value stands in a study: names of keys, and positions in lists."""

RULE = "study_rule"

_WANTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "a text",
    "string_unicode": "a text of valid characters",
    "bool_type": "true or false",
    "dict_type": "a mapping (lines of `key: value`)",
    "model_type": "a mapping (lines of `key: value`)",
    "model_attributes_type": "a mapping (lines of `key: value`)",
    "tuple_type": "a list",
    "invalid_key": "a key that is a text",
}


@dataclass(frozen=True)
class Problem:
    """One error in a study.

    Attributes:
        key: Path of the key, for example ``search.alpha.low``; empty where the file as a whole is wrong.
        message: The value found, what is allowed and the remedy.
        place: ``line 12``, ``command line``, or empty where it is not known.
    """

    key: str
    message: str
    place: str = ""

    def __str__(self) -> str:
        """Return one line: key, place and message, as far as there are any."""
        where = f"{self.key} ({self.place})" if self.key and self.place else self.key or self.place
        return f"{where}: {self.message}" if where else self.message


class StudyFileError(UserError):
    """A study that cannot be run, with all its errors at once.

    Attributes:
        problems: All problems found, in the order of the file where lines are known.
        source: The file, or ``study`` for one given as a dict.
    """

    def __init__(self, problems: Sequence[Problem], source: str) -> None:
        """Keep both as arguments of the exception, so that it survives pickling."""
        super().__init__(tuple(problems), source)
        self.problems = tuple(problems)
        self.source = source

    def __str__(self) -> str:
        """Return the source, the number of problems, and one line for each."""
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        return "\n".join([f"{self.source}: {count}", *(f"  {problem}" for problem in self.problems)])


def rule(allowed: str, remedy: str) -> PydanticCustomError:
    """Make an error for a pydantic validator to raise."""
    return PydanticCustomError(RULE, "{allowed}", {"allowed": allowed, "remedy": remedy})


class _WithoutSecrets(reprlib.Repr):
    """Shorten values for messages; passwords of URLs are hidden before anything is cut off."""

    def repr_str(self, x: str, level: int) -> str:
        return super().repr_str(without_password(x), level)


def show(value: object) -> str:
    """Format a value as in a study file, shortened, with passwords in URLs hidden."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    short = _WithoutSecrets()
    short.maxstring = short.maxother = 120
    return short.repr(value)


def key_text(parts: KeyPath) -> str:
    """Format ``("a", "b", 0)`` as ``a.b[0]``; keys that would not print are quoted."""
    text = ""
    for part in parts:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            name = part if part and part.isprintable() else repr(part)
            text += f".{name}" if text else name
    return text


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """List the known names, after ``Did you mean X?`` where one is close to the name."""
    close, allowed = closest(name, known), f"Allowed: {', '.join(known)}."
    return f"Did you mean {close}? {allowed}" if close else allowed


def key_path(loc: Sequence[str | int], data: object) -> KeyPath:
    """Return pydantic's location as a path in the study.

    Pydantic puts the tag of a union and marks such as ``[key]`` between the keys; a single value that was taken for a
    list of one has a position the writer of the study never saw.
    """
    parts: list[str | int] = []
    here = data
    tag_seen = False
    for step in loc:
        if step == "[key]" and not (isinstance(here, Mapping) and step in here):
            continue
        if isinstance(here, Mapping):
            if not tag_seen and step != "kind" and here.get("kind") == step:
                tag_seen = True
                continue
            parts.append(str(step))
            here = here.get(step)
        elif isinstance(here, list | tuple) and isinstance(step, int):
            parts.append(step)
            here = here[step] if step < len(here) else None
        elif not isinstance(step, int):
            parts.append(step)
            here = None
    return tuple(parts)


def explain(error: ErrorDetails, root: type[BaseModel], data: object, hint: bool = True) -> tuple[KeyPath, str]:
    """Return path and message of one pydantic error.

    Args:
        error: The error.
        root: The model of the whole study.
        data: Its input.
        hint: Look for the key that was meant in place of an unknown one, which takes longer than all else.
    """
    parts = key_path(error["loc"], data)
    kind, value, context = error["type"], error["input"], error.get("ctx", {})
    if kind == "extra_forbidden":
        meant = _known_instead(parts, root, data) if hint else "Remove it."
        return parts, f"found {show(value)}, but this key is unknown. {meant}"
    if kind == "missing":
        return parts, "this key is missing and has no default. Add it."
    if kind == "union_tag_not_found":
        return (*parts, "kind"), f"this key is missing. Add it: one of {_kinds(parts, root)}."
    if kind == "union_tag_invalid":
        return (
            *parts,
            "kind",
        ), f"found {show(context['tag'])}; must be one of {_kinds(parts, root)}. Choose one of them."
    if kind == RULE:
        return parts, f"found {show(value)}; {context['allowed']}. {context['remedy']}"
    allowed, remedy = _allowed(kind, value, context)
    return parts, f"found {show(value)}; {allowed or error['msg']}. {remedy}"


def _allowed(kind: str, value: object, context: Mapping[str, Any]) -> tuple[str, str]:
    """Return what one kind of pydantic error allows, and the remedy."""
    bounds = {"greater_than": ("gt", "above"), "greater_than_equal": ("ge", "at least")}
    bounds |= {"less_than": ("lt", "below"), "less_than_equal": ("le", "at most")}
    if kind in bounds:
        name, word = bounds[kind]
        bound = context[name]
        bound = int(bound) if isinstance(bound, float) and bound.is_integer() else bound
        return f"must be {word} {bound}", f"Choose a value {word} {bound}."
    if kind == "literal_error":
        return f"must be one of {context['expected']}", "Choose one of them."
    if kind == "too_short":
        return "the list must not be empty", "Give at least one value, or leave the key out where it has a default."
    if kind == "too_long":
        return f"the list has {context['actual_length']} entries, and {context['max_length']} are the most", "Give fewer."
    if kind == "string_too_short":
        return "must not be empty", "Write a value, or leave the key out where it has a default."
    if kind in ("string_too_long", "string_pattern_mismatch"):
        return "must be 1 to 64 letters, digits, dots, underscores or hyphens", "Choose such a name."
    wanted = _WANTED.get(kind)
    if wanted is None:
        return "", "Change the value."
    return f"must be {wanted}", _type_remedy(kind, value, wanted)


def _type_remedy(kind: str, value: object, wanted: str) -> str:
    """Return the remedy for a value of the wrong type, with the value that was probably meant."""
    if kind in ("int_type", "float_type"):
        if isinstance(value, bool):
            return f"Write {wanted}; true and false are for switches."
        if isinstance(value, float) and value.is_integer():
            return f"Write {int(value)}."
        if isinstance(value, str) and value.strip().lstrip("+-").replace(".", "", 1).isdecimal():
            return f"Remove the quotes: write {value.strip()}."
        if isinstance(value, list | tuple):
            return f"Write {wanted}; lists are for learning_rate and the hyperparameters of a method."
    if kind == "string_type" and isinstance(value, bool | int | float):
        return "Put it in quotes."
    return f"Write {wanted}."


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield every pydantic model inside a type annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
        return
    for inner in get_args(annotation):
        yield from _models(inner)


def _models_of(field: FieldInfo) -> Iterator[type[BaseModel]]:
    """Yield the section classes a field may hold: those of a registry (`search.spec.sections.ByKind`), or of its annotation."""
    registries = [mark.registry for mark in field.metadata if hasattr(mark, "registry")]
    for registry in registries:
        yield from registry.values()
    if not registries:
        yield from _models(field.annotation)


def _kind_of(model: type[BaseModel]) -> str | None:
    """Return the value of ``kind`` that chooses this model; None for one that is not chosen."""
    return get_args(model.model_fields["kind"].annotation)[0] if "kind" in model.model_fields else None


@lru_cache(maxsize=64)
def _sections(parts: tuple[str | int, ...], root: type[BaseModel]) -> list[type[BaseModel]]:
    """Return the models allowed at a path: several where ``kind`` chooses."""
    found = [root]
    for part in parts:
        fields = (model.model_fields.get(str(part)) for model in found)
        found = [inner for field in fields if field is not None for inner in _models_of(field)]
    return found


def _kinds(parts: KeyPath, root: type[BaseModel]) -> str:
    return ", ".join(str(_kind_of(model)) for model in _sections(parts, root))


def _all_keys(model: type[BaseModel], prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the path of every key a study can have."""
    for name, field in model.model_fields.items():
        yield (*prefix, name)
        for inner in _models_of(field):
            yield from _all_keys(inner, (*prefix, name))


def forget_keys() -> None:
    """Forget which keys there are, before a study is explained: an extension may have added some since the last."""
    _sections.cache_clear()
    _keys_by_name.cache_clear()


@lru_cache(maxsize=4)
def _keys_by_name(root: type[BaseModel]) -> dict[str, str]:
    """Return the key of every name; of keys with the same name the one nearest to the top: it comes last, so it stays."""
    return {path[-1]: key_text(path) for path in sorted(_all_keys(root), key=len, reverse=True)}


def _known_instead(parts: KeyPath, root: type[BaseModel], data: object) -> str:
    """Suggest a key in place of an unknown one, from anywhere in a study; else list the keys allowed there."""
    *above, last = parts
    name = str(last)
    here: Any = data
    for part in above:
        here = here[part]
    chosen = here.get("kind")
    candidates = _sections(tuple(above), root)
    own = [model for model in candidates if _kind_of(model) in (None, chosen)]
    allowed = [key for model in own for key in model.model_fields]
    if close := closest(name, allowed):
        return f"Did you mean {key_text((*above, close))}?"
    for model in candidates:
        if name in model.model_fields:
            return f"It belongs to {key_text((*above, 'kind'))}: {_kind_of(model)}. Remove it, or change the kind."
    elsewhere = _keys_by_name(root)
    close = closest(name, elsewhere)
    hint = f"Did you mean {elsewhere[close]}? " if close else ""
    return f"{hint}Allowed here: {', '.join(allowed)}."


HIDDEN = "***"
"""Stands for a password."""

_USER_SECRET = re.compile(r"(:/{1,2}[^:/@\s]*):(\S*)@")
"""One slash is what a path makes of two."""
_QUERY_SECRET = re.compile(r"([?&][^=&#\s]*(?:password|secret|token|key|sig|credential)[^=&#\s]*=)([^&#\s]*)", re.IGNORECASE)


def without_password(url: str) -> str:
    """Hide passwords, keys and tokens in a URL of a database or an object store.

    Hides too much rather than too little where an ``@`` or a ``:`` stands unquoted.
    """
    hidden = _USER_SECRET.sub(rf"\1:{HIDDEN}@", url)
    return _QUERY_SECRET.sub(rf"\1{HIDDEN}", hidden)


def without_secrets_of(text: str, url: str) -> str:
    """Hide the secrets of a URL in a text such as an error, encoded as in the URL or plain."""
    secrets = [found[2] for pattern in (_USER_SECRET, _QUERY_SECRET) for found in pattern.finditer(url)]
    for form in {change(secret) for secret in secrets if secret for change in (str, unquote, unquote_plus)}:
        text = text.replace(form, HIDDEN)
    return without_password(text)


def require_number_asked(option: str, value: int) -> None:
    """Refuse a number of finalists or seeds of a command that is no sane one.

    Raises:
        UserError: Names the option, the value and the range.
    """
    _require_within(option, value, MOST_ASKED)


def require_count(option: str, value: int | None) -> None:
    """Refuse a number of an option that a study file may not have in its place; raises as `require_number_asked`."""
    _require_within(option, value, MOST)


def require_rank(option: str, value: int | None) -> None:
    """Refuse a rank that a study file may not have; raises as `require_number_asked`."""
    _require_within(option, value, MOST_RANK)


def _require_within(option: str, value: int | None, most: int) -> None:
    if value is not None and not 1 <= value <= most:
        wrong = "few" if value < 1 else "many"
        raise UserError(f"{option}: {value} is too {wrong}; give at least 1 and at most {most}")
