"""What an exception says: its text and notes, the members of a group, and the exceptions that it came from."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from nbmerge.errors import NbmergeError, Problem, one_line
from nbmerge.explaining.candidates import Candidate, Strength
from nbmerge.explaining.messages import Reading, read_message

TAKES = (
    "pass a checkpoint, a plan, a Hugging Face directory, two shapes, or what torch, transformers, vLLM, DeepSpeed or "
    "nbmerge said on loading"
)
NOT_READ = "it says nothing of names or shapes that is known"
_MOST = 200  # exceptions of a chain or a group that are read
_NAME = re.compile(r"[\w-]+(?:\.[\w-]+)+")


def read_error(error: BaseException) -> tuple[Reading, tuple[Problem, ...]]:
    """What the first exception of the chain that can be read says, and what of it, or of the first, cannot be read."""
    unread: tuple[Problem, ...] | None = None
    for each in _chain(error):
        reading, others = _one(each)
        if reading:
            return reading, others
        unread = others if unread is None else unread
    return Reading(), unread or ()


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The exception, and those that it was raised from, or while handling them. Each once, however they are linked."""
    seen: set[int] = set()
    at: BaseException | None = error
    while at is not None and id(at) not in seen and len(seen) < _MOST:
        seen.add(id(at))
        yield at
        at = at.__cause__ or (None if at.__suppress_context__ else at.__context__)


def _one(error: BaseException) -> tuple[Reading, tuple[Problem, ...]]:
    if _exceptions(error):
        return _together(
            [_alone(each) for each in _members(error)] + [(read_message(note), ()) for note in _notes(error)]
        )
    return _alone(error)


def _notes(error: BaseException) -> list[str]:
    return [str(note) for note in getattr(error, "__notes__", ()) or ()]


def _exceptions(error: BaseException) -> tuple[BaseException, ...]:
    """The members of a group, Python's or the package's of that name; nothing for one exception."""
    members = getattr(error, "exceptions", ())
    are = isinstance(members, (tuple, list)) and all(isinstance(each, BaseException) for each in members)
    return tuple(members) if are else ()


def _members(group: BaseException) -> list[BaseException]:
    """The exceptions of a group and of the groups within it, each with what it came from."""
    found: list[BaseException] = []
    waiting: list[BaseException] = [group]
    while waiting and len(found) < _MOST:
        each = waiting.pop(0)
        if inner := _exceptions(each):
            waiting += inner
        else:
            found.append(next((one for one in _chain(each) if _alone(one)[0]), each))
    return found


def _alone(error: BaseException) -> tuple[Reading, tuple[Problem, ...]]:
    """One exception; of ours, all its problems."""
    if isinstance(error, NbmergeError):
        read = [(read_problem(each), each) for each in error.problems]
        reading, _ = _together([(each, ()) for each, _ in read] + [(read_message(note), ()) for note in _notes(error)])
        return reading, tuple(problem for each, problem in read if not each)
    reading = read_message("\n".join([text_of(error), *_notes(error)])) or _looked_up(error)
    if reading:
        return reading, ()
    first = text_of(error).strip().partition("\n")[0]
    what = one_line(f"{type(error).__name__}: {first}" if first else type(error).__name__, limit=300)
    return Reading(), (Problem(what, why=NOT_READ, fix=TAKES),)


def text_of(error: BaseException) -> str:
    """Its text; of one whose text cannot be made, its type."""
    try:
        return str(error)
    except Exception:  # noqa: BLE001 - another library's __str__
        return type(error).__name__


def read_problem(problem: Problem) -> Reading:
    """What one of our own problems says."""
    return read_message("\n".join((problem.what, problem.where)))


def _looked_up(error: BaseException) -> Reading:
    """A KeyError of a tensor's name, which does not say in what it was looked up."""
    key = error.args[0] if isinstance(error, KeyError) and len(error.args) == 1 else None
    if not isinstance(key, str) or len(key) > 1000 or not _NAME.fullmatch(key):
        return Reading()
    cause = Candidate(
        "a name that was looked up",
        "the checkpoint lacks it, or the model that was made for loading does; the error does not say which",
        (f"{key} was looked up, and is not there",),
        Strength.WEAK,
        f"ask of the checkpoint itself: nbmerge.explain(CHECKPOINT, {key!r})",
    )
    return Reading(causes=((f"KeyError: {key!r}", cause),))


def _together(
    read: Iterable[tuple[Reading, tuple[Problem, ...]]],
) -> tuple[Reading, tuple[Problem, ...]]:
    """Several readings as one, each thing once."""
    every = list(read)
    readings = [reading for reading, _ in every]
    joined = Reading(
        tuple(dict.fromkeys(each for reading in readings for each in reading.shapes)),
        tuple(dict.fromkeys(each for reading in readings for each in reading.missing)),
        tuple(dict.fromkeys(each for reading in readings for each in reading.unexpected)),
        tuple(dict.fromkeys(each for reading in readings for each in reading.causes)),
        next((reading.ranks for reading in readings if reading.ranks), None),
        sum(reading.cut for reading in readings),
    )
    return joined, tuple(problem for _, others in every for problem in others)
