"""What a family's table is: rows of Megatron names and rules, for the model's ends and for each stack of layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from nbmerge.naming.megatron.rules import Rule

Rows = Mapping[str, Rule]
"""Megatron name → rule. `{e}` stands for an expert's number."""


@dataclass(frozen=True)
class Stack:
    """Layers that share rows: `source` + N + "." + row → `target` + N + "." + what the row's rule makes.

    after: name of the config's size that is added to N (multi-token-prediction layers follow the others);
    extra: published names that are copies of other published tensors, per layer;
    loaded: whether the model class loads them; False for those that it publishes and does not load.
    """

    source: str
    target: str
    rows: Rows
    after: str = ""
    extra: Mapping[str, str] = field(default_factory=dict)
    loaded: bool = True


@dataclass(frozen=True)
class Family:
    """The table of a family.

    model_types: as config.json names them; ends: rows outside of the layers; unchanged: prefix in the checkpoint →
    prefix of the published names, for parts that Megatron takes over as they are; proven: whether checkpoints made
    by Megatron itself were merged with it, bit for bit; zero_centred: whether norms are published as what is added to
    1; interleaved: whether rotary embeddings turn neighbouring channels, None where Megatron has no option for it.
    """

    name: str
    model_types: tuple[str, ...]
    ends: Rows
    stacks: tuple[Stack, ...]
    unchanged: Mapping[str, str] = field(default_factory=dict)
    proven: bool = False
    zero_centred: bool = False
    interleaved: bool | None = False
