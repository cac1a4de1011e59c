"""What transformers says of the model that config.json describes, found on the meta device without weights."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from nbmerge.errors import ConfigError, listing
from nbmerge.expressions import Expr
from nbmerge.geometry import Shape
from nbmerge.naming.prefixes import strip_wrappers


@dataclass(frozen=True)
class ModelFacts:
    """What the model class says.

    class_name: transformers' class; memory: shapes by in-memory name, tied copies included;
    published: by the name that `save_pretrained` writes, the expression over Inputs with in-memory names;
    tied: in-memory name that is not written → the one whose bytes it shares;
    buffers: in-memory names that the class never writes (non-persistent);
    ignored: patterns of published names that the class knows and does not load;
    fp32: patterns of in-memory names that the class keeps in fp32.
    """

    class_name: str
    memory: Mapping[str, Shape]
    published: Mapping[str, Expr]
    tied: Mapping[str, str]
    buffers: frozenset[str]
    ignored: tuple[str, ...]
    fp32: tuple[str, ...]

    def is_ignored(self, name: str) -> bool:
        """Whether the class knows this published name and leaves it unloaded (multi-token prediction, say)."""
        return any(re.search(pattern, name) for pattern in self.ignored)

    def stays_fp32(self, name: str) -> bool:
        """Whether the class keeps this tensor in fp32, whatever the dtype of the rest."""
        return any(re.search(rf"(^|\.){pattern}($|\.)", name) for pattern in self.fp32)


@dataclass(frozen=True)
class HFModel:
    """The model of a configuration directory. Its facts are found when they are first asked for.

    config_dir holds config.json and the tokenizer; is_value_model asks for the token-classification class
    with one label; tie_word_embedding overrides the config.
    """

    config_dir: Path
    trust_remote_code: bool = False
    is_value_model: bool = False
    tie_word_embedding: bool | None = None
    _shapes: dict[str, Shape] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json as it is. Raises ConfigError where it is missing or is no JSON object."""
        path = self.config_dir / "config.json"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise ConfigError(
                "there is no config.json", where=str(self.config_dir),
                fix="pass the directory of the model's config with --hf_model_config_path DIR",
            ) from error  # fmt: skip
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"config.json is no JSON: {error}", where=str(path)) from error
        if not isinstance(content, dict):
            raise ConfigError("config.json holds no object", where=str(path))
        return content

    @property
    def architecture(self) -> str | None:
        """The class that config.json names first."""
        names = self.config.get("architectures") or [None]
        return names[0] if isinstance(names[0], str) else None

    @cached_property
    def facts(self) -> ModelFacts:
        """What transformers' class says of the model. Imports torch and transformers.

        Raises ConfigError where no class is known or it cannot be made.
        """
        from nbmerge.naming.meta import model_facts

        return model_facts(self)

    def expected_shape(self, name: str) -> Shape | None:
        """The global shape of a tensor by its in-memory or published name, wrappers' prefixes allowed."""
        name = strip_wrappers(name)
        facts = self.facts
        if name in facts.memory:
            return facts.memory[name]
        return facts.published[name].shape if name in facts.published else None


def auto_class_name(architecture: str, *, is_value_model: bool = False) -> str:
    """The auto class that loads an architecture, as verl's merger chooses it.

    Raises ConfigError for an architecture of no auto class that checkpoints are merged for.
    """
    if is_value_model or "ForTokenClassification" in architecture:
        return "AutoModelForTokenClassification"
    for ending, auto in (
        ("ForCausalLM", "AutoModelForCausalLM"),
        ("ForConditionalGeneration", "AutoModelForImageTextToText"),
        ("ForSequenceClassification", "AutoModelForSequenceClassification"),
    ):
        if ending in architecture:
            return auto
    raise ConfigError(
        f"no auto class is known for the architecture {architecture!r}",
        fix="load the merged directory with the class itself: transformers." + architecture,
    )


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without transformers' warnings on the token ids and the like of a config, which a merge does not touch."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def unknown_class(architecture: str | None, known: list[str]) -> ConfigError:
    """No class of transformers has this name."""
    return ConfigError(
        f"transformers has no class {architecture!r}" if architecture else "config.json names no architecture",
        why="the class decides which tensors belong to the model" + (f"; near: {listing(known)}" if known else ""),
        fix="update transformers, or pass --trust-remote-code if the class is in the checkpoint's own files",
    )
