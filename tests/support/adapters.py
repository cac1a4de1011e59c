"""Real peft models of the tiny families, and checkpoints of them."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.support.models import tiny_model, write_config
from tests.support.results import Bits, saved_bits
from tests.support.worlds import write_mesh_world

PREFIX = "base_model.model."


@dataclass
class Adapted:
    """A peft model, as it trained. family: of the model below it."""

    family: str
    model: Any

    def state(self) -> dict[str, torch.Tensor]:
        """All tensors under peft's names, as a full FSDP checkpoint has them."""
        return {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}

    def adapter_state(self) -> dict[str, torch.Tensor]:
        """The tensors of the adapter alone, under the names of the whole model's state dict."""
        return {name: tensor for name, tensor in self.state().items() if "lora_" in name or "modules_to_save" in name}

    def folded(self) -> dict[str, Bits]:
        """What `save_pretrained` writes after `merge_and_unload`."""
        return self._saved(copy.deepcopy(self.model).merge_and_unload())

    def base(self) -> dict[str, Bits]:
        """What `save_pretrained` writes of the model without the adapter."""
        from peft.utils import ModulesToSaveWrapper

        model = copy.deepcopy(self.model)
        for module in [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]:
            module.modules_to_save["default"] = copy.deepcopy(module.original_module)  # what unload() puts in its place
        return self._saved(model.unload())

    def adapter(self) -> dict[str, Bits]:
        """The tensors of the adapter_model.safetensors that peft writes, embeddings that did not change left out."""
        return self._saved(self.model, save_embedding_layers=False)

    def _saved(self, model: Any, **options: Any) -> dict[str, Bits]:
        with tempfile.TemporaryDirectory() as directory:
            model.save_pretrained(directory, **options)
            return saved_bits(Path(directory))

    def logits(self, model: Any = None) -> torch.Tensor:
        """Of a few tokens: [1, tokens, vocabulary]."""
        with torch.no_grad():
            return (model or self.model)(input_ids=torch.arange(5)[None]).logits


def adapted(family: str = "qwen2", dtype: str = "float32", *, base: Any = None, **config: Any) -> Adapted:
    """A tiny model with an adapter of random weights. config: peft's LoraConfig; base: another model to adapt."""
    from peft import LoraConfig, get_peft_model

    config = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj"], **config}
    with torch.random.fork_rng():
        torch.manual_seed(7)
        base = copy.deepcopy(tiny_model(family, dtype) if base is None else base)
        model = get_peft_model(base, LoraConfig(**config), autocast_adapter_dtype=False)
        with torch.no_grad():
            for name, tensor in model.named_parameters():
                if "lora_" in name or "modules_to_save" in name:
                    tensor.add_(torch.randn(tensor.shape).to(tensor.dtype) / 4)
    return Adapted(family, model.eval())


def write_world(directory: Path, made: Adapted, state: Mapping[str, torch.Tensor] | None = None) -> Path:
    """A checkpoint of it, of the whole state dict or of these tensors. Nothing in it says alpha."""
    state = made.state() if state is None else state
    write_mesh_world(directory, dict(state), (2,))
    write_config(directory / "huggingface", made.family)
    return directory


def save_adapter_config(made: Adapted, directory: Path) -> Path:
    """adapter_config.json as peft writes it, without the weights."""
    made.model.peft_config["default"].save_pretrained(directory)
    return directory


def write_directory(directory: Path, made: Adapted, **options: Any) -> Path:
    """The directory that peft writes of the adapter alone. options: of `PeftModel.save_pretrained`."""
    made.model.save_pretrained(directory, **options)
    return directory


def loaded_by_peft(family: str, base: Path, adapter: Path) -> Adapted:
    """What peft makes of a base model's directory and an adapter's."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(type(tiny_model(family)).from_pretrained(base, dtype="auto"), adapter)
    return Adapted(family, model.eval())
