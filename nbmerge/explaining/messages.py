"""Reads the messages that loading a checkpoint ends in: torch's, transformers', vLLM's, DeepSpeed's, and our own."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product

from nbmerge.explaining.candidates import Candidate, Strength
from nbmerge.geometry import Shape

MOST = 1_000_000  # characters of a message that are read
_SHAPE = r"(?:torch\.Size\()?[\[(]([\d, ]*)[\])]\)?"
_NAME = r"(?<!\S)([^\s|:]{1,1000})"
_CELL = r"(?m)^[ \t]*([^|\s][^|\n]{0,1000}?)[ \t]{0,1000}\|[ \t]*"
_SIZES = tuple(
    re.compile(text.replace("CELL", _CELL).replace("NAME", _NAME).replace("SHAPE", _SHAPE))
    for text in (
        # torch.nn.Module.load_state_dict
        r"size mismatch for NAME: copying a param with shape SHAPE from checkpoint, "
        r"the shape in current model is SHAPE",
        # transformers 4, and 5's table of a loading report
        r"NAME: found shape SHAPE in the checkpoint and SHAPE in the model",
        r"CELLMISMATCH[ \t]*\|.{0,200}?ckpt: SHAPE vs model: ?SHAPE",
        # nbmerge.naming.published
        r"NAME has shape SHAPE in the checkpoint; the config's \w+ has SHAPE",
        # nbmerge.loaders.assemble
        r"NAME: the ranks hold SHAPE on each of \d+ ranks, and the config demands SHAPE",
        # nbmerge.validation: structure, values
        r"NAME has another shape\b[^\[\]]{0,200}SHAPE here,[^\[\]]{0,200}SHAPE",
    )
)
# nbmerge.validation: a sentence, its shape where it has one, and which side lacks the tensor
_FOUND = tuple(
    (re.compile(text.replace("NAME", _NAME).replace("SHAPE", _SHAPE)), kind)
    for text, kind in (
        (r"NAME is missing\b[^\[\]\n]{0,80}[\n(][^\[\]\n]{0,40}\bshape SHAPE", "missing"),
        (r"NAME is no tensor of [^\[\]\n]{1,200}[\n(][^\[\]\n]{0,40}\bshape SHAPE", "unexpected"),
        (r"NAME is in the checkpoint, and not in the directory()", "missing"),
        (r"NAME is in the reference only()", "missing"),
        (r"NAME is in the directory, and no tensor of the checkpoint()", "unexpected"),
        (r"NAME is not in the reference()", "unexpected"),
    )
)
_NAMELESS = (
    # vLLM's default_weight_loader
    re.compile(rf"load weight \({_SHAPE}\) into parameter \({_SHAPE}\)"),
)
_KEYS = re.compile(r"(Missing|Unexpected) key\(s\) in state_dict: ((?:\"[^\"]*\",? ?)+)")
_LISTED = (
    (re.compile(r"newly initialized[^\[\n]{0,300}\[([^\]]*)\]"), "missing"),
    (re.compile(r"were not used when initializing[^\[\n]{0,300}\[([^\]]*)\]"), "unexpected"),
)
_ROW = re.compile(_CELL + r"(MISSING|UNEXPECTED)\b")
_OURS_MISSING = re.compile(r"no tensor of the checkpoint fills ([^\s]+)")
_OURS_EXTRA = re.compile(rf"no rule takes ([^\s]+) of shape {_SHAPE}")
_CONSUMED = re.compile(r"consumed (\d{1,18}) numels out of (\d{1,18})")
_SCALAR = re.compile(r"zero-dimensional tensor .{0,40}cannot be concatenated")
_PLAIN = re.compile(r"'Tensor' object has no attribute '(?:device_mesh|placements|_spec|_local_tensor|to_local)'|"
                    r"expected .{0,60}DTensor.{0,60}(?:got|but).{0,60}Tensor")  # fmt: skip
_UNEQUAL = re.compile(
    r"Sizes of tensors must match except in dimension (\d{1,3})\. Expected size (\d{1,18}) but got size (\d{1,18})"
)
_RANKS = re.compile(r"on each of (\d{1,9}) ranks|\b(\d{1,9}) ranks\b|world[_ ]size[ =:]{1,3}(\d{1,9})")
_BRACES = re.compile(r"\{([^{}]*)\}")
_MOST_NUMBERS = 4096  # names that one line of a loading report can stand for


@dataclass(frozen=True)
class Reading:
    """What a message says.

    shapes: (name, shape in the checkpoint, shape in the model), None where the message does not say; causes: of
    messages that are about no shape, with the sentence that was recognised; ranks: how many, where it says so; cut:
    characters at the end of the message that were not read.
    """

    shapes: tuple[tuple[str, Shape | None, Shape | None], ...] = ()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    causes: tuple[tuple[str, Candidate], ...] = field(default=())
    ranks: int | None = None
    cut: int = 0

    def __bool__(self) -> bool:
        return bool(self.shapes or self.missing or self.unexpected or self.causes)


def read_message(text: str) -> Reading:
    """All that a message says of tensors; false where it says nothing that is known."""
    text, cut = text[:MOST], max(len(text) - MOST, 0)
    shapes: dict[tuple[str, Shape | None, Shape | None], None] = {}
    for pattern in _SIZES:
        for name, got, expected in pattern.findall(text):
            if _shape(got) != _shape(expected):  # equal ones: the sentence is about something else, as a dtype
                shapes.update({(each, _shape(got), _shape(expected)): None for each in _names(name)})
    for pattern in _NAMELESS:
        shapes.update({("", _shape(got), _shape(expected)): None for got, expected in pattern.findall(text)})
    for used, total in _CONSUMED.findall(text):
        shapes["flat partition", (int(total),), (int(used),)] = None
    for name, shape in _OURS_EXTRA.findall(text):
        shapes[name, _shape(shape), None] = None
    found = {"missing": list(_OURS_MISSING.findall(text)), "unexpected": []}
    for kind, name, shape in _found(text):
        if shape is None:
            found[kind].append(name)
        else:
            shapes[(name, None, shape) if kind == "missing" else (name, shape, None)] = None
    for kind, name in _listed(text):
        found[kind].append(name)
    match = _RANKS.search(text)
    return Reading(
        tuple(shapes),
        tuple(dict.fromkeys(found["missing"])),
        tuple(dict.fromkeys(found["unexpected"])),
        tuple(_causes(text)),
        int(next(filter(None, match.groups()))) if match else None,
        cut,
    )


def _found(text: str) -> Iterator[tuple[str, str, Shape | None]]:
    """(`missing` or `unexpected`, name, shape where it is said) of what a validation found."""
    for pattern, kind in _FOUND:
        yield from ((kind, name, _shape(shape) if r"\bshape" in pattern.pattern else None)
                    for name, shape in pattern.findall(text))  # fmt: skip


def _listed(text: str) -> Iterator[tuple[str, str]]:
    """(`missing` or `unexpected`, name) of every list of keys."""
    for kind, names in _KEYS.findall(text):
        yield from ((kind.lower(), name) for name in re.findall(r'"([^"]*)"', names))
    for pattern, kind in _LISTED:
        for names in pattern.findall(text):
            yield from ((kind, name) for name in re.findall(r"['\"]([^'\"]+)['\"]", names))
    for name, kind in _ROW.findall(text):
        yield from ((kind.lower(), each) for each in _names(name))


def _names(name: str) -> list[str]:
    """The names that transformers writes as one: `layers.{0, 1}.x` and `layers.{0...35}.x`."""
    choices = [_numbers(inside) for inside in _BRACES.findall(name)]
    count = 1
    for numbers in choices:
        count *= len(numbers)
    if not 1 < count <= _MOST_NUMBERS:
        return [name]
    parts = _BRACES.split(name)[::2]
    return ["".join(a + b for a, b in zip(parts, (*chosen, ""), strict=True)) for chosen in product(*choices)]


def _numbers(inside: str) -> list[str]:
    match = re.fullmatch(r"(\d{1,6})\.\.\.(\d{1,6})", inside)
    if match and int(match[2]) - int(match[1]) < _MOST_NUMBERS:
        return [str(number) for number in range(int(match[1]), int(match[2]) + 1)]
    return [number.strip() for number in inside.split(",")]


def _shape(text: str) -> Shape:
    return tuple(int(number[:18]) for number in re.findall(r"\d+", text))


def _causes(text: str) -> Iterator[tuple[str, Candidate]]:
    """Causes of messages that name no shape."""
    if match := _SCALAR.search(text):
        yield (
            match[0],
            Candidate(
                "replicated, concatenated",
                "a buffer without dimensions, of which every rank holds a copy, was treated as a shard",
                ("torch.cat takes no 0-d tensors", "FSDP2 never shards buffers"),
                Strength.STRONG,
                "keep one copy: nbmerge.merge does, because a plain tensor beside DTensors is whole on every rank",
                seen=("verl 7610", "oumi 2618"),
            ),
        )
    if match := _PLAIN.search(text):
        yield (
            match[0],
            Candidate(
                "plain tensors of one rank",
                "a run on one GPU saves plain tensors, which are whole; nothing is sharded and there is no mesh",
                ("world size 1",),
                Strength.FAIR,
                "merge it with nbmerge.merge, which takes a single rank's plain tensors as they are",
                seen=("verl 903",),
            ),
        )
    if match := _UNEQUAL.search(text):
        yield (
            match[0],
            Candidate(
                "unlike parts concatenated",
                f"the parts that were put together along dimension {match[1]} differ in another one, so that they are "
                "cut along that one, or are not parts of one tensor",
                (f"{match[2]} and {match[3]} in a dimension that must be equal",),
                Strength.FAIR,
                "concatenate along the dimension of the tensor's placement; nbmerge.merge reads it from the checkpoint",
            ),
        )
