"""Which dimension of a parameter tensor parallelism cuts, by its name and, where that is not enough, by shapes.

The rules are those of megatron-core's layers: column-parallel ones divide their output rows, row-parallel ones their
input columns and keep a whole bias; norms, routers and all else is on every rank
(megatron/core/tensor_parallel/layers.py, transformer/mlp.py, transformer/multi_latent_attention.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from nbmerge.errors import Problem
from nbmerge.explaining.table import likely_cause
from nbmerge.geometry import Box, Shape, with_dim
from nbmerge.loaders.megatron.adapter_forms import adapter_cut_dim, fused_halves
from nbmerge.loaders.megatron.files import COPY_AGAIN
from nbmerge.loaders.megatron.settings import Settings

_COLUMN = {
    "eh_proj", "linear_fc1", "linear_kv", "linear_kv_up_proj", "linear_q", "linear_q_proj", "linear_q_up_proj",
    "linear_qkv", "output_layer", "word_embeddings",
}  # fmt: skip
_ROW = {"linear_fc2", "linear_proj"}
_LATENT_DOWN = {"linear_kv_down_proj", "linear_q_down_proj"}
_WHOLE_MODULES = {"position_embeddings", "rotary_pos_emb", "router"}
_WHOLE_PARAMETERS = {"gate_weight", "layer_norm_bias", "layer_norm_weight"}
_DIMENSIONS = {"weight": 2, "bias": 1, "softmax_offset": 1}
_NAME = re.compile(r"((?:.*\.)?)([^.]+)\.([^.]*?)(\d*)")  # path, module, parameter, number of a grouped expert

_ADAPTER = re.compile(
    r"(?P<path>(?:.*\.)?)(?P<base>[^.]+)\.adapter\.(?P<projection>adapter_[^.]+\.)?"
    r"(?P<part>linear_in|linear_out|weight_magnitude)(?:\.weight)?"
)

ShapeOf = Callable[[str], Shape | None]
"""The shape of another tensor on the same rank, by its name in the whole model; None where there is none."""


@dataclass(frozen=True, slots=True)
class TensorCut:
    """How the ranks' shapes make up the whole one.

    dim: what is cut, None where every rank has all of it; halves: 2 where each rank has [gate; up] and the whole is
    [all gates; all ups]; known: False where no rule names the parameter, so that copies are only assumed.
    """

    dim: int | None
    halves: int = 1
    known: bool = True

    def __str__(self) -> str:
        return "Replicate" if self.dim is None else f"Shard({self.dim})"

    def whole(self, shape: Shape, ranks: int) -> Shape:
        """The shape of all ranks' pieces together."""
        return tuple(size * ranks if dim == self.dim else size for dim, size in enumerate(shape))

    def boxes(self, shape: Shape, ranks: int, rank: int) -> Iterator[tuple[Box, Box]]:
        """What rank `rank` of `ranks` holds with a local `shape`: boxes of the whole tensor, and of its own."""
        if self.dim is None:
            yield Box.whole(shape), Box.whole(shape)
            return
        length = shape[self.dim] // self.halves
        extent = with_dim(shape, self.dim, length)
        origin = (0,) * len(shape)
        for half in range(self.halves):
            at = (half * ranks + rank) * length
            yield Box(with_dim(origin, self.dim, at), extent), Box(with_dim(origin, self.dim, half * length), extent)


_WHOLE = TensorCut(None)


def is_cut(name: str, shape: Shape) -> bool:
    """Whether several tensor parallel ranks surely hold different parts of a matrix of this name, as layers have it."""
    match = _NAME.fullmatch(name)
    if match is None or match[3] != "weight" or len(shape) != _DIMENSIONS["weight"]:
        return False
    return match[2] in _COLUMN | _ROW and not (match[2] == "output_layer" and shape[0] == 1)


def tensor_cut(name: str, shape: Shape, ranks: int, shape_of: ShapeOf, settings: Settings) -> TensorCut | Problem:
    """How `ranks` tensor parallel ranks cut a tensor that has the local `shape` on each.

    Returns the problem where the shapes contradict what the name says.
    """
    match = _NAME.fullmatch(name)
    if ranks == 1:
        return _WHOLE
    if match is None:
        return TensorCut(None, known=False)
    if adapter := _ADAPTER.fullmatch(name):
        return _adapter_cut(name, adapter, shape, ranks, shape_of, settings)
    _, module, parameter, _ = match.groups()
    if parameter in _WHOLE_PARAMETERS or module in _WHOLE_MODULES or module.endswith("norm"):
        return _WHOLE
    if len(shape) != _DIMENSIONS.get(parameter):
        return TensorCut(None, known=False)
    if parameter == "softmax_offset":
        return TensorCut(0)
    if module in _ROW:
        return TensorCut(1) if parameter == "weight" else _WHOLE
    if module in _LATENT_DOWN:
        return _latent_down(name, module, shape, ranks, shape_of, settings)
    if module == "output_layer" and shape[0] == 1:
        return _WHOLE  # a value head is a plain linear layer (verl's LinearForLastLayer)
    if module == "linear_fc1":
        return _up_projection(name, match, shape, ranks, shape_of)
    return TensorCut(0) if module in _COLUMN else TensorCut(None, known=False)


