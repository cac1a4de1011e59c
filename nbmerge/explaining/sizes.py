"""Sizes of published models, to say which one a checkpoint is of.

Each row is from the `config.json` that the model's authors published on the Hugging Face Hub. Models whose numbers
are not known for certain are left out: a wrong row would send a user to the wrong model.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PublishedSize:
    """The sizes of a published model, as its config.json has them.

    model_types: as config.json names them, later names of the same family included; intermediate_size: of dense
    layers; expert_size: of one routed expert; experts: how many are routed to.
    """

    name: str
    model_types: tuple[str, ...]
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    key_value_heads: int
    head_dim: int
    vocab_size: int
    experts: int = 0
    expert_size: int = 0

    @property
    def query_rows(self) -> int:
        """Rows of the query projection."""
        return self.heads * self.head_dim

    @property
    def key_rows(self) -> int:
        """Rows of the key projection, and of the value projection."""
        return self.key_value_heads * self.head_dim


_LLAMA, _QWEN2, _QWEN3, _MISTRAL = ("llama",), ("qwen2",), ("qwen3",), ("mistral",)
_GEMMA3 = ("gemma3", "gemma3_text")

# name, types, hidden, intermediate, layers, heads, key-value heads, head_dim, vocabulary[, experts, expert size]
PUBLISHED: tuple[PublishedSize, ...] = (
    PublishedSize("Llama 2 7B", _LLAMA, 4096, 11008, 32, 32, 32, 128, 32000),
    PublishedSize("Llama 2 13B", _LLAMA, 5120, 13824, 40, 40, 40, 128, 32000),
    PublishedSize("Llama 2 70B", _LLAMA, 8192, 28672, 80, 64, 8, 128, 32000),
    PublishedSize("Llama 3 8B", _LLAMA, 4096, 14336, 32, 32, 8, 128, 128256),
    PublishedSize("Llama 3 70B", _LLAMA, 8192, 28672, 80, 64, 8, 128, 128256),
    PublishedSize("Llama 3.1 405B", _LLAMA, 16384, 53248, 126, 128, 8, 128, 128256),
    PublishedSize("Llama 3.2 1B", _LLAMA, 2048, 8192, 16, 32, 8, 64, 128256),
    PublishedSize("Llama 3.2 3B", _LLAMA, 3072, 8192, 28, 24, 8, 128, 128256),
    PublishedSize("Qwen2.5 0.5B", _QWEN2, 896, 4864, 24, 14, 2, 64, 151936),
    PublishedSize("Qwen2.5 1.5B", _QWEN2, 1536, 8960, 28, 12, 2, 128, 151936),
    PublishedSize("Qwen2.5 3B", _QWEN2, 2048, 11008, 36, 16, 2, 128, 151936),
    PublishedSize("Qwen2.5 7B", _QWEN2, 3584, 18944, 28, 28, 4, 128, 152064),
    PublishedSize("Qwen2.5 14B", _QWEN2, 5120, 13824, 48, 40, 8, 128, 152064),
    PublishedSize("Qwen2.5 32B", _QWEN2, 5120, 27648, 64, 40, 8, 128, 152064),
    PublishedSize("Qwen2.5 72B", _QWEN2, 8192, 29568, 80, 64, 8, 128, 152064),
    PublishedSize("Qwen3 0.6B", _QWEN3, 1024, 3072, 28, 16, 8, 128, 151936),
    PublishedSize("Qwen3 1.7B", _QWEN3, 2048, 6144, 28, 16, 8, 128, 151936),
    PublishedSize("Qwen3 4B", _QWEN3, 2560, 9728, 36, 32, 8, 128, 151936),
    PublishedSize("Qwen3 8B", _QWEN3, 4096, 12288, 36, 32, 8, 128, 151936),
    PublishedSize("Qwen3 14B", _QWEN3, 5120, 17408, 40, 40, 8, 128, 151936),
    PublishedSize("Qwen3 32B", _QWEN3, 5120, 25600, 64, 64, 8, 128, 151936),
    PublishedSize("Qwen3 30B-A3B", ("qwen3_moe",), 2048, 6144, 48, 32, 4, 128, 151936, 128, 768),
    PublishedSize("Qwen3 235B-A22B", ("qwen3_moe",), 4096, 12288, 94, 64, 4, 128, 151936, 128, 1536),
    PublishedSize("Mistral 7B", _MISTRAL, 4096, 14336, 32, 32, 8, 128, 32000),
    PublishedSize("Mistral Nemo 12B", _MISTRAL, 5120, 14336, 40, 32, 8, 128, 131072),
    PublishedSize("Mistral Small 24B", _MISTRAL, 5120, 32768, 40, 32, 8, 128, 131072),
    PublishedSize("Mixtral 8x7B", ("mixtral",), 4096, 14336, 32, 32, 8, 128, 32000, 8, 14336),
    PublishedSize("Mixtral 8x22B", ("mixtral",), 6144, 16384, 56, 48, 8, 128, 32000, 8, 16384),
    PublishedSize("Gemma 2B", ("gemma",), 2048, 16384, 18, 8, 1, 256, 256000),
    PublishedSize("Gemma 7B", ("gemma",), 3072, 24576, 28, 16, 16, 256, 256000),
    PublishedSize("Gemma 2 2B", ("gemma2",), 2304, 9216, 26, 8, 4, 256, 256000),
    PublishedSize("Gemma 2 9B", ("gemma2",), 3584, 14336, 42, 16, 8, 256, 256000),
    PublishedSize("Gemma 2 27B", ("gemma2",), 4608, 36864, 46, 32, 16, 128, 256000),
    PublishedSize("Gemma 3 1B", _GEMMA3, 1152, 6912, 26, 4, 1, 256, 262144),
    PublishedSize("Gemma 3 4B", _GEMMA3, 2560, 10240, 34, 8, 4, 256, 262208),
    PublishedSize("Gemma 3 12B", _GEMMA3, 3840, 15360, 48, 16, 8, 256, 262208),
    PublishedSize("Gemma 3 27B", _GEMMA3, 5376, 21504, 62, 32, 16, 128, 262208),
    # Latent attention: head_dim is qk_nope_head_dim + qk_rope_head_dim, which the query projection has.
    PublishedSize("DeepSeek-V2-Lite", ("deepseek_v2",), 2048, 10944, 27, 16, 16, 192, 102400, 64, 1408),
    PublishedSize("DeepSeek-V2", ("deepseek_v2",), 5120, 12288, 60, 128, 128, 192, 102400, 160, 1536),
    PublishedSize("DeepSeek-V3", ("deepseek_v3",), 7168, 18432, 61, 128, 128, 192, 129280, 256, 2048),
    PublishedSize("gpt-oss 20B", ("gpt_oss",), 2880, 2880, 24, 64, 8, 64, 201088, 32, 2880),
    PublishedSize("gpt-oss 120B", ("gpt_oss",), 2880, 2880, 36, 64, 8, 64, 201088, 128, 2880),
)
