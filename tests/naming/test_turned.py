"""Experts of Qwen3-VL-MoE that another transformers trained: the same matrices, turned."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import nbmerge
from nbmerge.dtypes import BY_NAME
from nbmerge.expressions import Input
from nbmerge.naming.turned import turned
from nbmerge.validation.findings import FAILED
from tests.support.models import HAS_CONVERSIONS, memory_state, published_state, write_config, write_model_world
from tests.support.results import assert_same, bits_of_all, saved_bits

FAMILY = "qwen3_vl_moe"
GATE_UP, DOWN = "model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"


def of_the_other_version(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors as transformers 4 has them under 5, and the other way round."""
    return {
        name: tensor.transpose(1, 2).contiguous() if ".mlp.experts." in name else tensor
        for name, tensor in state.items()
    }


def test_shards_are_merged_and_proven(tmp_path: Path):
    state = of_the_other_version(memory_state(FAMILY))
    assert sum(".mlp.experts." in name for name in state) == 4
    write_model_world(tmp_path / "ckpt", FAMILY, state=state)
    nbmerge.merge(tmp_path / "ckpt", tmp_path / "out")
    assert_same(saved_bits(tmp_path / "out"), bits_of_all(published_state(FAMILY)))
    reference = write_config(tmp_path / "reference", FAMILY)
    save_file(of_the_other_version(published_state(FAMILY)), reference / "model.safetensors")
    report = nbmerge.validate(tmp_path / "out", checkpoint=tmp_path / "ckpt", reference=reference)
    # transformers 4 loads no reference of 5, whose logits would be compared
    failed = {result.name for result in report.results if result.status == FAILED}
    assert failed <= (set() if HAS_CONVERSIONS else {"running"})


@pytest.mark.parametrize("is_turned", [False, True])
def test_a_comparison_pairs_their_elements(tmp_path: Path, is_turned: bool):
    state = published_state(FAMILY)
    name = next(name for name in state if name.endswith("experts.down_proj"))
    changed = {**state, name: state[name].clone()}
    changed[name][2, 1, 3] += 1
    for side, tensors in (("a", state), ("b", of_the_other_version(changed))):
        save_file(tensors, write_config(tmp_path / side, FAMILY) / "model.safetensors")
    diff = nbmerge.diff(*(tmp_path / side for side in ("ba" if is_turned else "ab")))
    assert not diff.mismatched and not diff.unmatched
    assert [(one.name, one.changed, one.largest_at) for one in diff.changed] == [(name, 1, (2, 1, 3))]


@pytest.mark.parametrize(("hidden", "width"), [(10, 3), (16, 8), (8, 8)], ids=["none", "gate_up_proj", "down_proj"])
@pytest.mark.parametrize("is_turned", [False, True])
def test_a_square_matrix_is_turned_where_the_other_is(hidden: int, width: int, is_turned: bool):
    memory = {GATE_UP: (3, 2 * width, hidden), DOWN: (3, hidden, width)}
    facts: Any = SimpleNamespace(config={"model_type": FAMILY}, memory=memory)
    stored = {name: (e, b, a) if is_turned else (e, a, b) for name, (e, a, b) in memory.items()}
    held = {name: Input(name, shape, BY_NAME["float32"]) for name, shape in stored.items()}
    found = turned(held, facts)
    assert {name: expr.shape for name, expr in found.items()} == memory
    assert all((found[name] is held[name]) is not is_turned for name in held)
