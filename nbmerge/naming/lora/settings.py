"""What is known of an adapter beside its tensors: alpha, rslora, patterns, task. Each with where it was known from."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nbmerge.adapter_files import ADAPTER_CONFIG
from nbmerge.errors import OptionError, Problem
from nbmerge.json_files import json_object
from nbmerge.naming.lora.checks import another_type, is_size, wrong_values
from nbmerge.options import expanded_path

VERL_META = "lora_train_meta.json"
RUN_CONFIG = "run_config.yaml"  # Megatron-Bridge's, in the directory of an iteration
ALPHA_FIX = "pass the value that training used: --lora_alpha N, or its adapter_config.json: --lora_config FILE"
# peft's variants whose update is more than scale * B @ A, or that no merge can hold.
_VARIANTS = (
    "alora_invocation_tokens", "arrow_config", "kasa_config", "megatron_config", "monteclora_config", "use_bdlora",
    "use_qalora", "velora_config", "layer_replication", "trainable_token_indices",
)  # fmt: skip
# Initialisations that change the base weights: the adapter fits those that training began with, not the published ones.
_CHANGES_BASE = re.compile(r"pissa|corda|olora|loftq|lora_ga")


@dataclass(frozen=True)
class Settings:
    """What the files and the options say. values: adapter_config.json's keys; origins: key → where it was known from.

    base: the whole adapter_config.json that was found, to be written again with what is corrected in it.
    """

    values: Mapping[str, Any] = field(default_factory=dict)
    origins: Mapping[str, str] = field(default_factory=dict)
    base: Mapping[str, Any] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()

    @property
    def r(self) -> int | None:
        """The rank that is recorded for modules without one of their own."""
        value = self.values.get("r")
        return value if isinstance(value, int) else None

    @property
    def use_rslora(self) -> bool:
        """Whether the scale is alpha / sqrt(r); False, peft's default, where nothing says so."""
        return bool(self.values.get("use_rslora"))

    @property
    def variants(self) -> list[str]:
        """The keys that ask for a kind of LoRA whose update is not scale * B @ A."""
        return [name for name in _VARIANTS if self.values.get(name)]

    @property
    def changed_base(self) -> str:
        """The initialisation that changed the base weights; empty for one that did not."""
        value = self.values.get("init_lora_weights")
        return value if isinstance(value, str) and _CHANGES_BASE.match(value.lower()) else ""

    def alpha_of(self, target: str) -> float:
        """lora_alpha of a module or parameter, by peft's alpha_pattern. Only where lora_alpha is known."""
        alpha: float = _by_pattern(self.values.get("alpha_pattern"), target, self.values["lora_alpha"])
        return alpha

    def rank_of(self, target: str) -> int | None:
        """The rank that is recorded of a module or parameter, by peft's rank_pattern; None where none is."""
        rank: int | None = _by_pattern(self.values.get("rank_pattern"), target, self.r)
        return rank

    def is_parameter(self, name: str) -> bool:
        """Whether target_parameters selects the tensor of this name, by peft's rule."""
        return any(f".{name}".endswith(f".{end}") for end in self.values.get("target_parameters") or ())


def _by_pattern(patterns: object, target: str, default: Any) -> Any:
    """The rule of peft.utils.get_pattern_key: the first pattern that is the end of the name, or fits it."""
    if isinstance(patterns, dict):
        for pattern, value in patterns.items():
            if re.match(rf"(.*\.)?({pattern})$", target):
                return value
    return default