def _adapter_cut(
    name: str, match: re.Match[str], shape: Shape, ranks: int, shape_of: ShapeOf, settings: Settings
) -> TensorCut | Problem:
    """A and B of an adapter (see `adapters`); DoRA's magnitudes lie as the rows of the layer's output do."""
    base, projection, part = match["base"], match["projection"], match["part"]
    if part == "weight_magnitude" and base in _ROW:
        return _WHOLE
    if part == "linear_in" or base != "linear_fc1" or projection:
        return TensorCut(adapter_cut_dim(base, part))
    down = shape_of(f"{match['path']}linear_fc2.adapter.linear_in.weight")
    halves = fused_halves(shape[0], ranks, down, settings)
    if halves is None:
        return Problem(
            f"{name} has {shape[0]} rows on each of {ranks} tensor parallel ranks, which are neither once nor twice "
            "the intermediate size",
            why="whether gate and up projection are one tensor shows in that",
            fix="pass the config of the model that was trained: --hf_model_config_path DIR",
            kind="ambiguous",
        )
    return TensorCut(0, halves)


def _up_projection(name: str, match: re.Match[str], shape: Shape, ranks: int, shape_of: ShapeOf) -> TensorCut | Problem:
    """linear_fc1 has twice the rows that linear_fc2 has columns where gate and up projection are one, else as many."""
    path, _, _, number = match.groups()
    down = f"{path}linear_fc2.weight{number}"
    width = shape_of(down)
    if width is None or len(width) != 2 or shape[0] not in (width[1], 2 * width[1]):
        held = "is not there" if width is None else f"has {list(width)}"
        wanted = [] if width is None or len(width) != 2 else [with_dim(shape, 0, n * width[1]) for n in (2, 1)]
        return Problem(
            f"{name} has {list(shape)} on each rank, and {down} {held}",
            why="whether gate and up projection are one tensor shows in linear_fc2's columns: half as many as "
            "linear_fc1's rows, or as many" + _first_cause(name, shape, wanted, ranks),
            fix=COPY_AGAIN,
            kind="ambiguous" if width is None else "contradiction",
        )
    return TensorCut(0, halves=2 if shape[0] == 2 * width[1] and width[1] else 1)


def _latent_down(
    name: str, module: str, shape: Shape, ranks: int, shape_of: ShapeOf, settings: Settings
) -> TensorCut | Problem:
    """MLA's down projections: transformer_engine's layers keep them on every rank, the local ones cut their rows."""
    wanted = list(_query_ranks(settings) if module == "linear_q_down_proj" else _key_value_ranks(settings))
    up = shape_of(name.replace("_down_proj", "_up_proj"))
    if up is not None and module == "linear_q_down_proj" and len(up) == 2:
        wanted.append(up[-1])
    for rows in wanted:
        if shape[0] == rows or shape[0] * ranks == rows:
            return _WHOLE if shape[0] == rows else TensorCut(0)
    if up is not None and module == "linear_kv_down_proj" and len(up) == 2 and shape[0] * ranks > up[-1]:
        # The rows are the latent ones, which are the columns of the up projection, and a few for the rotary key.
        return _WHOLE if shape[0] > up[-1] else TensorCut(0)
    return Problem(
        f"{name} has {shape[0]} rows on each of {ranks} tensor parallel ranks, where {wanted or 'nothing'} is expected",
        why="neither one rank's rows nor all ranks' together are the latent size that arguments, config.json "
        "and the up projection give" + _first_cause(name, shape, [with_dim(shape, 0, rows) for rows in wanted], ranks),
        fix="check that config.json is this model's",
        kind="contradiction" if wanted else "ambiguous",
    )


def _first_cause(name: str, shape: Shape, wanted: Iterable[Shape], ranks: int) -> str:
    """A known cause for a shape where one of several was wanted."""
    return next(filter(None, (likely_cause(name, [shape], each, ranks) for each in wanted)), "")


def _query_ranks(settings: Settings) -> Iterator[int]:
    for rank in (settings.argument("q_lora_rank"), settings.config_size("q_lora_rank")):
        if rank is not None:
            yield rank


def _key_value_ranks(settings: Settings) -> Iterator[int]:
    latent, rotary = settings.argument("kv_lora_rank"), settings.argument("qk_pos_emb_head_dim")
    if latent is not None and rotary is not None:
        yield latent + rotary
    latent, rotary = settings.config_size("kv_lora_rank"), settings.config_size("qk_rope_head_dim")
    if latent is not None and rotary is not None:
        yield latent + rotary
