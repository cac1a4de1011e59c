"""What is shown of a run's directory: which checkpoints are where, and which path to pass."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from nbmerge.display import words
from nbmerge.display.model import ATTENTION, Alert, Cell, Column, Fact, Section, Table, View
from nbmerge.errors import listing, plural
from nbmerge.layout import Checkpoint
from nbmerge.runs import Found, Run

_ROWS = 30
_ALERTS = 6
_PASSED = 4


def run_view(run: Run) -> View:
    """Steps and checkpoints, those that are not whole first."""
    return View(
        title="Run",
        sentence=_sentence(run),
        alerts=tuple(_alerts(run)),
        facts=tuple(_facts(run)),
        sections=(_checkpoints(run),),
        code_title="Next",
        code=_code(run),
    )


def _sentence(run: Run) -> str:
    whole = sum(each.is_whole for each in run)
    steps = f" of {plural(len(run.steps), 'step')}" if run.steps else ""
    broken = f", {len(run) - whole:,} not whole" if whole < len(run) else ""
    lower = "a lower step" if len(run.unopened) == 1 else "lower steps"
    unopened = f", {len(run.unopened):,} of {lower} not opened" if run.unopened else ""
    count = plural(len(run) + len(run.unopened), "directory")
    return f"{count}{steps} in {words.elide(run.path.resolve().name)}: {whole:,} whole{broken}{unopened}"


def _alerts(run: Run) -> Iterator[Alert]:
    broken = [each for each in run if each.problem is not None]
    for each in broken[:_ALERTS]:
        if (problem := each.problem) is None:
            continue
        details = (("where", problem.where), ("why", problem.why), ("fix", problem.fix))
        yield Alert(
            ATTENTION,
            words.elide(f"{_path(each, run)}: {problem.what}", words.PROSE_LIMIT),
            tuple((label, words.elide(text, words.PROSE_LIMIT)) for label, text in details if text),
        )
    if run.is_cut:
        fix = (("fix", "pass a directory further down"),)
        yield Alert(ATTENTION, "not all directories below were looked at: there are too many", fix)
    if len(broken) > _ALERTS:
        yield Alert(ATTENTION, f"{plural(len(broken) - _ALERTS, 'further directory')} not whole; see the table")


def _facts(run: Run) -> Iterator[Fact]:
    yield Fact("path", words.elide(str(run.path), 2 * words.NAME_LIMIT), code=True)
    if run.steps:
        yield Fact("steps", listing((f"{step:,}" for step in run.steps), shown=12))
    tracked = [each for each in run if each.is_latest]
    if tracked:
        yield Fact("newest by the tracker", listing(dict.fromkeys(f"step {each.step:,}" for each in tracked)))
    for place, each in enumerate(run.newest[:_PASSED]):  # in full, as they are to be copied
        yield Fact("pass" if place == 0 else "or", words.visible(shlex.quote(str(each.path))), code=True)


def _checkpoints(run: Run) -> Section:
    columns = (
        Column("directory", code=True), Column("step", number=True), Column("back end"), Column("layout"),
        Column("ranks", number=True), Column("tensors", number=True), Column("bytes", number=True), Column("state"),
    )  # fmt: skip
    rows = tuple(_row(each, run) for each in run.found[-_ROWS:])  # the highest steps
    hidden = max(len(run) - _ROWS, 0) + len(run.unopened)
    rest = ".unopened" if run.unopened else ".found"
    table = Table(columns, rows, hidden=hidden, rows_are="directories", rest=rest)
    return Section("Checkpoints", plural(len(run) + len(run.unopened), "directory"), tables=(table,), opened=True)


def _row(each: Found, run: Run) -> tuple[Cell, ...]:
    checkpoint = each.checkpoint
    of_index = _index_cells(checkpoint) if checkpoint is not None else tuple(Cell("·") for _ in range(4))
    step = "·" if each.step is None else f"{each.step:,}"
    state = "whole" if each.is_whole else "not whole" if each.backends else "nothing to open"
    return (
        Cell(_path(each, run)), Cell(step), Cell(", ".join(each.backends) or "·"), *of_index,
        Cell(f"{state}, newest" if each.is_latest else state),
    )  # fmt: skip


def _index_cells(checkpoint: Checkpoint) -> tuple[Cell, ...]:
    ranks = "·" if checkpoint.whole else f"{checkpoint.world_size:,}"
    texts = (words.elide(checkpoint.layout), ranks, f"{len(checkpoint):,}", words.byte_size(checkpoint.nbytes))
    return tuple(map(Cell, texts))


def _path(each: Found, run: Run) -> str:
    return words.elide(str(each.path.relative_to(run.path)) if each.path != run.path else ".")


def _code(run: Run) -> tuple[str, ...]:
    if run.latest is None:
        return ()
    path = str(run.latest.path)
    return (f"ckpt = nbmerge.open_checkpoint({path!r})", "ckpt")
