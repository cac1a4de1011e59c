"""Megatron's rank files, cut from the tensors of a whole model as its ranks would hold them.

The names of the whole model are those that the reader gives: layers and experts numbered through, gates before ups.
"""

from __future__ import annotations

import argparse
import enum
import io
import itertools
import math
import random
import re
import signal
import sys
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

Tensors = dict[str, torch.Tensor]

# Which dimension tensor parallelism cuts. What is not here is on every rank.
_CUTS = (
    (r"(word_embeddings|output_layer)\.weight", 0),
    (r"linear_(qkv|q_proj|q_up_proj|kv_up_proj|fc1)\.(weight|bias)\d*", 0),
    (r"eh_proj\.weight", 0),
    (r"softmax_offset", 0),
    (r"linear_(proj|fc2)\.weight\d*", 1),
)
_LAYER = re.compile(r"((?:.*?\.)?layers\.)(\d+)(\..*)")
_EXPERT = re.compile(r"(.*\.experts\.(?:local_experts\.|linear_fc[12]\.(?:weight|bias)))(\d+)(.*)")


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """How the ranks divide a model.

    stages: layers of each pipeline stage, for each virtual stage: [[2, 1]] is two stages, [[1, 1], [1, 0]] two with
    two virtual ones. etp: shards of an expert, as many as tp unless given. cut_latent: MLA's down projections are
    cut, as by the local layers.
    """

    stages: Sequence[Sequence[int]]
    tp: int = 1
    ep: int = 1
    etp: int | None = None
    cut_latent: bool = False

    @property
    def pp(self) -> int:
        return len(self.stages[0])

    @property
    def expert_shards(self) -> int:
        return self.tp if self.etp is None else self.etp

    def files(self) -> Iterator[tuple[int, int, int, int]]:
        """(tp, pp, ep, etp) of each file: ranks of a stage are numbered with tp innermost, and with etp, then ep."""
        for pp in range(self.pp):
            for rank in range(math.lcm(self.tp, self.expert_shards * self.ep)):
                etp = self.expert_shards
                yield rank % self.tp, pp, rank // etp % self.ep, rank % etp

    def folder(self, tp: int, pp: int, ep: int) -> str:
        name = f"mp_rank_{tp:02}"
        name += f"_{pp:03}" if self.pp > 1 else ""
        return name + (f"_{ep:03}" if self.ep > 1 else "")


def _shard(name: str, tensor: torch.Tensor, ranks: int, rank: int, *, gated: bool, cut_latent: bool) -> torch.Tensor:
    """What rank `rank` of `ranks` holds: of a gated fc1 its gates, then its ups."""
    cuts = (*_CUTS, (r"linear_(q|kv)_down_proj\.weight", 0)) if cut_latent else _CUTS
    dim = next((dim for pattern, dim in cuts if re.search(rf"(^|\.){pattern}$", name)), None)
    if dim is None or ranks == 1 or (tensor.shape[0] == 1 and "output_layer" in name):
        return tensor.clone()
    halves = tensor.chunk(2) if gated and "linear_fc1" in name else (tensor,)
    return torch.cat([half.chunk(ranks, dim)[rank] for half in halves], dim)


def _stage_of(layer: int, stages: Sequence[Sequence[int]]) -> tuple[int, int, int]:
    """Virtual stage, stage and number in it of a layer."""
    for virtual, row in enumerate(stages):
        for pp, count in enumerate(row):
            if layer < count:
                return virtual, pp, layer
            layer -= count
    raise ValueError("more layers than stages hold")


def _home(name: str, ranks: Ranks) -> tuple[int, int, str]:
    """Virtual stage and stage of a tensor, and its name there."""
    last = len(ranks.stages) - 1, ranks.pp - 1
    match = _LAYER.fullmatch(name)
    if match and "vision" not in name and not name.startswith("mtp."):
        virtual, pp, number = _stage_of(int(match[2]), ranks.stages)
        return virtual, pp, f"{match[1]}{number}{match[3]}"
    if "embedding" in name or "vision" in name:
        return 0, 0, name
    return *last, name


def rank_states(tensors: Tensors, ranks: Ranks, *, gated: bool = True) -> dict[str, list[Tensors]]:
    """By folder, the state dict of each virtual stage."""
    counts: dict[str, int] = {}
    for name in tensors:
        if match := _EXPERT.fullmatch(name):
            counts[match[1] + match[3]] = counts.get(match[1] + match[3], 0) + 1
    states: dict[str, list[Tensors]] = {}
    for tp, pp, ep, etp in ranks.files():
        chunks: list[Tensors] = [OrderedDict() for _ in ranks.stages]
        for name, tensor in tensors.items():
            virtual, home, local = _home(name, ranks)
            if home != pp:
                continue
            expert = _EXPERT.fullmatch(local)
            if expert:
                held = counts[(whole := _EXPERT.fullmatch(name))[1] + whole[3]] // ranks.ep
                number = int(expert[2]) - ep * held
                if not 0 <= number < held:
                    continue
                local = f"{expert[1]}{number}{expert[3]}"
            degree, index = (ranks.expert_shards, etp) if expert else (ranks.tp, tp)
            chunks[virtual][local] = _shard(
                name, tensor, degree, index, gated=gated, cut_latent=ranks.cut_latent
            ).contiguous()
        states[ranks.folder(tp, pp, ep)] = chunks
    return states


