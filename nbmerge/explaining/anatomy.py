"""The sizes and parts of a model, read off the names and shapes of its tensors alone. Published or Megatron names."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from nbmerge.explaining.alike import row_of
from nbmerge.explaining.sizes import PUBLISHED, PublishedSize
from nbmerge.geometry import Shape

_LAYER = re.compile(r"^(?:.*\.)?(?:model|decoder|language_model|transformer)\.layers\.(\d{1,6})\.")
_EXPERT = re.compile(r"\bexperts\.(\d{1,6})\.")
_VISION = re.compile(r"(^|\.)(visual|vision_tower|vision_model|mtp|audio_tower)\.")

# Ending of a name → sizes in the order of the dimensions; `2·` for two of them in one tensor, None for none of ours.
_SIZES: tuple[tuple[re.Pattern[str], tuple[str | None, ...]], ...] = tuple(
    (re.compile(ending + "$"), sizes)
    for ending, sizes in (
        (r"(embed_tokens|word_embeddings)\.weight", ("vocab_size", "hidden_size")),
        (r"layers\.\d+\.mlp\.(gate_proj|up_proj)\.weight", ("intermediate_size", None)),
        (r"layers\.\d+\.mlp\.down_proj\.weight", (None, "intermediate_size")),
        (r"layers\.\d+\.mlp\.linear_fc2\.weight", (None, "intermediate_size")),
        (r"self_attn\.q_proj\.weight", ("query_rows", None)),
        (r"self_attn\.k_proj\.weight", ("key_rows", None)),
        (r"self_attention\.linear_proj\.weight", (None, "query_rows")),
        (r"self_attention\.linear_qkv\.weight", ("qkv_rows", None)),
        (r"experts\.(\d+\.)?down_proj(\.weight)?", (None, "expert_size")),
        (r"experts\.\d+\.(w2|linear_fc2)\.weight", (None, "expert_size")),
        (r"mlp\.(router|gate)\.weight", ("experts", None)),
    )
)

# Part of a model → what shows it in published names, and in Megatron's.
_PARTS: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("query and key norms", re.compile(r"self_attn\.k_norm\.weight$|self_attention\.k_layernorm\.weight$")),
    ("biases of query, key and value", re.compile(r"self_attn\.q_proj\.bias$|linear_qkv\.bias$")),
    ("routed experts", re.compile(r"\bexperts\.(\d+\.|gate_up_proj|down_proj|linear_fc|experts)")),
    ("a gated shared expert", re.compile(r"shared_expert_gate|shared_experts\.gate_weight")),
    ("latent attention", re.compile(r"kv_a_proj_with_mqa|linear_kv_down_proj")),
    ("norms after attention and MLP", re.compile(r"post_feedforward_layernorm|linear_fc2\.post_layernorm")),
    ("attention sinks", re.compile(r"self_attn\.sinks$|softmax_offset$")),
    ("a router bias", re.compile(r"e_score_correction_bias$|router\.expert_bias$")),
)
_TOWER, SEES = re.compile(r"(^|\.)(visual|vision_tower|vision_model)\."), "a vision tower"
_MOE, _BIAS, _NORMS = "routed experts", "biases of query, key and value", "query and key norms"
# Parts → the families whose tensors are named so.
FAMILIES: tuple[tuple[frozenset[str], str], ...] = tuple(
    (frozenset(parts), names)
    for parts, names in (
        ((), "Llama and Mistral"),
        ((_BIAS,), "Qwen2 and Qwen2.5"),
        ((_NORMS,), "Qwen3"),
        ((_NORMS, _MOE), "Qwen3-MoE"),
        ((_BIAS, _MOE, "a gated shared expert"), "Qwen2-MoE"),
        ((_MOE,), "Mixtral"),
        (("latent attention", _MOE), "DeepSeek-V2"),
        (("latent attention", _MOE, "a router bias"), "DeepSeek-V3"),
        (("norms after attention and MLP",), "Gemma 2"),
        (("norms after attention and MLP", _NORMS), "Gemma 3"),
        (("attention sinks", _BIAS, _MOE), "gpt-oss"),
    )
)


@dataclass(frozen=True)
class Anatomy:
    """sizes: by the config's name for them (`query_rows`, `key_rows` are heads times head_dim); parts: in words."""

    sizes: Mapping[str, int]
    parts: frozenset[str]

    @staticmethod
    def of(shapes: Mapping[str, Shape]) -> Anatomy:
        """What the tensors show. Names of a vision or audio tower and of multi-token prediction do not count."""
        names = [name for name in shapes if not _VISION.search(name)]
        rows = list({row_of(name): name for name in reversed(names)}.values())[::-1]  # one of each, the first
        sizes: dict[str, int] = {}
        for name in rows:
            for size, value in _sizes_of(name, shapes[name]):
                sizes.setdefault(size, value)
        layers = [int(match[1]) for name in names if (match := _LAYER.match(name))]
        if layers:
            sizes["num_hidden_layers"] = max(layers) + 1
        experts = [int(match[1]) for name in names if (match := _EXPERT.search(name))]
        if experts:
            sizes["experts"] = max(experts) + 1
        fused, queries = sizes.pop("qkv_rows", 0), sizes.get("query_rows", 0)
        if fused > queries > 0:
            sizes["key_rows"] = (fused - queries) // 2
        if queries and "key_rows" in sizes:
            sizes["qkv_rows"] = queries + 2 * sizes["key_rows"]
        parts = {part for part, sign in _PARTS if any(sign.search(name) for name in rows)}
        if any(_TOWER.search(name) for name in shapes):
            parts.add(SEES)
        return Anatomy(sizes, frozenset(parts))

    def published(self) -> tuple[PublishedSize, ...]:
        """The published models that have exactly these sizes, as far as the tensors show them."""
        if not {"hidden_size", "num_hidden_layers"} <= self.sizes.keys():
            return ()
        return tuple(model for model in PUBLISHED if self._is(model))

    def _is(self, model: PublishedSize) -> bool:
        sizes = {
            "hidden_size": model.hidden_size,
            "num_hidden_layers": model.layers,
            "intermediate_size": model.intermediate_size,
            "query_rows": model.query_rows,
            "key_rows": model.key_rows,
            "experts": model.experts,
            "expert_size": model.expert_size,
        }
        if bool(model.experts) != (_MOE in self.parts):
            return False
        padded = self.sizes.get("vocab_size", model.vocab_size) - model.vocab_size
        return -256 <= padded <= 16_384 and all(
            self.sizes[name] == size for name, size in sizes.items() if name in self.sizes
        )

    @property
    def family(self) -> str:
        """Whose tensors are named so; empty where none of the known families is, or names are of another kind."""
        if "query_rows" not in self.sizes and "latent attention" not in self.parts:
            return ""
        return next((names for parts, names in FAMILIES if parts == self.parts - {SEES}), "")


def _sizes_of(name: str, shape: Shape) -> Iterator[tuple[str, int]]:
    for ending, sizes in _SIZES:
        if ending.search(name):
            # Packed experts have a dimension more in front.
            for size, value in zip(sizes, shape[len(shape) - len(sizes) :], strict=False):
                if size is not None:
                    yield size, value
            return


def sizes_in_words(sizes: Mapping[str, int]) -> str:
    """`hidden_size 4096, 32 layers and 8 experts`."""
    words = {"num_hidden_layers": "{} layers", "experts": "{} experts", "query_rows": "{} query rows",
             "key_rows": "{} key rows"}  # fmt: skip
    said = [words.get(name, name + " {}").format(value) for name, value in sizes.items() if name != "qkv_rows"]
    return and_list(said)


def and_list(words: Sequence[str]) -> str:
    """`a, b and c`."""
    return " and ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))
