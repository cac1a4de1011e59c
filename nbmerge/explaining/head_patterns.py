"""Patterns of a model's last part and of its length: heads that are tied, lost or of another kind, and layers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

from nbmerge.errors import plural
from nbmerge.explaining.candidates import Candidate, Key, Known, Mismatch, Strength, evidence
from nbmerge.explaining.model_patterns import CONFIG_FIX
from nbmerge.geometry import Shape

_HEAD = re.compile(r"(^|\.)(lm_head|output_layer|embed_out)\.(weight|bias)$")
_HEAD_WEIGHT = re.compile(r"(^|\.)(lm_head|output_layer|embed_out)\.weight$")
_OTHER_HEAD = re.compile(
    r"(^|\.)(score|classifier|v_head|value_head|reward_head|rm_head|regression_head|qa_outputs)(\.\w+)?\.(weight|bias)$"
)
_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|word_embeddings|wte|shared|tok_embeddings)\.weight$")
_WITH_HEAD = re.compile(r"ForCausalLM|LMHead|ForConditionalGeneration|ForImageTextToText")
_LAYER = re.compile(r"^(.*?(?:^|\.)(?:layers|h|blocks|block))\.(\d{1,6})\.")
_TENSORS = 4  # of a layer, at least
_LABELS = 16  # rows of a head that are labels, not tokens
_TOKENS = 256
_LANGUAGE, _OTHER = "language", "other"
_CRITIC, _ACTOR = "a critic's or a classifier's head", "a language model's head"
CRITIC_FIX = "the checkpoint is a critic's: pass is_value_model=True (--is_value_model), or the critic's config"
ACTOR_FIX = (
    "the checkpoint is no critic's: leave is_value_model out, or pass a config whose architectures names the "
    "ForCausalLM class that was trained: --hf_model_config_path DIR"
)


def head_kind(name: str) -> str | None:
    """`language` for the head of a language model, `other` for that of a critic or a classifier, None for no head."""
    return _LANGUAGE if _HEAD.search(name) else _OTHER if _OTHER_HEAD.search(name) else None


def _partner_head(asked: Mismatch) -> str | None:
    """The head of the other kind that only the other side has."""
    kind = head_kind(asked.name)
    if kind is None or not asked.is_one_sided:
        return None
    other = _OTHER if kind == _LANGUAGE else _LANGUAGE
    return next(iter(asked.known.alone(_KIND, held=asked.got is None).get(other, ())), None)


_KIND: Key = head_kind


def other_head(asked: Mismatch) -> Iterator[Candidate]:
    """A critic's checkpoint under an actor's config, or the other way round: `score` here, `lm_head` there.

    A critic's head alone, without a partner, says it less surely; a language model's can be tied instead.
    """
    kind, partner = head_kind(asked.name), _partner_head(asked)
    if kind is None or not asked.is_one_sided or (partner is None and kind == _LANGUAGE):
        return
    is_held = asked.got is not None
    of_critic = (kind == _OTHER) == is_held  # the checkpoint
    mine, theirs = (_CRITIC, _ACTOR) if of_critic else (_ACTOR, _CRITIC)
    if partner is not None:
        held, wanted = (asked.name, partner) if is_held else (partner, asked.name)
        sentence = f"the checkpoint has {mine}, config.json's class {theirs}"
        fact = f"{held} in the checkpoint, {wanted} in the model"
    else:
        has, lacks = ("checkpoint", "model") if is_held else ("model", "checkpoint")
        sentence, fact = f"the {has} has {_CRITIC}, the {lacks} has not", asked.name
    strength = Strength.STRONG if partner is not None else Strength.FAIR
    fix = CRITIC_FIX if of_critic else ACTOR_FIX
    yield Candidate("another head", sentence, evidence(fact, _architecture(asked.known)), strength, fix)


def _architecture(known: Known) -> str:
    names = known.config.get("architectures")
    first = names[0] if isinstance(names, list) and names else ""
    return f"config.json names {first}" if isinstance(first, str) and first else ""


def labels_for_tokens(asked: Mismatch) -> Iterator[Candidate]:
    """A head of one row for each label where one for each token is meant, or the other way round."""
    found = asked.other_dim()
    if found is None or found[0] != 0 or head_kind(asked.name) is None or min(found[1:]) < 1:
        return
    _, got, expected = found
    few, many = sorted((got, expected))
    if few > _LABELS or many < _TOKENS:
        return
    labels = got == few
    whose = "a critic" if few == 1 else f"a classifier of {few} labels"
    side = "the checkpoint's head is that of" if labels else "config.json makes the head of"
    yield Candidate(
        "another head",
        f"{side} {whose}, not of a language model",
        (f"{plural(few, 'row')} where a language model has {many:,}",),
        Strength.STRONG if few == 1 else Strength.FAIR,
        (CRITIC_FIX if few == 1 else CONFIG_FIX) if labels else ACTOR_FIX,
    )


def tied_head(asked: Mismatch) -> Iterator[Candidate]:
    """The head shares the embedding's parameter, and the checkpoint holds one of the two, or the second as a copy."""
    if not _HEAD_WEIGHT.search(asked.name) or not asked.is_one_sided or _partner_head(asked) is not None:
        return
    shape = asked.expected if asked.got is None else asked.got
    embedding = asked.known.once(_embeddings).get(shape or ())
    tied = _is_tied(asked.known)
    if asked.got is None:
        yield Candidate(
            "tied head absent",
            "the head is tied to the embedding, and only the embedding is stored",
            evidence(
                f"{embedding} has the same shape, {list(shape or ())}" if embedding else "",
                "tie_word_embeddings is true in config.json" if tied else "",
            )
            or ("a head that is tied has no weight of its own",),
            Strength.STRONG if tied else Strength.FAIR if embedding is not None else Strength.WEAK,
            "set tie_word_embeddings in config.json (--tie_word_embedding) if training tied them; "
            "else the last pipeline stage is missing",
            seen=("DeepSpeed 1896", "verl 5357"),
        )
    elif any(_headless(asked)):
        yield from _headless(asked)
    elif tied is not False:
        yield Candidate(
            "tied head doubled",
            "the head is a copy of the embedding, which the model ties and stores once",
            evidence(
                f"{embedding} has the same shape, {list(asked.got)}" if embedding else f"the model has no {asked.name}",
                "tie_word_embeddings is true in config.json" if tied else "",
            ),
            Strength.STRONG if tied else Strength.FAIR if embedding is not None else Strength.WEAK,
            "leave the copy out where both are equal; nbmerge.merge compares them and records the tie",
            seen=("DeepSpeed 1896",),
        )