def grouped(tensors: Tensors, ranks: Ranks, *, gated: bool = True) -> dict[str, list[Tensors]]:
    """`rank_states` with the stacked experts [E, …] of the whole model as weight1 and weight2 of the rank's experts."""
    stacked = {name: tensor for name, tensor in tensors.items() if ".experts.experts." in name}
    states = rank_states({name: t for name, t in tensors.items() if name not in stacked}, ranks, gated=gated)
    for tp, pp, ep, etp in ranks.files():
        for name, tensor in stacked.items():
            virtual, home, local = _home(name, ranks)
            if home != pp:
                continue
            part = tensor.chunk(ranks.ep)[ep]
            degree = ranks.expert_shards
            if "linear_fc1" in name:
                halves = part.chunk(2, 1) if gated else (part,)
                part = torch.cat([half.chunk(degree, 1)[etp] for half in halves], 1)
                key, shape = "weight1", (part.shape[2], -1)
            else:
                part = part.chunk(degree, 2)[etp]
                key, shape = "weight2", (-1, part.shape[1])
            prefix = local.split("experts.linear_fc")[0]
            states[ranks.folder(tp, pp, ep)][virtual][prefix + key] = part.transpose(1, 2).contiguous().reshape(shape)
    return states


def write_lm(directory: Path, states: Mapping[str, list[Tensors]], arguments: Mapping[str, Any] | None = None) -> Path:
    """As Megatron-LM writes them: model_optim_rng.pt with arguments and the state of random numbers."""
    with _megatron_enums() as backend:
        for folder, chunks in states.items():
            (directory / folder).mkdir(parents=True)
            models = {"model": chunks[0]} if len(chunks) == 1 else {f"model{i}": c for i, c in enumerate(chunks)}
            for chunk in models.values():
                chunk.update(_extra_states())
            state = {
                "checkpoint_version": 3.0,
                "iteration": 10,
                **models,
                "optimizer": {"param_groups": [{"lr": 1e-4, "step": np.int64(10)}]},
                "rng_state": [{
                    "random_rng_state": random.getstate(),
                    "np_rng_state": np.random.get_state(),
                    "torch_rng_state": torch.get_rng_state(),
                }],
            }  # fmt: skip
            if arguments is not None:
                state["args"] = argparse.Namespace(
                    attention_backend=backend, exit_signal=signal.SIGTERM, params_dtype=torch.bfloat16,
                    iteration=10, **arguments,
                )  # fmt: skip
            torch.save(state, directory / folder / "model_optim_rng.pt")
    return directory


def write_verl(directory: Path, states: Mapping[str, list[Tensors]]) -> Path:
    """As verl 0.3 and 0.4 write them: model.pt, a list of state dicts."""
    for folder, chunks in states.items():
        (directory / folder).mkdir(parents=True)
        torch.save(chunks, directory / folder / "model.pt")
    return directory


def arguments_of(ranks: Ranks, **more: Any) -> dict[str, Any]:
    """The parallel sizes as Megatron-LM's arguments name them."""
    return {
        "tensor_model_parallel_size": ranks.tp,
        "pipeline_model_parallel_size": ranks.pp,
        "virtual_pipeline_model_parallel_size": len(ranks.stages) if len(ranks.stages) > 1 else None,
        "expert_model_parallel_size": ranks.ep,
        **more,
    }


def _extra_states() -> dict[str, Any]:
    """What layers of transformer_engine put beside their weights, in each form that it has had."""
    return {
        "decoder.extra1._extra_state": None,
        "decoder.extra2._extra_state": torch.empty(0, dtype=torch.uint8),
        "decoder.extra3._extra_state": io.BytesIO(b"scales"),
        "decoder.extra4._extra_state": io.BytesIO(b""),
    }


@contextmanager
def _megatron_enums() -> Iterator[Any]:
    """A value of megatron.core.transformer.enums.AttnBackend, whose module is there only while it is pickled."""
    module = "megatron.core.transformer.enums"
    names = ["megatron", "megatron.core", "megatron.core.transformer", module]
    before = {name: sys.modules.get(name) for name in names}
    backend = enum.Enum("AttnBackend", {"auto": 5}, module=module)
    for name in names:
        sys.modules[name] = types.ModuleType(name)
    sys.modules[module].AttnBackend = backend  # type: ignore[attr-defined]
    try:
        yield backend.auto
    finally:
        for name, found in before.items():
            if found is None:
                del sys.modules[name]
            else:
                sys.modules[name] = found


class Sizes:
    """Odd sizes of a small model, so that what is put together wrong does not pass by luck."""

    hidden, ffn, expert_width, vocab = 10, 12, 8, 22
    qkv, proj = 20, 12
    q_rank, kv_rank, rotary = 6, 4, 2


