"""Chat templates: where a directory keeps them, and whether they can be parsed as transformers parses them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nbmerge.validation.subject import Subject

_FOLDER = "additional_chat_templates"


def templates(subject: Subject) -> dict[str, str]:
    """The text of every chat template, by the name of the file that holds it."""
    found = {name: text for path in _files(subject.directory) for name, text in _text_of(path, subject.directory)}
    for name in ("tokenizer_config.json", "chat_template.json"):
        content = subject.json(name)
        found.update(_inside(name, content.get("chat_template") if isinstance(content, dict) else None))
    return found


def _files(directory: Path) -> list[Path]:
    return sorted([*directory.glob("*.jinja"), *(directory / _FOLDER).glob("*.jinja")])


def _text_of(path: Path, directory: Path) -> Iterator[tuple[str, str]]:
    try:
        yield path.relative_to(directory).as_posix(), path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return


def _inside(name: str, value: object) -> Iterator[tuple[str, str]]:
    """One template, or several as a list of name and template, as older tokenizers have them."""
    if isinstance(value, str):
        yield name, value
    for entry in value if isinstance(value, list) else ():
        if isinstance(entry, dict) and isinstance(entry.get("template"), str):
            yield f"{name}: {entry.get('name')}", entry["template"]


def syntax_error(text: str) -> str:
    """What keeps a template from being compiled; empty where nothing does. Nothing of it is run."""
    from jinja2 import TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}`, with which transformers marks what the assistant says."""

        tags = {"generation"}  # noqa: RUF012 - jinja2 has it so

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    # The environment of transformers' utils/chat_template_utils.py.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    try:
        environment.from_string(text)
    except (TemplateError, RecursionError) as error:
        line = getattr(error, "lineno", None)
        return f"{error}" + (f" (line {line})" if line else "")
    return ""
