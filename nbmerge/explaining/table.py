"""The table of patterns, and the candidates that it gives for a mismatch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from nbmerge.explaining import head_patterns, model_patterns, name_patterns, shape_patterns
from nbmerge.explaining.candidates import Candidate, Known, Mismatch, Pattern, Strength, ranked
from nbmerge.geometry import Shape

PATTERNS: tuple[Pattern, ...] = (
    shape_patterns.empty_placeholder,
    shape_patterns.replicated_concatenated,
    head_patterns.labels_for_tokens,
    model_patterns.vocabulary_padded,
    shape_patterns.ceil_padding,
    shape_patterns.one_shard,
    model_patterns.heads_of_queries,
    model_patterns.fused_query_key_value,
    model_patterns.fused_other_heads,
    model_patterns.fused_gate_up,
    model_patterns.config_size,
    model_patterns.packed,
    model_patterns.other_size,
    model_patterns.vocabulary_resized,
    shape_patterns.transposed,
    shape_patterns.wrong_dimension,
    shape_patterns.block_of_mesh,
    shape_patterns.flat_shard,
    shape_patterns.flat_alignment,
    name_patterns.wrapper_prefix,
    name_patterns.lora_base_layer,
    name_patterns.grouped_expert_names,
    head_patterns.other_head,
    head_patterns.tied_head,
    head_patterns.other_layers,
    name_patterns.fused_or_split_names,
    name_patterns.other_prefix,
    name_patterns.another_family,
)
"""Among candidates of one strength the order is that of the table: what users met most often first."""


def candidates(asked: Mismatch) -> tuple[Candidate, ...]:
    """What can have caused the mismatch, strongest first. Nothing for equal shapes."""
    found = [candidate for pattern in PATTERNS for candidate in pattern(asked)]
    return ranked([_against_record(each) for each in found] if asked.known.recorded else found)


def _against_record(candidate: Candidate) -> Candidate:
    """A cause that would show in the placements, of a checkpoint whose placements are recorded and agree."""
    if not candidate.counts:
        return candidate
    evidence = (*candidate.evidence, "against it: the recorded pieces make up this shape exactly")
    return replace(candidate, evidence=evidence, strength=Strength.WEAK)


def leading(found: tuple[Candidate, ...]) -> tuple[Candidate, ...]:
    """The candidates that share the greatest strength."""
    return tuple(each for each in found if each.strength == found[0].strength)


def why(asked: Mismatch, otherwise: str) -> str:
    """The best candidates in one sentence, for the `why` of an error; `otherwise` where none is more than possible.

    `3600 = 24 · ⌈3584/24⌉: the padding of an uneven shard was not trimmed (24 ranks)`.
    """
    found = candidates(asked)
    if not found or found[0].strength == Strength.WEAK:
        return otherwise
    return "; or ".join(str(each) for each in leading(found)[:3])


def likely_cause(name: str, held: Iterable[Shape], wanted: Shape, ranks: int) -> str:
    """`: ` and a known cause of the first shape that has one, to follow the `why` of an error; else nothing.

    held: shapes that a tensor may be said to have, the likelier first; ranks: among how many it was divided.
    """
    causes = (why(Mismatch(shape, wanted, name, Known(ranks)), "") for shape in held)
    return next((f": {cause}" for cause in causes if cause), "")


def likely_cause_either_way(name: str, one: Shape, other: Shape, ranks: int) -> str:
    """The same for two shapes of which either can be the wrong one."""
    ways = likely_cause(name, [one], other, ranks), likely_cause(name, [other], one, ranks)
    return ": " + "; or ".join(way.removeprefix(": ") for way in ways if way) if any(ways) else ""
