"""The tokenizer and the embedding: every id has a row, special tokens agree, the chat template renders."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from nbmerge.errors import listing
from nbmerge.receipt import RECEIPT_NAME
from nbmerge.validation.findings import ERROR, WARNING, Check, Finding, Outcome
from nbmerge.validation.quiet import first_line, quiet_transformers
from nbmerge.validation.side import has_tokenizer, vocabulary_size
from nbmerge.validation.subject import Subject

_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|tok_embeddings|embed_in|embeddings|shared)\.weight$")
# Not the one that stands for an image: models put it beyond the vocabulary, and replace it before the embedding.
_SPECIAL = ("bos", "eos", "pad", "unk", "decoder_start")
_BASE = "copy the tokenizer's files of the model that was trained, from its huggingface/ directory"
_MATRIX = 2  # dimensions
_SOUGHT = 50  # tokens that are looked for in the files; that many of one kind tell enough
_TOKENIZER_SUFFIXES = {".json", ".txt", ".model", ".tiktoken", ".vocab"}
_NOT_ITS = {"config.json", "generation_config.json", RECEIPT_NAME}


@dataclass(frozen=True)
class Loaded:
    """A tokenizer, or why there is none. missing: a package that it needs, or code that may not be run."""

    tokenizer: Any = None
    failure: str = ""
    missing: str = ""


def load_tokenizer(subject: Subject) -> Loaded:
    """The directory's tokenizer as transformers loads it. Never raises, shows nothing, uses no network."""
    if not has_tokenizer(subject.directory):
        return Loaded(missing="there is no tokenizer in the directory")
    from transformers import AutoTokenizer

    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(
                subject.directory, local_files_only=True, trust_remote_code=subject.trust_remote_code
            )
    except ImportError as error:
        return Loaded(missing=f"a package is not installed: {first_line(error)}")
    except Exception as error:  # noqa: BLE001 - a tokenizer's files can break a library in any way
        if not subject.trust_remote_code and "trust_remote_code" in str(error):
            return Loaded(missing="the tokenizer is code of the directory; pass trust_remote_code to run it")
        return Loaded(failure=first_line(error))
    return Loaded(tokenizer)


class TokenizerCheck(Check):
    """What the tokenizer gives, the embedding has a row for; and special tokens and the chat template work."""

    name = "tokenizer"
    title = "the tokenizer loads and agrees with the embedding, the config and the generation config"

    def run(self, subject: Subject) -> Outcome:
        """Loads the tokenizer with transformers. Reads no weights."""
        rows, what = _rows(subject)
        loaded = load_tokenizer(subject)
        if loaded.missing:
            return Outcome(said=loaded.missing, ran=False)
        if loaded.failure:
            return Outcome((_not_loaded(loaded.failure),), "it does not load")
        tokens = _vocabulary(loaded.tokenizer)
        findings = [
            *_too_many(subject, tokens, rows, what),
            *_ids_in_range(subject, rows, what),
            *_never_stops(subject, getattr(loaded.tokenizer, "eos_token_id", None)),
            *_not_rendered(loaded.tokenizer),
        ]
        fit = f" in {rows:,} rows of {what}" if rows is not None else ""
        template = "a chat template" if getattr(loaded.tokenizer, "chat_template", None) else "no chat template"
        return Outcome(tuple(findings), f"{len(tokens):,} tokens{fit}, {template}")


def _rows(subject: Subject) -> tuple[int | None, str]:
    """How many ids the model has a row for, and what says so: the embedding, or else the config."""
    shapes = {name: entry.shape for name, (_, entry) in subject.entries.items()}
    found = [(s[0], name) for name, s in shapes.items() if len(s) == _MATRIX and _EMBEDDING.search(name)]
    return max(found, default=(vocabulary_size(subject), "the config's vocab_size"), key=lambda item: item[0] or 0)


def _vocabulary(tokenizer: Any) -> Mapping[str, int]:
    """Every token and its id, added ones included."""
    return {**tokenizer.get_vocab(), **getattr(tokenizer, "get_added_vocab", dict)()}


def _not_loaded(failure: str) -> Finding:
    return Finding(
        "cannot be loaded by transformers", "the tokenizer", failure,
        why="its files are damaged, do not belong together, or are of another version of transformers", fix=_BASE,
    )  # fmt: skip


