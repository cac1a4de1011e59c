"""Averages checkpoints of one model: a checkpoint whose tensors are the means of others', element by element."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbmerge import expressions as ex
from nbmerge.averaging_sources import SOURCE_ONLY, plans_of, recorded_options, refuse_other_models
from nbmerge.comparing.elements import common_dtype
from nbmerge.dtypes import BY_NAME, DType, parse_dtype
from nbmerge.errors import InconsistentCheckpointError, OptionError
from nbmerge.expressions import Compute, Expr, Stored, walk
from nbmerge.layout import Checkpoint, Equality, LazyTensor, SourceFile
from nbmerge.options import WEIGHTS
from nbmerge.plan import MergePlan
from nbmerge.weights import Source

if TYPE_CHECKING:
    import torch

BACKEND = "average"
_FAR = 16  # powers of two beyond which weights are brought near 1, so that float32 holds their products


def averaged_checkpoint(
    sources: Sequence[Source], weights: Sequence[float] | None = None, *, progress: bool | None = None, **options: Any
) -> Checkpoint:
    """A checkpoint of the means of the sources' tensors, to be merged, validated or diffed as any other. Reads nothing
    but small copies, and integer tensors, which must be equal in all sources.

        mean = averaged_checkpoint(["global_step_80/actor", "global_step_100/actor"], weights=[1, 3])

    sources: what `nbmerge.diff` takes, all of one model. weights: one for each, of which only the proportions count;
    equal ones by default; 0 leaves one out. Each element is Σ wᵢ·xᵢ / Σ wᵢ, in float32 (float64 where a source is), in
    the order of the sources, and is rounded once: to the sources' dtype, or to the widest of theirs. options: the
    keywords of `nbmerge.merge`. What concerns adapters, a base model and opening is done to each source before; with
    `dtype=` the mean is left unrounded where that is another type, for the cast to round. Config and tokenizer are the
    first's. DeepSpeed's `weights=` are for `open_checkpoint`.

    Raises OptionError, PlanError with what is wrong with any source, InconsistentCheckpointError with all in which
    they do not agree, ConfigError where none of them has a config, and what opening raises.
    """
    return average_of(sources, weights, options, progress=progress)


def average_of(
    sources: Sequence[Source], weights: Sequence[float] | None, options: Mapping[str, Any], *, progress: bool | None
) -> Checkpoint:
    """`averaged_checkpoint`, with the options in a mapping, where DeepSpeed's `weights` have a place."""
    shares = _shares(sources, weights)
    plans = plans_of(sources, options, progress)
    refuse_other_models(plans)
    asked = parse_dtype(options["dtype"]) if options.get("dtype") else None
    outputs = [plan.tensors for plan in plans]
    tensors = {
        name: LazyTensor(name, _mean([each[name].expr for each in outputs], shares, asked)) for name in outputs[0]
    }
    labels = [str(plan.checkpoint.path) for plan in plans]
    return Checkpoint(
        path=plans[0].checkpoint.path,
        backend=BACKEND,
        layout=f"the average of {len(plans)} checkpoints",
        tensors=tensors,
        world_size=1,
        files=_files_of(tensors, plans),
        config_dir=plans[0].config_dir,
        notes=tuple(f"{share / sum(shares):.4g} × {label}" for label, share in zip(labels, shares, strict=True)),
        opened_with=recorded_options(plans, options),
        averaged=tuple(zip(labels, shares, strict=True)),
        compared=tuple(each for plan, share in zip(plans, shares, strict=True) if share for each in _compared(plan)),
        whole=True,
        is_untied=any(plan.is_untied for plan in plans),
    )


