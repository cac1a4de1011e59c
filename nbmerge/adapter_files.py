"""The files of a LoRA adapter alone, as peft's `save_pretrained` writes them, and the base model that they name."""

from __future__ import annotations

from pathlib import Path

from nbmerge.json_files import json_object

ADAPTER_CONFIG = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")  # in the order in which peft looks


def adapter_weights(directory: Path) -> str | None:
    """The name of the file with the adapter's weights; None without one. Whether a model lies beside is not asked."""
    held = (name for name in _WEIGHTS if (directory / name).is_file() or (directory / name).is_symlink())
    return next(held, None)


def base_named_by(directory: Path) -> str:
    """The directory of the base model that adapter_config.json names; empty where it names none that is here."""
    named = json_object(directory / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        return ""
    try:
        return named if (Path(named) / "config.json").is_file() else ""
    except (OSError, ValueError):  # a name too long, or with a null byte in it
        return ""


def base_fix(directory: Path) -> str:
    """What to pass: the base model, by its path where the adapter names one that is here. It is not read unasked."""
    if named := base_named_by(directory):
        return f"pass the model that training started from: --base_model {named} ({ADAPTER_CONFIG} names it)"
    return "pass the model that training started from: --base_model DIR"
