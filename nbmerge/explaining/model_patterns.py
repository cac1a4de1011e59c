"""Patterns that the sizes of a model decide: vocabulary, heads, fused projections, experts, stacked layers, size."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from nbmerge.errors import listing, plural
from nbmerge.explaining.candidates import Candidate, Mismatch, Strength, ceil_div, evidence, product
from nbmerge.explaining.sizes import PUBLISHED, PublishedSize

_VOCABULARY = re.compile(
    r"(^|\.)(embed_tokens|lm_head|word_embeddings|output_layer|wte|embed_out|tok_embeddings|shared)\."
)
_QUERY, _KEY_VALUE = re.compile(r"\.(q_proj|query)\."), re.compile(r"\.(k_proj|v_proj|key|value)\.")
_HALF, _BOTH = re.compile(r"\.(gate_proj|up_proj|w1|w3)\b"), re.compile(r"\.(gate_up_proj|linear_fc1)\b")
_MULTIPLES = (8, 16, 32, 64, *(128 * n for n in (1, 2, 4, 8, 16, 32, 64, 128, 3, 5, 6, 7)))
_SOLID = 64  # a multiple of this is seldom met by chance
_FARTHEST = 4  # times as many tokens; more is another tokenizer, or no vocabulary
CONFIG_FIX = "pass the config that training used: --hf_model_config_path DIR"


def is_vocabulary(name: str) -> bool:
    """Whether a tensor has one row for each token, by its name."""
    return bool(_VOCABULARY.search(name))


def _vocabulary_rows(asked: Mismatch) -> tuple[int, int] | None:
    """Rows of both shapes where nothing else differs, and the name does not say that these are no tokens."""
    found = asked.other_dim()
    if found is None or found[0] != 0 or min(found[1:]) < 1 or (asked.name and not is_vocabulary(asked.name)):
        return None
    return (found[1], found[2]) if asked.name or len(asked.got or ()) == 2 else None


def vocabulary_padded(asked: Mismatch) -> Iterator[Candidate]:
    """Rows were added until the vocabulary was a multiple of m, in the checkpoint or in the config.

    Megatron pads to a multiple of make_vocab_size_divisible_by (128) times the tensor parallel size.
    """
    if (rows := _vocabulary_rows(asked)) is None:
        return
    padded, tokens = max(rows), min(rows)
    multiples = [m for m in _MULTIPLES if m * ceil_div(tokens, m) == padded]
    if not multiples:
        return
    m = min((each for each in multiples if each >= _SOLID), default=max(multiples))
    strength = (Strength.STRONG if m >= _SOLID else Strength.FAIR) if asked.name else Strength.FAIR
    in_checkpoint = rows[0] > rows[1]
    yield Candidate(
        "vocabulary padded",
        f"the vocabulary is padded to a multiple of {m} in {'the checkpoint' if in_checkpoint else 'config.json'}, "
        f"by {padded - tokens} rows",
        evidence(
            f"{padded} = {m} · ⌈{tokens}/{m}⌉",
            f"multiples of {listing(sorted(set(multiples) - {m}))} fit too" if len(multiples) > 1 else "",
        ),
        strength if m >= _SOLID or asked.name else Strength.WEAK,
        f"cut it to {tokens} rows, as nbmerge.merge does for Megatron checkpoints"
        if in_checkpoint
        else f"set vocab_size to {tokens} in config.json, or resize the embeddings to {padded} rows",
    )


def vocabulary_resized(asked: Mismatch) -> Iterator[Candidate]:
    """Tokens were added or taken away, and the config was not changed with them."""
    if (rows := _vocabulary_rows(asked)) is None:
        return
    got, expected = rows
    if max(rows) > _FARTHEST * min(rows):
        return
    by = abs(got - expected)
    change = f"{plural(by, 'token')} {'more' if got > expected else 'fewer'} than config.json says"
    yield Candidate(
        "vocabulary resized",
        f"the vocabulary was resized or padded in training without the config: {change}",
        evidence(
            f"{got} = {expected} {'+' if got > expected else '-'} {by}",
            f"{max(rows)} = {max(rows) // 128} · 128, as padded vocabularies are" if max(rows) % 128 == 0 else "",
        ),
        Strength.FAIR if asked.name else Strength.WEAK,
        f"set vocab_size to {got} in config.json, or {CONFIG_FIX}",
        seen=("mergekit 489",),
    )


def heads_of_queries(asked: Mismatch) -> Iterator[Candidate]:
    """Rows of query, key or value heads: another number of key-value heads, or queries and keys exchanged."""
    found = asked.other_dim()
    if found is None or found[0] != 0 or min(found[1:]) < 1:
        return
    _, got, expected = found
    heads, groups = asked.known.size("num_attention_heads"), asked.known.size("num_key_value_heads")
    dim = head_dim(asked)
    if not heads or not dim or got % dim or expected % dim:
        return
    groups = groups or heads
    if groups != heads and {got, expected} == {heads * dim, groups * dim}:
        many, few = ("the checkpoint", "the model") if got > expected else ("the model", "the checkpoint")
        yield Candidate(
            "query and key-value sizes exchanged",
            f"{many} has rows of all {heads} query heads here, {few} those of {groups} key-value heads",
            (f"{heads * dim} = {heads} · {dim}", f"{groups * dim} = {groups} · {dim}"),
            Strength.STRONG if _QUERY.search(asked.name) or _KEY_VALUE.search(asked.name) else Strength.FAIR,
            "check which of q_proj, k_proj and v_proj it was cut from, and num_key_value_heads of config.json",
        )
    elif _KEY_VALUE.search(asked.name) and heads % (got // dim) == 0:
        yield Candidate(
            "other key-value heads",
            f"the checkpoint has {plural(got // dim, 'key-value head')} of {dim}, config.json says {expected // dim}",
            (f"{got} = {got // dim} · {dim}", f"{expected} = {expected // dim} · {dim}"),
            Strength.STRONG,
            f"set num_key_value_heads to {got // dim} in config.json, or {CONFIG_FIX}",
        )


def fused_query_key_value(asked: Mismatch) -> Iterator[Candidate]:
    """Query, key and value in one tensor where one of them is meant, or the other way round."""
    found = asked.other_dim()
    if found is None or found[0] != 0 or min(found[1:]) < 1:
        return
    fused, single = max(found[1:]), min(found[1:])
    attention = re.search(r"attn|attention|qkv|[qkv]_proj|linear_qkv", asked.name)
    if asked.name and not attention:
        return
    heads, dim = asked.known.size("num_attention_heads"), head_dim(asked)
    groups = asked.known.size("num_key_value_heads") or heads
    arithmetic, strength = "", Strength.WEAK
    if heads and groups and dim and fused == (heads + 2 * groups) * dim and single in (heads * dim, groups * dim):
        arithmetic, strength = f"{fused} = ({heads} + 2 · {groups}) · {dim}", Strength.STRONG
    elif fused == 3 * single:
        arithmetic, strength = f"{fused} = 3 · {single}", Strength.FAIR if attention else Strength.WEAK
    if arithmetic:
        where, other = ("checkpoint", "model") if found[1] > found[2] else ("model", "checkpoint")
        yield Candidate(
            "fused query-key-value",
            f"the {where} has query, key and value in one tensor, the {other} one of them",
            (arithmetic,),
            strength,
            "cut the fused tensor by query groups; nbmerge.merge does it for the Megatron families that it knows",
        )


def fused_other_heads(asked: Mismatch) -> Iterator[Candidate]:
    """Megatron's fused query-key-value of another number of key-value heads: rows = (heads + 2 · groups) · head_dim."""
    found = asked.other_dim()
    if found is None or found[0] != 0 or min(found[1:]) < 1 or "qkv" not in asked.name:
        return
    _, got, expected = found
    heads, dim = asked.known.size("num_attention_heads"), head_dim(asked)
    if not heads or not dim or got % dim or (got // dim - heads) % 2:
        return
    groups, mine = (got // dim - heads) // 2, asked.known.size("num_key_value_heads") or heads
    if groups > 0 and heads % groups == 0 and expected == (heads + 2 * mine) * dim:
        yield Candidate(
            "other key-value heads",
            f"the checkpoint has {plural(groups, 'key-value head')} of {dim}, config.json says {mine}",
            (f"{got} = ({heads} + 2 · {groups}) · {dim}", f"{expected} = ({heads} + 2 · {mine}) · {dim}"),
            Strength.STRONG,
            f"set num_key_value_heads to {groups} in config.json, or {CONFIG_FIX}",
        )


def head_dim(asked: Mismatch) -> int | None:
    """head_dim of the config, which defaults to hidden_size / num_attention_heads."""
    heads, hidden = asked.known.size("num_attention_heads"), asked.known.size("hidden_size")
    return asked.known.size("head_dim") or (hidden // heads or None if heads and hidden else None)


def fused_gate_up(asked: Mismatch) -> Iterator[Candidate]:
    """Gate and up projection in one tensor where one of them is meant, or the other way round."""
    found = asked.other_dim()
    if found is None or found[0] not in (0, 1) or min(found[1:]) < 1:
        return
    dim, got, expected = found
    if max(got, expected) != 2 * min(got, expected):
        return
    if asked.name and not (_HALF.search(asked.name) or _BOTH.search(asked.name)):
        return
    width = asked.known.size("moe_intermediate_size") if "experts" in asked.name else None
    width = width or asked.known.size("intermediate_size")
    confirmed = bool(asked.name) and width == min(got, expected)
    where, other = ("checkpoint", "model") if got > expected else ("model", "checkpoint")
    yield Candidate(
        "fused gate and up",
        f"the {where} has gate and up projection in one tensor, the {other} one of them",
        evidence(
            f"{max(got, expected)} = 2 · {min(got, expected)}",
            f"{width} is the intermediate size of config.json" if confirmed else "",
        ),
        Strength.STRONG if confirmed else (Strength.FAIR if asked.name else Strength.WEAK),
        f"cut it into two halves along dimension {dim}, or join them: gate first, then up",
    )


def packed(asked: Mismatch) -> Iterator[Candidate]:
    """All experts, or all layers, in one tensor where one of them is meant, or the other way round."""
    if asked.shapes is None:
        return
    more, fewer = sorted(asked.shapes, key=len, reverse=True)
    if len(more) != len(fewer) + 1 or more[1:] != fewer or more[0] < 2 or not fewer:
        return
    number = more[0]
    where, other = ("checkpoint", "model") if len(asked.shapes[0]) > len(fewer) else ("model", "checkpoint")
    experts = asked.known.size("num_experts", "num_local_experts", "n_routed_experts")
    layers = asked.known.size("num_hidden_layers", "num_layers")
    for what, count, hint in (("experts", experts, "experts" in asked.name), ("layers", layers, False)):
        if count == number or hint or count is None:
            known = count == number
            yield Candidate(
                f"packed {what}",
                f"the {where} has {number} {what} in one tensor, the {other} a tensor for each",
                evidence(
                    f"{product(more)} = {number} · {product(fewer)}",
                    f"config.json has {count} {what}" if known else "",
                ),
                Strength.STRONG if known else (Strength.FAIR if hint else Strength.WEAK),
                f"cut it along dimension 0, or stack the {what}",
            )


def config_size(asked: Mismatch) -> Iterator[Candidate]:
    """Every dimension that differs is a size of the config, of which other tensors show another value too."""
    if asked.shapes is None or len(asked.shapes[0]) != len(asked.shapes[1]) or is_vocabulary_row(asked):
        return
    names = {pair: name for name, pair in reversed(list(asked.known.differing.items())) if name != "vocab_size"}
    pairs = dict.fromkeys(pair for pair in zip(*asked.shapes, strict=True) if pair[0] != pair[1])
    if pairs and pairs.keys() <= names.keys() and not any(heads_of_queries(asked)):
        yield Candidate(
            "a size of the config",
            "config.json is of another model than the one that was trained",
            tuple(f"{names[pair]} is {pair[0]} in the checkpoint, config.json says {pair[1]}" for pair in pairs),
            Strength.STRONG,
            CONFIG_FIX,
        )


def is_vocabulary_row(asked: Mismatch) -> bool:
    """Whether the only dimension that differs counts tokens."""
    found = asked.other_dim()
    return found is not None and found[0] == 0 and is_vocabulary(asked.name)


def other_size(asked: Mismatch) -> Iterator[Candidate]:
    """Every dimension that differs is that of another published model of the config's family."""
    if asked.shapes is None or len(asked.shapes[0]) != len(asked.shapes[1]):
        return
    family = str(asked.known.config.get("model_type", ""))
    pairs = [(a, b) for a, b in zip(*asked.shapes, strict=True) if a != b]
    if not family:
        yield from _other_published(asked, dict.fromkeys(pairs))
        return
    named = [model for model in PUBLISHED if family in model.model_types and _explains(model, asked, pairs)]
    if named:
        yield Candidate(
            "another size",
            f"its sizes are those of {listing(model.name for model in named)}: config.json is of another size",
            tuple(_size_words(asked, named[0], got, expected) for got, expected in pairs),
            Strength.FAIR,
            CONFIG_FIX,
        )


def _other_published(asked: Mismatch, pairs: Iterable[tuple[int, int]]) -> Iterator[Candidate]:
    """Without a config: each pair is the same size of two published models, and neither is a multiple of the other."""
    said = []
    for got, expected in pairs:
        for size in ("hidden_size", "intermediate_size"):
            theirs, mine = _with_size(size, got), _with_size(size, expected)
            if theirs and mine and min(got, expected) > 0 and max(got, expected) % min(got, expected):
                said.append(f"{size} is {got} in {listing(theirs, shown=2)}, {expected} in {listing(mine, shown=2)}")
                break
        else:
            return
    if said and not is_vocabulary_row(asked):
        yield Candidate(
            "another size", "it is of a model of another size than the one that was expected", tuple(said),
            Strength.FAIR, CONFIG_FIX,
        )  # fmt: skip


def _with_size(size: str, value: int) -> list[str]:
    return [model.name for model in PUBLISHED if getattr(model, size) == value]


def _explains(model: PublishedSize, asked: Mismatch, pairs: list[tuple[int, int]]) -> bool:
    """Whether each dimension is the same size of the config and of the published model."""
    return all(
        any(mine == expected and theirs == got for mine, theirs, _ in _sizes(asked, model)) for got, expected in pairs
    )


def _sizes(asked: Mismatch, model: PublishedSize) -> list[tuple[int, int, str]]:
    """(size in the config, size in the published model, its name) for the sizes that dimensions have."""
    known, found = asked.known, []
    heads = known.size("num_attention_heads")
    dim = head_dim(asked)
    for name, mine, theirs in (
        ("hidden_size", known.size("hidden_size"), model.hidden_size),
        ("intermediate_size", known.size("intermediate_size"), model.intermediate_size),
        ("vocab_size", known.size("vocab_size"), model.vocab_size),
        ("rows of queries", heads * dim if heads and dim else None, model.query_rows),
        ("rows of keys", (known.size("num_key_value_heads") or heads or 0) * (dim or 0), model.key_rows),
    ):
        if mine:
            found.append((mine, theirs, name))
    return found


def _size_words(asked: Mismatch, model: PublishedSize, got: int, expected: int) -> str:
    names = [name for mine, theirs, name in _sizes(asked, model) if (mine, theirs) == (expected, got)]
    return f"{names[0]} is {got}, config.json says {expected}"