def _is_tied(known: Known) -> bool | None:
    """What config.json says of the tie; None where it says nothing, and the class's default decides."""
    text = known.config.get("text_config")
    inner = text if isinstance(text, Mapping) else {}
    said = inner.get("tie_word_embeddings", known.config.get("tie_word_embeddings"))
    return None if said is None else bool(said)


def _embeddings(known: Known) -> dict[Shape, str]:
    """The embeddings of both sides, by shape."""
    every = {**known.wanted, **known.held}
    return {shape: name for name, shape in reversed(list(every.items())) if _EMBEDDING.search(name)}


def _headless(asked: Mismatch) -> Iterator[Candidate]:
    """A head for which the class of the config has no place."""
    named = asked.known.config.get("architectures")
    first = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else ""
    if first and not _WITH_HEAD.search(first):
        yield Candidate(
            "another head",
            "the checkpoint has a language model's head, for which config.json's class has no place",
            (_architecture(asked.known),),
            Strength.STRONG,
            ACTOR_FIX,
        )


def other_layers(asked: Mismatch) -> Iterator[Candidate]:
    """Layers beyond the last one of the other side: num_hidden_layers is another, or some were lost."""
    match = _LAYER.match(asked.name)
    if match is None or not asked.is_one_sided:
        return
    prefix, number = match[1], int(match[2])
    held, wanted = (side.get(prefix) for side in asked.known.once(_lengths))
    if held is None or wanted is None:
        yield from _tail(asked, prefix)
        return
    if number < (held if asked.got is None else wanted):
        return
    said = asked.known.size("num_hidden_layers", "num_layers", "n_layer") == wanted
    lost = ", or a pipeline stage of the save is lost" if held < wanted else ""
    fact = f"config.json has num_hidden_layers {wanted}" if said else f"the model has {wanted} of them"
    yield Candidate(
        "another number of layers",
        f"the checkpoint has {plural(held, 'layer')}, and the model of config.json {wanted}{lost}",
        (f"{prefix}.0 to {prefix}.{held - 1} are in the checkpoint", fact),
        Strength.STRONG if said else Strength.FAIR,
        f"set num_hidden_layers to {held} in config.json, or {CONFIG_FIX}",
    )


def _lengths(known: Known) -> tuple[dict[str, int], dict[str, int]]:
    """Layers of the checkpoint and of the model, by what stands before their number."""
    held: dict[str, int] = {}
    wanted: dict[str, int] = {}
    for names, counts in ((known.held, held), (known.wanted, wanted)):
        for name in names:
            if match := _LAYER.match(name):
                counts[match[1]] = max(counts.get(match[1], 0), int(match[2]) + 1)
    return held, wanted


def _tail(asked: Mismatch, prefix: str) -> Iterator[Candidate]:
    """The same from a message, which names only what one side lacks: all of the last layers, and none of the first."""
    ends = asked.known.once(_missing_ends if asked.got is None else _unexpected_ends).get(prefix)
    if ends is None:
        return
    first, last = ends
    short, long = ("checkpoint", "model") if asked.got is None else ("model", "checkpoint")
    yield Candidate(
        "another number of layers",
        f"the {short} ends after {plural(first, 'layer')}, the {long} has {last + 1}",
        (f"{prefix}.{first} to {prefix}.{last} are in the {long} alone",),
        Strength.FAIR,
        f"compare num_hidden_layers of config.json with the checkpoint's layers, or {CONFIG_FIX}",
    )


def _missing_ends(known: Known) -> dict[str, tuple[int, int]]:
    return _ends(known.wanted)


def _unexpected_ends(known: Known) -> dict[str, tuple[int, int]]:
    return _ends(known.held)


def _ends(names: Iterable[str]) -> dict[str, tuple[int, int]]:
    """The first and the last layer by what stands before its number, where the names are of layers in a row.

    Each with several tensors, and not from 0 on.
    """
    counts: dict[str, dict[int, int]] = {}
    for name in names:
        if match := _LAYER.match(name):
            layers = counts.setdefault(match[1], {})
            layers[int(match[2])] = layers.get(int(match[2]), 0) + 1
    return {
        prefix: (min(layers), max(layers))
        for prefix, layers in counts.items()
        if min(layers) > 0 and max(layers) - min(layers) + 1 == len(layers) and min(layers.values()) >= _TENSORS
    }
