"""Runs a conversion on meta tensors and writes down, as expressions, what it does to them.

Views become views, copies become nothing, concatenations become pastes; an operation that is not known here
becomes a Compute node that runs the operation itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nbmerge import expressions as ex
from nbmerge.dtypes import DType, parse_dtype
from nbmerge.expressions import Cast, Compute, Expr, Input
from nbmerge.geometry import Shape


def dtype_of(tensor: torch.Tensor) -> DType:
    """The element type of a torch tensor."""
    return parse_dtype(str(tensor.dtype))


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves __init_subclass__ untyped
    """While active, follows every meta tensor that came out of `input`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._exprs: dict[int, Expr] = {}
        self._alive: list[torch.Tensor] = []  # an id is a tensor's only as long as the tensor lives

    def input(self, name: str, shape: Shape, dtype: torch.dtype) -> torch.Tensor:
        """A new meta tensor that stands for the Input `name`."""
        tensor = torch.empty(shape, dtype=dtype, device="meta")
        self._remember(tensor, Input(name, shape, dtype_of(tensor)))
        return tensor

    def expr(self, tensor: torch.Tensor) -> Expr:
        """How the tensor was made. Raises KeyError for one that came from nowhere."""
        return self._exprs[id(tensor)]

    def _remember(self, tensor: torch.Tensor, expr: Expr) -> None:
        self._exprs[id(tensor)] = expr
        self._alive.append(tensor)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        outputs = list(result) if isinstance(result, (tuple, list)) else [result]
        if not self._known(args):
            return result
        if func._schema.is_mutable:  # every view of what is changed would have to follow
            raise NotImplementedError(f"{func} changes a tensor in place, which is not recorded")
        rule = _RULES.get(str(func))
        made = rule(_replace(args, self._exprs), outputs) if rule is not None else None
        if made is None:
            made = [_computed(func, args, kwargs or {}, self._exprs, i, out) for i, out in enumerate(outputs)]
        for tensor, expr in zip(outputs, made if isinstance(made, list) else [made], strict=False):
            if isinstance(tensor, torch.Tensor):
                self._remember(tensor, expr)
        return result

    def _known(self, args: Sequence[Any]) -> bool:
        tensors = _tensors(args)
        return bool(tensors) and all(id(tensor) in self._exprs for tensor in tensors)


def _tensors(args: Any) -> list[torch.Tensor]:
    if isinstance(args, torch.Tensor):
        return [args]
    if isinstance(args, (tuple, list)):
        return [tensor for arg in args for tensor in _tensors(arg)]
    return []


def _replace(args: Any, exprs: Mapping[int, Expr]) -> Any:
    if isinstance(args, torch.Tensor):
        return exprs[id(args)]
    if isinstance(args, (tuple, list)):
        return [_replace(arg, exprs) for arg in args]
    return args


def _computed(
    func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], exprs: Mapping[int, Expr], index: int, out: Any
) -> Expr:
    """A node that runs the operation itself on whole tensors."""
    tensors = _tensors(args)

    def run(*inputs: torch.Tensor) -> torch.Tensor:
        left = list(inputs)
        result = func(*_put_back(args, left), **dict(kwargs, **({"device": "cpu"} if "device" in kwargs else {})))
        chosen: torch.Tensor = result[index] if isinstance(result, (tuple, list)) else result
        return chosen

    return Compute(str(func), run, tuple(exprs[id(t)] for t in tensors), tuple(out.shape), dtype_of(out))


def _put_back(args: Any, left: list[torch.Tensor]) -> Any:
    if isinstance(args, torch.Tensor):
        return left.pop(0)
    if isinstance(args, (tuple, list)):
        return [_put_back(arg, left) for arg in args]
    return args


def _split(args: Sequence[Any], outputs: list[torch.Tensor]) -> list[Expr]:
    dim = args[2] % len(args[0].shape) if len(args) > 2 else 0
    pieces: list[Expr] = []
    at = 0
    for output in outputs:
        pieces.append(ex.narrow(args[0], dim, at, output.shape[dim]))
        at += output.shape[dim]
    return pieces


