"""What `save_pretrained` makes of a model's names and tensors, in the installed version of transformers.

transformers 5 converts: it fuses and renames parts of a model in memory, and turns that round when it saves.
transformers 4 has in memory what it publishes, but for the prefixes of some vision-language models.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from importlib.util import find_spec
from typing import Any

import torch

from nbmerge.expressions import Expr, Input
from nbmerge.naming.recorder import Recorder, dtype_of


def reverted(model: Any, state: Mapping[str, torch.Tensor]) -> dict[str, Expr]:
    """The published tensors of these in-memory ones, as expressions over them."""
    if find_spec("transformers.core_model_loading") is None:
        return _renamed(model, state)
    return _converted(model, state)


def left_out_when_tied(model: Any, names: Collection[str]) -> set[str]:
    """Those of the in-memory names that the class declares as copies, left out where they are one with another."""
    if hasattr(model, "all_tied_weights_keys"):
        return set(names) & set(model.all_tied_weights_keys)  # transformers 5: {left out: kept}
    from transformers.modeling_utils import _get_tied_weight_keys

    patterns = _get_tied_weight_keys(model)
    return {name for name in names if any(re.search(pattern, name) for pattern in patterns)}


def _converted(model: Any, state: Mapping[str, torch.Tensor]) -> dict[str, Expr]:
    """transformers 5's own reverse conversion (core_model_loading.revert_weight_conversion).

    It runs on meta tensors while a recorder writes down which parts of which tensors it takes.
    """
    from transformers.core_model_loading import revert_weight_conversion

    with Recorder() as recorder:
        inputs = {name: recorder.input(name, tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()}
        converted = revert_weight_conversion(model, inputs)
        return {name: recorder.expr(tensor) for name, tensor in converted.items()}


def _renamed(model: Any, state: Mapping[str, torch.Tensor]) -> dict[str, Expr]:
    """transformers 4's renames (PreTrainedModel.save_pretrained): prefixes of the families in VLMS, and a hook."""
    from transformers import modeling_utils

    bases = [base.__name__.lower() for base in type(model).__mro__[:-1]]
    is_vlm = any(family in base for family in modeling_utils.VLMS for base in bases)
    mapping = model._checkpoint_conversion_mapping if is_vlm else {}
    names = {name: _reversed(name, mapping) for name in state}
    return {
        model._fix_state_dict_key_on_save(names[name])[0]: Input(name, tuple(tensor.shape), dtype_of(tensor))
        for name, tensor in state.items()
    }


def _reversed(name: str, mapping: Mapping[str, str]) -> str:
    """A name in memory under its published prefix. mapping: pattern of published names → prefix in memory."""
    for published, in_memory in mapping.items():
        prefix = re.sub(r"\(.*\)", "", published.lstrip("^"))
        name, count = re.subn(in_memory, prefix, name)
        if count:
            break
    return name
