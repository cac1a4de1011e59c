"""Experts of Qwen3-VL-MoE: [experts, in, out] in transformers 4 and its files, [experts, out, in] in transformers 5.

transformers 5 reads both, by their shapes (conversion_mapping.py, Transpose with check_dims).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from nbmerge import expressions as ex
from nbmerge.expressions import Expr
from nbmerge.naming.facts import ModelFacts

_MODEL_TYPES = ("qwen3_vl_moe", "qwen3_vl_moe_text")
_EXPERTS = re.compile(r"\.mlp\.experts\.(gate_up_proj|down_proj)$")
_TURN = (0, 2, 1)


def turned(tensors: Mapping[str, Expr], facts: ModelFacts) -> dict[str, Expr]:
    """The tensors with these experts as the installed class has them.

    Where one is turned, all are: of a layer's two matrices, [hidden, 2 n] and [n, hidden], at most one is square.
    """
    found = dict(tensors)
    if facts.config.get("model_type") not in _MODEL_TYPES:
        return found
    experts = [name for name in tensors if _EXPERTS.search(name) and len(facts.memory.get(name, ())) == len(_TURN)]
    other = {name: tuple(facts.memory[name][at] for at in _TURN) for name in experts}
    if all(tensors[name].shape == other[name] for name in experts) and any(
        other[name] != facts.memory[name] for name in experts
    ):
        found |= {name: ex.permute(tensors[name], _TURN) for name in experts}
    return found
