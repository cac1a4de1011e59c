"""What is shown of a checkpoint, and of a loader."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from nbmerge.display import words
from nbmerge.display.layout_views import layout_sections
from nbmerge.display.meshes import is_whole_mesh, mesh_in_words
from nbmerge.display.model import PROBLEM, Alert, Cell, Column, Fact, Section, Table, View
from nbmerge.display.parameter_views import parameters_section
from nbmerge.display.rank_views import ranks_section
from nbmerge.errors import Problem, plural
from nbmerge.layout import Checkpoint, SourceFile
from nbmerge.loaders.base import Loader

_NOTES = 8
_PROBLEMS = 10


def checkpoint_view(checkpoint: Checkpoint) -> View:
    """What it is in one sentence, then how it is sharded, its parameters, its files, and what to know of it."""
    return View(
        title="Checkpoint",
        sentence=_sentence(checkpoint),
        alerts=problem_alerts(checkpoint.problems),
        facts=tuple(_facts(checkpoint)),
        sections=(
            *layout_sections(checkpoint),
            *ranks_section(checkpoint),
            parameters_section(checkpoint),
            *_files_section(checkpoint),
            *_notes_section(checkpoint),
        ),
    )


def loader_view(loader: Loader) -> View:
    """What it recognises; of a directory that it was chosen for, the evidence."""
    sentence = f"{words.elide(loader.name)} opens directories that hold {words.elide(loader.recognises, 200)}"
    if loader.directory is None:
        return View("Loader", sentence)
    found = loader.evidence(loader.directory)
    facts = [Fact("directory", words.elide(str(loader.directory), 2 * words.NAME_LIMIT), code=True)]
    facts.append(Fact("evidence", words.elide(", ".join(found), 200) or "none any more"))
    config = loader.config_directory(loader.directory)
    facts.append(Fact("config", words.elide(str(config), 2 * words.NAME_LIMIT) if config else "none found"))
    return View("Loader", sentence, facts=tuple(facts))


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


def _sentence(checkpoint: Checkpoint) -> str:
    written = "" if checkpoint.whole else f", written by {plural(checkpoint.world_size, 'rank')}"
    if checkpoint.mesh:
        written += f" {'on a mesh' if is_whole_mesh(checkpoint) else 'with'} {mesh_in_words(checkpoint)}"
    nbytes: Counter[str] = Counter()
    for kind in checkpoint.kinds:
        nbytes[kind.first.dtype.name] += kind.nbytes
    return (
        f"{checkpoint.layout}{written}: {plural(len(checkpoint.tensors), 'tensor')}, "
        f"{words.big_count(checkpoint.numel, 'parameter')}, {words.byte_size(checkpoint.nbytes)}, "
        f"{dtypes_in_words(nbytes, checkpoint.nbytes) or 'no dtype'}"
    )


def _facts(checkpoint: Checkpoint) -> Iterator[Fact]:
    yield Fact("path", words.elide(str(checkpoint.path), 2 * words.NAME_LIMIT), code=True)
    yield Fact("parameters", f"{checkpoint.numel:,}")
    yield Fact("bytes", words.exact_bytes(checkpoint.nbytes))
    needed = "--base_model" if checkpoint.is_adapter else "--hf_model_config_path"
    found = checkpoint.config_dir and _as_asked(checkpoint.config_dir, checkpoint.path)
    config = str(found) if found else f"none found; a merge needs {needed}"
    yield Fact("config", words.elide(config, 2 * words.NAME_LIMIT), code=found is not None)
    evidence = ", ".join(checkpoint.evidence)
    yield Fact("back end", words.elide(f"{checkpoint.backend} ({evidence})" if evidence else checkpoint.backend, 200))


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


def _as_asked(path: Path, directory: Path) -> Path:
    """A path inside the directory, written as the directory is: relative to where the user is, or not."""
    inside = path.is_absolute() and not directory.is_absolute() and path.is_relative_to(directory.absolute())
    return directory / path.relative_to(directory.absolute()) if inside else path


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
