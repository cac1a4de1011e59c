"""What a model class says of its tensors, and which directory describes it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from nbmerge.errors import ConfigError
from nbmerge.expressions import Expr
from nbmerge.geometry import Shape


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
class ModelDirectory:
    """A directory with config.json and the tokenizer, and what the user says beyond it.

    is_value_model asks for the token-classification class with one label; tie_word_embedding overrides the config.
    """

    config_dir: Path
    trust_remote_code: bool = False
    is_value_model: bool = False
    tie_word_embedding: bool | None = None

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
