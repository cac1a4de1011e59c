"""What is shown of the steps of a run."""

from __future__ import annotations

from collections.abc import Iterator

from nbmerge.comparing.rolling import largest_kinds
from nbmerge.comparing.sentence import percent
from nbmerge.comparing.trajectory import Step, Trajectory
from nbmerge.display import words
from nbmerge.display.diff_views import KIND_ROWS, diff_alerts, number
from nbmerge.display.heat import share_cell
from nbmerge.display.model import Alert, Cell, Column, Fact, Section, Table, View
from nbmerge.display.sparklines import magnitude_line, sparkline
from nbmerge.errors import plural

_STEPS = 40
_BARS = 60


def trajectory_view(trajectory: Trajectory) -> View:
    """What each step changed, and whether it went on where the last one went."""
    return View(
        title="Trajectory",
        sentence=words.elide(trajectory.sentence, words.PROSE_LIMIT),
        alerts=tuple(_step_alerts(trajectory)),
        facts=tuple(_trajectory_facts(trajectory)),
        sections=(_steps_section(trajectory), _kinds_along(trajectory)),
        code_title="Next",
        code=("trajectory[0].diff", "trajectory.to_dataframe()"),
    )


def _step_alerts(trajectory: Trajectory) -> Iterator[Alert]:
    for step in trajectory.steps:
        for alert in diff_alerts(step.diff):
            yield Alert(alert.kind, f"to {words.path_label(step.label)}: {alert.what}", alert.details)


def _trajectory_facts(trajectory: Trajectory) -> Iterator[Fact]:
    yield Fact("start", words.elide(trajectory.start, 2 * words.NAME_LIMIT), code=True)
    yield Fact("end", words.elide(trajectory.steps[-1].label, 2 * words.NAME_LIMIT), code=True)
    shares = [step.diff.statistics.share for step in trajectory.steps]
    norms = [step.diff.statistics.relative_l2 or 0.0 for step in trajectory.steps]
    yield Fact("changed", f"{sparkline(shares[-_BARS:])} from {percent(shares[0])} to {percent(shares[-1])}")
    yield Fact("relative L2", f"{sparkline(norms[-_BARS:])} from {number(norms[0])} to {number(norms[-1])}")


def _steps_section(trajectory: Trajectory) -> Section:
    columns = (
        Column("to", code=True), Column("changed", number=True), Column("relative L2", number=True),
        Column("cosine to last update", number=True), Column("sign flips", number=True), Column("|Δ|"),
    )  # fmt: skip
    steps = trajectory.steps
    top = max((step.diff.statistics.relative_l2 or 0.0 for step in steps), default=0.0)
    rows = tuple(_step_row(step, top) for step in steps[:_STEPS])
    table = Table(columns, rows, hidden=max(len(steps) - _STEPS, 0), rows_are="steps", rest=".steps")
    return Section("Steps", f"{plural(len(steps), 'update')}", tables=(table,), opened=True)


def _step_row(step: Step, top: float) -> tuple[Cell, ...]:
    found = step.diff.statistics
    norm = found.relative_l2 or 0.0
    return (
        Cell(words.path_label(step.label)),
        share_cell(found),
        Cell(number(found.relative_l2), bar=norm / top if top else 0.0),
        Cell("·" if step.cosine is None else f"{step.cosine:+.3f}"),
        Cell(f"{found.flips:,}"),
        Cell(magnitude_line(found.magnitudes)),
    )


def _kinds_along(trajectory: Trajectory) -> Section:
    columns = (
        Column("kind", code=True), Column("relative L2 along the run"), Column("first", number=True),
        Column("last", number=True), Column("mean cosine of updates", number=True),
    )  # fmt: skip
    sizes = {kind: one.elements for step in trajectory.steps for kind, one in step.diff.by_kind.items()}
    kinds = largest_kinds(sizes, KIND_ROWS)
    rows = []
    for kind in kinds:
        norms = [_norm(step, kind) for step in trajectory.steps]
        cosines = [found for step in trajectory.steps if (found := step.cosines_by_kind.get(kind)) is not None]
        mean = f"{sum(cosines) / len(cosines):+.3f}" if cosines else "·"
        row = (words.elide(kind, 40), sparkline(norms[-_BARS:]), number(norms[0]), number(norms[-1]), mean)
        rows.append(tuple(Cell(text) for text in row))
    table = Table(columns, tuple(rows), hidden=len(sizes) - len(kinds), rows_are="kinds", rest=".steps")
    return Section("By kind of module", plural(len(sizes), "kind"), tables=(table,))


def _norm(step: Step, kind: str) -> float:
    found = step.diff.by_kind.get(kind)
    return (found.relative_l2 or 0.0) if found is not None else 0.0
