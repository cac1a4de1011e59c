"""Makes the model of a config on the meta device and reads off it what a published checkpoint holds."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch

from nbmerge.errors import ConfigError, listing
from nbmerge.expressions import Expr, Input, input_names
from nbmerge.naming.facts import ModelDirectory, ModelFacts
from nbmerge.naming.saving import left_out_when_tied, reverted
from nbmerge.naming.versions import later_config, refuse_too_old

# DeepSeek-V3 routes by this bias; rounding it to 16 bits changes which experts are chosen.
_ALWAYS_FP32 = ("e_score_correction_bias",)


_KEPT = 4  # models; of the largest one, facts take 100 MB


@dataclass(frozen=True)
class _Asked:
    """All that decides the facts of a model whose code is transformers' own."""

    config: bytes
    is_value_model: bool
    tie_word_embedding: bool | None
    source: ModelDirectory = field(compare=False)


def model_facts(source: ModelDirectory) -> ModelFacts:
    """The facts of the model of a config. Raises ConfigError where transformers cannot make it.

    To make a model takes seconds where it has ten thousand modules, and a session asks of the same few: a plan, its
    validation, a comparison. Those that were asked of last are kept.
    """
    refuse_too_old()
    if source.trust_remote_code:  # the directory's code decides too
        return _facts_of(source)
    return _kept_facts(_Asked(source.config_bytes, source.is_value_model, source.tie_word_embedding, source))


@lru_cache(maxsize=_KEPT)
def _kept_facts(asked: _Asked) -> ModelFacts:
    return _facts_of(asked.source)


def _facts_of(source: ModelDirectory) -> ModelFacts:
    with _quiet_transformers():
        model = _meta_model(source)
        state = {name: value for name, value in model.state_dict(keep_vars=True).items() if _is_tensor(value)}
        tied = _tied_names(model, state)
        try:
            published, tied_on_hub = _published(model, state, tied)
        except Exception as error:  # a conversion that the recorder cannot follow
            raise ConfigError(
                f"transformers' own conversion of {type(model).__name__} cannot be followed: "
                f"{type(error).__name__}: {' '.join(str(error).split())}",
                where=str(source.config_dir / "config.json"),
                fix="report it with the versions of nbmerge and transformers",
            ) from error
        return ModelFacts(
            class_name=type(model).__name__,
            memory={name: tuple(value.shape) for name, value in state.items()},
            published=published,
            tied=tied,
            tied_on_hub=tied_on_hub,
            buffers=frozenset(name for name, _ in model.named_buffers() if name not in state),
            ignored=tuple(sorted(model._keys_to_ignore_on_load_unexpected or ())),
            fp32=tuple(sorted({*(getattr(model, "_keep_in_fp32_modules_strict", None) or ()), *_ALWAYS_FP32})),
            fp32_beside_fp16=tuple(sorted(getattr(model, "_keep_in_fp32_modules", None) or ())),
            config={name: value for name, value in model.config.to_dict().items() if name != "_name_or_path"},
            turned=_turned(model),
        )


def _turned(model: Any) -> frozenset[str]:
    """Weights that are [in, out]: of transformers' Conv1D, and of experts that say so."""
    return frozenset(
        f"{path}.{name}"
        for path, module in model.named_modules()
        if type(module).__name__ == "Conv1D" or getattr(module, "is_transposed", False)
        for name, value in module.named_parameters(recurse=False)
        if value.dim() > 1
    )


def _is_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor)


def _meta_model(source: ModelDirectory) -> Any:
    from transformers import AutoConfig

    where = str(source.config_dir / "config.json")
    source.config  # noqa: B018 - a missing or broken file gets our own error
    try:
        config = AutoConfig.from_pretrained(
            source.config_dir, trust_remote_code=source.trust_remote_code, local_files_only=True
        )
        if source.is_value_model:
            config.num_labels = 1
        if source.tie_word_embedding is not None:
            config.tie_word_embeddings = source.tie_word_embedding
        if hasattr(config, "quantization_config"):  # the shards hold plain weights
            del config.quantization_config
        # What the config asks for may not be installed here (FlashAttention), and changes no tensor.
        config._attn_implementation = config._experts_implementation = "eager"
        cls = _model_class(source, config)
        with torch.device("meta"):
            return cls(config)
    except ConfigError:
        raise
    except Exception as error:  # a config can break a class in any way
        later = later_config(source.config)
        raise ConfigError(
            f"no model can be made of the config: {type(error).__name__}: {' '.join(str(error).split())}",
            where=where,
            why=later.what if later else "",
            fix=later.fix
            if later
            else "if you trust the model code beside the config, pass --trust-remote-code"
            if "auto_map" in source.config and not source.trust_remote_code
            else "pass the config of the model that was trained: --hf_model_config_path DIR",
        ) from error


