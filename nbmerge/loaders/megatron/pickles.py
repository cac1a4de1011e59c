"""What the pickles of Megatron's rank files name beside tensors: each an inert stand-in, none of it looked at.

The exception is the Namespace of Megatron-LM's arguments, whose plain values say how the run was set up.
Sources of the names: megatron/training/checkpointing.py and arguments.py of Megatron-LM (core 0.11 to 0.20).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nbmerge.loaders.standins import Function, Opaque, StandIn


class Namespace(StandIn):
    """argparse.Namespace."""

    __slots__ = ()


def _carried(*args: Any) -> Opaque:
    """A call whose result nobody reads: an array of a random number generator, bytes of an extra state."""
    made = Opaque()
    made.args = args
    return made


# A signal by its own name, as Python up to 3.10 pickles it: Megatron-LM's `exit_signal`.
_SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2", "SIGHUP", "SIGQUIT", "SIGALRM", "SIGCONT", "SIGABRT", "SIGXCPU")
_CLASSES = {
    "_io": ("BytesIO",),  # extra states of transformer_engine 1.x
    "datetime": ("datetime", "timedelta"),
    "megatron.core.enums": ("Fp4Recipe", "Fp8Recipe", "ModelType"),
    "megatron.core.rerun_state_machine": (
        "RerunDiagnostic", "RerunMode", "RerunState", "RerunValidationStatus",
    ),
    "megatron.core.transformer.enums": (
        "AttnBackend", "AttnMaskType", "AttnType", "CudaGraphModule", "CudaGraphScope", "InferenceCudaGraphScope",
        "LayerType", "ModelType",
    ),
    "megatron.core.transformer.pipeline_parallel_layer_layout": ("PipelineParallelLayerLayout",),
    "megatron.legacy.model.enums": ("AttnMaskType", "AttnType", "LayerType", "ModelType", "PositionEmbeddingType"),
    "megatron.model.enums": ("AttnMaskType", "AttnType", "LayerType", "ModelType", "PositionEmbeddingType"),
    "numpy": ("dtype", "ndarray"),
    "numpy.dtypes": ("Float32DType", "Float64DType", "Int64DType", "UInt32DType"),
    "pathlib": ("Path", "PosixPath", "PurePosixPath"),
    "pathlib._local": ("Path", "PosixPath", "PurePosixPath"),  # since Python 3.13
    "signal": ("Signals", *_SIGNALS),
    "types": ("SimpleNamespace",),
}  # fmt: skip
_FUNCTIONS = (
    ("_codecs", "encode"),
    *((module, "bytes") for module in ("builtins", "__builtin__")),  # b"" in protocol 2
    *((module, "set") for module in ("builtins", "__builtin__")),
    # numpy 2 and numpy 1 name them in different modules
    *((module, name) for module in ("numpy._core.multiarray", "numpy.core.multiarray")
      for name in ("_reconstruct", "scalar")),
)  # fmt: skip

ALLOWED: Mapping[tuple[str, str], Any] = {
    ("argparse", "Namespace"): Namespace,
    **{(module, name): Opaque for module, names in _CLASSES.items() for name in names},
    **{function: Function(_carried) for function in _FUNCTIONS},
}
"""For `load_torch_file(path, allowed=ALLOWED)`: what rank files name in addition to torch's own."""


def saved_arguments(state: Any) -> dict[str, Any]:
    """The arguments of Megatron-LM that a rank file carries, those of them that are plain values.

    Numbers, texts, None, and lists of them; enumerations and other objects are left out. Empty for a file
    without arguments, as verl's are.
    """
    saved = state.get("args") if isinstance(state, Mapping) else None
    attributes = saved.attributes if isinstance(saved, Namespace) else saved
    if not isinstance(attributes, Mapping):
        return {}
    return {str(name): value for name, value in attributes.items() if _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(item is None or isinstance(item, (bool, int, float, str)) for item in value)
    return value is None or isinstance(value, (bool, int, float, str))
