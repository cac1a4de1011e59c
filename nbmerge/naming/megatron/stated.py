"""What a run recorded of its model, held against config.json and the family's table.

Sizes that no shape shows (attention heads) and forms that no name shows (norms that are added to 1, rotary channels
side by side, gate and up rows in blocks) would give wrong weights without a word. Both come from Megatron-LM's
arguments or verl's transformer_config.json, whose names are those of megatron/core/transformer/transformer_config.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from nbmerge.errors import Problem
from nbmerge.explaining.model_patterns import CONFIG_FIX
from nbmerge.layout import Stated
from nbmerge.naming.megatron.family import Family
from nbmerge.naming.megatron.rules import Sizes

_OTHER_FORM = "convert the checkpoint with the framework that trained it, with that option "
_DENSE_MLP = (".mlp.gate_proj.weight", ".mlp.gate_up_proj.weight")
_QUERY_KEY_VALUE = "self_attention.linear_qkv.weight"
_QUERY_NORM = ".self_attn.q_norm.weight"
_EXPERT_COUNTS = ("n_routed_experts", "num_experts", "num_local_experts")
_LATENT = {
    "q_lora_rank": "q_lora_rank", "kv_lora_rank": "kv_lora_rank", "qk_head_dim": "qk_nope_head_dim",
    "qk_pos_emb_head_dim": "qk_rope_head_dim", "v_head_dim": "v_head_dim",
}  # fmt: skip


@dataclass(frozen=True)
class _Pair:
    """One size under both names, with both values; None where a side does not state it.

    silent: whether the tensors' shapes can be the same with either value.
    """

    run: str
    config: str
    said: int | None
    wanted: int | None
    silent: bool = False

    @property
    def differs(self) -> bool:
        return self.said is not None and self.wanted is not None and self.said != self.wanted


def other_sizes(stated: Stated, sizes: Sizes, family: Family, *, is_wrong: bool) -> list[Problem]:
    """The problem that config.json and the run contradict each other; none where neither's sizes are in doubt.

    is_wrong: whether anything else is wrong with the checkpoint. Where nothing is, all shapes fit config.json, and a
    size that shapes show is no contradiction: a run of experts alone may name another width for its dense layers.
    """
    differing = [pair for pair in _pairs(_Said(stated.values), sizes, family) if pair.differs]
    if not any(pair.silent for pair in differing) and not (is_wrong and differing):
        return []
    words = [
        f"{pair.run} is {pair.said:,} in the run, {'' if pair.run == pair.config else pair.config + ' '}"
        f"{pair.wanted:,} in config.json"
        for pair in differing
    ]
    silent = any(pair.silent for pair in differing)
    return [
        Problem(
            f"config.json contradicts what the run recorded of its model: {'; '.join(words)}",
            where=f"{stated.where}; config.json",
            why="query, key and value are cut by the number of heads, and their shapes are the same with other heads"
            if silent
            else "config.json is of another model than the one that was trained",
            fix=CONFIG_FIX,
            kind="contradiction",
        )
    ]


def other_forms(stated: Stated, family: Family) -> list[Problem]:
    """The problems of tensors that were stored in another form than the family's table has rules for."""
    said = _Said(stated.values)
    return [*_norms(said, stated.where, family), *_rotary(said, stated.where, family), *_blocks(said, stated.where)]


class _Said:
    """What the run recorded: sizes and flags, where they are what their names promise."""

    def __init__(self, values: Mapping[str, object]) -> None:
        self._values = values

    def size(self, *names: str) -> int | None:
        """The first of these that is a positive integer."""
        found = (self._values.get(name) for name in names)
        return next((v for v in found if isinstance(v, int) and not isinstance(v, bool) and v > 0), None)

    def flag(self, *names: str) -> bool | None:
        """Whether any of these is set; None where none is stated."""
        found = [value for name in names if isinstance(value := self._values.get(name), bool)]
        return any(found) if found else None

    @property
    def groups(self) -> int | None:
        """Query groups. Megatron-LM's arguments say 1 where group_query_attention is off: then they count heads."""
        if self.flag("group_query_attention") is False:
            return self.size("num_attention_heads")
        if "num_query_groups" in self._values and self._values["num_query_groups"] is None:
            return self.size("num_attention_heads")
        return self.size("num_query_groups")


def _has_groups(family: Family) -> bool:
    """Whether query, key and value are in one tensor by query groups: not in multi-head latent attention."""
    return any(_QUERY_KEY_VALUE in stack.rows for stack in family.stacks)


