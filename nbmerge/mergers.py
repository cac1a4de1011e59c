"""The merger objects, with the names and signatures of verl's model merger, over the engine of this package.

    config = ModelMergerConfig(operation="merge", backend="fsdp", local_dir="actor", target_dir="merged")
    FSDPModelMerger(config).merge_and_save()

Source of the interface: verl/model_merger/base_model_merger.py (Apache-2.0), whose users switch by one import.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from nbmerge.api import carry_out, refuse_hopeless_upload
from nbmerge.errors import OptionError, VerificationError, plural
from nbmerge.layout import Checkpoint, LazyTensor
from nbmerge.loaders import choose_loader
from nbmerge.loaders.base import existing_directory
from nbmerge.memory import checkpoint_of
from nbmerge.naming.lora.facts import ADAPTER_DIRECTORY
from nbmerge.naming.lora.keys import adapter_names
from nbmerge.naming.model import HFModel, auto_class_name
from nbmerge.opening import open_checkpoint, plan_merge
from nbmerge.options import OPEN_ONLY, OPEN_OPTIONS, expanded_path
from nbmerge.plan import MergePlan
from nbmerge.report import MergeReport
from nbmerge.shown import Displayed

if TYPE_CHECKING:
    import torch

    from nbmerge.export.hub import PushReport


@dataclass
class ModelMergerConfig:
    """What a merger is to do. The fields are verl's, with verl's defaults; `options` adds this package's own.

    operation: `merge`, or `test` to compare what a merge would write with test_hf_dir; options: further
    keywords of `nbmerge.merge`, such as dtype or max_shard_size. Raises OptionError.
    """

    operation: str = "merge"
    backend: str = "auto"
    target_dir: str | None = "tmp"
    hf_upload_path: str | None = None
    private: bool = False
    test_hf_dir: str | None = None
    tie_word_embedding: bool = False
    trust_remote_code: bool = False
    is_value_model: bool = False
    local_dir: str | None = None
    hf_model_config_path: str | None = None
    use_cpu_initialization: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def hf_upload(self) -> bool:
        """Whether the merged directory is to be uploaded."""
        return self.operation == "merge" and bool(self.hf_upload_path)

    def __post_init__(self) -> None:
        if self.operation not in ("merge", "test"):
            raise OptionError(f"operation={self.operation!r}", fix="merge or test")
        if self.local_dir is None:
            raise OptionError("there is no checkpoint", fix="pass its directory: local_dir=")
        if self.operation == "test":
            if self.test_hf_dir is None:
                raise OptionError("there is nothing to compare with", fix="pass test_hf_dir=")
            self.target_dir = self.hf_upload_path = None
            self.private = False

    def merge_keywords(self) -> dict[str, Any]:
        """The keywords of `nbmerge.plan_merge` that the fields stand for."""
        named = ("backend", "tie_word_embedding", "trust_remote_code", "is_value_model", "hf_model_config_path")
        return {**{name: getattr(self, name) for name in named}, **self.options}


class BaseModelMerger(Displayed):
    """A merger of one checkpoint, of whatever layout. Nothing is read before a method is called.

    checkpoint, plan_made, report: what `open`, `plan` and a merge gave last, for its display; None before.
    """

    backend: ClassVar[str] = "auto"

    def __init__(self, config: ModelMergerConfig) -> None:
        self.config = config
        self.checkpoint: Checkpoint | None = None
        self.plan_made: MergePlan | None = None
        self.report: MergeReport | None = None

    @property
    def local_dir(self) -> Path:
        """The checkpoint's directory."""
        return expanded_path(str(self.config.local_dir))

    @property
    def hf_model_config_path(self) -> Path:
        """The directory of config.json and the tokenizer."""
        given = self.config.hf_model_config_path
        if given:
            return expanded_path(given)
        found = choose_loader(existing_directory(self.local_dir), self.backend).config_directory(self.local_dir)
        return found or self.local_dir / "huggingface"

    @property
    def model_config(self) -> Any:
        """transformers' config object of config.json."""
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(
            self.hf_model_config_path, trust_remote_code=self.config.trust_remote_code, local_files_only=True
        )

    def get_transformers_auto_model_class(self) -> Any:
        """transformers' auto class for the config's architecture. Raises ConfigError where there is none."""
        import transformers

        model = HFModel(self.hf_model_config_path)
        name = auto_class_name(model.architecture or "", is_value_model=self.config.is_value_model)
        if name == "AutoModelForImageTextToText" and not hasattr(transformers, name):
            name = "AutoModelForVision2Seq"  # its name before transformers 4.52
        return getattr(transformers, name)

    def open(self) -> Checkpoint:
        """The checkpoint's index. Raises as `nbmerge.open_checkpoint` does."""
        given = {name: value for name, value in self.config.merge_keywords().items() if name in OPEN_OPTIONS}
        asked = given.pop("backend")
        if self.backend != "auto" and asked not in ("auto", self.backend):
            raise OptionError(f"backend={asked!r} for {type(self).__name__}", fix=f"backend={self.backend!r}, or auto")
        self.checkpoint = open_checkpoint(self.local_dir, asked if self.backend == "auto" else self.backend, **given)
        return self.checkpoint

    def plan(self) -> MergePlan:
        """What would be written."""
        self.plan_made = plan_merge(self.open(), **self._plan_keywords())
        return self.plan_made

    def merge_and_save(self) -> MergeReport:
        """Merges into target_dir; for `test`, compares as verl does, and raises VerificationError on a difference."""
        from nbmerge.validation.against import compare_unmerged

        plan = self.plan()
        if self.config.operation == "merge":
            return self._write(plan)
        findings = compare_unmerged(plan, str(self.config.test_hf_dir)).findings
        if findings:
            title = f"{plural(len(findings), 'difference')} from {self.config.test_hf_dir}"
            raise VerificationError(title, problems=[finding.as_problem() for finding in findings])
        return MergeReport(plan)

    def save_hf_model_and_tokenizer(self, state_dict: Mapping[str, torch.Tensor | LazyTensor]) -> MergeReport:
        """Writes these tensors, with config and tokenizer, as a Hugging Face directory to target_dir.

        state_dict: torch tensors, lazy tensors, or both, under in-memory or published names; all that the model
        has. Raises as `nbmerge.merge` does.
        """
        checkpoint = checkpoint_of(state_dict, self.local_dir, self.hf_model_config_path)
        return self._write(plan_merge(checkpoint, **self._plan_keywords()))

    def save_lora_adapter(self, state_dict: Mapping[str, torch.Tensor | LazyTensor]) -> Path | None:
        """Writes the adapter among these tensors to target_dir/lora_adapter, and says where; None where there is none.

        The tensors stay as they are. For the model beside it, or with the adapter folded in, pass lora='split' or
        'fold' and `save_hf_model_and_tokenizer`. Raises as `nbmerge.merge` does: where nothing says lora_alpha, too.
        """
        if not adapter_names(state_dict):
            return None
        checkpoint = checkpoint_of(state_dict, self.local_dir, self.hf_model_config_path)
        keywords = {name: value for name, value in self._plan_keywords().items() if name != "fold_precision"}
        report = self._carried_out(plan_merge(checkpoint, **{**keywords, "lora": "adapter"}))
        return None if report.target is None else Path(report.target) / ADAPTER_DIRECTORY

    def upload_to_huggingface(self) -> PushReport:
        """Uploads target_dir to hf_upload_path, as `nbmerge.push_to_hub` does. Raises as it does, and OptionError."""
        from nbmerge.export.hub import push_to_hub

        if not self.config.hf_upload_path or not self.config.target_dir:
            raise OptionError("there is nowhere to upload to", fix="pass hf_upload_path= and target_dir=")
        return push_to_hub(self.config.target_dir, self.config.hf_upload_path, private=self.config.private)

    def cleanup(self) -> None:
        """Nothing is left to release: files are open only while a method runs, and no process group is made."""

    def _plan_keywords(self) -> dict[str, Any]:
        """The keywords that an opened checkpoint leaves to decide."""
        return {name: value for name, value in self.config.merge_keywords().items() if name not in OPEN_ONLY}

    def _write(self, plan: MergePlan) -> MergeReport:
        repo_id = self.config.hf_upload_path if self.config.hf_upload else None
        refuse_hopeless_upload(repo_id, private=self.config.private)
        report = self._carried_out(plan)
        if self.config.hf_upload and report.target is not None:
            self.report = report = replace(report, pushed=self.upload_to_huggingface())
        return report

    def _carried_out(self, plan: MergePlan) -> MergeReport:
        asked = {name: bool(self.config.options.get(name)) for name in ("overwrite", "dry_run")}
        self.report = carry_out(plan, self.config.target_dir, **asked)
        return self.report


class FSDPModelMerger(BaseModelMerger):
    """Merges per-rank FSDP checkpoints (`model_world_size_N_rank_R.pt`)."""

    backend = "fsdp"


class MegatronModelMerger(BaseModelMerger):
    """Merges Megatron checkpoints: `dist_ckpt/`, `iter_NNNNNNN/`, `mp_rank_*/`."""

    backend = "megatron"
