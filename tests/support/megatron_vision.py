"""Vision towers under Megatron's names: taken over from transformers as they are, or built of Megatron's layers.

Only fc1 of Qwen2.5-VL's layers is gated. A tower lies on the first pipeline stage.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from nbmerge.demo.megatron.pieces import Coordinates, ParallelSizes, local_pieces
from nbmerge.geometry import Box
from tests.support.megatron import Pieces, megatron_pieces
from tests.support.megatron_layers import Published, Tensors, fc1
from tests.support.models import HAS_CONVERSIONS

TOWERS = ("vision_model.", "visual.", "vision_tower.", "vision_projection.", "multi_modal_projector.")
_KINDS = ("weight", "bias")
_LAYERS = 9  # more than any tower here has


def unchanged(source: Published, prefix: str) -> Tensors:
    """The tower as transformers has it."""
    return {name: source.take(name) for name in source.tensors if name.startswith(prefix)}


def interleaved(parts: list[torch.Tensor], heads: int) -> torch.Tensor:
    """Rows of query, key and value head by head: a head's query, its key, its value."""
    by_head = [part.chunk(heads) for part in parts]
    return torch.cat([part[head] for head in range(heads) for part in by_head])


# Gemma 3


def gemma3_tower(source: Published, config: Any) -> Tensors:
    """SigLIP and its projector, whose matrix is published transposed."""
    norm = source.take("multi_modal_projector.mm_soft_emb_norm.weight")
    projection = source.take("multi_modal_projector.mm_input_projection_weight").T.contiguous()
    if source.form == "bridge":
        projector = {
            "multi_modal_projector.mm_soft_embed_norm.weight": norm,
            "multi_modal_projector.proj.weight": projection,
        }
        return unchanged(source, "vision_tower.") | projector
    tower = "vision_tower." if HAS_CONVERSIONS else "vision_tower.vision_model."
    tensors = {
        "vision_projection.mm_input_projection.layer_norm_weight": norm,
        "vision_projection.mm_input_projection.weight": projection,
        "vision_model.position_embeddings.weight": source.take(f"{tower}embeddings.position_embedding.weight"),
    }
    for kind in _KINDS:
        tensors[f"vision_model.conv1.{kind}"] = source.take(f"{tower}embeddings.patch_embedding.{kind}")
        tensors[f"vision_model.ln_post.{kind}"] = source.take(f"{tower}post_layernorm.{kind}")
        for number in range(config.num_hidden_layers):
            take = source.under(f"{tower}encoder.layers.{number}.")
            qkv = [take(f"self_attn.{part}_proj.{kind}") for part in "qkv"]
            for name, tensor in {
                "self_attention.linear_qkv.layer_norm_": take(f"layer_norm1.{kind}"),
                "self_attention.linear_qkv.": interleaved(qkv, config.num_attention_heads),
                "self_attention.linear_proj.": take(f"self_attn.out_proj.{kind}"),
                "mlp.linear_fc1.layer_norm_": take(f"layer_norm2.{kind}"),
                "mlp.linear_fc1.": take(f"mlp.fc1.{kind}"),
                "mlp.linear_fc2.": take(f"mlp.fc2.{kind}"),
            }.items():
                tensors[f"vision_model.decoder.layers.{number}.{name}{kind}"] = tensor
    return tensors


# Qwen


