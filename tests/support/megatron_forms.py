"""The forms in which Megatron saves the same tensors: stacked, by itself each, under a prefix, renumbered.

All take what `megatron_names.to_megatron` gives: names layer by layer, experts stacked [E, ...].
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch

from tests.support.megatron_layers import Tensors, under

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
# What Megatron can stack: the layers of the decoder and of a vision tower, and a tower's mergers.
_STACK = re.compile(r"((?:language_model\.|vision_model\.)?decoder\.(?:layers|deepstack_merger_list))\.(\d+)\.(.+)")
_EXPERTS = "mlp.experts.experts."


def stacked(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """The layers as one tensor [L, ...] of each name, as Megatron saves models whose layers are all alike.

    Each stack by itself: a vision tower's layers, and its mergers, have lengths of their own.
    Raises AssertionError where a layer lacks what another has: such a model is saved layer by layer.
    """
    stacks: dict[str, dict[str, dict[int, torch.Tensor]]] = defaultdict(lambda: defaultdict(dict))
    out: Tensors = {}
    for name, tensor in tensors.items():
        found = _STACK.fullmatch(name)
        if found is None:
            out[name] = tensor
        else:
            stacks[found[1]][found[3]][int(found[2])] = tensor
    for stack, layers in stacks.items():
        assert len({tuple(sorted(parts)) for parts in layers.values()}) == 1, "the layers are not alike"
        for rest, parts in layers.items():
            out[f"{stack}.{rest}"] = torch.stack([parts[number] for number in sorted(parts)])
    return out


def singleton(tensors: Mapping[str, torch.Tensor], *, plain: tuple[str, ...] = ()) -> Tensors:
    """`singleton_local_shards`: gate and up apart (`weight_w`, `weight_v`), and each expert under its own number.

    plain: prefixes of names whose fc1 is not gated.
    """
    out: Tensors = {}
    for name, tensor in tensors.items():
        if name.startswith(plain):
            out[name] = tensor
            continue
        if _EXPERTS not in name:
            out |= _halves(name, tensor)
            continue
        before, rest = name.split(_EXPERTS)
        for number, expert in enumerate(tensor):
            out |= _halves(f"{before}{_EXPERTS}{number}.{rest}", expert)
    return out


def megatron_fsdp(tensors: Mapping[str, torch.Tensor], prefix: str = "model.module.") -> Tensors:
    """Megatron-FSDP's names of the modules' parameters, fp32. Give it names of container="ranks"."""
    out: Tensors = {}
    for name, tensor in tensors.items():
        if _EXPERTS not in name:
            out |= _halves(name, tensor.float())
            continue
        before, rest = name.split(_EXPERTS)
        for number, expert in enumerate(tensor):
            out |= _halves(f"{before}mlp.experts.{rest}{number}", expert.float())
    return under(prefix, out)


def _halves(name: str, tensor: torch.Tensor) -> Tensors:
    """A gated fc1 as gate and up; anything else as it is."""
    if not re.search(r"linear_fc1\.(weight|bias)\d*$", name):
        return {name: tensor}
    gate, up = tensor.chunk(2)
    return {f"{name}_w": gate.clone(), f"{name}_v": up.clone()}


def hybrid(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """HybridModel's numbering: layer N is 2N (attention) and 2N + 1 (what follows it)."""
    out: Tensors = {}
    for name, tensor in tensors.items():
        found = _LAYER.fullmatch(name)
        if found is None:
            out[name.replace("decoder.final_layernorm.", "decoder.final_norm.")] = tensor
        else:
            second = found[2].startswith(("mlp.", "pre_mlp_", "post_mlp_", "post_feedforward_"))
            out[f"decoder.layers.{2 * int(found[1]) + second}.{found[2]}"] = tensor
    return out


def padded(tensors: Mapping[str, torch.Tensor], rows: int) -> Tensors:
    """Embedding and head with so many rows, the added ones random; a value head [1, H] stays as it is."""
    out = dict(tensors)
    for name in tensors:
        if name.endswith(("embedding.word_embeddings.weight", "output_layer.weight")) and out[name].shape[0] != 1:
            more = torch.randn(rows - out[name].shape[0], *out[name].shape[1:])
            out[name] = torch.cat([out[name], more.to(out[name].dtype)])
    return out


def optimizer_beside(tensors: Mapping[str, torch.Tensor], form: str = "fully_reshardable") -> Tensors:
    """fp32 optimizer tensors as Megatron saves them beside the weights; other values than the weights have.

    form: "fully_reshardable" (keys and shapes of the weights), "fp32_param" (0.13 to 0.15, reshaped to one row for
    each weight), "dp_reshardable" (buckets of all of them), "chained" (the same under chained_0).
    """
    if form in ("dp_reshardable", "chained"):
        start = "chained_0.optimizer." if form == "chained" else "optimizer."
        bucket = f"{start}distributed.dp_group_idx_0.gbuf_idx_0.dtype_(torch.bfloat16, torch.float32).bucket_idx_0."
        size = sum(tensor.numel() for tensor in tensors.values())
        return {bucket + kind: torch.randn(size) for kind in ("param", "exp_avg", "exp_avg_sq")}
    first = "fp32_param" if form == "fp32_param" else "param"
    return {
        f"optimizer.state.{kind}.{name}": torch.randn((1, tensor.numel()) if form == "fp32_param" else tensor.shape)
        for kind in (first, "exp_avg", "exp_avg_sq")
        for name, tensor in tensors.items()
    }


def with_mtp(published: Mapping[str, torch.Tensor], config: Any, count: int = 1) -> tuple[Tensors, Any]:
    """A published DeepSeek or GLM model with `count` MTP layers more, as the hub has them, and a config that says so.

    Each is the last layer with other values, and copies of the model's two tables.
    """
    import copy

    layers = config.num_hidden_layers
    hidden = config.hidden_size
    generator = torch.Generator().manual_seed(3)  # of its own: the same model each time, whatever ran before
    out = dict(published)
    for number in range(layers, layers + count):
        prefix = f"model.layers.{number}."
        last = f"model.layers.{layers - 1}."
        for name in published:
            if name.startswith(last):
                other = torch.randn(published[name].shape, generator=generator) / 8
                out[prefix + name.removeprefix(last)] = other.to(published[name].dtype)
        norm = published["model.norm.weight"]
        for name, shape in (("enorm", (hidden,)), ("hnorm", (hidden,)), ("shared_head.norm", (hidden,)),
                            ("eh_proj", (hidden, 2 * hidden))):  # fmt: skip
            out[f"{prefix}{name}.weight"] = (torch.randn(shape, generator=generator) / 8).to(norm.dtype)
        out[prefix + "embed_tokens.weight"] = published["model.embed_tokens.weight"].clone()
        out[prefix + "shared_head.head.weight"] = published["lm_head.weight"].clone()
    changed = copy.deepcopy(config)
    changed.num_nextn_predict_layers = count
    return out, changed
