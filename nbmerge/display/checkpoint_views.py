"""What is shown of a checkpoint, and of a loader."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from nbmerge.display import words
from nbmerge.display.collapse import Group, collapse
from nbmerge.display.meshes import axis_label, mesh_in_words, on_axis, placement_in_words, table_axes
from nbmerge.display.model import PROBLEM, Alert, Cell, Column, Fact, Section, Table, View
from nbmerge.display.rank_views import ranks_section
from nbmerge.display.shards import Cut, cut_of
from nbmerge.errors import Problem, plural
from nbmerge.layout import Checkpoint, LazyTensor, SourceFile
from nbmerge.loaders.base import Loader

_ROWS = 60  # groups of parameters
_OPENED = 24  # rows up to which the table of parameters starts unfolded
_LAYOUTS = 16
_AXES = 6
_NOTES = 8
_PROBLEMS = 10


@dataclass(frozen=True, slots=True)
class _Parameters:
    """Tensors of one name but for its numbers, and of one shape, dtype and mesh, so that one stands for all."""

    group: Group
    first: LazyTensor

    @property
    def count(self) -> int:
        return len(self.group.members)

    @property
    def nbytes(self) -> int:
        return self.count * self.first.nbytes


def checkpoint_view(checkpoint: Checkpoint) -> View:
    """What it is in one sentence, then how it is sharded, its parameters, its files, and what to know of it."""
    tensors = checkpoint.tensors
    named = ((name, (t.shape, t.dtype.name, t.mesh, len(t.chunks))) for name, t in tensors.items())
    parameters = [_Parameters(group, tensors[group.members[0]]) for group in collapse(named)]
    total = sum(one.nbytes for one in parameters)
    return View(
        title="Checkpoint",
        sentence=_sentence(checkpoint, parameters, total),
        alerts=problem_alerts(checkpoint.problems),
        facts=tuple(_facts(checkpoint, parameters, total)),
        sections=(
            _layout_section(checkpoint, parameters, total),
            *ranks_section(checkpoint),
            _parameters_section(checkpoint, parameters, total),
            *_files_section(checkpoint),
            *_notes_section(checkpoint),
        ),
    )


def loader_view(loader: Loader) -> View:
    """What it recognises."""
    return View("Loader", f"{loader.name} opens directories that hold {loader.recognises}")


def problem_alerts(problems: Sequence[Problem]) -> tuple[Alert, ...]:
    """The problems, each with where, why and fix; beyond a limit their number."""
    alerts = [
        Alert(
            PROBLEM,
            words.elide(problem.what, words.PROSE_LIMIT),
            tuple(
                (label, words.elide(text, words.PROSE_LIMIT))
                for label, text in (("where", problem.where), ("why", problem.why), ("fix", problem.fix))
                if text
            ),
        )
        for problem in problems[:_PROBLEMS]
    ]
    if len(problems) > _PROBLEMS:
        alerts.append(Alert(PROBLEM, f"{len(problems) - _PROBLEMS:,} more problems; all are in .problems"))
    return tuple(alerts)


def dtypes_in_words(nbytes: Counter[str], total: int) -> str:
    """`bfloat16`, or `bfloat16 (99.9%), float32 (0.1%)`: by bytes, the largest first."""
    if len(nbytes) == 1:
        return next(iter(nbytes))
    found = [f"{name} ({words.percent(size, total)})" for name, size in nbytes.most_common(4)]
    return ", ".join(found) + (f" and {len(nbytes) - 4} more" if len(nbytes) > 4 else "")


def _sentence(checkpoint: Checkpoint, parameters: list[_Parameters], total: int) -> str:
    written = f"written by {plural(checkpoint.world_size, 'rank')}"
    if checkpoint.mesh:
        written += f" on a mesh {mesh_in_words(checkpoint)}"
    nbytes: Counter[str] = Counter()
    for one in parameters:
        nbytes[one.first.dtype.name] += one.nbytes
    return (
        f"{checkpoint.layout}, {written}: {plural(len(checkpoint.tensors), 'tensor')}, "
        f"{words.big_count(_elements(parameters), 'parameter')}, {words.byte_size(total)}, "
        f"{dtypes_in_words(nbytes, total) or 'no dtype'}"
    )


def _elements(parameters: list[_Parameters]) -> int:
    return sum(one.count * one.first.numel for one in parameters)


def _facts(checkpoint: Checkpoint, parameters: list[_Parameters], total: int) -> Iterator[Fact]:
    yield Fact("path", words.elide(str(checkpoint.path), 2 * words.NAME_LIMIT), code=True)
    yield Fact("parameters", f"{_elements(parameters):,}")
    yield Fact("bytes", words.exact_bytes(total))
    config = str(checkpoint.config_dir) if checkpoint.config_dir else "none found; a merge needs --hf_model_config_path"
    yield Fact("config", words.elide(config, 2 * words.NAME_LIMIT), code=checkpoint.config_dir is not None)
    evidence = ", ".join(checkpoint.evidence)
    yield Fact("back end", words.elide(f"{checkpoint.backend} ({evidence})" if evidence else checkpoint.backend, 200))


def _layout_section(checkpoint: Checkpoint, parameters: list[_Parameters], total: int) -> Section:
    axes = table_axes(checkpoint, [one.first.mesh for one in parameters])[:_AXES]
    groups: dict[tuple[str, ...], list[tuple[_Parameters, Cut]]] = {}
    for one in parameters:
        on = tuple(on_axis(one.first, axis, checkpoint) for axis in axes) or (
            placement_in_words(one.first, checkpoint),
        )
        groups.setdefault(on, []).append((one, cut_of(one.first)))
    order = sorted(groups.items(), key=lambda item: -sum(one.nbytes for one, _ in item[1]))
    once = all(cut.stored_once for members in groups.values() for _, cut in members) and bool(groups)
    kinds = [kind for kind in Cut.KINDS if kind != "empty" or not once]
    places = [Column(f"on {axis_label(axis)}") for axis in axes] or [Column("placement")]
    counts = ("tensors", *kinds, "pieces" if once else "copies", "bytes", "share")
    columns = (*places, *(Column(title, number=True) for title in counts))
    rows = tuple(_layout_row(on, members, kinds, total) for on, members in order[:_LAYOUTS])
    table = Table(columns, rows, hidden=max(len(order) - _LAYOUTS, 0), rows_are="placements")
    mesh = f"mesh {mesh_in_words(checkpoint)}" if checkpoint.mesh else "no device mesh"
    summary = f"{mesh}, {plural(checkpoint.world_size, 'rank')}, {plural(len(groups), 'placement')}"
    return Section("Shard layout", summary, tables=(table,), notes=(_LEGEND_ONCE if once else _LEGEND,), opened=True)


_LEGEND = (
    "even: every rank's piece has the same shape; uneven: some are smaller; empty: some rank holds nothing of it; "
    "whole: not cut; copies: ranks that hold the same piece"
)
_LEGEND_ONCE = (
    "even: all stored pieces have the same shape; uneven: some are smaller; whole: stored in one piece; pieces: of "
    "one tensor, where stacked layers and experts are a piece each; one copy is stored, and how many ranks held it "
    "is not in the files"
)


def _layout_row(
    on: tuple[str, ...], members: list[tuple[_Parameters, Cut]], kinds: Sequence[str], total: int
) -> tuple[Cell, ...]:
    cuts: Counter[str] = Counter()
    for one, cut in members:
        cuts[cut.kind] += one.count
    counted = {cut.pieces if cut.stored_once else cut.copies for _, cut in members}
    nbytes = sum(one.nbytes for one, _ in members)
    return (
        *(Cell(words.elide(text, 60)) for text in on),
        Cell(f"{cuts.total():,}"),
        *(Cell(f"{cuts[kind]:,}" if cuts[kind] else "·") for kind in kinds),
        Cell(f"{min(counted):,}" if len(counted) == 1 else f"{min(counted):,} to {max(counted):,}"),
        Cell(words.byte_size(nbytes)),
        Cell(words.percent(nbytes, total), bar=nbytes / total if total else 0.0),
    )


def _parameters_section(checkpoint: Checkpoint, parameters: list[_Parameters], total: int) -> Section:
    columns = (
        Column("parameter", code=True),
        Column("tensors", number=True),
        Column("shape"),
        Column("dtype"),
        Column("placement"),
        Column("bytes", number=True),
        Column("share", number=True),
    )
    rows = tuple(
        (
            Cell(words.elide(one.group.name)),
            Cell(f"{one.count:,}"),
            Cell(words.shape_of(one.first.shape)),
            Cell(str(one.first.dtype)),
            Cell(words.elide(placement_in_words(one.first, checkpoint), 120)),
            Cell(words.byte_size(one.nbytes)),
            Cell(words.percent(one.nbytes, total), bar=one.nbytes / (total or 1)),
        )
        for one in parameters[:_ROWS]
    )
    table = Table(columns, rows, hidden=max(len(parameters) - _ROWS, 0), rows_are="rows", rest=".tensors")
    tensors = plural(sum(one.count for one in parameters), "tensor")
    summary = f"{tensors} in {plural(len(parameters), 'row')}; repeated layers share a row"
    return Section("Parameters", summary, tables=(table,), opened=len(rows) <= _OPENED)


def _files_section(checkpoint: Checkpoint) -> Iterator[Section]:
    files = checkpoint.files
    if not files:
        return
    by_role: dict[str, list[SourceFile]] = {}
    for file in files:
        by_role.setdefault(file.role, []).append(file)
    columns = (
        Column("role"),
        Column("files", number=True),
        Column("bytes", number=True),
        Column("smallest", number=True),
        Column("largest", number=True),
        Column("first file", code=True),
    )
    rows = []
    for role, members in sorted(by_role.items(), key=lambda item: item[0] != "weights"):
        sizes = [file.size for file in members]
        texts = (f"{len(members):,}", *map(words.byte_size, (sum(sizes), min(sizes), max(sizes))))
        rows.append((Cell(role), *map(Cell, texts), Cell(words.elide(_below(members[0].path, checkpoint.path)))))
    summary = f"{plural(len(files), 'file')}, {words.byte_size(sum(file.size for file in files))}"
    yield Section("Files", summary, tables=(Table(columns, tuple(rows), rows_are="roles"),))


def _below(path: Path, directory: Path) -> str:
    """The path as it is in the directory; its name alone where it is outside of it."""
    try:
        return str(path.absolute().relative_to(directory.absolute()))
    except ValueError:
        return path.name


def _notes_section(checkpoint: Checkpoint) -> Iterator[Section]:
    notes = [words.elide(note, 200) for note in checkpoint.notes]
    facts = tuple(
        Fact(name, words.value_in_words(value)) for name, value in list(checkpoint.overrides.items())[:_NOTES]
    )
    if len(notes) > _NOTES:
        notes[_NOTES:] = [f"… {len(notes) - _NOTES:,} more notes; all are in .notes"]
    if notes or facts:
        parts = [plural(len(checkpoint.notes), "note")] if notes else []
        parts += [f"{plural(len(facts), 'override')} by the user"] if facts else []
        yield Section("Notes", ", ".join(parts), facts=facts, notes=tuple(notes), opened=True)
