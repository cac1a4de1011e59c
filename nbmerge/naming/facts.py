"""What a model class says of its tensors, and which directory describes it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from nbmerge.dtypes import DType
from nbmerge.errors import ConfigError
from nbmerge.expressions import Expr, input_names
from nbmerge.geometry import Shape

_FP32_BYTES = 4


@dataclass(frozen=True)
class ModelFacts:
    """What the model class says.

    class_name: transformers' class; memory: shapes by in-memory name, tied copies included;
    published: by the name that `save_pretrained` writes, the expression over Inputs with in-memory names;
    tied: in-memory name that is not written → the one whose bytes it shares;
    tied_on_hub: the same, with the names that both would have in a published checkpoint;
    buffers: in-memory names that the class never writes (non-persistent);
    ignored: patterns of published names that the class knows and does not load;
    fp32: patterns of in-memory names that the class keeps in fp32 beside 16-bit weights;
    fp32_beside_fp16: further ones, which it keeps in fp32 beside float16 only;
    config: transformers' config with its defaults, wherever it lies;
    turned: in-memory names of weights that are [in, out] where others are [out, in] (transformers' Conv1D, GPT-OSS).
    """

    class_name: str
    memory: Mapping[str, Shape]
    published: Mapping[str, Expr]
    tied: Mapping[str, str]
    tied_on_hub: Mapping[str, str]
    buffers: frozenset[str]
    ignored: tuple[str, ...]
    fp32: tuple[str, ...]
    fp32_beside_fp16: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    turned: frozenset[str] = frozenset()

    @cached_property
    def names(self) -> frozenset[str]:
        """Every name that the class has for a tensor, in memory or published."""
        return frozenset({*self.memory, *self.published, *self.tied_on_hub})

    def is_ignored(self, name: str) -> bool:
        """Whether the class knows this published name and leaves it unloaded (multi-token prediction, say)."""
        return any(re.search(pattern, name) for pattern in self.ignored)

    def is_kept_from(self, dtype: DType, name: str) -> bool:
        """Whether the class keeps the tensor of this output name in fp32 where the rest is cast to `dtype`."""
        if dtype.itemsize >= _FP32_BYTES:
            return False
        patterns = self.fp32 + (self.fp32_beside_fp16 if dtype.name == "float16" else ())
        in_memory = input_names(self.published[name]) if name in self.published else []
        return any(re.search(rf"(^|\.){pattern}($|\.)", each) for pattern in patterns for each in (name, *in_memory))


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
    def config_bytes(self) -> bytes:
        """config.json as it stands. Raises ConfigError where it is missing or may not be read."""
        path = self.config_dir / "config.json"
        try:
            return path.read_bytes()
        except OSError as error:
            raise ConfigError(
                "there is no config.json" if isinstance(error, FileNotFoundError) else f"config.json: {error.strerror}",
                where=str(self.config_dir),
                fix="pass the directory of the model's config with --hf_model_config_path DIR",
            ) from error

    @cached_property
    def config(self) -> dict[str, Any]:
        """The content of config.json. Raises ConfigError where it is missing or is no JSON object."""
        stored = self.config_bytes  # its own error is a ValueError too
        try:
            content = json.loads(stored)
            json.dumps(content, ensure_ascii=False).encode()  # a lone surrogate could not be written again
        except (ValueError, RecursionError) as error:
            content = str(error)
        if not isinstance(content, dict):
            raise ConfigError(
                "config.json is no JSON object" + (f": {content}" if isinstance(content, str) else ""),
                where=str(self.config_dir / "config.json"),
                fix="copy it again from the model that was trained",
            )
        return content

    @property
    def architecture(self) -> str | None:
        """The class that config.json names first; None where it names none."""
        return _first_class(self.config) or self.misplaced_architecture

    @property
    def misplaced_architecture(self) -> str | None:
        """The class that stands in text_config alone, where transformers 4.57 writes that of Qwen2.5-VL."""
        text = self.config.get("text_config")
        return _first_class(text) if isinstance(text, dict) and not _first_class(self.config) else None


def _first_class(config: Mapping[str, Any]) -> str | None:
    names = config.get("architectures")
    first = names[0] if isinstance(names, list) and names else names
    return first if isinstance(first, str) else None