def _pairs(said: _Said, sizes: Sizes, family: Family) -> Iterator[_Pair]:
    heads, hidden = _of(sizes, "num_attention_heads"), _of(sizes, "hidden_size")
    yield _Pair("num_attention_heads", "num_attention_heads", said.size("num_attention_heads"), heads, silent=True)
    if _has_groups(family) and heads:
        groups = _of(sizes, "num_key_value_heads") or heads
        yield _Pair("num_query_groups", "num_key_value_heads", said.groups, groups, silent=True)
        dim = _of(sizes, "head_dim") or (hidden // heads if hidden else None)
        yield _Pair("kv_channels", "head_dim", said.size("kv_channels"), dim, silent=True)
    yield _Pair("hidden_size", "hidden_size", said.size("hidden_size"), hidden)
    layers, wanted = said.size("num_layers"), _of(sizes, "num_hidden_layers")
    if layers and wanted and layers != 2 * wanted:  # HybridModel counts attention and MLP as layers of their own
        yield _Pair("num_layers", "num_hidden_layers", layers, wanted)
    if any(name.endswith(_DENSE_MLP) for name in sizes.published):
        width = _of(sizes, "intermediate_size")
        yield _Pair("ffn_hidden_size", "intermediate_size", said.size("ffn_hidden_size"), width)
    if not _has_groups(family):
        for run, config in _LATENT.items():
            yield _Pair(run, config, said.size(run), _of(sizes, config))
    elif said.flag("qk_layernorm") is not None:
        has_norm = any(name.endswith(_QUERY_NORM) for name in sizes.published)
        yield _Pair("qk_layernorm", "norms of query and key", int(bool(said.flag("qk_layernorm"))), int(has_norm))
    yield from _expert_pairs(said, sizes)


def _expert_pairs(said: _Said, sizes: Sizes) -> Iterator[_Pair]:
    experts = said.size("num_moe_experts", "num_experts")
    name = next((name for name in _EXPERT_COUNTS if _of(sizes, name)), "")
    if not experts or not name:
        return
    yield _Pair("num_experts", name, experts, _of(sizes, name))
    width = next((name for name in ("moe_intermediate_size", "intermediate_size") if _of(sizes, name)), "")
    if width:
        yield _Pair("moe_ffn_hidden_size", width, said.size("moe_ffn_hidden_size"), _of(sizes, width))


def _of(sizes: Sizes, name: str) -> int | None:
    value: Any = sizes.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _norms(said: _Said, where: str, family: Family) -> Iterator[Problem]:
    """`zero_centered_gamma`: a norm multiplies by 1 + weight, as Gemma's do and no other family's here."""
    names = ("layernorm_zero_centered_gamma", "apply_layernorm_1p")
    centred = said.flag(*names)
    if centred is None or centred == family.zero_centred:
        return
    yield Problem(
        f"the weights of norms are stored {'less' if centred else 'without being less'} 1, and {family.name} "
        f"publishes them {'as they are' if centred else 'less 1'}: {names[0]}={centred}",
        where=where,
        why="a norm multiplies by its weight, or by 1 + weight; this version copies weights of norms, and would change "
        "what each of them does",
        fix=_OTHER_FORM + ("off" if centred else "on"),
        kind="unsupported",
    )


def _rotary(said: _Said, where: str, family: Family) -> Iterator[Problem]:
    """Rotary embeddings turn channel i with channel i + dim / 2, or neighbours: query and key rows lie accordingly."""
    interleaved = said.flag("rotary_interleaved")
    if interleaved is None or family.interleaved is None or interleaved == family.interleaved:
        return
    forms = "channels of one half with those of the other", "neighbouring channels"
    yield Problem(
        f"rotary embeddings turn {forms[interleaved]} in the run, and {forms[family.interleaved]} in "
        f"{family.name}: rotary_interleaved={interleaved}",
        where=where,
        why="the rows of query and key lie in that order; this version does not reorder them",
        fix=_OTHER_FORM + ("off" if interleaved else "on"),
        kind="unsupported",
    )


def _blocks(said: _Said, where: str) -> Iterator[Problem]:
    """Gate and up rows of experts in blocks (megatron/core/transformer/moe/experts.py, moe_mlp_glu_interleave_size)."""
    for name in ("moe_mlp_glu_interleave_size", "moe_shared_expert_glu_interleave_size"):
        if size := said.size(name):
            yield Problem(
                f"the experts' gate and up rows are stored in alternating blocks: {name}={size}",
                where=where,
                why="this version knows no table for that form, and would mix gate and up projections",
                fix=_OTHER_FORM + "off",
                kind="unsupported",
            )
