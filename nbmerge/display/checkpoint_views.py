"""What is shown of a checkpoint, of one of its tensors, and of a loader."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from nbmerge import expressions as ex
from nbmerge.display import words
from nbmerge.display.collapse import Group, collapse
from nbmerge.display.model import PROBLEM, Alert, Cell, Column, Fact, Section, Table, View
from nbmerge.display.shards import Cut, cut_of
from nbmerge.errors import Problem, plural
from nbmerge.layout import Checkpoint, LazyTensor, MeshAxis, SourceFile
from nbmerge.loaders.base import Loader

_ROWS = 60  # groups of parameters
_OPENED = 24  # rows up to which the table of parameters starts unfolded
_LAYOUTS = 16
_AXES = 6
_PIECES = 32
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
            _parameters_section(parameters, total),
            *_files_section(checkpoint.files),
            *_notes_section(checkpoint),
        ),
    )


def tensor_view(tensor: LazyTensor) -> View:
    """Shape, dtype and placement, and which rank and file hold which box."""
    facts = [
        Fact("shape", words.shape_of(tensor.shape)),
        Fact("dtype", str(tensor.dtype)),
        Fact("bytes", words.exact_bytes(tensor.nbytes)),
        Fact("elements", f"{tensor.numel:,}"),
    ]
    facts += [
        Fact(f"on {words.elide(axis.name, 24)}={axis.size:,}", words.elide(axis.placement)) for axis in tensor.mesh[:8]
    ]
    if not tensor.mesh:
        facts.append(Fact("placement", tensor.placement))
    if tensor.chunks:
        cut = cut_of(tensor)
        facts += [Fact("cut", cut.in_words)]
        section = _chunks_section(tensor)
    else:
        section = _made_of_section(tensor)
    pieces = len(tensor.chunks) or len(_stored(tensor))
    sentence = (
        f"{words.elide(tensor.name)} is {words.shape_of(tensor.shape)} {tensor.dtype}, "
        f"{words.byte_size(tensor.nbytes)}, in {plural(pieces, 'stored piece')}"
    )
    return View("Lazy tensor", sentence, facts=tuple(facts), sections=(section,))


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


def mesh_in_words(mesh: Sequence[MeshAxis]) -> str:
    """`fsdp=4 × tp=2`."""
    return words.elide(" × ".join(f"{words.elide(axis.name, 24)}={axis.size:,}" for axis in mesh))


def dtypes_in_words(nbytes: Counter[str], total: int) -> str:
    """`bfloat16`, or `bfloat16 (99.9%), float32 (0.1%)`: by bytes, the largest first."""
    if len(nbytes) == 1:
        return next(iter(nbytes))
    found = [f"{name} ({words.percent(size, total)})" for name, size in nbytes.most_common(4)]
    return ", ".join(found) + (f" and {len(nbytes) - 4} more" if len(nbytes) > 4 else "")


def _sentence(checkpoint: Checkpoint, parameters: list[_Parameters], total: int) -> str:
    written = f"written by {plural(checkpoint.world_size, 'rank')}"
    if checkpoint.mesh:
        written += f" on a mesh {mesh_in_words(checkpoint.mesh)}"
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
    groups: dict[tuple[MeshAxis, ...], list[_Parameters]] = {}
    for one in parameters:
        groups.setdefault(one.first.mesh, []).append(one)
    axes = list(dict.fromkeys((axis.name, axis.size) for mesh in (checkpoint.mesh, *groups) for axis in mesh))[:_AXES]
    places = [Column(f"on {words.elide(name, 24)}={size:,}") for name, size in axes] or [Column("placement")]
    counts = ("tensors", *Cut.KINDS, "copies", "bytes", "share")
    columns = (*places, *(Column(title, number=True) for title in counts))
    order = sorted(groups.items(), key=lambda item: -sum(one.nbytes for one in item[1]))
    rows = tuple(_layout_row(mesh, axes, members, total) for mesh, members in order[:_LAYOUTS])
    table = Table(columns, rows, hidden=max(len(order) - _LAYOUTS, 0), rows_are="placements")
    mesh = f"mesh {mesh_in_words(checkpoint.mesh)}" if checkpoint.mesh else "no device mesh"
    summary = f"{mesh}, {plural(checkpoint.world_size, 'rank')}, {plural(len(groups), 'placement')}"
    return Section("Shard layout", summary, tables=(table,), notes=(_LEGEND,), opened=True)


_LEGEND = (
    "even: every rank's piece has the same shape; uneven: some are smaller; empty: some rank holds nothing of it; "
    "whole: not cut; copies: ranks that hold the same piece"
)


def _layout_row(
    mesh: tuple[MeshAxis, ...], axes: list[tuple[str, int]], members: list[_Parameters], total: int
) -> tuple[Cell, ...]:
    on = {(axis.name, axis.size): axis.placement for axis in mesh}
    cuts: Counter[str] = Counter()
    copies: set[int] = set()
    for one in members:
        cut = cut_of(one.first)
        cuts[cut.kind] += one.count
        copies.add(cut.copies)
    nbytes = sum(one.nbytes for one in members)
    placements = [on.get(axis, "not on it") for axis in axes] or ["whole"]
    return (
        *(Cell(words.elide(text, 60)) for text in placements),
        Cell(f"{cuts.total():,}"),
        *(Cell(f"{cuts[kind]:,}" if cuts[kind] else "·") for kind in Cut.KINDS),
        Cell(f"{min(copies):,}" if len(copies) == 1 else f"{min(copies):,} to {max(copies):,}"),
        Cell(words.byte_size(nbytes)),
        Cell(words.percent(nbytes, total), bar=nbytes / total if total else 0.0),
    )


def _parameters_section(parameters: list[_Parameters], total: int) -> Section:
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
            Cell(words.elide(one.first.placement, 120)),
            Cell(words.byte_size(one.nbytes)),
            Cell(words.percent(one.nbytes, total), bar=one.nbytes / (total or 1)),
        )
        for one in parameters[:_ROWS]
    )
    table = Table(columns, rows, hidden=max(len(parameters) - _ROWS, 0), rows_are="rows", rest=".tensors")
    tensors = plural(sum(one.count for one in parameters), "tensor")
    summary = f"{tensors} in {plural(len(parameters), 'row')}; repeated layers share a row"
    return Section("Parameters", summary, tables=(table,), opened=len(rows) <= _OPENED)


def _files_section(files: Sequence[SourceFile]) -> Iterator[Section]:
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
        rows.append((Cell(role), *map(Cell, texts), Cell(words.elide(members[0].path.name))))
    summary = f"{plural(len(files), 'file')}, {words.byte_size(sum(file.size for file in files))}"
    yield Section("Files", summary, tables=(Table(columns, tuple(rows), rows_are="roles"),))


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


def _chunks_section(tensor: LazyTensor) -> Section:
    columns = (
        Column("box", code=True),
        Column("shape"),
        Column("bytes", number=True),
        Column("share", number=True),
        Column("rank", number=True),
        Column("copies on ranks"),
        Column("file", code=True),
        Column("at byte", number=True),
    )
    rows = tuple(
        (
            Cell(str(chunk.box)),
            Cell(words.shape_of(chunk.box.shape)),
            Cell(words.byte_size(chunk.stored.nbytes) if chunk.box.numel else "empty"),
            Cell(words.percent(chunk.stored.nbytes, tensor.nbytes), bar=chunk.stored.nbytes / (tensor.nbytes or 1)),
            Cell(f"{chunk.rank:,}"),
            Cell(ranks_in_words([rank for rank, _ in chunk.replicas])),
            Cell(words.elide(Path(chunk.stored.file).name)),
            Cell(f"{chunk.stored.offset:,}"),
        )
        for chunk in tensor.chunks[:_PIECES]
    )
    hidden = max(len(tensor.chunks) - _PIECES, 0)
    table = Table(columns, rows, hidden=hidden, rows_are="boxes", rest=".chunks")
    summary = "1 box" if len(tensor.chunks) == 1 else f"{len(tensor.chunks):,} boxes"
    return Section("Shard map", summary, tables=(table,), opened=True)


def ranks_in_words(ranks: Sequence[int]) -> str:
    """`1, 3`; for many the first and how many; `·` for none."""
    if not ranks:
        return "·"
    shown = ", ".join(f"{rank:,}" for rank in ranks[:6])
    return shown if len(ranks) <= 6 else f"{shown} and {len(ranks) - 6:,} more"


def _stored(tensor: LazyTensor) -> list[ex.Stored]:
    return [node for node in ex.walk(tensor.expr) if isinstance(node, ex.Stored)]


def _made_of_section(tensor: LazyTensor) -> Section:
    """For a tensor that was cut out of others: the nodes of its expression, and the stored pieces below them."""
    kinds = Counter(type(node).__name__.lower() for node in ex.walk(tensor.expr))
    columns = (Column("stored piece", code=True), Column("shape"), Column("bytes", number=True))
    stored = _stored(tensor)
    rows = tuple(
        (
            Cell(words.elide(Path(node.file).name)),
            Cell(words.shape_of(node.shape)),
            Cell(words.byte_size(node.nbytes)),
        )
        for node in stored[:_PIECES]
    )
    table = Table(columns, rows, hidden=max(len(stored) - _PIECES, 0), rows_are="pieces", rest=".expr")
    summary = "an expression of " + ", ".join(f"{count:,} {name}" for name, count in kinds.items())
    return Section("Made of", summary, tables=(table,), opened=True)
