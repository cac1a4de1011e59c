"""What a demonstration checkpoint is made of: model, layout, mesh and dtype, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from nbmerge.demo.megatron.files import huggingface_directory
from nbmerge.demo.models import architecture
from nbmerge.errors import OptionError

# The mesh of each layout, outermost dimension first, and which of its dimensions FSDP shards over.
# An empty mesh: the layout has none. Layouts that begin with fsdp1 use FullyShardedDataParallel, the rest fully_shard.
_MESHES: Mapping[str, tuple[str, ...]] = {
    "fsdp2": ("fsdp",),
    "hsdp": ("dp_replicate", "fsdp"),
    "fsdp_tp": ("fsdp", "tp"),
    "ddp_fsdp_tp": ("ddp", "fsdp", "tp"),
    "fsdp1": ("fsdp",),
    "fsdp1_hsdp": ("ddp", "fsdp"),
    "fsdp1_no_mesh": (),
    "fsdp1_flat": (),
    "plain": (),
    "megatron": ("pp", "ep", "tp"),
    "megatron_v1": ("pp", "ep", "tp"),
    "megatron_lm": ("pp", "ep", "tp"),
}
LAYOUTS = tuple(_MESHES)
# Megatron cuts everything into equal parts: dimensions that two ranks of tensor parallelism divide.
MEGATRON_ARCHITECTURES = ("qwen2", "qwen2_value", "llama", "qwen3", "qwen3_moe")
MEGATRON_VALUES: Mapping[str, Any] = {"hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One checkpoint to make.

    layout: one of LAYOUTS. `fsdp1_no_mesh` saves ShardedTensors, `fsdp1_flat` flat parameters (LOCAL_STATE_DICT,
    which cannot be merged), `plain` the tensors of a world of one process. `megatron` is verl's directory of a
    Megatron torch_dist checkpoint, `megatron_v1` verl's before 0.9, `megatron_lm` Megatron-LM's own.
    arch: one of `nbmerge.demo.models.ARCHITECTURES`; config: values that replace those of its tiny config.
    mesh_shape, mesh_dim_names: sizes and names of the mesh, in the order of the layout's own; by default every
    dimension but the FSDP one has size 2. The mesh of a Megatron layout has pipeline, expert and tensor parallel sizes,
    by default (rest, 1, 2); the expert parallel ranks are its data parallel ones, so that the three multiply to the
    world, and the experts are also cut by tensor parallelism. Its names are Megatron's.
    tied: whether lm_head shares the embedding. use_orig_params: FSDP1's option of that name.
    extra_buffers: adds a 0-d and a 1-d integer buffer that no model class knows. optimizer: also saves AdamW's state.
    lora_r: above 0 an adapter of that rank is trained on, on all linear layers, with alpha = 2 · lora_r: the model is
    wrapped by peft and saved with it, as verl does.

    Raises OptionError for a combination that cannot be made.
    """

    layout: str = "fsdp2"
    arch: str = "qwen2"
    world_size: int = 4
    mesh_shape: tuple[int, ...] | None = None
    mesh_dim_names: tuple[str, ...] | None = None
    dtype: str = "float32"
    tied: bool = False
    seed: int = 0
    use_orig_params: bool = True
    extra_buffers: bool = False
    optimizer: bool = False
    lora_r: int = 0
    config: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value, known in (("layout", self.layout, LAYOUTS), ("dtype", self.dtype, DTYPES)):
            if value not in known:
                raise OptionError(f"no {name} {value!r}", fix=f"one of {', '.join(known)}")
        architecture(self.arch)
        if self.world_size < 1 or (self.layout == "plain" and self.world_size != 1):
            raise OptionError(f"no {self.layout} checkpoint has a world of {self.world_size}", fix="pass world_size=1")
        names = _MESHES[self.layout]
        for given in (self.mesh_shape, self.mesh_dim_names):
            if given is not None and len(given) != len(names):
                raise OptionError(f"the mesh of {self.layout} has {len(names)} dimensions, not {len(given)}")
        if names and prod(self.mesh) != self.world_size:
            raise OptionError(
                f"a mesh of {' × '.join(map(str, self.mesh))} does not fit a world of {self.world_size} processes",
                fix="pass world_size and mesh_shape that multiply to it",
            )
        if self.lora_r < 0 or (self.lora_r and (self.is_megatron or self.has_tp)):
            raise OptionError(
                f"no {self.layout} checkpoint with an adapter of rank {self.lora_r} can be made",
                fix="pass lora_r=8, say, and a layout of FSDP alone",
            )
        if self.is_megatron:
            self._check_megatron()

    def _check_megatron(self) -> None:
        """Raises OptionError for what no Megatron checkpoint can be."""
        if self.arch not in MEGATRON_ARCHITECTURES:
            raise OptionError(
                f"no Megatron checkpoint of {self.arch} can be made", fix=f"one of {', '.join(MEGATRON_ARCHITECTURES)}"
            )
        if self.mesh_dim_names or self.extra_buffers:
            raise OptionError("a Megatron checkpoint has no names of mesh dimensions and no extra buffers")
        values, (_, ep, tp) = self.model_values, self.mesh
        experts = values.get("num_experts", 0)
        if ep > 1 and (experts == 0 or experts % ep):
            raise OptionError(
                f"{experts} experts cannot be spread over {ep} ranks", fix="pass a mesh_shape with another second size"
            )
        sizes = ["num_key_value_heads", "intermediate_size", *(["moe_intermediate_size"] if experts else [])]
        for name in sizes:
            if values[name] % tp:
                raise OptionError(
                    f"{name} {values[name]} cannot be cut into {tp} equal parts",
                    fix=f"pass config={{{name!r}: …}}, or a mesh_shape with another last size",
                )

    @property
    def mesh(self) -> tuple[int, ...]:
        """Sizes of the device mesh, outermost first; () where the layout has none."""
        if self.mesh_shape is not None:
            return self.mesh_shape
        names = _MESHES[self.layout]
        if self.is_megatron:
            return (self.world_size // 2, 1, 2)
        rest = self.world_size // 2 ** (len(names) - 1) if names else 0
        return tuple(rest if name == "fsdp" else 2 for name in names)

    @property
    def mesh_names(self) -> tuple[str, ...]:
        """Names of the mesh's dimensions."""
        return self.mesh_dim_names or _MESHES[self.layout]

    @property
    def is_megatron(self) -> bool:
        """Whether Megatron saved it, and not PyTorch's FSDP."""
        return self.layout.startswith("megatron")

    @property
    def model_values(self) -> dict[str, Any]:
        """The values of the model's config."""
        even = MEGATRON_VALUES if self.is_megatron else {}
        return {**architecture(self.arch).values, **even, "tie_word_embeddings": self.tied, **self.config}

    @property
    def has_tp(self) -> bool:
        """Whether the innermost mesh dimension is tensor parallel."""
        return _MESHES[self.layout][-1:] == ("tp",)

    @property
    def fsdp_version(self) -> int:
        """1 for FullyShardedDataParallel, 2 for fully_shard."""
        return 1 if self.layout.startswith("fsdp1") or self.layout == "plain" else 2

    def to_json(self) -> dict[str, Any]:
        """The recipe as JSON values."""
        return asdict(self)

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Recipe:
        """The recipe that `to_json` wrote."""
        fields: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
        }
        return Recipe(**fields)