def qwen2_5_tower(source: Published, config: Any) -> Tensors:
    """RMS norms, a gated MLP, and a merger that Megatron calls a projection."""
    if source.form == "bridge":
        return unchanged(source, "visual.")
    take = source.under("visual.")
    tensors = {
        "vision_model.patch_embed.proj.weight": take("patch_embed.proj.weight"),
        "vision_model.decoder.final_layernorm.weight": take("merger.ln_q.weight"),
    }
    for kind in _KINDS:
        for layer, module in (("linear_fc1", "merger.mlp.0"), ("linear_fc2", "merger.mlp.2")):
            tensors[f"vision_model.projection.encoder.{layer}.{kind}"] = take(f"{module}.{kind}")
        for number in range(config.depth):
            block = source.under(f"visual.blocks.{number}.")
            layer = f"vision_model.decoder.layers.{number}."
            tensors |= _qwen_attention(source, f"visual.blocks.{number}.", layer, kind, config.num_heads)
            tensors[f"{layer}mlp.linear_fc1.{kind}"] = fc1(block(f"mlp.gate_proj.{kind}"), block(f"mlp.up_proj.{kind}"))
            tensors[f"{layer}mlp.linear_fc2.{kind}"] = block(f"mlp.down_proj.{kind}")
    return tensors


def qwen3_tower(source: Published, config: Any) -> Tensors:
    """Norms with biases, and a merger after the tower and after some of its layers. One form for both bridges."""
    visual = "model.visual."
    tensors = {"vision_model.pos_embed.weight": source.take(f"{visual}pos_embed.weight")}
    mergers = {"merger.": "merger."}
    for number in range(len(config.deepstack_visual_indexes)):
        mergers[f"deepstack_merger_list.{number}."] = f"decoder.deepstack_merger_list.{number}."
    for kind in _KINDS:
        tensors[f"vision_model.patch_embed.proj.{kind}"] = source.take(f"{visual}patch_embed.proj.{kind}")
        for published, megatron in mergers.items():
            for part, to in (("norm", "patch_norm"), ("linear_fc1", "linear_fc1"), ("linear_fc2", "linear_fc2")):
                name = f"vision_model.{megatron}{to}.{kind}"
                tensors[name] = source.take(f"{visual}{published}{part}.{kind}")
        for number in range(config.depth):
            block, layer = f"{visual}blocks.{number}.", f"vision_model.decoder.layers.{number}."
            tensors |= _qwen_attention(source, block, layer, kind, config.num_heads)
            for part in ("linear_fc1", "linear_fc2"):
                tensors[f"{layer}mlp.{part}.{kind}"] = source.take(f"{block}mlp.{part}.{kind}")
    return tensors


def _qwen_attention(source: Published, block: str, layer: str, kind: str, heads: int) -> Tensors:
    """Attention and both norms. Published: all queries, all keys, all values."""
    take = source.under(block)
    tensors = {
        f"{layer}self_attention.linear_qkv.{kind}": interleaved(list(take(f"attn.qkv.{kind}").chunk(3)), heads),
        f"{layer}self_attention.linear_proj.{kind}": take(f"attn.proj.{kind}"),
    }
    for norm, module in (("norm1", "self_attention.linear_qkv"), ("norm2", "mlp.linear_fc1")):
        if source.has(f"{block}{norm}.{kind}"):
            tensors[f"{layer}{module}.layer_norm_{kind}"] = take(f"{norm}.{kind}")
    return tensors


# Where it lies


def pieces_with_tower(sizes: ParallelSizes, *, gated: bool = False) -> Pieces:
    """Megatron's pieces of a model that sees: the tower on the first stage, its fc1 cut once unless it is gated."""
    language = megatron_pieces(sizes)

    def pieces(name: str, tensor: torch.Tensor) -> Iterator[tuple[int, Box]]:
        if not name.startswith(TOWERS):
            yield from language(name, tensor)
            return
        if not name.startswith("vision_model."):
            yield 0, Box.whole(tuple(tensor.shape))
            return
        alone = ParallelSizes(layers=_LAYERS, tp=sizes.tp)
        like = name.replace("deepstack_merger_list.", "layers.")
        if not (gated and ".layers." in name):
            like = like.replace("linear_fc1.", "linear_qkv.")
        for rank in range(sizes.tp):
            boxes = local_pieces(like, tuple(tensor.shape), Coordinates.of(rank, alone), alone)
            yield from ((rank, box) for box in boxes)

    return pieces
