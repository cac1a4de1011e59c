"""A prompt, one pass and greedy generation: what a model's code answers becomes a finding, or a sentence."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nbmerge.validation.findings import WARNING, Finding
from nbmerge.validation.quiet import first_line

PROMPT = "The capital of France is"
_FEW = 8  # tokens of a prompt for a model without a tokenizer
_MORE_INPUTS = re.compile(r"missing \d+ required")  # Python's words for arguments that were not passed
# What the class needs to generate at all; the rest of a generation config changes the search.
_KEPT_IN_GENERATION = ("bos_token_id", "eos_token_id", "decoder_start_token_id")


def prompt(model: Any, tokenizer: Any) -> list[int]:
    """The tokens of a pass: those of a sentence, or a few that stand for no image. Empty for a model without words."""
    config = model.config.get_text_config()
    size = getattr(config, "vocab_size", None)
    if getattr(model, "main_input_name", "") != "input_ids" or not isinstance(size, int):
        return []
    special = _special_tokens({**model.config.to_dict(), **config.to_dict()})
    tokens = _sentence(tokenizer, size)
    if tokens and not any(special.get(number) for number in tokens):
        return tokens
    plain = [number for number in range(size) if number not in special]
    return plain[:: max(len(plain) // _FEW, 1)][:_FEW]


def _sentence(tokenizer: Any, size: int) -> list[int]:
    """The prompt's tokens below `size`; empty where the tokenizer does not know its words."""
    try:
        tokens = [number for number in tokenizer(PROMPT)["input_ids"] if number < size]
        return [] if tokenizer.unk_token_id in tokens else tokens
    except Exception:  # noqa: BLE001 - there is none, or it fails in some way that its own check finds
        return []


def _special_tokens(config: Mapping[str, Any]) -> dict[int, bool]:
    """The tokens that a config names, and whether each stands for an image or other input that is not given."""
    found: dict[int, bool] = {}
    for key, value in config.items():
        if key.endswith(("_token_id", "_token_index")):
            for number in value if isinstance(value, list) else [value]:
                if isinstance(number, int):
                    found[number] = found.get(number, False) or not key.startswith(("bos_", "eos_", "pad_", "decoder_"))
    return found


@dataclass(frozen=True)
class Pass:
    """What came of a pass. logits: [tokens, vocabulary or labels] in float64, None where there are none.

    Without logits and without findings, nothing was computed: said tells why no pass is possible here.
    """

    logits: Any = None
    said: str = ""
    findings: tuple[Finding, ...] = ()


def forward(model: Any, tokens: list[int]) -> Pass:
    """One pass with these tokens. Never raises for what the model's code does."""
    import torch

    ids = torch.tensor([tokens])
    inputs = {"input_ids": ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})}
    try:
        logits = _logits(model, inputs)
    except (NotImplementedError, MemoryError, ImportError) as error:
        return Pass(said=f"no pass on this machine: {first_line(error)}")
    except Exception as error:  # noqa: BLE001 - a model's code can fail in any way
        if isinstance(error, TypeError) and _MORE_INPUTS.search(str(error)):
            return Pass(said=f"no pass with tokens alone: {first_line(error)}")
        if "not implemented for" in str(error) or is_out_of_memory(error):
            return Pass(said=f"no pass on this machine: {first_line(error)}")
        failed = Finding(
            "fails in a forward pass", "the model", first_line(error),
            why="the config's numbers do not fit together, or the code expects another version of transformers",
            fix="compare config.json with the one that training used",
        )  # fmt: skip
        return Pass(said="its pass fails", findings=(failed,))
    bad = int((~logits.isfinite()).sum())
    if not bad:
        low, high = logits.min().item(), logits.max().item()
        return Pass(logits, f"logits of {len(tokens)} tokens are finite, from {low:.3g} to {high:.3g}")
    finding = Finding(
        "computes logits that are not finite", "the model", f"{bad:,} of {logits.numel():,} for {len(tokens)} tokens",
        why="weights hold NaN or infinity, or the dtype's range is too small for the activations",
        fix="see the check of the weights' health; load it in bfloat16 or float32",
    )  # fmt: skip
    return Pass(logits, "logits are not finite", (finding,))


def _logits(model: Any, inputs: Mapping[str, Any]) -> Any:
    """What a pass gives; with experts one by one where the grouped product refuses their sizes."""
    try:
        output = model(**inputs)
    except RuntimeError:
        if getattr(model.config, "_experts_implementation", None) in (None, "eager"):
            raise
        model.set_experts_implementation("eager")  # torch's grouped_mm wants rows of a multiple of 16 bytes
        output = model(**inputs)
    return (output.logits if hasattr(output, "logits") else output[0])[0].double()


def generated(model: Any, tokenizer: Any, tokens: list[int], count: int) -> tuple[str, tuple[Finding, ...]]:
    """What it says, greedily, to the prompt; whatever search its generation config asks for."""
    import torch
    from transformers import GenerationConfig

    if not model.can_generate():
        return "", ()
    ids = torch.tensor([tokens])
    options = {"do_sample": False, "num_beams": 1, "pad_token_id": tokens[0]}
    try:
        given = model.generation_config
        model.generation_config = GenerationConfig(**{key: getattr(given, key, None) for key in _KEPT_IN_GENERATION})
        made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, **options)[0].tolist()
        new = made if model.config.is_encoder_decoder else made[len(tokens) :]
        text = "" if tokenizer is None else f"greedy: {tokenizer.decode(tokens)!r} → {tokenizer.decode(new)!r}"
    except Exception as error:  # noqa: BLE001 - as for a pass
        finding = Finding(
            "cannot generate", "the model", first_line(error),
            why="its special tokens are not this model's, or the class needs more than text",
            fix="try it: model.generate(**tokenizer(text, return_tensors='pt'))",
            severity=WARNING,
        )  # fmt: skip
        return "", (finding,)
    return text or f"greedy tokens: {', '.join(map(str, new))}", ()


def is_out_of_memory(error: Exception) -> bool:
    """Whether torch found no memory for a tensor."""
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)