@dataclass(frozen=True)
class DemoCheckpoint:
    """A checkpoint that was made, and the truth beside it.

    path: the checkpoint as the framework lays it out; huggingface: config and tokenizer, which the checkpoint of
    Megatron-LM alone has not in it; reference: what `save_pretrained` wrote of the
    whole model before it was sharded; state: a `.pt` file with the state dict of that model, by in-memory name.
    With LoRA both are the base model's, and adapter is what peft's `save_pretrained` wrote of the adapter.
    """

    directory: Path
    recipe: Recipe

    @property
    def path(self) -> Path:
        """The checkpoint directory."""
        return self.directory / "global_step_0" / "actor"

    @property
    def huggingface(self) -> Path:
        """The directory of config.json and the tokenizer."""
        if self.recipe.is_megatron:
            return huggingface_directory(self.recipe.layout, self.path)
        return self.path / "huggingface"

    @property
    def reference(self) -> Path:
        """The unsharded model as a Hugging Face directory."""
        return self.directory / "reference"

    @property
    def state(self) -> Path:
        """The unsharded state dict."""
        return self.directory / "unsharded.pt"

    @property
    def adapter(self) -> Path:
        """The unsharded adapter as peft saves it; there where the recipe has LoRA."""
        return self.directory / "adapter"
