"""What the class that config.json names has, under the names that the files use."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from nbmerge import expressions as ex
from nbmerge.dtypes import DType
from nbmerge.errors import NbmergeError
from nbmerge.expressions import Input
from nbmerge.geometry import Shape
from nbmerge.naming.facts import ModelFacts
from nbmerge.naming.further_layers import further_layers
from nbmerge.validation.subject import Subject

# Buffers that older transformers saved, and that transformers drops when it loads.
_RECOMPUTED = re.compile(r"(^|\.)(rotary_emb\.inv_freq|masked_bias|attn\.bias|position_ids)$")


@dataclass(frozen=True)
class Expectation:
    """What the class has, under the names that the files use: published ones, or those in memory.

    transformers loads both. shapes: of the tensors that are written; tied: name that is not → the one that is;
    unloaded: names in the files that are known, and that the class does not load.
    """

    facts: ModelFacts
    found: Mapping[str, Shape]
    unloaded: frozenset[str] = frozenset()

    @staticmethod
    def of(subject: Subject) -> Expectation | NbmergeError | str:
        """That of a directory; the error, or the sentence, that says why there is none."""
        if _is_quantized(subject):
            return "config.json has a quantization_config, and packed weights have names and shapes of their own"
        facts = subject.facts
        if isinstance(facts, NbmergeError):
            return facts
        found = {name: entry.shape for name, (_, entry) in subject.entries.items()}
        return Expectation(facts, found, names_unloaded(subject))

    @cached_property
    def in_memory(self) -> bool:
        """Whether more of the names and shapes in the files are those in memory than those that are published."""
        facts = self.facts
        memory = sum(facts.memory.get(name) == shape for name, shape in self.found.items())
        published = sum(
            name in facts.tied_on_hub or (name in facts.published and facts.published[name].shape == shape)
            for name, shape in self.found.items()
        )
        return memory > published

    @cached_property
    def tied(self) -> Mapping[str, str]:
        """Names that share the tensor of another one."""
        return self.facts.tied if self.in_memory else self.facts.tied_on_hub

    @cached_property
    def shapes(self) -> Mapping[str, Shape]:
        """The shape of every tensor that is written."""
        if self.in_memory:
            return {name: shape for name, shape in self.facts.memory.items() if name not in self.facts.tied}
        return {name: rule.shape for name, rule in self.facts.published.items()}

    @cached_property
    def dtypes(self) -> Mapping[str, DType]:
        """The dtype that the class makes a tensor with: floating or not is what matters of it."""
        published = self.facts.published
        inputs = {
            node.name: node.dtype for rule in published.values() for node in ex.walk(rule) if isinstance(node, Input)
        }
        return {**inputs, **{name: rule.dtype for name, rule in published.items()}}

    def missing(self) -> list[str]:
        """Tensors of the class that the files lack; one whose tied partner is there is not missing."""
        present = {kept for alias, kept in self.tied.items() if self.found.get(alias) == self.shapes.get(kept)}
        return [name for name in self.shapes if name not in self.found and name not in present]

    def unexpected(self) -> list[str]:
        """Tensors of the files that the class neither loads nor knows."""
        known = {*self.shapes, *self.tied, *self.unloaded, *self.facts.buffers}
        return [name for name in self.found if name not in known and not _RECOMPUTED.search(name)]

    def mismatched(self) -> Iterator[tuple[str, Shape, Shape]]:
        """Name, shape in the file and shape in the class, where the two differ."""
        for name, shape in self.found.items():
            want = self.shapes.get(self.tied.get(name, name))
            if want is not None and want != shape:
                yield name, shape, want


def names_unloaded(subject: Subject) -> frozenset[str]:
    """Names in the files that are known, and that the class does not load: those that it ignores, and further layers.

    Empty where there is no class.
    """
    facts = subject.facts
    if isinstance(facts, NbmergeError):
        return frozenset()
    receipt = (subject.receipt or {}).get("unloaded")
    recorded = frozenset(str(name) for name in receipt) if isinstance(receipt, list) else frozenset()
    ignored = frozenset(name for name in subject.entries if facts.is_ignored(name))
    return ignored | further_layers(subject.entries, facts.config, recorded)


def quantization_configs(subject: Subject) -> list[object]:
    """The quantization_config of config.json and of its parts, as they stand there."""
    config = subject.json("config.json")
    parts = [config, *config.values()] if isinstance(config, dict) else []
    return [part["quantization_config"] for part in parts if isinstance(part, dict) and "quantization_config" in part]


def names_a_method(quantization: object) -> bool:
    """Whether a quantization_config says how the weights are packed. transformers takes two keys of old for a name."""
    given: dict[str, Any] = quantization if isinstance(quantization, dict) else {}
    method = given.get("quant_method")
    return bool(isinstance(method, str) and method) or any(
        given.get(key) is True for key in ("load_in_8bit", "load_in_4bit")
    )


def _is_quantized(subject: Subject) -> bool:
    return any(map(names_a_method, quantization_configs(subject)))
