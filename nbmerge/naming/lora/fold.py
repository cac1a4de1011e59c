"""Folds an adapter into the weights, by the arithmetic of peft's own layers.

A layer of peft's, of one row and one column, is made once for each thread and kind; it is lent the tensors of one
module, and its `merge` is called. So the result is that of `merge_and_unload`, bit for bit, and follows the installed
peft. Large matrices are folded in blocks of rows, which changes no bit: every element of B @ A is a sum over r.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nbmerge import expressions as ex
from nbmerge.dtypes import BY_NAME, DType
from nbmerge.expressions import Compute, Expr

if TYPE_CHECKING:
    import torch

EXACT, FP32 = "exact", "fp32"
_WHOLE_BYTES = 2 * 2**20  # a matrix up to this is folded in one piece
_FEW_ROWS = 16  # a product of fewer rows may be summed in another order
_FLOAT32 = BY_NAME["float32"]
_local = threading.local()
_making = threading.Lock()


@dataclass(frozen=True, slots=True)
class Kind:
    """What peft's layer is made for.

    layer: `linear`, `embedding`, `conv1d`, `conv2d`, `conv3d`; of target_parameters `parameter`, with three dimensions
    `experts`.
    """

    layer: str
    r: int
    alpha: float
    use_rslora: bool = False
    use_dora: bool = False
    is_turned: bool = False
    """Whether the weight is [in, out], as transformers' Conv1D keeps it (peft's fan_in_fan_out)."""

    @property
    def scale(self) -> float:
        """What B @ A is multiplied with."""
        return self.alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def __str__(self) -> str:
        rest = [word for word, given in (("DoRA", self.use_dora), ("turned", self.is_turned)) if given]
        return ", ".join([f"{self.layer} r={self.r} scale={self.scale!r}", *rest])


def folded(kind: Kind, weight: Expr, a: Expr, b: Expr, magnitude: Expr | None = None, *, precision: str) -> Expr:
    """The weight with the adapter in it. precision: `exact`, in the weight's dtype as peft adds; `fp32`, in float32."""
    dtype = _FLOAT32 if precision == FP32 else weight.dtype
    name = f"LoRA fold ({kind}, {precision})"
    in_blocks = (
        kind.layer in ("linear", "embedding", "parameter")
        and not kind.use_dora
        and weight.nbytes > _WHOLE_BYTES
        and weight.shape[0] > _FEW_ROWS
    )
    if not in_blocks:
        inputs = (weight, a, b) if magnitude is None else (weight, a, b, magnitude)
        return Compute(name, _Fold(kind, precision), inputs, weight.shape, dtype, scratch=_scratch(kind, weight, dtype))
    if kind.layer == "embedding" or kind.is_turned:
        cut, kept, by_columns = ex.permute(a, (1, 0)), b, True
    else:
        cut, kept, by_columns = b, a, False
    function = _FoldRows(kind, precision, by_columns)
    return Compute(name, function, (weight, cut, kept), weight.shape, dtype, axis=0, whole=1)


def _scratch(kind: Kind, weight: Expr, dtype: DType) -> int:
    """Bytes that peft's merge holds at its peak beside inputs and result, as measured."""
    each = max(dtype.itemsize * (4 if kind.use_dora else 2), 8)
    return weight.numel * (each + (dtype.itemsize if weight.dtype != dtype else 0))


def folded_experts(kind: Kind, weight: Expr, a: Expr, b: Expr, *, precision: str) -> Expr:
    """The stacked weights of experts, [experts, out, in], each with its part of the adapter in it.

    a: [experts * r, in]; b: [out, r * experts]. is_turned: each weight is [in, out]. peft's ParamWrapper.
    """
    experts = weight.shape[0]
    parts = ex.reshape(b, (b.shape[0], kind.r, experts))
    return ex.stack(
        [
            folded(
                kind, ex.select(weight, 0, e), ex.narrow(a, 0, e * kind.r, kind.r), ex.select(parts, 2, e),
                precision=precision,
            )
            for e in range(experts)
        ]
    )  # fmt: skip


def folded_bias(kind: Kind, bias: Expr, added: Expr, *, precision: str) -> Expr:
    """The bias of a layer whose adapter has one too (peft's lora_bias). Both are [out]."""
    dtype = _FLOAT32 if precision == FP32 else bias.dtype
    return Compute(f"LoRA bias ({kind}, {precision})", _FoldBias(kind, precision), (bias, added), bias.shape, dtype)


def dtype_before_fold(expr: Expr) -> DType | None:
    """The weight's dtype, where it was folded in float32 and is yet to be rounded; None elsewhere."""
    found: DType | None = None
    for node in ex.walk(expr):  # the innermost last, where several layers are folded into one tensor
        if isinstance(node, Compute) and isinstance(node.function, _FOLDS):
            found = node.inputs[0].dtype if node.function.precision == FP32 else None
    return found


