"""Patterns that names decide: prefixes of wrappers, adapters, and parts that are fused or cut elsewhere.

Each looks from one side of the pair: a name that the model wants and the checkpoint does not hold, or one that the
checkpoint holds and the model does not have.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from itertools import islice

from nbmerge.explaining.candidates import Candidate, Key, Mismatch, Strength, evidence

_WRAPPER = re.compile(
    r"(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_fpw_module)\."
)
_ADAPTER = re.compile(r"^base_model\.model\.|(?<=\.)base_layer\.|(?<=\.)modules_to_save\.(?:default\.)?")
_LORA = re.compile(r"(?:^|\.)lora_(?:[AB]|embedding_[AB]|magnitude_vector)(?=\.|$)")
_PART = re.compile(r"(?:^|(?<=\.))(?:model|language_model|text_model|actor|policy|backbone|transformer)\.")
_GROUPED_EXPERT = re.compile(r"^(.*\bexperts)\.(\w+)\.(weight|bias)(\d+)$")
_MOST_PARTNERS = 4  # that are told of one name
_FUSED = (
    ("query, key and value", re.compile(r"(?<![^.])(q_proj|k_proj|v_proj)\.(weight|bias)$"),
     re.compile(r"(?<![^.])(qkv_proj|linear_qkv|query_key_value|Wqkv|c_attn|in_proj|qkv)\.(weight|bias)$")),
    ("gate and up projection", re.compile(r"(?<![^.])(gate_proj|up_proj|w1|w3)\.(weight|bias)$"),
     re.compile(r"(?<![^.])(gate_up_proj|linear_fc1|dense_h_to_4h)(\.(weight|bias))?$")),
    ("the experts", re.compile(r"experts\.\d+\.(gate_proj|up_proj|down_proj|w1|w2|w3)\.weight$"),
     re.compile(r"experts\.(experts\.)?(gate_up_proj|down_proj|linear_fc[12])(\.weight)?$")),
)  # fmt: skip


def _partners(asked: Mismatch, plain: Key) -> Iterator[tuple[str, bool | None]]:
    """Names of the other side that are the same once `plain` has worked on both, and whether shapes agree.

    None where a message tells names without their shapes.
    """
    if not asked.name or not asked.is_one_sided:
        return
    held = asked.got is None
    names, shape = (asked.known.only_held, asked.expected) if held else (asked.known.only_wanted, asked.got)
    found = asked.known.alone(plain, held=held).get(plain(asked.name) or "", ())
    for name in islice((each for each in found if each != asked.name), _MOST_PARTNERS):
        yield name, None if not shape and not names[name] else names[name] == (shape or ())


def _renamed(
    asked: Mismatch, pattern: str, plain: Key, says: Callable[[str, str], str], fix: str,
    seen: tuple[str, ...] = (),
) -> Iterator[Candidate]:  # fmt: skip
    """A candidate for each partner. says: makes the sentence of (name in the checkpoint, name in the model)."""
    for name, agrees in _partners(asked, plain):
        held, wanted = (name, asked.name) if asked.got is None else (asked.name, name)
        yield Candidate(
            pattern,
            says(held, wanted),
            evidence(f"{held} → {wanted}", "the shapes agree" if agrees else ""),
            Strength.FAIR if agrees is False else Strength.STRONG,
            fix,
            seen=seen,
            other=name,
        )


def _or_the_models(renamed: Candidate, mark: re.Pattern[str], what: str, fix: str) -> Candidate:
    """The candidate; where the mark is in the model's name and not in the checkpoint's, with what is true then."""
    held = renamed.evidence[0].partition(" → ")[0]
    if mark.search(held):
        return renamed
    return replace(renamed, sentence=f"{what}, and the checkpoint has {held}", fix=fix)


def _unwrapped(name: str) -> str:
    return _WRAPPER.sub("", name)


def _unadapted(name: str) -> str:
    return _ADAPTER.sub("", _unwrapped(name))


def wrapper_prefix(asked: Mismatch) -> Iterator[Candidate]:
    """DistributedDataParallel, torch.compile, FSDP and activation checkpointing put their own name into the path."""
    fix = "take the prefix off; nbmerge does, for every wrapper that it knows"
    found = False
    for candidate in _renamed(
        asked, "wrapper prefix", _unwrapped,
        lambda held, wanted: f"the checkpoint has it under a training wrapper's prefix: {held}", fix,
    ):  # fmt: skip
        found = True
        yield _or_the_models(
            candidate, _WRAPPER, "the model is inside a training wrapper",
            "load it into the module inside the wrapper: model.module, or model._orig_mod of torch.compile",
        )  # fmt: skip
    if not found and asked.expected is None and (prefix := _WRAPPER.search(asked.name)):
        yield Candidate(
            "wrapper prefix",
            f"the name has a training wrapper's prefix, {prefix[0]}",
            (f"{asked.name} → {_WRAPPER.sub('', asked.name)}",),
            Strength.FAIR,
            fix,
        )


def lora_base_layer(asked: Mismatch) -> Iterator[Candidate]:
    """peft wraps a layer that it adapts: the weight moves to `base_layer.`, and the model below `base_model.model.`."""
    fix = "merge with lora='fold' (--lora fold), or 'split' for the model and its adapter side by side"
    found = False
    for candidate in _renamed(
        asked, "LoRA base layer", _unadapted,
        lambda held, wanted: f"a LoRA adapter was never folded: the weight is {held}", fix, ("verl 4761", "verl 1804"),
    ):  # fmt: skip
        if _ADAPTER.search(candidate.evidence[0]):
            found = True
            yield _or_the_models(
                candidate, _ADAPTER, "peft wraps the model",
                "load it into the model before peft wraps it, or into model.get_base_model()",
            )  # fmt: skip
    if asked.expected is None and (_LORA.search(asked.name) or (not found and _ADAPTER.search(asked.name))):
        yield Candidate(
            "LoRA tensor",
            "it belongs to a LoRA adapter, which the model of config.json does not have",
            (asked.name,),
            Strength.STRONG if _LORA.search(asked.name) else Strength.FAIR,
            fix,
            seen=("verl 4553",),
        )


def grouped_expert_names(asked: Mismatch) -> Iterator[Candidate]:
    """Transformer Engine numbers grouped experts at the end: `experts.gate_proj.weight100`."""
    fix = "map the keys to one module for each expert; nbmerge.merge does, and refuses what it cannot map"

    def says(held: str, wanted: str) -> str:
        return f"the expert's number stands at the end of its name, so that {wanted} is never filled"

    yield from _renamed(asked, "grouped expert names", _ungrouped, says, fix, ("verl 2319", "verl 2024"))
    if asked.expected is None and not asked.known.wanted and (match := _GROUPED_EXPERT.match(asked.name)):
        right = f"{match[1]}.{match[4]}.{match[2]}.{match[3]}"
        yield Candidate("grouped expert names", says(asked.name, right), (f"{asked.name} → {right}",),
                        Strength.STRONG, fix, seen=("verl 2319", "verl 2024"))  # fmt: skip


def _ungrouped(name: str) -> str:
    match = _GROUPED_EXPERT.match(name)
    return f"{match[1]}.{match[4]}.{match[2]}.{match[3]}" if match else name


def other_prefix(asked: Mismatch) -> Iterator[Candidate]:
    """Versions place a language model differently: `model.language_model.`, `language_model.model.`, `model.`."""
    for candidate in _renamed(
        asked, "another prefix", _without_parts,
        lambda held, wanted: f"the checkpoint has it as {held}, the model as {wanted}",
        "save with the version of transformers that trained, or rename the keys; nbmerge.merge writes published names",
        ("verl 2262", "verl 1710"),
    ):  # fmt: skip
        if not _WRAPPER.search(candidate.evidence[0]) and not _ADAPTER.search(candidate.evidence[0]):
            yield candidate


def _without_parts(name: str) -> str:
    return _PART.sub("", name)


def fused_or_split_names(asked: Mismatch) -> Iterator[Candidate]:
    """A projection under its own name on one side, and within a fused tensor on the other."""
    if not asked.name or not asked.is_one_sided:
        return
    for what, single, fused in _FUSED:
        mine, theirs = (single, fused) if single.search(asked.name) else (fused, single)
        module = _module(mine)(asked.name)
        partners = (
            asked.known.alone(_module(theirs), held=asked.got is None).get(module) if module is not None else None
        )
        if not partners:
            continue
        one, other = ("checkpoint", "model") if asked.got is not None else ("model", "checkpoint")
        form = ("a tensor each", "one fused tensor") if mine is single else ("one fused tensor", "a tensor each")
        yield Candidate(
            "fused or split",
            f"the {one} has {what} as {form[0]}, the {other} as {form[1]}",
            (f"{asked.name} and {partners[0]}",),
            Strength.STRONG,
            "save with the version of transformers that trained, or merge with nbmerge, which cuts and joins them",
        )


@cache
def _module(pattern: re.Pattern[str]) -> Key:
    """What stands before the projection's own name; the same function for the same pattern."""

    def module(name: str) -> str | None:
        match = pattern.search(name)
        return name[: match.start()] if match else None

    return module


def another_family(asked: Mismatch) -> Iterator[Candidate]:
    """A tensor that one family has and another has not."""
    if (asked.got is None) != (asked.expected is None) and asked.known.other_family:
        yield Candidate(
            "another family",
            "the checkpoint has it, and the config's model has not"
            if asked.expected is None
            else "the config's model has it, and the checkpoint has not",
            (f"the checkpoint {asked.known.other_family}",),
            Strength.FAIR,
            "pass the config that training used: --hf_model_config_path DIR",
        )
