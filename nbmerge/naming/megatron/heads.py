"""Value heads: a critic's output layer has one row, and the class of its config must be one that has such a head."""

from __future__ import annotations

from collections.abc import Container

from nbmerge.errors import Problem
from nbmerge.expressions import Fill
from nbmerge.naming.facts import ModelFacts
from nbmerge.naming.megatron.rename import Renamed
from nbmerge.naming.notes import ZEROS, Filled

_VALUE, _BIAS, _OUTPUT = "score.weight", "score.bias", "output_layer.weight"


def fill_bias(work: Renamed, facts: ModelFacts) -> list[Filled]:
    """The bias of a value head, which transformers' token classifiers have and Megatron's critics do not."""
    if _BIAS not in facts.published or _BIAS in work.tensors or _VALUE not in work.tensors:
        return []
    weight = work.tensors[_VALUE]
    work.tensors[_BIAS] = Fill(0.0, facts.published[_BIAS].shape, weight.dtype)
    work.sources[_BIAS] = work.sources[_VALUE]
    return [Filled(_BIAS, ZEROS, "Megatron's value head has no bias; the class expects one")]


def mistaken_head(work: Renamed, facts: ModelFacts, base: Container[str]) -> list[Problem]:
    """The problem of a critic under another model's config, or of another model under a critic's.

    base: names that a base model fills. Takes the heads out of `work`, so that they are told once.
    """
    wanted, there = _VALUE in facts.published, _VALUE in work.tensors
    if wanted == there or work.family is None or (wanted and _VALUE in base):
        return []
    logits = work.family.ends[_OUTPUT].targets[0]
    held = next((name for name in (_VALUE, logits) if name in work.tensors), None)
    source = work.sources[held] if held else ""
    rows = work.tensors[held].shape[0] + next((t.rows - t.kept for t in work.trims if t.name == held), 0) if held else 0
    for name in (_VALUE, _BIAS, logits):
        work.tensors.pop(name, None)
        work.sources.setdefault(name, source or _OUTPUT)
    if there:
        return [
            Problem(
                f"the checkpoint is a critic's: its output layer has one row, and {facts.class_name} predicts tokens",
                where=source,
                why="config.json names another class than the one that was trained",
                fix="pass --is_value_model, which makes the model a token classifier with one label",
                kind="contradiction",
            )
        ]
    return [
        Problem(
            f"{facts.class_name} predicts values, and the checkpoint has no value head: "
            + (f"its output layer has {rows:,} rows" if held else "it has no output layer at all"),
            where=source,
            why="the model is no critic" + ("" if held else ", or its last pipeline stage is missing"),
            fix="leave --is_value_model out, or pass the config that training used: --hf_model_config_path DIR",
            kind="contradiction",
        )
    ]