def read_settings(places: list[Path], lora_config: str | None, lora_alpha: float | None) -> Settings:
    """What is known. places: directories to look in, those that say most first; the options hold against files.

    Raises OptionError for a lora_config that is not there or says nothing.
    """
    found = list(_given(lora_config)) if lora_config is not None else list(_beside(places))
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    problems: list[Problem] = []
    for path, content in found:
        for key, value in content.items():
            if value is None or (key == "r" and _is_zero(value)):
                continue
            if key not in values or (key == "lora_alpha" and _is_zero(values[key])):
                values[key], origins[key] = value, str(path)
            elif key == "lora_alpha" and _is_zero(value):
                continue
            elif key in ("r", "lora_alpha") and values[key] != value and lora_alpha is None:
                problems.append(_contradiction(key, values[key], origins[key], value, path))
    base = next((content for path, content in found if "peft_type" in content), {})
    if lora_alpha is not None:
        lora_alpha = int(lora_alpha) if float(lora_alpha).is_integer() else lora_alpha  # as adapter_config.json has it
        said = f"; {origins['lora_alpha']} says {values['lora_alpha']!r}" if "lora_alpha" in values else ""
        values["lora_alpha"], origins["lora_alpha"] = lora_alpha, f"the option lora_alpha{said}"
        values.pop("alpha_pattern", None)
    if others := another_type(values, origins):
        return Settings({}, {}, base, tuple(others))
    wrong = wrong_values(values, origins)
    problems += [problem for found in wrong.values() for problem in found]
    problems += _alpha_problem(values, origins, places)
    known = {key: value for key, value in values.items() if key not in wrong}
    return Settings(known, origins, base, tuple(problems))


def _is_zero(value: object) -> bool:
    """Whether it is the 0 that verl writes for what it does not know."""
    return value == 0 and not isinstance(value, bool)


def _given(lora_config: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    path = expanded_path(lora_config)
    files = [path / name for name in (ADAPTER_CONFIG, VERL_META)] if path.is_dir() else [path]
    contents = [(file, content) for file in files if (content := json_object(file))]
    if not contents:
        raise OptionError(
            "lora_config names no file that says anything of an adapter", where=str(path),
            fix=f"pass {ADAPTER_CONFIG} or {VERL_META}, or a directory with one of them",
        )  # fmt: skip
    yield from contents


def _beside(places: list[Path]) -> Iterator[tuple[Path, dict[str, Any]]]:
    for name in (ADAPTER_CONFIG, VERL_META):
        for place in dict.fromkeys(places):
            if content := json_object(place / name):
                yield place / name, content
    for place in dict.fromkeys(places):
        if content := _of_bridge(place / RUN_CONFIG):
            yield place / RUN_CONFIG, content


def _of_bridge(path: Path) -> dict[str, Any]:
    """What Megatron-Bridge's run config says of its adapter, under peft's names; nothing where it cannot be read."""
    if not path.is_file():
        return {}
    import yaml

    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    said = content.get("peft") if isinstance(content, Mapping) else None
    if not isinstance(said, Mapping):
        return {}
    found = {key: said.get(name) for key, name in (("lora_alpha", "alpha"), ("lora_dropout", "dropout"))}
    if not said.get("normalize_moe_lora"):  # else experts have another rank, and the tensors say each
        found["r"] = said.get("dim")
    return {**found, "use_dora": str(said.get("_target_", "")).endswith(".DoRA")}


def _contradiction(key: str, value: object, origin: str, other: object, path: Path) -> Problem:
    return Problem(
        f"{key} is {value!r} in one file of the adapter and {other!r} in another", where=f"{origin} and {path}",
        why="one of the two is of another run", fix="pass the file that is right: --lora_config FILE",
        kind="contradiction",
    )  # fmt: skip


def _alpha_problem(values: Mapping[str, Any], origins: Mapping[str, str], places: list[Path]) -> list[Problem]:
    alpha = values.get("lora_alpha")
    if is_size(alpha):
        return []
    if alpha is None:
        what, where = "nothing says lora_alpha, without which the adapter's scale is not known", str(places[0])
        why = f"there is no {ADAPTER_CONFIG} and no {VERL_META} in or beside the checkpoint that says it"
    else:
        what, where = f"lora_alpha is {alpha!r}", origins["lora_alpha"]
        why = "alpha is a finite number above 0"
        if _is_zero(alpha):
            why = "with alpha 0 an adapter changes nothing; verl has written 0 where it did not know better"
    return [Problem(what, where, why, ALPHA_FIX, kind="missing")]
