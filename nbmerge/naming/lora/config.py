"""The adapter_config.json that peft loads an adapter with."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from nbmerge.naming.facts import ModelFacts
from nbmerge.naming.lora.keys import shortest_saved, shortest_targets
from nbmerge.naming.lora.layers import Fitted
from nbmerge.naming.lora.settings import Settings

_TASKS = {
    "ForCausalLM": "CAUSAL_LM", "ForTokenClassification": "TOKEN_CLS", "ForSequenceClassification": "SEQ_CLS",
    "ForQuestionAnswering": "QUESTION_ANS", "ForConditionalGeneration": "CAUSAL_LM",
}  # fmt: skip


def adapter_config(
    fitted: Sequence[Fitted],
    saved: Iterable[str],
    settings: Settings,
    facts: ModelFacts,
    modules: Iterable[str],
    *,
    base_model: str | None,
    base_is_beside: bool,
) -> bytes:
    """The file's content: the one that was found, with what the tensors say; else peft's defaults with it.

    saved: modules that were trained whole; modules: all of the model's; base_is_beside: the base model is written too,
    with the weights that the adapter fits, so that nothing is to be done to them again on loading.
    """
    from peft import LoraConfig

    every = set(modules)
    targets = _targets(fitted, settings, every)
    content: dict[str, Any] = {**LoraConfig(r=1, target_modules=[]).to_dict(), **settings.base}
    content |= _sizes(fitted, settings)
    content |= {
        "base_model_name_or_path": settings.values.get("base_model_name_or_path") or base_model,
        "task_type": settings.values.get("task_type") or _task(facts),
        "target_modules": targets,
        "target_parameters": sorted({each.weight for each in fitted if each.is_parameter}) or None,
        "modules_to_save": shortest_saved(saved, every) or None,
        "bias": settings.values.get("bias", "none"),
        "use_dora": any(each.kind.use_dora for each in fitted),
        "use_rslora": settings.use_rslora,
        "lora_bias": any(each.layer.bias is not None for each in fitted),
        "fan_in_fan_out": any(each.kind.is_turned and not each.is_parameter for each in fitted),
        "inference_mode": True,
    }
    if base_is_beside and settings.changed_base:
        content["init_lora_weights"] = True
    return (json.dumps(content, indent=2, sort_keys=True, default=_plain) + "\n").encode()


def _plain(value: object) -> object:
    return sorted(value) if isinstance(value, (set, frozenset)) else str(value)


def most_common_rank(fitted: Sequence[Fitted]) -> int:
    """The rank of most layers; 1 where no layer has any, as a rank of 0 cannot be loaded."""
    ranks = Counter(each.kind.r for each in fitted)
    return ranks.most_common(1)[0][0] if ranks else 1


def _sizes(fitted: Sequence[Fitted], settings: Settings) -> dict[str, Any]:
    """r, lora_alpha and the patterns of modules with others."""
    r = settings.r if settings.r is not None else most_common_rank(fitted)
    alpha = settings.values["lora_alpha"]
    ranks = dict(settings.values.get("rank_pattern") or {})
    alphas = dict(settings.values.get("alpha_pattern") or {})
    respelled = any(each.layer.trained for each in fitted)  # then the files' patterns may fit no name any more
    if respelled or not ranks:
        ranks = {each.target: each.kind.r for each in fitted if each.kind.r != r}
    if respelled:
        alphas = {each.target: each.kind.alpha for each in fitted if each.kind.alpha != alpha}
    return {"r": r, "lora_alpha": alpha, "rank_pattern": ranks, "alpha_pattern": alphas}


def _targets(fitted: Sequence[Fitted], settings: Settings, modules: Iterable[str]) -> str | list[str]:
    """target_modules as they were found, where they select just the adapted modules; else what selects those."""
    adapted = [each.layer.plain for each in fitted if not each.is_parameter]
    every = {*modules, *adapted}
    found = settings.values.get("target_modules")
    if found and selected_modules(settings, every) == set(adapted):
        return found if isinstance(found, str) else sorted(found)
    return shortest_targets(adapted, every)


def selected_modules(settings: Settings, modules: Iterable[str]) -> set[str] | None:
    """Those of the modules that target_modules selects; None where nothing says it, or not it alone."""
    found = settings.values.get("target_modules")
    if not found or any(settings.values.get(key) for key in ("layers_to_transform", "exclude_modules")):
        return None
    return {name for name in modules if _selects(found, name)}


def _selects(targets: object, name: str) -> bool:
    """The rule of peft's check_target_module_exists."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    ends = targets if isinstance(targets, (list, tuple)) else ()
    return any(name == end or name.endswith(f".{end}") for end in ends)


def _task(facts: ModelFacts) -> str | None:
    if facts.config.get("is_encoder_decoder"):
        return "SEQ_2_SEQ_LM"
    return next((task for ending, task in _TASKS.items() if facts.class_name.endswith(ending)), None)
