"""A model that is saved in any of Megatron's forms is merged into what it was made of, name by name, bit by bit.

The Megatron tensors come from `tests.support.megatron_names`, which knows nothing of nbmerge's tables.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import nbmerge
from nbmerge.demo.megatron.pieces import ParallelSizes
from nbmerge.naming.model import auto_class_name
from nbmerge.report import MergeReport
from tests.support.megatron import whole
from tests.support.megatron_forms import megatron_fsdp, padded, singleton, stacked, with_mtp
from tests.support.megatron_layers import Container, Form, Spec, Tensors
from tests.support.megatron_models import VOCABULARY, write_megatron
from tests.support.megatron_names import to_megatron
from tests.support.megatron_others import write_fsdp_dtensor
from tests.support.megatron_vision import pieces_with_tower
from tests.support.models import HAS_CONVERSIONS, published_state, tiny_config, tiny_model, write_config
from tests.support.results import assert_same, bits_of_all, receipt_of, saved_bits


@dataclass(frozen=True)
class Case:
    """A model under the table of a family. alike: whether its layers can be stacked; experts: how many;
    local: whether the local spec has names of its own in torch_dist; plain: whose fc1 is not gated.
    """

    family: str
    model: str = ""
    form: Form = "bridge"
    alike: bool = True
    experts: int = 0
    local: bool = False
    mtp: int = 0
    plain: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return "-".join(
            filter(None, [self.model or self.family, self.form * (self.form != "bridge"), "mtp" * bool(self.mtp)])
        )

    @property
    def is_critic(self) -> bool:
        return self.family == "qwen2_value"

    @property
    def published(self) -> Tensors:
        """What the merge must give."""
        return self._with_mtp[0]

    @property
    def config_changes(self) -> dict[str, int]:
        return {"num_nextn_predict_layers": self.mtp} if self.mtp else {}

    @property
    def _with_mtp(self) -> tuple[Tensors, Any]:
        state, config = published_state(self.model or self.family), tiny_config(self.model or self.family)
        if self.is_critic:  # Megatron's value head has no bias
            state["score.bias"] = torch.zeros(1)
        return with_mtp(state, config, self.mtp) if self.mtp else (state, config)

    def tensors(self, spec: Spec = "te", container: Container = "torch_dist") -> Tensors:
        """The same under Megatron's names, layer by layer."""
        published, config = self._with_mtp
        return padded(
            to_megatron(self.family, published, config, spec=spec, container=container, form=self.form), VOCABULARY
        )


CASES = (
    Case("llama"), Case("mistral"), Case("qwen2"), Case("qwen2_tied"), Case("qwen2_value"), Case("qwen3"),
    Case("qwen2_moe", experts=3, local=True),
    Case("qwen3_moe", experts=3, local=True),
    Case("mixtral", experts=3, local=True),
    Case("deepseek_v2", alike=False, experts=4, local=True),
    Case("deepseek_v3", alike=False, experts=4, local=True),
    Case("deepseek_v3", "deepseek_v3_direct", alike=False, experts=4, local=True),
    Case("deepseek_v3", alike=False, experts=4, local=True, mtp=1),
    Case("gemma"), Case("gemma2"), Case("gemma2", form="mbridge"), Case("gemma3"), Case("gemma3", form="mbridge"),
    Case("gemma3_vision"),
    Case("gemma3_vision", form="mbridge", plain=("vision_model.",)),
    Case("glm4"),
    Case("glm4_moe", alike=False, experts=4, local=True),
    Case("glm4_moe", alike=False, experts=4, local=True, mtp=2),
    Case("gpt_oss", experts=4, local=True),
    Case("qwen2_5_vl"),
    Case("qwen2_5_vl", form="mbridge", plain=("vision_model.projection.",)),
    Case("qwen3_vl", plain=("vision_model.",)),
    Case("qwen3_vl", "qwen3_vl_deep", plain=("vision_model.",)),
    Case("qwen3_vl_moe", experts=3, local=True, plain=("vision_model.",)),
)  # fmt: skip
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def variants() -> Iterator[Any]:
    """Every case in every form that Megatron saves it in."""
    for case in CASES:
        for spec in ("te", "local") if case.local else ("te",):
            for form in ("stacked", "layers", "singleton"):
                if case.alike or form != "stacked":
                    yield pytest.param(case, spec, form, id=f"{case.name}-{spec}-{form}")


def arranged(case: Case, spec: Spec, form: str) -> Tensors:
    tensors = case.tensors(spec)
    if form == "stacked":
        return stacked(tensors)
    return singleton(tensors, plain=case.plain) if form == "singleton" else tensors


