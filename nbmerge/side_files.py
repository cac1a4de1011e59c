"""What lies beside the weights: config, tokenizer, templates and code, copied as they are but for a few config keys."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nbmerge.dtypes import DType
from nbmerge.engine.safetensors_file import index_json
from nbmerge.expressions import Expr
from nbmerge.naming.facts import ModelFacts
from nbmerge.naming.model import HFModel
from nbmerge.options import MergeOptions
from nbmerge.plan import OutputFile, SideFile
from nbmerge.receipt import RECEIPT_NAME

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".index.json", ".gguf", ".h5", ".msgpack")
_LEFT = {"config.json", "fsdp_config.json", RECEIPT_NAME}
_FOLDERS = ("additional_chat_templates",)  # the only folder that transformers' tokenizers read

Edits = dict[str, tuple[object, object]]


def edited_config(
    model: HFModel, outputs: Mapping[str, Expr], options: MergeOptions, facts: ModelFacts
) -> tuple[Edits, bytes | None]:
    """The keys of config.json that the merge changes, old and new, and the new file; None where it stays as it is."""
    config: dict[str, Any] = json.loads(json.dumps(model.config))
    edits: Edits = {}
    if dtype := _common_dtype(outputs):
        _edit_dtype(config, dtype.name, edits)
    if options.tie_word_embedding:
        _edit(config, "tie_word_embeddings", True, edits)
    if options.is_value_model:
        _edit(config, "architectures", [facts.class_name], edits)
        _edit(config, "id2label", {"0": "LABEL_0"}, edits)  # num_labels of a config is how many of these it has
        _edit(config, "label2id", {"LABEL_0": 0}, edits)
    if "quantization_config" in config:  # the weights that were trained are plain ones
        edits["quantization_config"] = (config.pop("quantization_config"), None)
    return edits, (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode() if edits else None


def _edit(config: dict[str, Any], key: str, value: object, edits: Edits, prefix: str = "") -> None:
    if config.get(key) != value:
        edits[prefix + key] = (config.get(key), value)
        config[key] = value


def _edit_dtype(config: dict[str, Any], name: str, edits: Edits) -> None:
    """The dtype of the config and of the parts that state one, as `save_pretrained` writes it."""
    for key in [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]:
        _edit(config, key, name, edits)
    for section, content in config.items():
        if isinstance(content, dict) and isinstance(content.get("dtype"), str):
            _edit(content, "dtype", name, edits, prefix=f"{section}.")


def _common_dtype(outputs: Mapping[str, Expr]) -> DType | None:
    """The dtype of most floating elements."""
    weight: dict[DType, int] = {}
    for expr in outputs.values():
        if expr.dtype.is_floating:
            weight[expr.dtype] = weight.get(expr.dtype, 0) + expr.numel
    return max(weight, key=lambda dtype: weight[dtype], default=None)


def side_files(config_dir: Path, files: tuple[OutputFile, ...], config: bytes | None) -> Iterator[SideFile]:
    """All small files of the result. config: the edited config.json, or None to copy it."""
    for path in sorted(config_dir.iterdir()):
        if _is_side_file(path) and path.name not in _LEFT:
            yield SideFile(path.name, source=path)
    for folder in _FOLDERS:
        for path in sorted((config_dir / folder).glob("*")):
            if _is_side_file(path):
                yield SideFile(f"{folder}/{path.name}", source=path)
    original = config_dir / "config.json"
    yield SideFile("config.json", content=config) if config else SideFile("config.json", source=original)
    if len(files) > 1:
        yield SideFile("model.safetensors.index.json", content=index_json(files))


def _is_side_file(path: Path) -> bool:
    """Whether a file belongs beside the weights: no weights, nothing hidden, no log or lock."""
    hidden = path.name.startswith(".") or path.suffix in (".lock", ".log")
    return path.is_file() and not hidden and not path.name.endswith(_WEIGHTS)
