"""Patterns that names decide: prefixes of wrappers, adapters, tied heads, and parts that are fused or cut elsewhere.

Each looks from one side of the pair: a name that the model wants and the checkpoint does not hold, or one that the
checkpoint holds and the model does not have.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping

from nbmerge.explaining.candidates import Candidate, Mismatch, Strength, evidence
from nbmerge.geometry import Shape

_WRAPPER = re.compile(
    r"(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_fpw_module)\."
)
_ADAPTER = re.compile(r"^base_model\.model\.|(?<=\.)base_layer\.|(?<=\.)modules_to_save\.(?:default\.)?")
_LORA = re.compile(r"(?:^|\.)lora_(?:[AB]|embedding_[AB]|magnitude_vector)(?=\.|$)")
_PART = re.compile(r"(?:^|(?<=\.))(?:model|language_model|text_model|actor|policy|backbone|transformer)\.")
_GROUPED_EXPERT = re.compile(r"^(.*\bexperts)\.(\w+)\.(weight|bias)(\d+)$")
_HEAD = re.compile(r"(^|\.)(lm_head|output_layer|embed_out)\.weight$")
_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|word_embeddings|wte|shared|tok_embeddings)\.weight$")
_FUSED = (
    ("query, key and value", re.compile(r"(?<![^.])(q_proj|k_proj|v_proj)\.(weight|bias)$"),
     re.compile(r"(?<![^.])(qkv_proj|linear_qkv|query_key_value|Wqkv|c_attn|in_proj|qkv)\.(weight|bias)$")),
    ("gate and up projection", re.compile(r"(?<![^.])(gate_proj|up_proj|w1|w3)\.(weight|bias)$"),
     re.compile(r"(?<![^.])(gate_up_proj|linear_fc1|dense_h_to_4h)(\.(weight|bias))?$")),
    ("the experts", re.compile(r"experts\.\d+\.(gate_proj|up_proj|down_proj|w1|w2|w3)\.weight$"),
     re.compile(r"experts\.(experts\.)?(gate_up_proj|down_proj|linear_fc[12])(\.weight)?$")),
)  # fmt: skip


def _other_side(asked: Mismatch) -> tuple[Mapping[str, Shape], Shape] | None:
    """The names to look for a partner in, and the shape that it should have; None where both shapes are known."""
    if not asked.name or (asked.got is None) == (asked.expected is None):
        return None
    if asked.got is None:
        return {n: s for n, s in asked.known.held.items() if n not in asked.known.wanted}, asked.expected or ()
    return {n: s for n, s in asked.known.wanted.items() if n not in asked.known.held}, asked.got


def _partners(asked: Mismatch, plain: Callable[[str], str]) -> Iterator[tuple[str, bool]]:
    """Names of the other side that are the same once `plain` has worked on both, and whether shapes agree."""
    if (side := _other_side(asked)) is None:
        return
    names, shape = side
    mine = plain(asked.name)
    for name, other in names.items():
        if name != asked.name and plain(name) == mine:
            yield name, other == shape


def _renamed(
    asked: Mismatch, pattern: str, plain: Callable[[str], str], says: Callable[[str, str], str], fix: str,
    seen: tuple[str, ...] = (),
) -> Iterator[Candidate]:  # fmt: skip
    """A candidate for each partner. says: makes the sentence of (name in the checkpoint, name in the model)."""
    for name, agrees in _partners(asked, plain):
        held, wanted = (name, asked.name) if asked.got is None else (asked.name, name)
        yield Candidate(
            pattern,
            says(held, wanted),
            evidence(f"{held} → {wanted}", "the shapes agree" if agrees else ""),
            Strength.STRONG if agrees else Strength.FAIR,
            fix,
            seen=seen,
        )


def wrapper_prefix(asked: Mismatch) -> Iterator[Candidate]:
    """DistributedDataParallel, torch.compile, FSDP and activation checkpointing put their own name into the path."""
    fix = "take the prefix off; nbmerge does, for every wrapper that it knows"
    found = False
    for candidate in _renamed(
        asked, "wrapper prefix", lambda name: _WRAPPER.sub("", name),
        lambda held, wanted: f"the checkpoint has it under a training wrapper's prefix: {held}", fix,
    ):  # fmt: skip
        found = True
        yield candidate
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
    fix = "fold the adapter (peft's merge_and_unload) and save again, or save the adapter by itself"
    found = False
    for candidate in _renamed(
        asked, "LoRA base layer", lambda name: _ADAPTER.sub("", _WRAPPER.sub("", name)),
        lambda held, wanted: f"a LoRA adapter was never folded: the weight is {held}", fix, ("verl 4761", "verl 1804"),
    ):  # fmt: skip
        if _ADAPTER.search(candidate.evidence[0]):
            found = True
            yield candidate
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


def tied_head(asked: Mismatch) -> Iterator[Candidate]:
    """The head shares the embedding's parameter, and the checkpoint holds one of the two, or the second as a copy."""
    if not _HEAD.search(asked.name):
        return
    names = {**asked.known.wanted, **asked.known.held}
    shape = asked.expected if asked.got is None else asked.got
    embedding = next((n for n, s in names.items() if _EMBEDDING.search(n) and (s == shape or shape is None)), None)
    tied = bool(asked.known.config.get("tie_word_embeddings"))
    if asked.got is None and asked.expected is not None:
        known = embedding is not None or tied
        yield Candidate(
            "tied head absent",
            "the head is tied to the embedding, and only the embedding is stored",
            evidence(
                f"{embedding} has the same shape, {list(shape or ())}" if embedding else "",
                "tie_word_embeddings is true in config.json" if tied else "",
            )
            or ("a head that is tied has no weight of its own",),
            Strength.STRONG if tied else (Strength.FAIR if known else Strength.WEAK),
            "set tie_word_embeddings in config.json (--tie_word_embedding) if training tied them; "
            "else the last pipeline stage is missing",
            seen=("DeepSpeed 1896", "verl 5357"),
        )
    elif asked.expected is None and asked.got is not None:
        yield Candidate(
            "tied head doubled",
            "the head is a copy of the embedding, which the model ties and stores once",
            evidence(
                f"{embedding} has the same shape, {list(asked.got)}" if embedding else f"the model has no {asked.name}",
                "tie_word_embeddings is true in config.json" if tied else "",
            ),
            Strength.STRONG if tied else Strength.FAIR,
            "leave the copy out where both are equal; nbmerge.merge compares them and records the tie",
            seen=("DeepSpeed 1896",),
        )


def fused_or_split_names(asked: Mismatch) -> Iterator[Candidate]:
    """A projection under its own name on one side, and within a fused tensor on the other."""
    if (side := _other_side(asked)) is None:
        return
    names, _ = side
    for what, single, fused in _FUSED:
        mine, theirs = (single, fused) if single.search(asked.name) else (fused, single)
        match = mine.search(asked.name)
        if match is None:
            continue
        module = asked.name[: match.start()]
        partner = next((name for name in names if name.startswith(module) and theirs.search(name)), None)
        if partner is None:
            continue
        one, other = ("checkpoint", "model") if asked.got is not None else ("model", "checkpoint")
        form = ("a tensor each", "one fused tensor") if mine is single else ("one fused tensor", "a tensor each")
        yield Candidate(
            "fused or split",
            f"the {one} has {what} as {form[0]}, the {other} as {form[1]}",
            (f"{asked.name} and {partner}",),
            Strength.STRONG,
            "save with the version of transformers that trained, or merge with nbmerge, which cuts and joins them",
        )


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
