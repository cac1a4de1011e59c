"""What lies beside the weights: config, tokenizer, templates and code, copied as they are but for a few config keys."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbmerge.dtypes import DType
from nbmerge.engine.safetensors_file import index_json
from nbmerge.errors import Problem
from nbmerge.expressions import Expr
from nbmerge.layout import SourceFile
from nbmerge.naming.facts import ModelFacts
from nbmerge.naming.model import HFModel
from nbmerge.options import MergeOptions
from nbmerge.plan import OutputFile, SideFile
from nbmerge.receipt import RECEIPT_NAME

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".index.json", ".gguf", ".h5", ".msgpack", ".onnx")
# Files that speak of the checkpoint or its run, of an earlier merge, or of quantised or adapter weights that are not
# written. A pointer to a step would make the result look like a checkpoint.
_LEFT = {
    "config.json", "fsdp_config.json", "lora_train_meta.json", "adapter_config.json", "hf_quant_config.json",
    "latest", "latest_universal", "zero_to_fp32.py", "trainer_state.json", "layer_names.json",
    "latest_checkpointed_iteration.txt", "run_config.yaml", "metadata.json", RECEIPT_NAME,
}  # fmt: skip
_FOLDERS = ("additional_chat_templates",)  # the only folder that transformers' tokenizers read

Edits = dict[str, tuple[object, object]]


def edited_config(
    model: HFModel, outputs: Mapping[str, Expr], options: MergeOptions, facts: ModelFacts
) -> tuple[Edits, bytes]:
    """The keys of config.json that the merge changes, old and new, and the file: as it was where nothing changes."""
    config: dict[str, Any] = json.loads(json.dumps(model.config))
    edits: Edits = {}
    if dtype := _common_dtype(outputs):
        _edit_dtype(config, dtype.name, edits)
        if not any(isinstance(config.get(key), str) for key in ("dtype", "torch_dtype")):
            _edit(config, "dtype", dtype.name, edits)
    if model.tie_word_embedding is not None:
        _edit(config, "tie_word_embeddings", model.tie_word_embedding, edits)
    if options.is_value_model:
        _edit(config, "architectures", [facts.class_name], edits)
        _edit(config, "id2label", {"0": "LABEL_0"}, edits)  # num_labels of a config is how many of these it has
        _edit(config, "label2id", {"LABEL_0": 0}, edits)
        if "num_labels" in config:
            _edit(config, "num_labels", 1, edits)
    elif model.misplaced_architecture:
        _edit(config, "architectures", [model.misplaced_architecture], edits)
    _drop_quantization(config, edits)
    return edits, (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode() if edits else model.config_bytes


def _edit(config: dict[str, Any], key: str, value: object, edits: Edits, prefix: str = "") -> None:
    if config.get(key) != value:
        edits[prefix + key] = (config.get(key), value)
        config[key] = value


def _edit_dtype(config: dict[str, Any], name: str, edits: Edits, prefix: str = "") -> None:
    """The dtype of the config and of the parts that state one, as `save_pretrained` writes it."""
    for key in ("dtype", "torch_dtype"):
        if isinstance(config.get(key), str):
            _edit(config, key, name, edits, prefix)
    for section, content in config.items():
        if isinstance(content, dict) and section != "quantization_config":
            _edit_dtype(content, name, edits, f"{prefix}{section}.")


def _drop_quantization(config: dict[str, Any], edits: Edits, prefix: str = "") -> None:
    """Without quantization_config, on any level: the weights that were trained are plain ones."""
    if "quantization_config" in config:
        edits[f"{prefix}quantization_config"] = (config.pop("quantization_config"), None)
    for section, content in config.items():
        if isinstance(content, dict):
            _drop_quantization(content, edits, f"{prefix}{section}.")


def _common_dtype(outputs: Mapping[str, Expr]) -> DType | None:
    """The dtype of most floating elements."""
    weight: dict[DType, int] = {}
    for expr in outputs.values():
        if expr.dtype.is_floating:
            weight[expr.dtype] = weight.get(expr.dtype, 0) + expr.numel
    return max(weight, key=lambda dtype: weight[dtype], default=None)


@dataclass(frozen=True)
class SideFiles:
    """The small files of the result, those of the directory that are left out, and what is wrong with some."""

    files: tuple[SideFile, ...]
    left_out: tuple[str, ...]
    problems: tuple[Problem, ...]


def side_files(config_dir: Path, files: tuple[OutputFile, ...], config: bytes) -> SideFiles:
    """All small files of a result with these weights. config: the content of config.json."""
    found = {path.relative_to(config_dir).as_posix(): path for path in _candidates(config_dir)}
    taken = {name: path for name, path in found.items() if path.is_file() and _is_side_file(path)}
    outside = {name for name, path in taken.items() if _leads_outside(path, config_dir)}
    made = [SideFile(name, SourceFile.of(path, "config")) for name, path in taken.items() if name not in outside]
    made.append(SideFile("config.json", content=config))
    if len(files) > 1:
        made.append(SideFile("model.safetensors.index.json", content=index_json(files)))
    problems = [
        Problem(
            f"{name} is a link to a file outside the config's directory",
            where=str(config_dir),
            why="what it leads to would be copied, and perhaps published, with the model",
            fix="replace the link by the file, or remove it",
        )
        for name in sorted(outside)
    ]
    left = sorted(name for name in found if name not in taken and name != "config.json" and not name.startswith("."))
    return SideFiles(tuple(made), tuple(left), tuple(problems))


def _candidates(config_dir: Path) -> Iterator[Path]:
    for path in sorted(config_dir.iterdir()):
        if path.is_dir() and path.name in _FOLDERS:
            yield from sorted(path.iterdir())
        else:
            yield path


def _is_side_file(path: Path) -> bool:
    """Whether a file belongs beside the weights: no weights, nothing hidden, no log or lock."""
    hidden = path.name.startswith(".") or path.suffix in (".lock", ".log")
    return not hidden and path.name not in _LEFT and not path.name.endswith(_WEIGHTS)


def _leads_outside(path: Path, config_dir: Path) -> bool:
    """Whether a link leaves the directory; the Hub's cache links every file to its `blobs` folder."""
    real = path.resolve()
    return path.is_symlink() and config_dir.resolve() not in real.parents and real.parent.name != "blobs"
