"""The families' tables. A new family is one file here, and one line below."""

from __future__ import annotations

from nbmerge.naming.megatron.families.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from nbmerge.naming.megatron.families.gemma import GEMMA, GEMMA_2, GEMMA_3, GEMMA_3_VISION
from nbmerge.naming.megatron.families.glm4 import GLM_4, GLM_4_MOE
from nbmerge.naming.megatron.families.gpt_oss import GPT_OSS
from nbmerge.naming.megatron.families.llama import LLAMA
from nbmerge.naming.megatron.families.mixtral import MIXTRAL
from nbmerge.naming.megatron.families.qwen2 import QWEN2
from nbmerge.naming.megatron.families.qwen2_moe import QWEN2_MOE
from nbmerge.naming.megatron.families.qwen3 import QWEN3
from nbmerge.naming.megatron.families.qwen3_moe import QWEN3_MOE
from nbmerge.naming.megatron.families.qwen_vl import QWEN2_5_VL, QWEN3_VL, QWEN3_VL_MOE
from nbmerge.naming.megatron.family import Family

FAMILIES: tuple[Family, ...] = (
    LLAMA, QWEN2, QWEN2_MOE, QWEN3, QWEN3_MOE, MIXTRAL, DEEPSEEK_V2, DEEPSEEK_V3,
    GEMMA, GEMMA_2, GEMMA_3, GEMMA_3_VISION, GLM_4, GLM_4_MOE, GPT_OSS, QWEN2_5_VL, QWEN3_VL, QWEN3_VL_MOE,
)  # fmt: skip


def family_of(model_type: str) -> Family | None:
    """The table for a config's `model_type`."""
    return next((family for family in FAMILIES if model_type in family.model_types), None)
