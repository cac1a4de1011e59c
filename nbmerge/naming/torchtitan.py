"""torchtitan's names of a model as Hugging Face's, and its rotary layout turned back.

torchtitan's Llama keeps Meta's rotary embedding, which turns neighbouring elements of a head; transformers turns an
element of a head's first half with one of its second. The rows of the query and key weights are ordered to match.
Source: torchtitan/models/llama3/state_dict_adapter.py (0.3.0) and models/common/attention.py (FusedQKVLinear).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from nbmerge import expressions as ex
from nbmerge.errors import Problem, listing
from nbmerge.expressions import Expr
from nbmerge.naming.facts import ModelFacts
from nbmerge.naming.notes import Drop
from nbmerge.naming.prefixes import stripped_names
from nbmerge.naming.published import HUB, Base, Given, Named, name_tensors

_OUTSIDE = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_FUSED = "attention.wqkv"
_IN_LAYER = re.compile(r"layers\.(\d+)\.(.+)\.(weight|bias)")
_COMPUTED = re.compile(r"(?:^|\.)(?:freqs_cis|rope\.cache|rope_cache)$")  # rotary tables, which older versions saved
# Families that torchtitan trains with these names, and whether it keeps Meta's rotary layout in them.
_FAMILIES = {"llama": True, "qwen3": False}


@dataclass(frozen=True)
class _Heads:
    """Query heads, key and value heads, and the elements of each."""

    query: int
    key: int
    size: int

    @staticmethod
    def of(config: Mapping[str, Any]) -> _Heads:
        query = int(config["num_attention_heads"])
        key = int(config.get("num_key_value_heads") or query)
        return _Heads(query, key, int(config.get("head_dim") or int(config["hidden_size"]) // query))


@dataclass
class _Renamed:
    """tensors: by published name; sources: published name → torchtitan's."""

    tensors: dict[str, Expr] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    drops: list[Drop] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def add(self, name: str, expr: Expr, source: str) -> None:
        if name in self.tensors:
            self.problems.append(
                Problem(
                    f"{self.sources[name]} and {source} both become {name}",
                    why="the checkpoint holds one parameter under two names",
                    fix="save the state dict of one version of torchtitan only",
                    kind="contradiction",
                )
            )
        else:
            self.tensors[name], self.sources[name] = expr, source


def from_torchtitan(
    tensors: Mapping[str, Expr],
    facts: ModelFacts,
    target: str = HUB,
    base: Base | None = None,
    ranks: int | None = None,
) -> Named:
    """The outputs of tensors that have torchtitan's names. ranks: how many wrote the checkpoint."""
    family = str(facts.config.get("model_type"))
    if family not in _FAMILIES:
        problem = Problem(
            f"no table says what torchtitan's names are in a model of type {family!r}",
            where=listing(tensors),
            why=f"there are tables for {', '.join(_FAMILIES)}",
            fix="save in Hugging Face form from torchtitan (checkpoint.last_save_in_hf), or pass another config",
            kind="unsupported",
        )
        return Named({}, {}, HUB, problems=(problem,))
    work = _rename(tensors, _Heads.of(facts.config), rotary=_FAMILIES[family])
    named = name_tensors(work.tensors, facts, target, base=base, given=Given(HUB, work.sources), ranks=ranks)
    return replace(
        named,
        dialect=f"torchtitan ({family})",
        renamed=len(work.tensors),
        drops=(*work.drops, *named.drops),
        problems=(*work.problems, *named.problems),
    )


def _rename(tensors: Mapping[str, Expr], heads: _Heads, *, rotary: bool) -> _Renamed:
    names, collisions = stripped_names(tensors)
    work = _Renamed(problems=collisions)
    for stripped, source in names.items():
        expr = tensors[source]
        if _COMPUTED.search(source):
            work.drops.append(Drop(source, "a buffer that the model computes when it is loaded"))
            continue
        for part, made in _made(stripped.replace(".attention.qkv_linear.", ".attention."), expr, heads):
            name, tensor = _published(part), made
            if rotary and name.endswith(("q_proj.weight", "k_proj.weight", "q_proj.bias", "k_proj.bias")):
                tensor = half_by_half(made, heads.size)
            work.add(name, tensor, source)
    return work


def _published(name: str) -> str:
    """The published name; the name itself where no table has it, so that it is told as one that nothing takes."""
    match = _IN_LAYER.fullmatch(name)
    if match is None or match[2] not in _LAYER:
        return _OUTSIDE.get(name, name)
    return f"model.layers.{match[1]}.{_LAYER[match[2]]}.{match[3]}"


def _made(name: str, expr: Expr, heads: _Heads) -> Iterator[tuple[str, Expr]]:
    """The tensor; of a fused one query, key and value, under the names that they would have apart.

    wqkv: `[kv_heads * (group + 2) * head_dim, …]`, each group of query heads followed by its key and its value head.
    """
    match = _IN_LAYER.fullmatch(name)
    group = heads.query // heads.key
    if match is None or match[2] != _FUSED or expr.shape[0] != heads.key * (group + 2) * heads.size:
        yield name, expr
        return
    rest = expr.shape[1:]
    grouped = ex.reshape(expr, (heads.key, (group + 2) * heads.size, *rest))
    for part, start, count in (("wq", 0, group), ("wk", group, 1), ("wv", group + 1, 1)):
        rows = ex.narrow(grouped, 1, start * heads.size, count * heads.size)
        yield name.replace("wqkv", part), ex.reshape(rows, (heads.key * count * heads.size, *rest))


def half_by_half(expr: Expr, head_dim: int) -> Expr:
    """The rows of each head reordered from pairs to halves: all first elements of its pairs, then all second ones.

    expr: `[heads * head_dim, …]`. A tensor of another number of rows stays as it is, and its shape is a problem later.
    """
    if not expr.shape or head_dim % 2 or expr.shape[0] % head_dim:
        return expr
    rest = expr.shape[1:]
    pairs = ex.reshape(expr, (expr.shape[0] // head_dim, head_dim // 2, 2, *rest))
    halves = ex.permute(pairs, (0, 2, 1, *range(3, 3 + len(rest))))
    return ex.reshape(halves, expr.shape)
