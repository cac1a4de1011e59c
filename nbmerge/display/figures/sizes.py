"""A figure of what takes the bytes of a checkpoint: a bar for each kind of module."""

from __future__ import annotations

from nbmerge.display import words
from nbmerge.display.figures.canvas import BAR, Picture, picture, ticks
from nbmerge.errors import plural
from nbmerge.layout import Checkpoint

_BARS = 24


def sizes_by_module(checkpoint: Checkpoint) -> Picture:
    """Bytes of each kind of parameter, repeated layers together, the largest at the top."""
    found = sorted(checkpoint.kinds, key=lambda one: -one.nbytes)
    bars = [(one.group.name, one.nbytes) for one in found[:_BARS]]
    if found[_BARS:]:
        rest = sum(one.nbytes for one in found[_BARS:])
        bars.append((f"{plural(len(found) - _BARS, 'further kind')}", rest))
    total = checkpoint.nbytes
    made, (axes,) = picture(
        9.0, 1.2 + 0.27 * max(len(bars), 1), f"{words.byte_size(total)} in {plural(len(checkpoint.tensors), 'tensor')}"
    )
    axes.barh(range(len(bars)), [nbytes for _, nbytes in bars], color=BAR, alpha=0.85)
    for place, (_, nbytes) in enumerate(bars):
        axes.text(
            nbytes, place, f" {words.byte_size(nbytes)}, {words.percent(nbytes, total)}", va="center", fontsize="small"
        )
    ticks(axes.yaxis, range(len(bars)), [name for name, _ in bars], fontsize="small")
    axes.invert_yaxis()
    axes.margins(x=0.22)
    axes.xaxis.set_major_formatter(lambda value, _: words.byte_size(value))
    return made
