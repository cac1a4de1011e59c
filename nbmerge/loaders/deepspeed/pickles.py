"""What the pickles of DeepSpeed's files name beside tensors: each an inert stand-in."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nbmerge.errors import UnsupportedCheckpointError
from nbmerge.loaders.megatron.pickles import ALLOWED as CARRIED  # arrays and options in the user's client state
from nbmerge.loaders.standins import Enumeration, Function, Opaque, StateDict
from nbmerge.loaders.unpickle import load_torch_file


def _without_factory(*_: Any) -> StateDict:
    """A collections.defaultdict, whose entries the pickle puts in after."""
    return StateDict()


_STAGES = {"disabled": 0, "optimizer_states": 1, "gradients": 2, "weights": 3}  # deepspeed/runtime/zero/config.py
_CLASSES = {
    "collections": ("Counter",),  # of torch's MultiStepLR
    "deepspeed.runtime.fp16.loss_scaler": (
        "DynamicLossScaler", "LossScaleConfig", "LossScaleProfile", "LossScaler", "LossScalerBase",
    ),
    "deepspeed.utils.tensor_fragment": ("fragment_address", "tensor_fragment"),
}  # fmt: skip

ALLOWED: Mapping[tuple[str, str], Any] = {
    **CARRIED,
    ("collections", "defaultdict"): Function(_without_factory),
    **{(module, name): Opaque for module in ("builtins", "__builtin__") for name in ("dict", "float", "int", "list")},
    ("deepspeed.runtime.zero.config", "ZeroStageEnum"): Enumeration,
    **{(module, name): Opaque for module, names in _CLASSES.items() for name in names},
}


def read(path: Path, *, trust_pickle: bool) -> Mapping[str, Any]:
    """What a file holds, tensors as byte ranges. Raises as `load_torch_file`, and for a file without entries."""
    content = load_torch_file(path, allowed=ALLOWED, trust_pickle=trust_pickle)
    if not isinstance(content, Mapping):
        raise UnsupportedCheckpointError(
            f"the file holds a {type(content).__name__}, not the states of a checkpoint", where=str(path),
            fix="pass the directory that DeepSpeed's save_checkpoint wrote",
        )  # fmt: skip
    return content


def number(value: Any) -> int | None:
    """A whole number, or a stage of ZeRO; None for anything else."""
    if isinstance(value, Enumeration) and len(value.args) == 1:
        value = value.args[0]
        value = _STAGES.get(value) if isinstance(value, str) else value
    return value if isinstance(value, int) and not isinstance(value, bool) else None
