"""What was said about a run beside its tensors: Megatron-LM's saved arguments, and the model's config.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

_NESTED = ("text_config", "llm_config", "thinker_config")  # where multimodal configs keep the language model's sizes

_EXPERT_COUNTS = ("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts")


@dataclass(frozen=True)
class Settings:
    """arguments: plain values of Megatron-LM's Namespace, empty without one; config: the content of config.json."""

    arguments: Mapping[str, Any]
    config: Mapping[str, Any]

    def argument(self, name: str) -> int | None:
        """A size that the arguments give, or None."""
        return _size(self.arguments.get(name))

    def config_size(self, *names: str) -> int | None:
        """The first of these sizes that config.json gives for the language model, or None."""
        for scope in _scopes(self.config):
            for name in names:
                if (size := _size(scope.get(name))) is not None:
                    return size
        return None

    @property
    def expert_width(self) -> int | None:
        """Intermediate size of one routed expert by config.json. Mixtral's kind has no name of its own for it."""
        if self.config_size(*_EXPERT_COUNTS) is None:
            return None
        return self.config_size("moe_intermediate_size") or self.config_size("intermediate_size")

    @property
    def expert_count(self) -> int | None:
        """Routed experts of a layer, by the arguments, else by config.json."""
        return self.argument("num_experts") or self.config_size(*_EXPERT_COUNTS)


def _scopes(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The config of the language model first, then what is around it."""
    for name in _NESTED:
        inner = config.get(name)
        if isinstance(inner, Mapping):
            yield from _scopes(inner)
    yield config


def _size(value: Any) -> int | None:
    """A positive integer, or None for anything else that may stand there."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
