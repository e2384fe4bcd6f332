"""Make the pages of the documentation that have a source elsewhere, and llms.txt. Hooks of MkDocs, see mkdocs.yml."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ROOT_PAGES = {"index.md": "README.md", "architecture.md": "ARCHITECTURE.md", "changelog.md": "CHANGELOG.md"}
LINK = re.compile(r"\]\(([^)#:\s]+)(#[^)]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages."""
    from mkdocs.structure.files import File

    made = {"schema.md": _schema_page(), "cli.md": _command_line_page(), "api.md": _python_page()}
    made |= {page: (ROOT / source).read_text() for page, source in ROOT_PAGES.items()}
    for name, text in made.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Point links at pages; what is no page of the site is named as a file of the repository."""
    source = ROOT_PAGES.get(page.file.src_uri)
    folder = ROOT if source else ROOT / "docs"
    pages = {(ROOT / original).resolve(): name for name, original in ROOT_PAGES.items()}

    def place(match: re.Match[str]) -> str:
        target, anchor = match.group(1), match.group(2) or ""
        path = (folder / target).resolve()
        if path in pages:
            return f"]({pages[path]}{anchor})"
        if path.is_relative_to(ROOT / "docs") and path.is_file():
            return f"]({path.relative_to(ROOT / 'docs').as_posix()}{anchor})"
        return f"](repository:{path.relative_to(ROOT).as_posix()})"

    text = LINK.sub(place, markdown)
    return re.sub(r"(?<!!)\[([^\]]*)\]\(repository:([^)]*)\)", lambda m: _in_repository(m.group(1), m.group(2)), text)


def _in_repository(text: str, path: str) -> str:
    plain = text.strip("`")
    return f"`{path}`" if path.endswith(plain) else f"{text} (`{path}`)"


def on_post_build(config: Any) -> None:
    """Write llms.txt: every page with its first sentence, for readers that are programs."""
    lines = [f"# {config['site_name']}", "", f"> {config['site_description']}", ""]
    for group, pages in _groups(config["nav"]):
        lines += [f"## {group}", ""]
        for title, name in pages:
            text = (Path(config["site_dir"]) / name.replace(".md", ".html")).read_text()
            first = re.search(r"<p>(.*?)</p>", text.split("<article", 1)[-1], re.DOTALL)
            said = " ".join(re.sub(r"<[^>]+>", "", first.group(1)).split()) if first else ""
            lines.append(f"- [{title}]({name.replace('.md', '.html')}): {said[:200]}")
        lines.append("")
    (Path(config["site_dir"]) / "llms.txt").write_text("\n".join(lines))


def _groups(nav: list[Any]) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    single = []
    for entry in nav:
        if isinstance(entry, str):
            single.append(("Start", entry))
        else:
            ((title, inside),) = entry.items()
            if isinstance(inside, str):
                single.append((title, inside))
            else:
                yield title, [next(iter(each.items())) for each in inside]
    yield "Pages", single


def _command_line_page() -> str:
    import typer
    from typer.cli import get_docs_for_click

    from search.cli.main import app

    command = typer.main.get_command(app)
    text = get_docs_for_click(obj=command, ctx=typer.Context(command), name="uipe")
    return re.sub(r"\[/?bold\]", "", text).replace("# `uipe`", "# The command line", 1)


def _python_page() -> str:
    import search

    homes = {name: home.replace(":", ".") for name, home in sorted(search._HOMES.items())}
    intro = (
        "# Python\n\nEverything that `import search` gives. What is loaded late (Ray, torch) is loaded with the first use.\n"
    )
    return intro + "".join(f"\n::: {home}\n" for home in dict.fromkeys(homes.values()))


def _schema_page() -> str:
    schema = json.loads((ROOT / "studies" / "study.schema.json").read_text())
    lines = [
        "# Types and bounds of every key",
        "",
        "Made from `studies/study.schema.json`, which `uipe schema` prints. What keys mean: [the study file](study_file.md).",
    ]
    top = {"properties": {}, "required": schema["required"]}
    sections = []
    for key, value in schema["properties"].items():
        kinds = [_resolved(schema, each) for each in _alternatives(value)]
        kinds = [each for each in kinds if each.get("type") == "object" and "properties" in each]
        if kinds:
            sections += [(key, each) for each in kinds]
        else:
            top["properties"][key] = value
    for title, section in [("Top level", top), *sections]:
        kind = section["properties"].get("kind", {}).get("const")
        lines += ["", f"## {title}{f', kind: {kind}' if kind else ''}", "", "| key | type | default |", "|---|---|---|"]
        for name, value in _keys(schema, section):
            lines.append(f"| `{name}` | {_type(schema, value)} | {_default(value)} |")
    return "\n".join(lines) + "\n"


def _keys(schema: Any, section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    required = section.get("required", ())
    for name, value in section["properties"].items():
        if name == "kind":
            continue
        yield prefix + name, {**value, **({"default": REQUIRED} if name in required else {})}
        for each in (_resolved(schema, one) for one in _alternatives(value)):
            if "properties" in each:
                yield from _keys(schema, each, f"{prefix}{name}.")


REQUIRED = object()


def _default(value: Mapping[str, Any]) -> str:
    if value.get("default") is REQUIRED:
        return "required"
    return f"`{json.dumps(value['default'])}`" if "default" in value else ""


def _alternatives(value: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return value.get("anyOf") or value.get("oneOf") or [value]


def _resolved(schema: Any, value: Mapping[str, Any]) -> Mapping[str, Any]:
    return schema["$defs"][value["$ref"].rsplit("/", 1)[1]] if "$ref" in value else value


BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}


def _type(schema: Any, value: Mapping[str, Any]) -> str:
    found = []
    for each in (_resolved(schema, one) for one in _alternatives(value)):
        if "const" in each or "enum" in each:
            text = " or ".join(f"`{json.dumps(one)}`" for one in each.get("enum", [each.get("const")]))
        elif each.get("type") == "array":
            text = f"list of {_type(schema, each.get('items', {}))}"
        elif "properties" in each:
            text = "section"
        elif each.get("type") == "object":
            text = "mapping"
        else:
            text = str(each.get("type", "any value"))
        bounds = [f"{sign} {each[name]:g}" for name, sign in BOUNDS.items() if name in each]
        found.append(f"{text} {' and '.join(bounds)}".strip())
    return " or ".join(dict.fromkeys(found)).replace("|", "\\|")