def _unbind(args: Sequence[Any], outputs: list[torch.Tensor]) -> list[Expr]:
    dim = args[1] % len(args[0].shape) if len(args) > 1 else 0
    return [ex.select(args[0], dim, index) for index in range(len(outputs))]


def _slice(args: Sequence[Any], outputs: list[torch.Tensor]) -> Expr | None:
    source: Expr = args[0]
    given: list[Any] = list(args[1:])
    dim, start, _, step = given + [0, None, None, 1][len(given) :]
    if step != 1:
        return None
    size = source.shape[dim]
    first = int(start or 0)
    first = max(first + size, 0) if first < 0 else min(first, size)
    return ex.narrow(source, dim % len(source.shape), first, outputs[0].shape[dim])


def _select(args: Sequence[Any], outputs: list[torch.Tensor]) -> Expr:
    source, dim, index = args
    dim %= len(source.shape)
    return ex.select(source, dim, index % source.shape[dim])


def _transpose(args: Sequence[Any], outputs: list[torch.Tensor]) -> Expr:
    source: Expr = args[0]
    rank = len(source.shape)
    if not rank:
        return source
    a, b = (args[1] % rank, args[2] % rank) if len(args) > 1 else (0, rank - 1)
    dims = list(range(rank))
    dims[a], dims[b] = dims[b], dims[a]
    return ex.permute(source, tuple(dims))


def _permute(args: Sequence[Any], outputs: list[torch.Tensor]) -> Expr:
    return ex.permute(args[0], tuple(dim % len(args[0].shape) for dim in args[1]))


def _reshape(args: Sequence[Any], outputs: list[torch.Tensor]) -> Expr:
    return ex.reshape(args[0], tuple(outputs[0].shape))


def _same(args: Sequence[Any], outputs: list[torch.Tensor]) -> Expr:
    expr: Expr = args[0]
    dtype = dtype_of(outputs[0])
    return expr if expr.dtype == dtype else Cast(expr, dtype)


def _as(output: torch.Tensor, parts: Sequence[Expr]) -> list[Expr]:
    """The parts in the dtype that torch promotes them to."""
    dtype = dtype_of(output)
    return [part if part.dtype == dtype else Cast(part, dtype) for part in parts]


def _cat(args: Sequence[Any], outputs: list[torch.Tensor]) -> Expr:
    filled = [part for part in args[0] if part.shape != (0,)]  # torch lets these stand among tensors of any rank
    return ex.cat(_as(outputs[0], filled or args[0]), args[1] % len(outputs[0].shape) if len(args) > 1 else 0)


def _stack(args: Sequence[Any], outputs: list[torch.Tensor]) -> Expr:
    dim = args[1] % len(outputs[0].shape) if len(args) > 1 else 0
    parts = _as(outputs[0], args[0])
    rows = [ex.reshape(part, (*part.shape[:dim], 1, *part.shape[dim:])) for part in parts]
    return ex.cat(rows, dim)


# A rule answers None for a form of its operation that is more than a view.
_RULES: dict[str, Callable[[Sequence[Any], list[torch.Tensor]], Expr | list[Expr] | None]] = {
    "aten.split.Tensor": _split,
    "aten.split_with_sizes.default": _split,
    "aten.chunk.default": _split,
    "aten.unbind.int": _unbind,
    "aten.slice.Tensor": _slice,
    "aten.select.int": _select,
    "aten.transpose.int": _transpose,
    "aten.t.default": _transpose,
    "aten.permute.default": _permute,
    "aten.view.default": _reshape,
    "aten._unsafe_view.default": _reshape,
    "aten.reshape.default": _reshape,
    "aten._reshape_alias.default": _reshape,
    "aten.squeeze.default": _reshape,
    "aten.squeeze.dim": _reshape,
    "aten.squeeze.dims": _reshape,
    "aten.unsqueeze.default": _reshape,
    "aten.flatten.using_ints": _reshape,
    "aten.clone.default": _same,
    "aten.contiguous.default": _same,
    "aten.detach.default": _same,
    "aten.alias.default": _same,
    "aten._to_copy.default": _same,
    "aten.cat.default": _cat,
    "aten.stack.default": _stack,
}
