"""What is shown of an explanation: both shapes side by side, and every cause with its evidence; and of a location."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce
from itertools import zip_longest

from nbmerge.collapse import collapse
from nbmerge.display import words
from nbmerge.display.checkpoint_views import problem_alerts
from nbmerge.display.model import ATTENTION, PROBLEM, Alert, Cell, Column, Fact, Section, Table, View
from nbmerge.errors import listing, plural
from nbmerge.explaining.candidates import Candidate
from nbmerge.explaining.explanation import FAILED, FITS, MISMATCH, MISSING, RENAMED, Explanation, Subject
from nbmerge.explaining.table import leading
from nbmerge.geometry import Shape
from nbmerge.tracing import Location

_SUBJECTS = 24  # rows of the overview
_DETAILED = 6  # sections of subjects
_OPENED = 1
_CANDIDATES = 8
_DIMENSIONS = 8
_ABSENT = "·"


def explanation_view(explanation: Explanation) -> View:
    """The answer in a sentence; what does not fit, side by side; the causes with their evidence; what to do."""
    wrong = explanation.mismatches
    sections = [_overview(wrong, explanation.diagnosis)] if len(wrong) > 1 else []
    opened = 0 if explanation.diagnosis else _OPENED
    fix = _one_fix(explanation)
    told_alike = list(_told_alike(wrong))[:_DETAILED]
    sections += [_subject_section(each, fix, opened=i < opened) for i, each in enumerate(told_alike)]
    return View(
        title="Explanation",
        sentence=words.elide(explanation.sentence, 2 * words.PROSE_LIMIT),
        alerts=tuple(_alerts(explanation)),
        facts=tuple(_facts(explanation)),
        sections=tuple(sections),
    )


def _alerts(explanation: Explanation) -> Iterator[Alert]:
    if explanation.diagnosis:
        fix = "pass the config that training used: --hf_model_config_path DIR"
        yield Alert(PROBLEM, "the config is of another model than the checkpoint", (("fix", fix),))
    elif explanation.is_ambiguous:
        what = "several causes fit equally well; the shapes alone do not decide"
        details = (
            () if explanation.ranks else (("fix", "say how many ranks wrote it, which rules causes out: ranks=N"),)
        )
        yield Alert(ATTENTION, what, details)
    yield from problem_alerts(explanation.problems)


def _facts(explanation: Explanation) -> Iterator[Fact]:
    yield Fact("explained", words.elide(explanation.asked, 2 * words.NAME_LIMIT))
    if explanation.ranks is not None:
        yield Fact("ranks", f"{explanation.ranks:,}")
    if explanation.checked > 1:
        yield Fact("compared", plural(explanation.checked, "tensor"))
    fitting = [subject for subject in explanation.subjects if subject.kind == FITS]
    for subject in fitting[:1]:
        yield Fact("shape", words.shape_of(subject.got or ()))
        if subject.lies:
            yield Fact("lies", words.elide(subject.lies, words.PROSE_LIMIT))
    if fix := _one_fix(explanation):
        yield Fact("fix", words.elide(fix, words.PROSE_LIMIT))


def _one_fix(explanation: Explanation) -> str:
    """What to do, where one cause stands before all others; else empty."""
    if explanation.best is None or explanation.is_ambiguous or explanation.diagnosis:
        return ""
    return explanation.best.fix


def _overview(subjects: Sequence[Subject], diagnosis: str) -> Section:
    """A row for each subject: its names as one, both shapes, and the best cause."""
    columns = (
        Column("tensor", code=True),
        Column("expected", number=True),
        Column("got", number=True),
        Column("best cause"),
        Column("evidence"),
    )
    rows = tuple(
        (
            Cell(words.elide(_title(each))),
            Cell(_shape_words(each, each.expected)),
            Cell("another name" if each.kind == RENAMED else _shape_words(each, each.got)),
            Cell(_best_words(each)),
            Cell(_evidence_words(each, diagnosis)),
        )
        for each in subjects[:_SUBJECTS]
    )
    hidden = max(len(subjects) - _SUBJECTS, 0)
    table = Table(columns, rows, hidden=hidden, rows_are="kinds of tensors", rest=".subjects")
    count = sum(max(len(each.names), 1) for each in subjects)
    return Section("What does not fit", plural(count, "tensor"), tables=(table,), opened=True)


def _evidence_words(subject: Subject, diagnosis: str) -> str:
    if subject.held_as:
        return words.elide(f"there as {_prefix(subject) or _one_name(subject.held_as)}")
    if subject.best is None or not subject.best.evidence:
        return _ABSENT
    first = subject.best.evidence[0]
    return "as said above" if first in diagnosis else words.elide(first, 120)


def _prefix(subject: Subject) -> str:
    """`_orig_mod.…`, where the checkpoint's names are the model's after that; else empty."""
    held, name = _one_name(subject.held_as), _one_name(subject.names)
    return f"{held.removesuffix(name)}…" if held.endswith(name) else ""


def _title(subject: Subject) -> str:
    """All names of a subject as one: `model.layers.{0..35}.self_attn.q_proj.weight`."""
    return "the error" if subject.kind == FAILED else _one_name(subject.names) or "the tensor"


def _titles(subjects: Sequence[Subject]) -> str:
    """Two titles, or the first of more."""
    return listing([_title(each) for each in subjects], shown=2 if len(subjects) == 2 else 1)


def _one_name(names: Sequence[str]) -> str:
    return listing([group.name for group in collapse((name, None) for name in names)], shown=1)


def _shape_words(subject: Subject, shape: Shape | None) -> str:
    if shape is None or subject.kind == FAILED:
        return _ABSENT
    return words.shape_of(shape) if shape or subject.kind == MISMATCH else "there"


def _best_words(subject: Subject) -> str:
    first = leading(subject.candidates)
    if not first:
        return "no known pattern"
    return f"{' or '.join(each.pattern for each in first[:3])} ({first[0].strength})"


def _told_alike(subjects: Sequence[Subject]) -> Iterator[Sequence[Subject]]:
    """The subjects of which the same is to be said: the same best causes of the same two shapes, or of any name."""
    groups: dict[object, list[Subject]] = {}
    for each in subjects:
        shapes = (each.expected, each.got) if each.kind == MISMATCH else each.message
        causes = tuple((one.pattern, one.strength, _nameless(one, each)) for one in leading(each.candidates))
        groups.setdefault((each.kind, shapes, causes, _prefix(each)), []).append(each)
    yield from groups.values()


def _nameless(cause: Candidate, subject: Subject) -> str:
    """What happened, without the names of the tensor."""
    names = sorted(filter(None, (subject.name, cause.other)), key=len, reverse=True)
    return reduce(lambda said, name: said.replace(name, _ABSENT), names, cause.sentence)


def _subject_section(subjects: Sequence[Subject], above: str, *, opened: bool) -> Section:
    """Of the first of them: both shapes dimension by dimension, and the causes.

    above: the fix that is said over all sections.
    """
    subject = subjects[0]
    first = leading(subject.candidates)
    summary = (
        f"{len(first)} causes fit equally well"
        if len(first) > 1
        else words.elide(subject.best.sentence if subject.held_as else str(subject.best), words.PROSE_LIMIT)
        if subject.best
        else "no known pattern fits"
    )
    tables = [_sides(subject)] if subject.kind == MISMATCH else []
    tables += [_causes(subject.candidates)] if subject.candidates else []
    said = {MISSING: "missing: ", FAILED: words.elide(f"{subject.message}: ", words.PROSE_LIMIT)}
    return Section(
        words.elide(_titles(subjects), 2 * words.NAME_LIMIT),
        said.get(subject.kind, "") + summary,
        tables=tuple(tables),
        notes=tuple(_fixes(subject.candidates, above)),
        opened=opened,
    )


def _sides(subject: Subject) -> Table:
    """Expected above got, a column for each dimension, so that what differs stands one over the other."""
    got, expected = subject.got or (), subject.expected or ()
    pairs = list(zip_longest(expected, got))[:_DIMENSIONS]
    heads = [Column(f"dimension {dim}", number=True) for dim in range(len(pairs))]
    columns = (Column("shape"), *heads, Column("elements", number=True))
    rows = (
        ("expected", *(_number(one) for one, _ in pairs), f"{_elements(expected):,}"),
        ("got", *(_number(other) for _, other in pairs), f"{_elements(got):,}"),
        ("differs", *("" if one == other else _difference(one, other) for one, other in pairs), ""),
    )
    return Table(columns, tuple(tuple(Cell(text) for text in row) for row in rows))


def _number(value: int | None) -> str:
    return _ABSENT if value is None else words.elide(f"{value:,}", 40)


def _elements(shape: Shape) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _difference(one: int | None, other: int | None) -> str:
    """`×8`, `÷8`, or `+16`."""
    if one is None or other is None:
        return "only in one"
    if one and other and other % one == 0:
        return f"×{other // one:,}"
    if one and other and one % other == 0:
        return f"÷{one // other:,}"
    return f"{other - one:+,}"


def _causes(candidates: Sequence[Candidate]) -> Table:
    columns = (Column("cause"), Column("strength"), Column("arithmetic"), Column("what happened"), Column("seen in"))
    rows = tuple(
        (
            Cell(each.pattern),
            Cell(str(each.strength)),
            Cell(words.elide("; ".join(each.evidence), words.PROSE_LIMIT)),
            Cell(words.elide(each.sentence, words.PROSE_LIMIT)),
            Cell(", ".join(each.seen) or _ABSENT),
        )
        for each in candidates[:_CANDIDATES]
    )
    hidden = max(len(candidates) - _CANDIDATES, 0)
    return Table(columns, rows, hidden=hidden, rows_are="causes", rest=".candidates")


def _fixes(candidates: Sequence[Candidate], above: str) -> Iterator[str]:
    """What to do for the leading causes, each remedy once: not the one that is said above."""
    by_fix: dict[str, list[str]] = {}
    for each in leading(tuple(candidates)):
        by_fix.setdefault(each.fix, []).append(each.pattern)
    if list(by_fix) == [above]:
        return
    for fix, patterns in list(by_fix.items())[:4]:
        case = f", if it is {listing(patterns)}" if len(by_fix) > 1 else ""
        yield f"Fix{case}: {words.elide(fix, words.PROSE_LIMIT)}"


def location_view(location: Location) -> View:
    """The file, the byte and the rank, the place in that rank's shard, and what happens on the way."""
    return View(
        title="Location",
        sentence=words.elide(location.sentence, words.PROSE_LIMIT),
        facts=tuple(_location_facts(location)),
        code_title="Read it" if location.file is not None else "",
        code=_reading(location) if location.file is not None else (),
    )