@dataclass(frozen=True, slots=True)
class _Fold:
    kind: Kind
    precision: str

    def __call__(
        self, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, magnitude: torch.Tensor | None = None
    ) -> torch.Tensor:
        if self.precision == FP32:
            weight, a, b = weight.float(), a.float(), b.float()
            magnitude = None if magnitude is None else magnitude.float()
        if self.kind.layer == "experts":
            return _add_expert(self.kind, weight, a, b)
        return _merge(self.kind, weight, a, b, magnitude)


@dataclass(frozen=True, slots=True)
class _FoldRows:
    """The same for some rows of the weight. by_columns: `cut` is the same rows of A's transpose, and not of B."""

    kind: Kind
    precision: str
    by_columns: bool

    def __call__(self, weight: torch.Tensor, cut: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        import torch

        rows, lacking = weight.shape[0], _FEW_ROWS - weight.shape[0]
        if lacking > 0:
            weight, cut = (torch.cat([each, each.new_zeros(lacking, each.shape[1])]) for each in (weight, cut))
        a, b = (cut.T, kept) if self.by_columns else (kept, cut)
        return _Fold(self.kind, self.precision)(weight, a, b)[:rows]


@dataclass(frozen=True, slots=True)
class _FoldBias:
    kind: Kind
    precision: str

    def __call__(self, bias: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
        if self.precision == FP32:
            bias, added = bias.float(), added.float()
        result = bias.clone()
        result += added * self.kind.scale  # peft.tuners.lora.layer.Linear.merge
        return result


_FOLDS = (_Fold, _FoldRows, _FoldBias)


def _add_expert(kind: Kind, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """One expert's share of peft.tuners.lora.layer.ParamWrapper.get_delta_weight and merge."""
    import torch

    equation = "o r e, e r i -> e i o" if kind.is_turned else "o r e, e r i -> e o i"
    delta = torch.einsum(equation, b[:, :, None], a[None])[0] * kind.scale
    result = weight.clone()
    result += delta.to(weight.dtype)
    return result


def _merge(
    kind: Kind, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, magnitude: torch.Tensor | None
) -> torch.Tensor:
    """peft's merge of these tensors."""
    import torch

    def parameter(tensor: torch.Tensor) -> torch.nn.Parameter:
        return torch.nn.Parameter(tensor, requires_grad=False)

    layer = _layer(kind)
    base = layer.get_base_layer()
    try:
        base.weight = parameter(weight.clone())
        if kind.layer == "embedding":
            layer.lora_embedding_A["default"], layer.lora_embedding_B["default"] = parameter(a), parameter(b)
        else:
            layer.lora_A["default"].weight, layer.lora_B["default"].weight = parameter(a), parameter(b)
        if magnitude is not None:
            layer.lora_magnitude_vector["default"].weight = parameter(magnitude)
        with torch.no_grad():
            if kind.layer == "parameter":  # peft.tuners.lora.layer.ParamWrapper.merge, which rounds before it adds
                base.weight.data += layer.get_delta_weight("default").to(weight.dtype)
            else:
                layer.merge()
        result: torch.Tensor = base.weight.data
        return result
    finally:
        _local.layers.pop(kind, None) if magnitude is not None else layer.merged_adapters.clear()


def _layer(kind: Kind) -> Any:
    """peft's layer of this kind, this thread's own."""
    layers: dict[Kind, Any] = _local.__dict__.setdefault("layers", {})
    if kind not in layers:
        with _making:
            layers[kind] = _made(kind)
    return layers[kind]


def _made(kind: Kind) -> Any:
    import torch
    from peft import LoraConfig, inject_adapter_in_model
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    makers: dict[str, Any] = {
        "linear": lambda: Conv1D(1, 1) if kind.is_turned else nn.Linear(1, 1, bias=False),
        "parameter": lambda: nn.Linear(1, 1, bias=False),
        "embedding": lambda: nn.Embedding(1, 1),
        "conv1d": lambda: nn.Conv1d(1, 1, 1, bias=False),
        "conv2d": lambda: nn.Conv2d(1, 1, 1, bias=False),
        "conv3d": lambda: nn.Conv3d(1, 1, 1, bias=False),
    }
    config = LoraConfig(
        r=kind.r, lora_alpha=kind.alpha, use_rslora=kind.use_rslora, use_dora=kind.use_dora,
        fan_in_fan_out=kind.is_turned, init_lora_weights=False, target_modules=["layer"],
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):  # who calls finds the random state as it was
        holder = nn.ModuleDict({"layer": makers[kind.layer]()})
        inject_adapter_in_model(config, holder)
    return holder["layer"]
