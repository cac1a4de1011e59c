"""Where a model changed: layers by kinds of module, each with the share of its elements that did."""

from __future__ import annotations

from collections.abc import Iterable

from nbmerge.comparing.model_diff import ModelDiff
from nbmerge.comparing.rolling import Place, Together, kind_sizes, largest_kinds, main_stack, rolled
from nbmerge.comparing.sentence import percent
from nbmerge.comparing.statistics import Statistics
from nbmerge.display import words
from nbmerge.display.model import Cell, Column, Table
from nbmerge.errors import plural

_LAYERS = 12  # rows; more layers are put together
_KINDS = 9  # columns


def main_layers(diff: ModelDiff) -> tuple[str, dict[Place, Together], list[int]]:
    """The container of the largest layers, the places in it, and the layers' numbers; none where there are none."""
    stack = main_stack(diff.by_place)
    inside = {place: one for place, one in diff.by_place.items() if place.layer is not None and place.stack == stack}
    return stack, inside, sorted({place.layer for place in inside if place.layer is not None})


def heat_table(diff: ModelDiff) -> Table | None:
    """Layers by kinds of module; neighbouring layers together where there are many."""
    stack, inside, layers = main_layers(diff)
    if not layers:
        return None
    sizes = kind_sizes(inside)
    kinds = largest_kinds(sizes, _KINDS)
    width = -(-len(layers) // _LAYERS)
    rows_of = {layer: number // width for number, layer in enumerate(layers)}
    cells = rolled(inside, lambda place: (rows_of[place.layer or 0], place.kind))
    most = max(map(shown_share, cells.values()), default=0.0)
    rows = []
    for row, start in enumerate(range(0, len(layers), width)):
        together = layers[start : start + width]
        label = f"{together[0]}" if len(together) == 1 else f"{together[0]}–{together[-1]}"
        rows.append((Cell(label), *(share_cell(cells.get((row, kind)), most) for kind in kinds)))
    columns = (Column("layer"), *(Column(_short(kind, sizes), number=True) for kind in kinds))
    others = len(sizes) - len(kinds)
    more = f"; {plural(others, 'smaller kind')} not in this table" if others else ""
    scale = f"; the longest bar is {percent(most)}" if most else ""
    return Table(columns, tuple(rows), title=f"{words.elide(stack)}{scale}{more}")


def share_cell(found: Statistics | None, longest: float = 1.0) -> Cell:
    """A share of changed elements, with a bar that is full at `longest`."""
    if found is None:
        return Cell("")
    share = shown_share(found)
    return Cell(percent(share) if share else "0", bar=share / longest if longest else 0.0)


def shown_share(found: Statistics) -> float:
    """The share that is drawn: after rounding to the narrower dtype where there is one."""
    return found.share if found.share_rounded is None else found.share_rounded


def _short(kind: str, kinds: Iterable[str]) -> str:
    """The last part of a kind's name where no other kind ends in it."""
    last = kind.rpartition(".")[2]
    return words.elide(last if sum(each.rpartition(".")[2] == last for each in kinds) == 1 else kind, 30)