def _location_facts(location: Location) -> Iterator[Fact]:
    yield Fact("tensor", words.elide(location.name), code=True)
    yield Fact("index", f"{list(location.index)} of {words.shape_of(location.shape)}")
    for step in location.steps:
        yield Fact("on the way", words.elide(step, words.PROSE_LIMIT))
    if location.inputs:
        yield Fact("made from", words.elide(listing(location.inputs), words.PROSE_LIMIT))
    if location.file is None:
        return
    if location.source and (location.source != location.name or location.source_index != location.index):
        yield Fact("stored as", f"{words.elide(location.source)}{list(location.source_index)}", code=True)
    yield Fact("file", words.elide(str(location.file), 2 * words.NAME_LIMIT), code=True)
    yield Fact("byte", f"{location.offset:,} to {location.offset + location.nbytes - 1:,}, {location.stored_dtype}")
    if location.rank is not None:
        yield Fact("rank", f"{location.rank:,}")
    if location.box is not None:
        yield Fact("in the shard", f"{list(location.shard_index)} of {words.shape_of(location.box.shape)}, "
                   f"which is {words.elide(str(location.box))} of the tensor")  # fmt: skip
    if location.copies:
        ranks = [f"{copy.rank:,}" for copy in location.copies]
        yield Fact("copies", f"on {plural(len(ranks), 'other rank')}: {listing(ranks, shown=8)}")


def _reading(location: Location) -> tuple[str, ...]:
    path = str(location.file)
    return (
        f"with open({ascii(path) if not path.isprintable() else repr(path)}, 'rb') as file:",
        f"    file.seek({location.offset}); element = file.read({location.nbytes})",
    )
