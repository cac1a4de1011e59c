"""What a merge changes beside names: casts, drops, ties, trims, fills, what is not loaded, and keys of the config."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator

from nbmerge.collapse import collapse
from nbmerge.comparing.elements import is_held
from nbmerge.display import words
from nbmerge.display.model import Cell, Column, Table
from nbmerge.errors import listing, plural
from nbmerge.naming.notes import ZEROS
from nbmerge.plan import MergePlan

_ROWS = 16


def changes_in_words(plan: MergePlan) -> str:
    """`; 2 trimmed of padding, 1 filled with zeros`: what a reader of the sentence must know of the outputs."""
    zeros = sum(fill.origin == ZEROS for fill in plan.fills)
    counted = (
        (len(plan.trims), "trimmed of padding"),
        (zeros, "filled with zeros"),
        (len(plan.fills) - zeros, "taken from the base model"),
        (len(plan.unloaded), "not loaded by the class"),
    )
    said = [f"{count:,} {what}" for count, what in counted if count]
    return f"; {', '.join(said)}" if said else ""


def change_tables(plan: MergePlan) -> Iterator[Table]:
    """A table for each kind of change, empty where the plan has none of it."""
    yield _casts_table(plan)
    yield _names_table(
        f"{plural(len(plan.drops), 'drop')}: in the checkpoint and not written",
        "why",
        ((drop.name, drop.reason) for drop in plan.drops),
        ".drops",
    )
    yield _names_table(
        f"{plural(len(plan.ties), 'tie')}: not written, because another tensor holds the same values",
        "kept as",
        ((tie.name, tie.kept) for tie in plan.ties),
        ".ties",
    )
    yield _trims_table(plan)
    yield _fills_table(plan)
    yield _names_table(
        f"{len(plan.left_out):,} left out: files beside the config that are not copied",
        "",
        ((name, "") for name in plan.left_out),
        ".left_out",
        noun="file",
    )
    yield _names_table(
        f"{len(plan.unloaded):,} unloaded: written, and known to {plan.model_class}, which does not load them",
        "",
        ((name, "") for name in plan.unloaded),
        ".unloaded",
    )
    yield _edits_table(plan)


def _trims_table(plan: MergePlan) -> Table:
    rows = tuple(
        (
            Cell(words.elide(trim.name)),
            Cell(f"rows {trim.kept}:{trim.rows} of {words.elide(trim.source)} are padding"),
            Cell(f"{trim.kept:,} of {trim.rows:,}"),
        )
        for trim in plan.trims[:_ROWS]
    )
    columns = (Column("tensor", code=True), Column("cut off"), Column("rows kept", number=True))
    title = f"{plural(len(plan.trims), 'trim')}: rows of the padded vocabulary that are cut off"
    return Table(columns, rows, title, max(len(plan.trims) - _ROWS, 0), "trims", ".trims")


def _fills_table(plan: MergePlan) -> Table:
    """Fills of one kind collapsed: a base model may fill every layer."""
    groups = collapse((fill.name, (fill.origin, fill.reason)) for fill in plan.fills)
    why = {fill.name: fill for fill in plan.fills}
    rows = []
    for group in groups[:_ROWS]:
        fill = why[group.first]
        cells = (words.elide(group.name), f"{group.count:,}", words.elide(fill.origin))
        rows.append((*map(Cell, cells), Cell(words.elide(fill.reason, 120))))
    columns = (Column("tensor", code=True), Column("tensors", number=True), Column("filled with"), Column("why"))
    title = f"{plural(len(plan.fills), 'fill')}: not in the checkpoint, and written"
    return Table(columns, tuple(rows), title, max(len(groups) - _ROWS, 0), "rows", ".fills")


def _edits_table(plan: MergePlan) -> Table:
    edits = list(plan.config_edits.items())
    rows = tuple(
        (Cell(words.elide(key)), Cell(words.value_in_words(before)), Cell(words.value_in_words(after)))
        for key, (before, after) in edits[:_ROWS]
    )
    columns = (Column("key", code=True), Column("before"), Column("after"))
    title = f"{plural(len(edits), 'config edit')}: keys of config.json that the merge changes"
    return Table(columns, rows, title, max(len(edits) - _ROWS, 0), "keys", ".config_edits")


def _casts_table(plan: MergePlan) -> Table:
    """A row for each pair of dtypes: a cast of the whole model is one line, not one for each tensor."""
    kinds: dict[str, list[str]] = {}
    for cast in plan.casts:
        kinds.setdefault(f"{cast.before} → {cast.after}", []).append(cast.name)
    rows = tuple(
        (
            Cell(kind),
            Cell(f"{len(names):,}"),
            Cell(words.elide(listing(group.name for group in collapse((name, None) for name in names)), 200)),
        )
        for kind, names in list(kinds.items())[:_ROWS]
    )
    columns = (Column("cast"), Column("tensors", number=True), Column("which", code=True))
    exact = all(is_held(cast.before, cast.after) for cast in plan.casts)
    how = "exact, as the wider dtype holds every value" if exact else "rounded to the nearest, ties to even"
    title = f"{plural(len(plan.casts), 'cast')}: {how}"
    return Table(columns, rows, title, max(len(kinds) - _ROWS, 0), "kinds", ".casts")


def _names_table(
    title: str, reason: str, named: Iterable[tuple[str, Hashable]], rest: str, noun: str = "tensor"
) -> Table:
    """Tensors with what happens to each, repeated layers collapsed; or other things that have names."""
    groups = collapse(named)
    columns = [Column(noun, code=True), Column(f"{noun}s", number=True)]
    columns += [Column(reason, code=rest == ".ties")] if reason else []
    rows = []
    for group in groups[:_ROWS]:
        cells = [Cell(words.elide(group.name)), Cell(f"{group.count:,}")]
        rows.append((*cells, Cell(words.elide(str(group.key), 120))) if reason else tuple(cells))
    return Table(tuple(columns), tuple(rows), title, max(len(groups) - _ROWS, 0), "rows", rest)
