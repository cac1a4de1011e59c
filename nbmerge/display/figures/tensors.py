"""Figures of one tensor: its boxes to scale, coloured by rank, and the distribution of its elements."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.patches import Rectangle

from nbmerge.display import words
from nbmerge.display.figures.canvas import BAR, HUES, Picture, picture, plain
from nbmerge.display.figures.histograms import draw_magnitudes
from nbmerge.display.maps import ranks_in_words
from nbmerge.display.shards import holders_of
from nbmerge.geometry import Shape
from nbmerge.layout import Chunk, LazyTensor
from nbmerge.tensor_stats import TensorStats

_LABELLED = 64  # boxes up to which each is labelled
_MOST = 4096  # boxes that are drawn


def shards(tensor: LazyTensor) -> Picture:
    """The boxes of the tensor, to scale along the two last dimensions that are cut, each in its rank's colour."""
    made, (axes,) = picture(6.4, 4.4, f"{plain(tensor.name)} {words.shape_of(tensor.shape)} {tensor.dtype}")
    filled = [chunk for chunk in tensor.chunks if chunk.box.numel]
    rows, columns = _dims(filled, len(tensor.shape))
    first = filled[0].box.offset if filled else ()
    others = [dim for dim in range(len(tensor.shape)) if dim not in (rows, columns)]
    drawn = [chunk for chunk in filled if all(chunk.box.offset[dim] == first[dim] for dim in others)]
    for chunk in drawn[:_MOST]:
        _draw_box(axes, chunk, tensor, (rows, columns), labelled=len(drawn) <= _LABELLED)
    axes.set_xlim(0, _extent(tensor.shape, columns))
    axes.set_ylim(_extent(tensor.shape, rows), 0)
    _name_axis(axes.xaxis, tensor.shape, columns)
    _name_axis(axes.yaxis, tensor.shape, rows)
    left_out = [f"{len(drawn) - _MOST:,} more boxes"] if len(drawn) > _MOST else []
    left_out += [f"{len(filled) - len(drawn):,} boxes elsewhere in dim {', '.join(map(str, others))}"] * (
        len(drawn) < len(filled)
    )
    if left_out:
        axes.set_title("not drawn: " + "; ".join(left_out), fontsize="small")
    return made


def histogram(stats: TensorStats) -> Picture:
    """How many elements have which magnitude."""
    made, (axes,) = picture(
        6.4, 3.2, f"{plain(stats.name)}: |x| of {stats.elements - stats.zero:,} elements that are not 0"
    )
    draw_magnitudes(axes, stats.magnitudes, "|x|", BAR)
    return made


def _dims(filled: list[Chunk], dims: int) -> tuple[int | None, int | None]:
    """The dimension drawn downward and the one drawn across: those that are cut before others, later before earlier."""
    cut = {dim for dim in range(dims) if len({chunk.box.offset[dim] for chunk in filled}) > 1}
    chosen: list[int | None] = [*sorted(sorted(range(dims), key=lambda dim: (dim in cut, dim))[-2:])]
    down, across = [*chosen, None, None][:2]
    return down, across


def _extent(shape: Shape, dim: int | None) -> int:
    return 1 if dim is None else max(shape[dim], 1)


def _name_axis(axis: Axis, shape: Shape, dim: int | None) -> None:
    axis.set_label_text("" if dim is None else f"dim {dim} ({shape[dim]:,})")
    if dim is None:
        axis.set_ticks([])


def _draw_box(
    axes: Axes, chunk: Chunk, tensor: LazyTensor, dims: tuple[int | None, int | None], *, labelled: bool
) -> None:
    (top, height), (left, width) = (
        (0, 1) if dim is None else (chunk.box.offset[dim], chunk.box.shape[dim]) for dim in dims
    )
    hue = HUES[chunk.rank % len(HUES)] if tensor.ranked else BAR
    axes.add_patch(Rectangle((left, top), width, height, facecolor=hue, alpha=0.55, edgecolor=axes.get_facecolor()))
    if labelled:
        text = ranks_in_words(list(holders_of(chunk))) if tensor.ranked else words.shape_of(chunk.box.shape)
        axes.text(left + width / 2, top + height / 2, text, ha="center", va="center", fontsize="small", clip_on=True)