def write_checkpoint(directory: Path, case: Case, tensors: Mapping[str, torch.Tensor], pieces: Any = whole) -> Path:
    return write_megatron(directory, tensors, case.model or case.family, pieces=pieces, **case.config_changes)


def merged(checkpoint: Path, **options: Any) -> MergeReport:
    return nbmerge.merge(checkpoint, checkpoint.parent / "out", **options)


@pytest.mark.parametrize(("case", "spec", "form"), variants())
def test_the_published_tensors_come_back(tmp_path: Path, case: Case, spec: Spec, form: str):
    report = merged(write_checkpoint(tmp_path / "ckpt", case, arranged(case, spec, form)))
    assert_same(saved_bits(tmp_path / "out"), bits_of_all(case.published))
    assert report.plan.dialect.startswith("megatron (")
    trimmed = sum(name.endswith(("embed_tokens.weight", "lm_head.weight")) for name in case.published)
    assert {(trim.rows, trim.kept) for trim in report.plan.trims} == {(VOCABULARY, 37)}
    assert len(report.plan.trims) == trimmed - case.mtp  # a layer of MTP holds a copy of the trimmed table


@each_case
def test_whatever_the_parallel_sizes(tmp_path: Path, case: Case):
    ep = 2 if case.experts % 2 == 0 and case.experts else 1
    sizes = ParallelSizes(layers=2, experts=case.experts, tp=2, pp=2, ep=ep, etp=1)
    form = "stacked" if case.alike else "layers"
    pieces = pieces_with_tower(sizes, gated=case.family == "qwen2_5_vl")
    tensors = arranged(case, "local" if case.local else "te", form)
    merged(write_checkpoint(tmp_path / "ckpt", case, tensors, pieces))
    assert_same(saved_bits(tmp_path / "out"), bits_of_all(case.published))


@pytest.mark.parametrize("spec", ["te", "local"])
@pytest.mark.parametrize(
    "case", [case for case in CASES if not case.plain and case.form == "bridge"], ids=lambda case: case.name
)
def test_from_the_names_of_the_modules_as_megatron_fsdp_saves_them(tmp_path: Path, case: Case, spec: Spec):
    tensors = megatron_fsdp(case.tensors(spec, "ranks"))
    write_fsdp_dtensor(tmp_path / "ckpt" / "model" / "dist_ckpt", tensors, ParallelSizes(layers=2))
    write_config(tmp_path / "ckpt" / "model" / "huggingface", case.model or case.family, **case.config_changes)
    merged(tmp_path / "ckpt")
    assert_same(saved_bits(tmp_path / "out"), bits_of_all(case.published))


@pytest.mark.parametrize("case", [case for case in CASES if not case.local], ids=lambda case: case.name)
def test_of_dense_layers_torch_dist_has_one_set_of_names(case: Case):
    assert case.tensors("local").keys() == case.tensors("te").keys()


@each_case
def test_transformers_loads_the_model_that_was_saved(tmp_path: Path, case: Case):
    report = merged(write_checkpoint(tmp_path / "ckpt", case, arranged(case, "te", "layers")))
    model, loading = load(tmp_path / "out")
    beyond = tuple(f"model.layers.{2 + extra}." for extra in range(case.mtp))
    unloaded = {name for name in case.published if name.startswith(beyond)}
    assert set(report.plan.unloaded) == set(receipt_of(tmp_path / "out")["unloaded"]) == unloaded
    told = {key: value for key, value in loading.items() if value}
    assert all(name.startswith(beyond) for name in told.pop("unexpected_keys", ()))
    assert told == {}
    want = tiny_model(case.model or case.family).state_dict() | (
        {"score.bias": torch.zeros(1)} if case.is_critic else {}
    )
    assert [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, want[name])] == []
    with torch.no_grad():
        assert model(input_ids=torch.tensor([[5, 31, 8, 20]])).logits.isfinite().all()


def load(directory: Path) -> tuple[Any, Mapping[str, Any]]:
    """The model of the auto class for the config, and transformers' report on loading it."""
    import transformers

    architecture = json.loads((directory / "config.json").read_text())["architectures"][0]
    auto = getattr(transformers, auto_class_name(architecture))
    model, loading = auto.from_pretrained(directory, output_loading_info=True)
    if HAS_CONVERSIONS and model._can_set_experts_implementation():
        model.set_experts_implementation("eager")  # the others need rows of a multiple of 16 bytes
    return model.eval(), loading
