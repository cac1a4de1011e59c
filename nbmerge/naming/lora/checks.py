"""What adapter_config.json and its like must hold to be of use: types, regular expressions, sizes."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping

from nbmerge.errors import Problem

_FIX = "correct it, or pass the file of this run: --lora_config FILE"


def wrong_values(values: Mapping[str, object], origins: Mapping[str, str]) -> dict[str, list[Problem]]:
    """What is wrong with the values, by key. origins: the file that each is from. lora_alpha is not looked at."""
    found: dict[str, list[Problem]] = {}
    for key, (is_right, wanted) in _RULES.items():
        if key in values and not is_right(values[key]):
            problem = Problem(f"{key} is {values[key]!r}", origins[key], f"it must be {wanted}", _FIX)
            found.setdefault(key, []).append(problem)
    for key, (is_right, wanted) in _PATTERNS.items():
        if key in values and (wrong := list(_wrong_patterns(key, values[key], is_right, wanted, origins[key]))):
            found[key] = wrong
    return found


def another_type(values: Mapping[str, object], origins: Mapping[str, str]) -> list[Problem]:
    """The files are of another method than LoRA, whose tensors may look alike."""
    kind = values.get("peft_type", "LORA")
    if kind == "LORA":
        return []
    return [
        Problem(
            f"peft_type is {kind!r}: the adapter is no LoRA", where=origins["peft_type"],
            why="its update is not scale * B @ A", fix="fold it in the training job, with peft's merge_and_unload",
            kind="unsupported",
        )
    ]  # fmt: skip


def is_size(value: object) -> bool:
    """Whether it is a finite number above 0, as alpha is."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= sys.float_info.max


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_flag(value: object) -> bool:
    return isinstance(value, bool)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _are_names(value: object) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(each, str) for each in value)


def _are_targets(value: object) -> bool:
    return _is_regex(value) if isinstance(value, str) else _are_names(value)


def _is_regex(text: str) -> bool:
    try:
        re.compile(rf"(.*\.)?({text})$")
    except (re.error, OverflowError, RecursionError):
        return False
    return True


def _is_bias(value: object) -> bool:
    return value in ("none", "all", "lora_only")


def _wrong_patterns(
    key: str, patterns: object, is_right: Callable[[object], bool], wanted: str, where: str
) -> Iterator[Problem]:
    if not isinstance(patterns, Mapping):
        why = f"it must be an object of names of modules, each with {wanted}"
        yield Problem(f"{key} is {patterns!r}", where, why, _FIX)
        return
    for pattern, value in patterns.items():
        if not isinstance(pattern, str) or not _is_regex(pattern):
            yield Problem(f"{key} has {pattern!r}", where, "it is no regular expression", _FIX)
        if not is_right(value):
            yield Problem(f"{key} of {pattern!r} is {value!r}", where, f"it must be {wanted}", _FIX)


_RULES: dict[str, tuple[Callable[[object], bool], str]] = {
    "r": (_is_rank, "a whole number above 0"),
    "use_rslora": (_is_flag, "true or false"),
    "use_dora": (_is_flag, "true or false"),
    "ensure_weight_tying": (_is_flag, "true or false"),
    "bias": (_is_bias, "none, all or lora_only"),
    "target_modules": (_are_targets, "a list of names, or a regular expression"),
    "exclude_modules": (_are_targets, "a list of names, or a regular expression"),
    "target_parameters": (_are_names, "a list of names"),
    "modules_to_save": (_are_names, "a list of names"),
    "task_type": (_is_text, "a text"),
    "base_model_name_or_path": (_is_text, "a text"),
}
_PATTERNS: dict[str, tuple[Callable[[object], bool], str]] = {
    "rank_pattern": (_is_rank, "a whole number above 0"),
    "alpha_pattern": (is_size, "a finite number above 0"),
}
