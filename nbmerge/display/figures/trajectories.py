"""A figure of a run: how much each step changed, and whether it went on where the last one went."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import PurePath

from nbmerge.comparing.sentence import percent
from nbmerge.comparing.trajectory import Step, Trajectory
from nbmerge.display.figures.canvas import HUES, Picture, picture, ticks
from nbmerge.display.words import path_label

_LABELS = 16
_LEVEL = 4  # labels up to which they are not turned


def steps(trajectory: Trajectory) -> Picture:
    """Relative L2 of each update, share of elements that it changed, and its cosine to the update before."""
    found = trajectory.steps
    made, panels = picture(7.2, 5.4, "Updates along the run", rows=3)
    every = -(-len(found) // _LABELS)
    series: dict[str, list[float | None]] = {
        "relative L2": [step.diff.statistics.relative_l2 for step in found],
        "share changed": [step.diff.statistics.share for step in found],
        "cosine to the\nlast update": [step.cosine for step in found],
    }
    for panel, (name, values), hue in zip(panels, series.items(), HUES, strict=False):
        panel.plot(range(len(found)), [math.nan if value is None else value for value in values], "o-", color=hue)
        panel.set_ylabel(name)
        panel.set_xlim(-0.5, len(found) - 0.5)
        panel.set_xticks(range(0, len(found), every), labels=[])
    for panel in panels[:2]:
        panel.set_ylim(bottom=0)
    panels[1].yaxis.set_major_formatter(lambda value, _: percent(value) if value else "0")
    panels[2].set_ylim(-1.05, 1.05)
    panels[2].axhline(0, linewidth=0.8, color="gray")
    ticks(panels[2].xaxis, range(0, len(found), every), _labels(found[::every]), rotation=30, ha="right")
    return made


def _labels(steps: Sequence[Step]) -> list[str]:
    """What tells the steps apart: their last component goes where all have the same."""
    paths = [PurePath(step.label) for step in steps]
    if len({path.name for path in paths}) == 1 and len({path.parent.name for path in paths} - {""}) == len(paths) > 1:
        paths = [path.parent for path in paths]
    return [path_label(str(path)) for path in paths]
