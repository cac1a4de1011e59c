"""What is shown of a comparison: of two models, and of one tensor."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence

from nbmerge.collapse import collapse
from nbmerge.comparing.left_out import Unmatched
from nbmerge.comparing.model_diff import ModelDiff, TensorDiff
from nbmerge.comparing.rolling import largest_kinds
from nbmerge.comparing.sentence import percent
from nbmerge.comparing.statistics import Statistics, combined, ulp_bin
from nbmerge.display import words
from nbmerge.display.heat import heat_table, share_cell
from nbmerge.display.model import ATTENTION, PROBLEM, Alert, Cell, Column, Fact, Section, Table, View
from nbmerge.display.sparklines import magnitude_line, power_of_two, scientific, ulp_line
from nbmerge.errors import listing, plural

KIND_ROWS = 20
_TENSORS = 10
_LEFT_OUT = 12


def diff_view(diff: ModelDiff) -> View:
    """What changed, where and how far; what was declared frozen and moved, first."""
    return View(
        title="Model diff",
        sentence=words.elide(diff.sentence, 2 * words.PROSE_LIMIT),
        alerts=tuple(diff_alerts(diff)),
        facts=tuple(_facts(diff)),
        sections=tuple(_sections(diff)),
        code_title="Next" if diff.changed else "",
        code=(f"diff[{_literal(diff.largest_updates(1)[0].name)}]", "diff.to_dataframe()") if diff.changed else (),
    )


def _literal(name: str) -> str:
    shown = words.elide(name)
    return repr(shown) if shown.isascii() else ascii(shown)


def diff_alerts(diff: ModelDiff) -> Iterator[Alert]:
    if diff.frozen_moved:
        moved = diff.frozen_moved
        yield Alert(
            PROBLEM,
            f"{plural(len(moved), 'tensor')} declared frozen moved",
            (
                ("tensors", _names([tensor.name for tensor in moved])),
                ("changed", f"{combined(t.statistics for t in moved).changed:,} elements"),
                ("fix", "check requires_grad and the optimizer's parameter groups before training goes on"),
            ),
        )
    for pattern in diff.idle_patterns[:4]:
        yield Alert(
            ATTENTION,
            f"no tensor has a name like {words.elide(pattern)}, which was declared frozen",
            (("fix", "look for a typing error; * stands for any text, e.g. '*.embed_tokens.*'"),),
        )
    if diff.frozen_unseen:
        yield Alert(
            ATTENTION,
            f"{plural(len(diff.frozen_unseen), 'tensor')} declared frozen could not be compared as a whole",
            (("tensors", _names(diff.frozen_unseen)),),
        )
    changed = diff.changed if diff.statistics.nonfinite_b else ()
    broken = [tensor for tensor in changed if tensor.statistics.nonfinite_b > tensor.statistics.nonfinite_a]
    if broken:
        yield Alert(
            ATTENTION,
            f"more values of {plural(len(broken), 'tensor')} are NaN or infinite in B than in A",
            (("tensors", _names([tensor.name for tensor in broken])),),
        )
    left_out = [*(one.name for one in diff.unmatched), *(one.name for one in diff.mismatched)]
    if left_out:
        yield Alert(
            ATTENTION, f"{plural(len(left_out), 'tensor')} could not be compared as a whole",
            (("tensors", _names(left_out)),),
        )  # fmt: skip


def _names(names: Sequence[str]) -> str:
    groups = collapse((words.elide(name), None) for name in names)
    return words.elide(listing(group.name for group in groups), words.PROSE_LIMIT)


def _facts(diff: ModelDiff) -> Iterator[Fact]:
    yield Fact("A", words.elide(diff.a, 2 * words.NAME_LIMIT), code=True)
    yield Fact("B", words.elide(diff.b, 2 * words.NAME_LIMIT), code=True)
    found = diff.statistics
    sampled = "" if diff.looked.whole else f", {percent(diff.looked.share)} of all; what follows is of those"
    yield Fact("compared", f"{plural(len(diff.tensors), 'tensor')}, {plural(found.elements, 'element')}{sampled}")
    yield from measures(found)
    if found.largest is not None:
        largest = next(t for t in diff.changed if t.statistics.largest == found.largest)
        yield Fact("largest |Δ|", f"{_largest(largest)} of {words.elide(largest.name)}")
    for a, b, dtype in diff.compared_as[:4]:
        yield Fact("dtypes", f"{a} in A and {b} in B, compared as {dtype}")
    if diff.frozen:
        yield Fact("declared frozen", words.elide(", ".join(diff.frozen), words.PROSE_LIMIT))
    yield Fact("time", f"{words.duration(diff.looked.seconds)} for {words.byte_size(diff.looked.nbytes)} of both")


def measures(found: Statistics) -> Iterator[Fact]:
    """What a tensor and a whole model have in common."""
    share = f"{found.changed:,} of {found.elements:,} elements, {percent(found.share)}"
    yield Fact("changed", share)
    if found.changed_rounded is not None:
        yield Fact("after rounding", f"{found.changed_rounded:,} differ once both are in the narrower dtype")
    if found.relative_l2 is not None and found.changed:
        yield Fact("relative L2", f"{number(found.relative_l2)} = ‖B − A‖ / ‖A‖")
        yield Fact("cosine", _cosine(found))
        yield Fact("sign flips", f"{found.flips:,}")
    if found.nonfinite_a or found.nonfinite_b:
        yield Fact("NaN or infinite", f"{found.nonfinite_a:,} in A, {found.nonfinite_b:,} in B")


def number(value: float | None) -> str:
    return "·" if value is None else scientific(value)


def _cosine(found: Statistics) -> str:
    """`0.912`, or how little it is from 1: `1 − 3.2e-07`."""
    if found.cosine is None or found.one_minus_cosine is None:
        return "·"
    return f"{found.cosine:.4f}" if found.one_minus_cosine > 0.01 else f"1 − {scientific(found.one_minus_cosine)}"


def _largest(tensor: TensorDiff) -> str:
    largest = tensor.statistics.largest
    if largest is None or tensor.largest_at is None:
        return "·"
    at = words.shape_of(tensor.largest_at)
    return f"{number(largest.size)}, from {number(largest.before)} to {number(largest.after)}, at {at}"


def _sections(diff: ModelDiff) -> Iterator[Section]:
    if diff.changed:
        heat = heat_table(diff)
        if heat is not None:
            yield Section(
                "Where", f"share of changed elements by layer and module{_rounding(diff)}", tables=(heat,), opened=True
            )
        yield _kinds_section(diff)
        yield _tensors_section(diff)
    if diff.unmatched or diff.mismatched:
        yield _left_out_section(diff)
    notes = [*diff.notes, *diff.tensor_notes]
    if notes:
        shown = tuple(words.elide(note, words.PROSE_LIMIT) for note in notes[:6])
        yield Section("How tensors were paired", plural(len(notes), "rule"), notes=shown)


def _rounding(diff: ModelDiff) -> str:
    return "" if diff.statistics.changed_rounded is None else ", after rounding to the narrower dtype"


def _kinds_section(diff: ModelDiff) -> Section:
    columns = (
        Column("kind", code=True), Column("changed", number=True), Column("relative L2", number=True),
        Column("cosine", number=True), Column("max |Δ|", number=True), Column("ULPs"),
        Column("|Δ|"),
    )  # fmt: skip
    found = diff.by_kind
    kinds = largest_kinds({kind: one.elements for kind, one in found.items()}, KIND_ROWS)
    rows = tuple((Cell(words.elide(kind, 40)), *_measure_cells(found[kind])) for kind in kinds)
    table = Table(columns, rows, hidden=len(found) - len(kinds), rows_are="kinds", rest=".by_kind")
    histograms = "histograms of the changed elements: units in the last place, and |Δ| by powers of two"
    summary = f"{plural(len(found), 'kind')} of module; {histograms}"
    return Section("By kind of module", summary, tables=(table,), opened=True)


def _measure_cells(found: Statistics) -> tuple[Cell, ...]:
    return (
        share_cell(found),
        Cell(number(found.relative_l2)),
        Cell(_cosine(found) if found.changed else "1"),
        Cell(number(found.largest.size) if found.largest else "·"),
        Cell(ulp_line(found.ulps)),
        Cell(magnitude_line(found.magnitudes)),
    )


def _tensors_section(diff: ModelDiff) -> Section:
    largest = diff.largest_updates(_TENSORS)
    ranked = any(tensor.rank_one is not None for tensor in largest)
    columns = [Column("tensor", code=True), Column("changed", number=True), Column("relative L2", number=True)]
    columns += [Column("rank one", number=True)] if ranked else []
    columns += [Column("|Δ|")]
    rows = []
    for tensor in largest:
        found = tensor.statistics
        row = [Cell(words.elide(tensor.name)), share_cell(found), Cell(number(found.relative_l2))]
        if ranked:
            row.append(Cell("·" if tensor.rank_one is None else percent(tensor.rank_one), bar=tensor.rank_one))
        rows.append((*row, Cell(magnitude_line(found.magnitudes))))
    table = Table(
        tuple(columns), tuple(rows), hidden=len(diff.changed) - len(rows), rows_are="changed tensors", rest=".changed"
    )  # fmt: skip
    what = "; rank one: the share of ‖Δ‖² that one outer product holds, at least" if ranked else ""
    return Section("Largest updates", f"by relative L2{what}", tables=(table,))


def _left_out_section(diff: ModelDiff) -> Section:
    columns = (Column("tensor", code=True), Column("only in"), Column("shape"), Column("dtype"), Column("why"))
    rows: list[tuple[str, ...]] = []
    alike: dict[Hashable, Unmatched] = {(one.side, one.shape, one.dtype, one.why): one for one in diff.unmatched}
    keyed = ((words.elide(one.name), (one.side, one.shape, one.dtype, one.why)) for one in diff.unmatched)
    for group in collapse(keyed):
        one = alike[group.key]
        why = one.why or "the other has no such tensor"
        rows.append((group.name, one.side, words.shape_of(one.shape), str(one.dtype), why))
    for other in diff.mismatched:
        shapes = f"{words.shape_of(other.a[0])} / {words.shape_of(other.b[0])}"
        dtypes = str(other.a[1]) if other.a[1] == other.b[1] else f"{other.a[1]} / {other.b[1]}"
        rows.append((words.elide(other.name), "·", shapes, dtypes, other.why))
    cells = tuple(tuple(Cell(words.elide(text)) for text in row) for row in rows[:_LEFT_OUT])
    table = Table(columns, cells, hidden=max(len(rows) - _LEFT_OUT, 0), rest=".unmatched and .mismatched")
    sides = [
        f"{plural(len(found), 'tensor')} only in {side}"
        for side, found in (("A", diff.only_a), ("B", diff.only_b))
        if found
    ]
    sides += [f"{len(diff.mismatched):,} that differ in shape or kind"] if diff.mismatched else []
    return Section("Not compared", ", ".join(sides), tables=(table,), opened=True)


def tensor_diff_view(tensor: TensorDiff) -> View:
    """How one tensor changed, with both histograms."""
    found = tensor.statistics
    shape = f"{words.shape_of(tensor.shape)} {tensor.compared_as}"
    return View(
        "Tensor diff",
        f"{percent(found.share)} of the elements of {words.elide(tensor.name)}, {shape}, changed"
        if found.changed
        else f"no element of {words.elide(tensor.name)}, {shape}, changed",
        alerts=(Alert(PROBLEM, "it was declared frozen, and moved"),) if tensor.frozen and found.changed else (),
        facts=tuple(_tensor_facts(tensor)),
        sections=tuple(_histograms(found)),
    )


def _tensor_facts(tensor: TensorDiff) -> Iterator[Fact]:
    if tensor.dtype_a != tensor.dtype_b:
        yield Fact("dtypes", f"{tensor.dtype_a} in A and {tensor.dtype_b} in B, compared as {tensor.compared_as}")
    yield from measures(tensor.statistics)
    if tensor.statistics.largest is not None:
        yield Fact("largest |Δ|", _largest(tensor))
    if tensor.rank_one is not None:
        yield Fact("rank one", f"{percent(tensor.rank_one)} of ‖Δ‖² at least is one outer product")
    if tensor.note:
        yield Fact("paired", words.elide(tensor.note, words.PROSE_LIMIT))


def _histograms(found: Statistics) -> Iterator[Section]:
    if any(found.ulps):
        named = [(ulp_bin(number), count) for number, count in enumerate(found.ulps) if count]
        yield _histogram("Units in the last place", ulp_line(found.ulps), "units", named, found.changed)
    if found.magnitudes:
        named = [(f"{power_of_two(k)} to {power_of_two(k + 1)}", n) for k, n in sorted(found.magnitudes.items())]
        yield _histogram("|Δ|", magnitude_line(found.magnitudes), "|Δ|", named, found.changed)


def _histogram(title: str, line: str, unit: str, named: Sequence[tuple[str, int]], changed: int) -> Section:
    columns = (Column(unit), Column("elements", number=True), Column("share", number=True))
    shown = named[-32:]
    rows = tuple(
        (Cell(name), Cell(f"{count:,}"), Cell(percent(count / changed), bar=count / changed)) for name, count in shown
    )
    table = Table(columns, rows, hidden=len(named) - len(shown), rows_are="bins", rest=".statistics")
    return Section(title, f"{line}, of the changed elements", tables=(table,), opened=True)