def result_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of `nbmerge.merge` that are left for the merge of an average: the others concern its sources."""
    return {name: value for name, value in options.items() if name not in SOURCE_ONLY}


def _shares(sources: Sequence[Source], weights: Sequence[float] | None) -> list[float]:
    """The weights as numbers; far from 1, all times the same power of two. Raises OptionError."""
    if isinstance(sources, (str, bytes)) or not isinstance(sources, Sequence) or len(sources) < 2:
        raise OptionError("there is nothing to average", fix="pass a list of at least two checkpoints of one model")
    if weights is None:
        return [1.0] * len(sources)
    if isinstance(weights, (str, bytes, Mapping)) or not isinstance(weights, Iterable):
        hint = "; for DeepSpeed's: average([open_checkpoint(path, weights=…), …])" if str(weights) in WEIGHTS else ""
        raise OptionError(f"weights={weights!r}", fix=f"a list of numbers, one for each checkpoint{hint}")
    given = list(weights)
    numbers = [_number(weight) for weight in given]
    if len(numbers) != len(sources):
        raise OptionError(f"{len(numbers)} weights for {len(sources)} checkpoints", fix="one for each, in their order")
    shares = [number for number in numbers if math.isfinite(number) and number >= 0]
    if len(shares) != len(numbers) or not any(shares):
        raise OptionError(f"weights={given}", fix="finite numbers from 0 on that are not all 0, e.g. [1, 1, 2]")
    exponent = math.frexp(max(shares))[1]
    return shares if abs(exponent) <= _FAR else [math.ldexp(share, -exponent) for share in shares]


def _number(weight: object) -> float:
    """A weight as a float; NaN for what is none."""
    is_scalar = isinstance(weight, Real) or getattr(weight, "shape", None) == ()  # numpy's, torch's
    try:
        return float(weight) if is_scalar and not isinstance(weight, bool) else math.nan  # type: ignore[arg-type]
    except (OverflowError, TypeError, ValueError):
        return math.nan


def _compared(plan: MergePlan) -> list[Equality]:
    """What a merge of a source would compare, named so that it says which source."""
    label = plan.checkpoint.path
    return [replace(each, name=f"{each.name} of {label}") for each in (*plan.probed, *plan.equalities)]


def _mean(parts: Sequence[Expr], shares: Sequence[float], asked: DType | None) -> Expr:
    """The mean of floating tensors; of others, which are equal, the first.

    One source after the other is added, so that memory does not grow with their number.
    """
    first = parts[0]
    if not first.dtype.is_floating:
        return first
    stored = reduce(_wider, (part.dtype for part in parts))
    wide = BY_NAME["float64" if stored.name == "float64" else "float32"]
    dtype = stored if asked is None or asked == stored else wide
    counted = [(part, share) for part, share in zip(parts, shares, strict=True) if share]  # the rest may be infinite
    total: tuple[Expr, ...] = ()
    for part, share in counted:
        total = (_computed(f"average: {share!r} ×", _Add(share, wide.name), (*total, _rows(part)), wide),)
    whole = sum(share for _, share in counted)
    quotient = _computed(f"average: ÷ {whole!r}", _Divide(whole, dtype.name), total, dtype)
    return ex.reshape(quotient, first.shape)


def _computed(name: str, function: _Add | _Divide, inputs: tuple[Expr, ...], dtype: DType) -> Compute:
    shape = inputs[-1].shape
    return Compute(name, function, inputs, shape, dtype, 0 if shape else None)


def _rows(expr: Expr) -> Expr:
    """A tensor of more than two dimensions as a matrix: blocks are cut along the first, which experts have few of."""
    shape = expr.shape
    return expr if len(shape) < 3 else ex.reshape(expr, (math.prod(shape[:-1]), shape[-1]))


def _wider(a: DType, b: DType) -> DType:
    wide = common_dtype(a, b)
    if wide is None:  # told with all else that differs before this is asked
        raise InconsistentCheckpointError(f"{a} and {b} cannot be averaged")
    return wide


# Products, sums and the quotient one by one, so that the result is the same on every machine.


@dataclass(frozen=True, slots=True)
class _Add:
    """total + share · tensor, or the product alone where it is the first."""

    share: float
    dtype: str

    def __call__(self, *tensors: torch.Tensor) -> torch.Tensor:
        import torch

        *total, tensor = tensors
        wide = tensor.to(getattr(torch, self.dtype))
        product = wide.mul(self.share) if wide is tensor else wide.mul_(self.share)
        return total[0].add_(product) if total else product


@dataclass(frozen=True, slots=True)
class _Divide:
    """total / shares, rounded to a dtype."""

    shares: float
    dtype: str

    def __call__(self, total: torch.Tensor) -> torch.Tensor:
        import torch

        return total.div_(self.shares).to(getattr(torch, self.dtype))


def _files_of(tensors: Mapping[str, LazyTensor], plans: Sequence[MergePlan]) -> tuple[SourceFile, ...]:
    """The files that are read, as they were when each source was opened."""
    known = {str(file.path): file for plan in plans for file in plan.sources}
    nodes = (node for tensor in tensors.values() for node in walk(tensor.expr))
    paths = dict.fromkeys(node.file for node in nodes if isinstance(node, Stored))
    found = (known.get(path) or SourceFile.of(Path(path), "weights") for path in paths)
    return tuple(replace(file, role="weights") for file in found)