def _too_many(subject: Subject, tokens: Mapping[str, int], rows: int | None, what: str) -> Iterator[Finding]:
    beyond = sorted((number, token) for token, number in tokens.items() if rows is not None and number >= rows)
    if not beyond:
        return
    shown = listing(f"{token!r} is {number}" for number, token in beyond)
    said = f"{what} has {rows:,} rows; {shown}"
    if not _in_files(subject, [token for _, token in beyond[:_SOUGHT]]):
        yield Finding(
            "gets tokens from transformers that the embedding has no row for", "the tokenizer", said,
            why="no file of the directory names them: the tokenizer's class adds them when it is loaded",
            fix="leave them unused; or name the model's own tokens in tokenizer_config.json", severity=WARNING,
        )  # fmt: skip
        return
    yield Finding(
        "gives ids that the embedding has no row for", "the tokenizer", said,
        why="it is of another model, or tokens were added without resizing the embedding",
        fix=f"{_BASE}; if tokens were added in training, the checkpoint's embedding should have their rows",
    )  # fmt: skip


def _in_files(subject: Subject, tokens: Iterable[str]) -> bool:
    """Whether a tokenizer's file of the directory names any of the tokens, written as it is or with JSON's escapes."""
    forms = [form for token in tokens for form in (token.encode(), json.dumps(token)[1:-1].encode())]
    for path in sorted(subject.directory.iterdir()):
        if path.suffix not in _TOKENIZER_SUFFIXES or path.name in _NOT_ITS or path.name.endswith(".index.json"):
            continue
        try:
            content = path.read_bytes()
        except OSError:
            continue
        if any(form in content for form in forms):
            return True
    return False


def _ids_in_range(subject: Subject, rows: int | None, what: str) -> Iterator[Finding]:
    for file, values in _configs(subject):
        for key, value in values.items():
            for number in value if isinstance(value, list) else [value]:
                if isinstance(number, int) and rows is not None and number >= rows:
                    yield Finding(
                        "names a special token that the embedding has no row for", f"{file}: {key}",
                        f"{number}; {what} has {rows:,} rows",
                        why="the file is of another model, or the embedding was not resized", fix=_BASE,
                        # What config.json says is overruled by generation_config.json, and transformers only warns.
                        severity=ERROR if file == "generation_config.json" else WARNING,
                    )  # fmt: skip


def _configs(subject: Subject) -> list[tuple[str, dict[str, Any]]]:
    """The special tokens' ids in the config, in its text part and in the generation config."""
    config = subject.json("config.json")
    text = config.get("text_config") if isinstance(config, dict) else None
    generation = subject.json("generation_config.json")
    parts = (("config.json", config), ("config.json: text_config", text), ("generation_config.json", generation))
    keys = [f"{name}_token_id" for name in _SPECIAL]
    return [(file, {key: part[key] for key in keys if key in part}) for file, part in parts if isinstance(part, dict)]


def _never_stops(subject: Subject, eos: object) -> Iterator[Finding]:
    """Generation stops at the ids of generation_config.json; only without that file, at those of the config."""
    if not isinstance(eos, int) or not _generates(subject):
        return
    configs = dict(_configs(subject))
    files = ["generation_config.json"] if "generation_config.json" in configs else list(configs)
    file, ids = next(
        ((file, ids) for file in files if (ids := configs[file].get("eos_token_id")) is not None), ("", None)
    )
    if eos not in (ids if isinstance(ids, list) else [ids]):
        yield Finding(
            "has another end of text than generation stops at", "the tokenizer",
            f"its eos_token_id is {eos}; " + (f"{file} says {ids}" if file else f"{listing(files)} states none"),
            why="generation_config.json was lost, or is of another model; generation may never stop",
            fix="copy generation_config.json of the model that was trained, or set its eos_token_id",
            severity=WARNING,
        )  # fmt: skip


def _generates(subject: Subject) -> bool:
    """Whether the class is one that text is generated with."""
    config = subject.json("config.json")
    named = config.get("architectures") if isinstance(config, dict) else None
    names = named if isinstance(named, list) else []
    return any(str(name).endswith(("ForCausalLM", "ForConditionalGeneration")) for name in names)


def _not_rendered(tokenizer: Any) -> Iterator[Finding]:
    if not getattr(tokenizer, "chat_template", None):
        return
    failure = _render(tokenizer, "Hello") and _render(tokenizer, [{"type": "text", "text": "Hello"}])
    if failure:
        yield Finding(
            "does not render a conversation of one message", "the chat template", failure,
            why="it needs more than messages, or was edited", fix="try it: tokenizer.apply_chat_template(messages)",
            severity=WARNING,
        )  # fmt: skip


def _render(tokenizer: Any, content: Any) -> str:
    """What keeps the template from rendering a user's message; empty where nothing does."""
    from jinja2 import TemplateSyntaxError

    try:
        with quiet_transformers():
            tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
    except TemplateSyntaxError:
        return ""  # a finding of the check of the files
    except Exception as error:  # noqa: BLE001 - a template can fail in any way
        return first_line(error)
    return ""
