"""The prefixes that training wrappers leave in parameter names, and taking them off."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable

from nbmerge.errors import Problem

# torch.compile, FSDP, activation checkpointing and Lightning (`_forward_module`) put their modules between two others,
# anywhere in a name; DistributedDataParallel puts `module.` in front.
_INNER = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\.")
_OUTER = re.compile(r"^(?:module\.)+")


def strip_wrappers(name: str) -> str:
    """`module.model._orig_mod.norm.weight` → `model.norm.weight`."""
    return _OUTER.sub("", _INNER.sub("", name))


def stripped_names(names: Iterable[str], known: Container[str] = ()) -> tuple[dict[str, str], list[Problem]]:
    """Every name with its wrappers' prefixes off, as new → old, and the names that would then collide.

    A name that the model knows stays as it is: a model may have a part called `module` of its own.
    """
    olds: dict[str, list[str]] = {}
    for name in names:
        olds.setdefault(name if name in known else strip_wrappers(name), []).append(name)
    problems = [
        Problem(
            f"{' and '.join(same)} are both {new} without the prefixes of training wrappers",
            why="the state dict holds a wrapped and an unwrapped copy of one parameter",
            fix="save the state dict of the unwrapped model",
            kind="contradiction",
        )
        for new, same in olds.items()
        if len(same) > 1
    ]
    return {new: same[0] for new, same in olds.items()}, problems
