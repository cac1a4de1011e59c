"""Figures of a comparison: where a model changed, and how far its elements moved."""

from __future__ import annotations

import math

from matplotlib.ticker import MaxNLocator

from nbmerge.comparing.model_diff import ModelDiff, TensorDiff
from nbmerge.comparing.rolling import kind_sizes, largest_kinds, rolled
from nbmerge.comparing.sentence import percent
from nbmerge.comparing.statistics import Statistics
from nbmerge.display.figures.canvas import HUES, Picture, picture, plain, ticks
from nbmerge.display.figures.histograms import draw_magnitudes, draw_ulps
from nbmerge.display.heat import main_layers, shown_share
from nbmerge.display.words import path_label
from nbmerge.errors import plural

_KINDS = 16
_WRITTEN = 160  # cells up to which each has its share written in it
_DARK = 0.55  # of the scale, above which text is black


def heat_map(diff: ModelDiff) -> Picture:
    """Layers by kinds of module, in colours for the share of elements that changed."""
    stack, inside, layers = main_layers(diff)
    sizes = kind_sizes(inside)
    kinds = largest_kinds(sizes, _KINDS)
    others = len(sizes) - len(kinds)
    cells = rolled(inside, lambda place: (place.layer, place.kind))
    shares = [[_share(cells.get((layer, kind))) for layer in layers] for kind in kinds]
    title = "Share of elements that changed" + (
        f"; not drawn: {plural(others, 'smaller kind')} of module" if others else ""
    )
    made, (axes,) = picture(max(4.8, min(1.9 + 0.42 * len(layers), 12)), 1.6 + 0.3 * max(len(kinds), 1), title)
    if not layers:
        axes.text(0.5, 0.5, "no repeated layers to draw", ha="center", va="center", transform=axes.transAxes)
        return made
    top = max((share for row in shares for share in row if not math.isnan(share)), default=0.0) or 1.0
    extent = (layers[0] - 0.5, layers[0] + len(layers) - 0.5, len(kinds) - 0.5, -0.5)
    image = axes.imshow(shares, aspect="auto", cmap="viridis", vmin=0.0, vmax=top, extent=extent)
    made.colorbar(image, ax=axes, format=lambda value, _: percent(value))
    ticks(axes.yaxis, range(len(kinds)), kinds)
    axes.set_xlabel(f"layer of {plain(stack)}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(layers) * len(kinds) <= _WRITTEN:
        ticks(axes.xaxis, range(layers[0], layers[0] + len(layers)), [str(layer) for layer in layers])
        for row, found in enumerate(shares):
            for column, share in enumerate(found):
                colour = "black" if share > _DARK * top else "white"
                text = "" if math.isnan(share) else percent(share)
                axes.text(layers[0] + column, row, text, ha="center", va="center", fontsize="x-small", color=colour)
    return made


def histogram_of_model(diff: ModelDiff) -> Picture:
    """How far the elements of all tensors moved."""
    return _histograms(diff.statistics, f"{path_label(diff.a)} → {path_label(diff.b)}")


def histogram_of_tensor(tensor: TensorDiff) -> Picture:
    """How far the elements of the tensor moved."""
    return _histograms(tensor.statistics, tensor.name)


def _histograms(found: Statistics, title: str) -> Picture:
    said = f"{plain(title)}: {found.changed:,} of {found.elements:,} elements changed"
    made, (left, right) = picture(9.0, 3.4, said, columns=2)
    draw_magnitudes(left, found.magnitudes, "|Δ|", HUES[0])
    draw_ulps(right, found.ulps, HUES[1])
    return made


def _share(found: Statistics | None) -> float:
    return math.nan if found is None else shown_share(found)
