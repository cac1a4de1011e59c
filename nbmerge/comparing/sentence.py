"""The one sentence that says what a comparison found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from nbmerge.comparing.rolling import PARTS
from nbmerge.errors import plural

if TYPE_CHECKING:
    from nbmerge.comparing.model_diff import ModelDiff

_SINGULAR = {"matrices": "matrix", "embeddings": "embedding", "norms": "norm", "biases": "bias",
             "other tensors": "other tensor"}  # fmt: skip
_LITTLE, _NEARLY_ALL = 0.05, 99.95  # percent that one digit would show as none and as all


def diff_sentence(diff: ModelDiff) -> str:
    """`Training changed 14.2% of all elements, in all 196 matrices; norms and embeddings did not move; …`"""
    if not diff.tensors:
        clauses = ["nothing could be compared"]
    elif not diff.changed:
        clauses = [f"no element of {plural(len(diff.tensors), 'tensor')} changed{_compared_as(diff)}"]
    else:
        clauses = list(_changes(diff))
    estimate = "" if diff.looked.whole else f"an estimate from {percent(diff.looked.share)} of the elements: "
    return estimate + "; ".join([*clauses, *_frozen(diff), *_left_out(diff)])


def percent(share: float) -> str:
    """`14.2%`; `<0.1%` and `>99.9%` for what would round to nothing and to all."""
    value = 100 * share
    if 0 < value < _LITTLE:
        return "<0.1%"
    return ">99.9%" if _NEARLY_ALL <= value < 100 else f"{value:.1f}%"


def joined(words: Sequence[str]) -> str:
    """`norms`, `norms and biases`, `norms, biases and embeddings`."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _changes(diff: ModelDiff) -> Iterator[str]:
    every, moved = Counter[str](), Counter[str]()
    for place, found in diff.by_place.items():
        every[place.part] += found.tensors
        moved[place.part] += found.changed
    first, *others = [part for part in PARTS if moved[part]]
    dtypes = _compared_as(diff)
    share = percent(diff.statistics.share)
    lead = f"{share} of all elements differ{dtypes}" if dtypes else f"training changed {share} of all elements"
    yield f"{lead}, in {_so_many(first, moved[first], every[first])}"
    if others:
        yield f"{joined([_so_many(part, moved[part], every[part]) for part in others])} moved too"
    still = [part for part in PARTS if every[part] and not moved[part]]
    if still:
        yield f"{joined(still)} did not move"


def _so_many(part: str, moved: int, every: int) -> str:
    """`all 196 matrices`, `3 of 57 norms`, `the embedding`."""
    if moved == every:
        return f"the {_SINGULAR[part]}" if every == 1 else f"{'both' if every == 2 else f'all {every:,}'} {part}"
    return f"{moved:,} of {every:,} {part}"


def _compared_as(diff: ModelDiff) -> str:
    """`, compared as float32 (0.3% after rounding to the narrower dtype)`; empty where the dtypes are the same."""
    names = list(dict.fromkeys(str(dtype) for _, _, dtype in diff.compared_as))
    if not names:
        return ""
    rounded = diff.statistics.share_rounded
    after = "" if rounded is None else f" ({percent(rounded)} after rounding to the narrower dtype)"
    return f", compared as {joined(names)}{after}"


def _frozen(diff: ModelDiff) -> Iterator[str]:
    if not diff.frozen:
        return
    count = len(diff.frozen_moved)
    yield f"{plural(count, 'tensor')} declared frozen moved" if count else "nothing declared frozen moved"


def _left_out(diff: ModelDiff) -> Iterator[str]:
    for side, found in (("A", diff.only_a), ("B", diff.only_b)):
        if found:
            yield f"{plural(len(found), 'tensor')} {'is' if len(found) == 1 else 'are'} only in {side}"
    if diff.mismatched:
        yield f"{plural(len(diff.mismatched), 'tensor')} could not be compared"
