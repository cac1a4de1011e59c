"""The names that peft gives to an adapter's tensors, and taking them apart."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from nbmerge.expressions import Expr

MODEL_PREFIX = "base_model.model."  # PeftModel holds a tuner as `base_model`, which holds the model as `model`
DEFAULT = "default"

_TENSOR = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector)"
    r"(?:\.(?P<adapter>[^.]+))??(?:\.(?P<kind>weight|bias))?"
)
_SAVED = re.compile(r"(?P<module>.+)\.modules_to_save\.(?P<adapter>[^.]+)\.(?P<rest>.+)")
_ORIGINAL = re.compile(r"(?P<module>.+)\.original_module\.(?P<rest>.+)")
_BASE_LAYER = re.compile(r"(?<=\.)base_layer\.|\.base_layer$")
_TOKENS = re.compile(r"\.token_adapter\.|\.trainable_tokens_")
_ANY = re.compile(
    r"(^|\.)(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|base_layer|modules_to_save|original_module"
    r"|token_adapter)(\.|$)"
)


@dataclass
class Layer:
    """The tensors of an adapter at one module. module: as peft names it, `base_layer` of nested wrappers included.

    parts: `lora_A`, `lora_B`, `lora_B.bias`, `lora_embedding_A`, `lora_embedding_B`, `lora_magnitude_vector`.
    """

    module: str
    parts: dict[str, Expr] = field(default_factory=dict)

    @property
    def plain(self) -> str:
        """The module's name in the model without the adapter."""
        return without_base_layer(self.module)

    @property
    def is_embedding(self) -> bool:
        """Whether it adapts an embedding, whose matrices peft keeps as bare parameters."""
        return "lora_embedding_A" in self.parts

    @property
    def a(self) -> Expr | None:
        """[r, in]; of an embedding [r, rows]."""
        return self.parts.get("lora_embedding_A" if self.is_embedding else "lora_A")

    @property
    def b(self) -> Expr | None:
        """[out, r]; of an embedding [width, r]."""
        return self.parts.get("lora_embedding_B" if self.is_embedding else "lora_B")

    @property
    def bias(self) -> Expr | None:
        """[out], of an adapter with lora_bias."""
        return self.parts.get("lora_B.bias")

    @property
    def magnitude(self) -> Expr | None:
        """[out], of DoRA."""
        return self.parts.get("lora_magnitude_vector")


@dataclass
class Adapted:
    """A checkpoint's tensors, those of its adapters apart.

    model: by the model's own names, of modules that were trained whole their original; layers: by adapter and module;
    saved: by adapter, the tensors of modules that were trained whole, by the model's own names; whole: by adapter,
    those modules; unknown: names of adapter tensors of a kind that is not read.
    """

    model: dict[str, Expr] = field(default_factory=dict)
    layers: dict[str, dict[str, Layer]] = field(default_factory=dict)
    saved: dict[str, dict[str, Expr]] = field(default_factory=dict)
    whole: dict[str, set[str]] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    has_base: bool = False
    """Whether it holds weights of adapted layers: it is the whole model's state dict, and not the adapter's alone."""

    @property
    def adapters(self) -> list[str]:
        """The names of the adapters."""
        return list(dict.fromkeys([*self.layers, *self.saved]))

    def save(self, adapter: str, module: str, name: str, expr: Expr) -> None:
        """Counts a tensor among those of a module that was trained whole."""
        self.saved.setdefault(adapter, {})[name] = expr
        self.whole.setdefault(adapter, set()).add(module)

    def set_saved(self, adapter: str, modules: Iterable[str]) -> None:
        """Moves the modules of these names from the model to those that were trained whole.

        A checkpoint that get_peft_model_state_dict made has them under the model's own names.
        """
        for end in modules:
            for name in [name for name in self.model if f".{end}." in f".{name}"]:
                module = f".{name}".partition(f".{end}.")[0] + f".{end}"
                self.save(adapter, module.lstrip("."), name, self.model.pop(name))


def adapter_names(names: Iterable[str], known: Container[str] = ()) -> list[str]:
    """Those of the names that only a model with an adapter has."""
    return [name for name in names if name not in known and _ANY.search(name)]


def without_base_layer(name: str) -> str:
    """`q_proj.base_layer.weight` → `q_proj.weight`."""
    return _BASE_LAYER.sub("", name)


def take_apart(tensors: Mapping[str, Expr], known: Container[str] = ()) -> Adapted:
    """The tensors by what they are. tensors: without wrappers' prefixes; known: names that the model itself has."""
    found = Adapted()
    for name, expr in tensors.items():
        own = name.removeprefix(MODEL_PREFIX)
        if name in known or own in known:
            found.model[name if name in known else own] = expr
        elif _TOKENS.search(own):
            found.unknown.append(name)
        elif match := _TENSOR.fullmatch(own):
            part = match["part"] + (".bias" if match["kind"] == "bias" else "")
            layers = found.layers.setdefault(match["adapter"] or DEFAULT, {})
            layers.setdefault(match["module"], Layer(match["module"])).parts[part] = expr
        elif match := _SAVED.fullmatch(own):
            found.save(match["adapter"], match["module"], f"{match['module']}.{match['rest']}", expr)
        elif match := _ORIGINAL.fullmatch(own):
            found.model[f"{without_base_layer(match['module'])}.{match['rest']}"] = expr
        else:
            found.model[without_base_layer(own)] = expr
            found.has_base |= without_base_layer(own) != own
    return found


def saved_name(layer: Layer, part: str) -> str:
    """The name of a part in adapter_model.safetensors: peft leaves the adapter's name out."""
    stem, _, bias = part.partition(".")
    bare = stem.startswith("lora_embedding") or stem == "lora_magnitude_vector"
    return f"{MODEL_PREFIX}{layer.module}.{stem}" + ("" if bare else f".{bias or 'weight'}")


def shortest_targets(adapted: Sequence[str], modules: Iterable[str]) -> list[str]:
    """target_modules that select these modules and no other: the last parts of their names where that is enough.

    modules: all that the model has. The rule of peft's `check_target_module_exists`: the whole name, or its end.
    """
    wanted = set(adapted)
    ends = {name.rpartition(".")[2] for name in adapted}
    selected = {name for name in modules if name.rpartition(".")[2] in ends}
    return sorted(ends if selected <= wanted and not any(end.isdecimal() for end in ends) else wanted)
