"""Averages checkpoints of one model: a checkpoint whose tensors are the means of others', element by element."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbmerge.comparing.elements import common_dtype
from nbmerge.dtypes import DType
from nbmerge.engine.comparison import first_difference
from nbmerge.engine.sources import LocalFiles
from nbmerge.errors import ConfigError, InconsistentCheckpointError, OptionError, Problem, listing
from nbmerge.expressions import Compute, Expr, Stored, walk
from nbmerge.geometry import Shape
from nbmerge.layout import Checkpoint, LazyTensor, SourceFile
from nbmerge.weights import Source, Weights, weights_of

if TYPE_CHECKING:
    import torch

BACKEND = "average"
_BLOCK_BYTES = 2 * 2**20


def averaged_checkpoint(
    sources: Sequence[Source], weights: Sequence[float] | None = None, *, progress: bool | None = None, **options: Any
) -> Checkpoint:
    """A checkpoint of the means of the sources' tensors, to be merged, validated or diffed as any other. Reads nothing
    but integer tensors, which must be equal in all sources.

        mean = averaged_checkpoint(["global_step_80/actor", "global_step_100/actor"], weights=[1, 3])

    sources: what `nbmerge.diff` takes, all of one model. weights: one for each, of which only the proportions count;
    equal ones by default. Each element is Σ wᵢ·xᵢ / Σ wᵢ, in float32 (float64 where a source is), in the order of the
    sources, and is rounded once: to the sources' dtype, or to the widest of theirs. options: the keywords of
    `nbmerge.merge` that open and plan a checkpoint (pass DeepSpeed's `weights=` to `open_checkpoint`).

    Raises OptionError, InconsistentCheckpointError with every tensor in which the sources do not agree, ConfigError
    where none of them has a config, and what opening raises.
    """
    shares = _shares(sources, weights)
    models = [weights_of(source, progress=progress, **options) for source in sources]
    _refuse_other_models(models)
    config_dir = next((model.config_dir for model in models if model.config_dir is not None), None)
    if config_dir is None:
        raise ConfigError(
            "none of the checkpoints has a config.json", where=listing(model.label for model in models),
            fix="pass the directory of the model's config and tokenizer: --hf_model_config_path DIR",
        )  # fmt: skip
    tensors = {
        name: LazyTensor(name, _mean([model.tensors[name] for model in models], shares)) for name in models[0].tensors
    }
    labels = [model.label for model in models]
    return Checkpoint(
        path=Path(labels[0]),
        backend=BACKEND,
        layout=f"the average of {len(models)} checkpoints",
        tensors=tensors,
        world_size=1,
        files=_files_of(tensors),
        config_dir=config_dir,
        notes=tuple(f"{share / sum(shares):.4g} × {label}" for label, share in zip(labels, shares, strict=True)),
        averaged=tuple(zip(labels, shares, strict=True)),
    )


def _shares(sources: Sequence[Source], weights: Sequence[float] | None) -> list[float]:
    if isinstance(sources, (str, bytes)) or not isinstance(sources, Sequence) or len(sources) < 2:
        raise OptionError("there is nothing to average", fix="pass a list of at least two checkpoints of one model")
    shares = [1.0] * len(sources) if weights is None else [float(weight) for weight in weights]
    if len(shares) != len(sources):
        raise OptionError(f"{len(shares)} weights for {len(sources)} checkpoints", fix="one for each, in their order")
    if not all(math.isfinite(share) and share >= 0 for share in shares) or not sum(shares) > 0:
        raise OptionError(f"weights={shares}", fix="numbers from 0 on that are not all 0, e.g. [1, 1, 2]")
    return shares


def _refuse_other_models(models: Sequence[Weights]) -> None:
    """Raises InconsistentCheckpointError with every name, shape and integer in which a model is not as the first."""
    first, *others = models
    problems = [problem for other in others for problem in _disagreements(first, other)]
    if problems:
        raise InconsistentCheckpointError("the checkpoints are not of one model", problems=problems)


def _disagreements(first: Weights, other: Weights) -> list[Problem]:
    problems: list[Problem] = []

    def tell(what: str, why: str) -> None:
        problems.append(
            Problem(what, where=other.label, why=why, fix="average checkpoints of one run", kind="contradiction")
        )

    absent = [name for name in first.tensors if name not in other.tensors]
    beyond = [name for name in other.tensors if name not in first.tensors]
    for names, where in ((absent, first.label), (beyond, other.label)):
        if names:
            tell(f"{listing(names)} only in {where}", "an average needs every tensor of every checkpoint")
    for name, a in first.tensors.items():
        b = other.tensors.get(name)
        if b is None:
            continue
        if a.shape != b.shape:
            tell(f"{name} has {list(a.shape)} in {first.label}, and {list(b.shape)} here", "they are other models")
        elif common_dtype(a.dtype, b.dtype) is None or a.dtype.is_floating != b.dtype.is_floating:
            tell(f"{name} is {a.dtype} in {first.label}, and {b.dtype} here", "they cannot be averaged")
        elif not a.dtype.is_floating and (at := _first_difference(a, b)) is not None:
            tell(f"{name} differs at {list(at)}", f"it is {a.dtype}, and whole numbers have no average")
    return problems


def _first_difference(a: Expr, b: Expr) -> Shape | None:
    if a.dtype != b.dtype:
        return (0,) * len(a.shape)
    with LocalFiles() as files:
        return first_difference(a, b, _BLOCK_BYTES, files)


def _mean(parts: Sequence[Expr], shares: Sequence[float]) -> Expr:
    """The mean of floating tensors; of others, which are equal, the first."""
    first = parts[0]
    if not first.dtype.is_floating:
        return first
    dtype = reduce(_wider, (part.dtype for part in parts))
    counted = [(part, share) for part, share in zip(parts, shares, strict=True) if share]  # the rest may be infinite
    inputs, weights = tuple(part for part, _ in counted), [share for _, share in counted]
    name = "average " + " ".join(map(repr, weights))
    return Compute(name, _mean_in(dtype, weights), inputs, first.shape, dtype, 0 if first.shape else None)


def _wider(a: DType, b: DType) -> DType:
    wide = common_dtype(a, b)
    if wide is None:  # told with all else that differs before this is asked
        raise InconsistentCheckpointError(f"{a} and {b} cannot be averaged")
    return wide


def _mean_in(dtype: DType, weights: Sequence[float]) -> Callable[..., torch.Tensor]:
    """Products and sums one by one, so that the result is the same on every machine."""

    def mean(*tensors: torch.Tensor) -> torch.Tensor:
        import torch

        wide = torch.float64 if dtype.name == "float64" else torch.float32
        products = (tensor.to(wide).mul(weight) for tensor, weight in zip(tensors, weights, strict=True))
        total = next(products)
        for product in products:
            total.add_(product)
        return total.div_(sum(weights)).to(getattr(torch, dtype.name))

    return mean


def _files_of(tensors: Mapping[str, LazyTensor]) -> tuple[SourceFile, ...]:
    nodes = (node for tensor in tensors.values() for node in walk(tensor.expr))
    paths = dict.fromkeys(node.file for node in nodes if isinstance(node, Stored))
    return tuple(SourceFile.of(Path(path), "weights") for path in paths)
