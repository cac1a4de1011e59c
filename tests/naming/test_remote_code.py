"""A model class that comes with the checkpoint: run only where the user says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import nbmerge

_CONFIGURATION = """
from transformers import PretrainedConfig

class PlusConfig(PretrainedConfig):
    model_type = "plus_of_the_tests"
    def __init__(self, width=4, **kwargs):
        self.width = width
        super().__init__(**kwargs)
"""
_MODELING = """
import pathlib
import torch
from transformers import PreTrainedModel
from .configuration_plus import PlusConfig

class PlusForCausalLM(PreTrainedModel):
    config_class = PlusConfig
    def __init__(self, config):
        super().__init__(config)
        self.plus = torch.nn.Linear(config.width, config.width + 1)
        self.post_init()
    def _init_weights(self, module):
        pass
"""


@pytest.fixture
def remote_model(tmp_path: Path) -> Path:
    config_dir = tmp_path / "ckpt" / "huggingface"
    config_dir.mkdir(parents=True)
    auto_map = {"AutoConfig": "configuration_plus.PlusConfig", "AutoModelForCausalLM": "modeling_plus.PlusForCausalLM"}
    config = {"architectures": ["PlusForCausalLM"], "model_type": "plus_of_the_tests", "width": 4, "auto_map": auto_map}
    (config_dir / "config.json").write_text(json.dumps(config))
    (config_dir / "configuration_plus.py").write_text(_CONFIGURATION)
    (config_dir / "modeling_plus.py").write_text(_MODELING)
    state = {"plus.weight": torch.arange(20.0).reshape(5, 4), "plus.bias": torch.ones(5)}
    torch.save(state, tmp_path / "ckpt" / "model_world_size_1_rank_0.pt")
    return tmp_path / "ckpt"


def test_remote_code_is_not_run_without_being_asked(remote_model: Path, tmp_path: Path) -> None:
    with pytest.raises(nbmerge.ConfigError, match="trust"):
        nbmerge.merge(remote_model, tmp_path / "out")
    assert not (tmp_path / "modules").exists()
    assert not (tmp_path / "out").exists()


def test_remote_code_names_the_tensors_and_is_copied(remote_model: Path, tmp_path: Path) -> None:
    report = nbmerge.merge(remote_model, tmp_path / "out", trust_remote_code=True)
    assert report.plan.model_class == "PlusForCausalLM"
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(merged["plus.weight"], torch.arange(20.0).reshape(5, 4))
    assert (tmp_path / "out" / "modeling_plus.py").read_text() == _MODELING