def _model_class(source: ModelDirectory, config: Any) -> Any:
    import transformers
    from transformers.models.auto import modeling_auto

    if source.is_value_model:
        mapping = modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING
        if type(config) not in mapping:
            raise ConfigError(
                f"transformers has no token-classification class for {config.model_type!r}",
                why="a value model is a token classifier with one label",
                fix="leave --is-value-model out and name the class in config.json's architectures",
            )
        return mapping[type(config)]
    architecture = source.architecture
    if source.trust_remote_code and getattr(config, "auto_map", None):
        return _remote_class(source, config.auto_map)
    if architecture is None:
        mapping = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING
        if type(config) in mapping:
            return mapping[type(config)]
    found = getattr(transformers, architecture or "", None)
    if (
        isinstance(found, type)
        and issubclass(found, transformers.PreTrainedModel)
        and found is not transformers.PreTrainedModel
    ):
        return found
    near = difflib.get_close_matches(architecture or "", dir(transformers), n=3)
    raise _unknown_class(source, near)


def _remote_class(source: ModelDirectory, auto_map: Mapping[str, Any]) -> Any:
    """The class that the checkpoint's own code defines; only with trust_remote_code."""
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    models = [entry for auto, entry in auto_map.items() if auto.startswith("AutoModel") and isinstance(entry, str)]
    named = [entry for entry in models if entry.rpartition(".")[2] == source.architecture]
    if not named and (source.architecture or not models):
        raise _unknown_class(source, [entry.rpartition(".")[2] for entry in models])
    return get_class_from_dynamic_module((named or models)[0], str(source.config_dir))


def _tied_names(model: Any, state: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """In-memory names that `save_pretrained` leaves out because another name has the same parameter."""
    groups: dict[int, list[str]] = {}
    for name, value in state.items():
        groups.setdefault(id(value), []).append(name)
    declared = left_out_when_tied(model, state)
    tied: dict[str, str] = {}
    for names in groups.values():
        if len(names) > 1:
            kept = next((name for name in names if name not in declared), names[0])
            tied.update({name: kept for name in names if name != kept})
    return tied


def _published(
    model: Any, state: Mapping[str, torch.Tensor], tied: Mapping[str, str]
) -> tuple[dict[str, Expr], dict[str, str]]:
    """What `save_pretrained` writes, as expressions over the in-memory tensors, and `tied` in published names."""
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_save or ()]
    kept = {name: tensor for name, tensor in state.items() if name not in tied}
    saved = {name: t for name, t in kept.items() if not any(pattern.search(name) for pattern in ignored)}
    published = _in_model_order(reverted(model, saved), list(state))
    names = {rule.name: name for name, rule in published.items() if isinstance(rule, Input)}
    aliases = {alias: next(iter(reverted(model, {alias: state[alias]}))) for alias in tied}
    return published, {aliases[alias]: names.get(name, name) for alias, name in tied.items()}


def _in_model_order(made: dict[str, Expr], order: list[str]) -> dict[str, Expr]:
    """Sorted by where the first in-memory tensor of each stands in the model, as its files are usually ordered."""
    position = {name: i for i, name in enumerate(order)}

    def first_position(item: tuple[str, Expr]) -> int:
        return min((position[name] for name in input_names(item[1])), default=len(order))

    return dict(sorted(made.items(), key=first_position))


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without transformers' warnings on the token ids and the like of a config, which a merge does not touch."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _unknown_class(source: ModelDirectory, known: list[str]) -> ConfigError:
    """No class of transformers has the name that the config gives."""
    name, later = source.architecture, later_config(source.config)
    return ConfigError(
        f"transformers has no class {name!r}" if name else "config.json names no architecture",
        where=str(source.config_dir / "config.json"),
        why="the class decides which tensors belong to the model" + (f"; near: {listing(known)}" if known else ""),
        fix=(later.fix if later else "update transformers")
        + ", or pass --trust-remote-code if the class is in the checkpoint's own files",
    )