def random_tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape).to(dtype)


def gpt(layers: int, layer: Callable[[str], Tensors] | None = None, *, head: int | None = None) -> Tensors:
    """A whole model: tables, final norm, and `layers` layers. head: rows of output_layer, 0 for none (tied)."""
    s, make = Sizes, layer or dense_layer
    rows = s.vocab if head is None else head
    return {
        "embedding.word_embeddings.weight": random_tensor(s.vocab, s.hidden),
        **dict(itertools.chain.from_iterable(make(f"decoder.layers.{i}.").items() for i in range(layers))),
        "decoder.final_layernorm.weight": random_tensor(s.hidden),
        **({"output_layer.weight": random_tensor(rows, s.hidden)} if rows else {}),
    }


def attention(prefix: str) -> Tensors:
    """Grouped-query attention with biases and sinks."""
    s = Sizes
    return {
        f"{prefix}self_attention.linear_qkv.layer_norm_weight": random_tensor(s.hidden),
        f"{prefix}self_attention.linear_qkv.weight": random_tensor(s.qkv, s.hidden),
        f"{prefix}self_attention.linear_qkv.bias": random_tensor(s.qkv),
        f"{prefix}self_attention.q_layernorm.weight": random_tensor(4),
        f"{prefix}self_attention.core_attention.softmax_offset": random_tensor(4, dtype=torch.float32),
        f"{prefix}self_attention.linear_proj.weight": random_tensor(s.hidden, s.proj),
        f"{prefix}self_attention.linear_proj.bias": random_tensor(s.hidden),
    }


def mlp(prefix: str, width: int, number: str = "", *, gated: bool = True, bias: bool = True) -> Tensors:
    """Both linear layers; `number` is a grouped expert's."""
    s = Sizes
    rows = 2 * width if gated else width
    weights = {
        f"{prefix}linear_fc1.weight{number}": random_tensor(rows, s.hidden),
        f"{prefix}linear_fc2.weight{number}": random_tensor(s.hidden, width),
    }
    biases = {
        f"{prefix}linear_fc1.bias{number}": random_tensor(rows),
        f"{prefix}linear_fc2.bias{number}": random_tensor(s.hidden),
    }
    return weights | biases if bias else weights


def dense_layer(prefix: str, *, gated: bool = True) -> Tensors:
    return attention(prefix) | mlp(f"{prefix}mlp.", Sizes.ffn, gated=gated)


def _router(prefix: str, experts: int) -> Tensors:
    return {
        f"{prefix}pre_mlp_layernorm.weight": random_tensor(Sizes.hidden),
        f"{prefix}mlp.router.weight": random_tensor(experts, Sizes.hidden),
        f"{prefix}mlp.router.expert_bias": random_tensor(experts, dtype=torch.float32),
        f"{prefix}mlp.shared_experts.gate_weight": random_tensor(1, Sizes.hidden),
        **mlp(f"{prefix}mlp.shared_experts.", Sizes.ffn, bias=False),
    }


def sequential_layer(prefix: str, experts: int = 4) -> Tensors:
    """Experts as `local_experts.E`."""
    made = attention(prefix) | _router(prefix, experts)
    for e in range(experts):
        made |= mlp(f"{prefix}mlp.experts.local_experts.{e}.", Sizes.expert_width)
    return made


def grouped_layer(prefix: str, experts: int = 4) -> Tensors:
    """Experts as transformer_engine's `linear_fc1.weightE`."""
    made = attention(prefix) | _router(prefix, experts)
    for e in range(experts):
        made |= mlp(f"{prefix}mlp.experts.", Sizes.expert_width, str(e))
    return made


def stacked_layer(prefix: str, experts: int = 4, *, gated: bool = True) -> Tensors:
    """Experts as the two stacked tensors that older grouped ones become."""
    width = Sizes.expert_width
    return attention(prefix) | _router(prefix, experts) | {
        f"{prefix}mlp.experts.experts.linear_fc1.weight": random_tensor(experts, width * (1 + gated), Sizes.hidden),
        f"{prefix}mlp.experts.experts.linear_fc2.weight": random_tensor(experts, Sizes.hidden, width),
    }  # fmt: skip


def latent_layer(prefix: str) -> Tensors:
    """MLA, with the norms of the local layers."""
    s, at = Sizes, f"{prefix}self_attention."
    return {
        f"{prefix}input_layernorm.weight": random_tensor(s.hidden),
        f"{at}linear_q_down_proj.weight": random_tensor(s.q_rank, s.hidden),
        f"{at}linear_q_up_proj.weight": random_tensor(8, s.q_rank),
        f"{at}q_layernorm.weight": random_tensor(s.q_rank),
        f"{at}linear_kv_down_proj.weight": random_tensor(s.kv_rank + s.rotary, s.hidden),
        f"{at}linear_kv_up_proj.weight": random_tensor(12, s.kv_rank),
        f"{at}linear_proj.weight": random_tensor(s.hidden, s.proj),
        **mlp(f"{prefix}mlp.", s.ffn, bias=False),
    }
