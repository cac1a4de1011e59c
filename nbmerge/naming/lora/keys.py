"""The names that peft gives to an adapter's tensors, and taking them apart."""

from __future__ import annotations

import re
from collections.abc import Collection, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from nbmerge.expressions import Expr
from nbmerge.naming.towers import respelled

MODEL_PREFIX = "base_model.model."  # PeftModel holds a tuner as `base_model`, which holds the model as `model`
DEFAULT = "default"

_EMBEDDINGS = ("embed_tokens", "lm_head")  # which peft saves with an adapter that adapts them

_TENSOR = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector)"
    r"(?:\.(?P<adapter>[^.]+))??(?:\.(?P<kind>weight|bias))?"
)
_PARTS = ("lora_A", "lora_B", "lora_B.bias", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
_LORA = re.compile(r"(^|\.)lora_")
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

    parts: `lora_A`, `lora_B`, `lora_B.bias`, `lora_embedding_A`, `lora_embedding_B`, `lora_magnitude_vector`;
    trained: the module's name while it trained, where the installed transformers spells it otherwise.
    """

    module: str
    parts: dict[str, Expr] = field(default_factory=dict)
    trained: str = ""

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
    those modules; tokens: names of tensors of single tokens that were trained; unread: other names of adapter tensors
    that are of no known part; doubles: pairs of names that mean the same tensor.
    """

    model: dict[str, Expr] = field(default_factory=dict)
    layers: dict[str, dict[str, Layer]] = field(default_factory=dict)
    saved: dict[str, dict[str, Expr]] = field(default_factory=dict)
    whole: dict[str, set[str]] = field(default_factory=dict)
    tokens: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)
    doubles: list[tuple[str, str]] = field(default_factory=list)

    @property
    def adapters(self) -> list[str]:
        """The names of the adapters."""
        return list(dict.fromkeys([*self.layers, *self.saved]))

    def save(self, adapter: str, module: str, name: str, expr: Expr) -> None:
        """Counts a tensor among those of a module that was trained whole."""
        self.saved.setdefault(adapter, {})[name] = expr
        self.whole.setdefault(adapter, set()).add(module)

    def holds_model(self, adapter: str) -> bool:
        """Whether it holds weights of the layers that are adapted: it is not the adapter's state dict alone."""
        plains = {layer.plain for layer in self.layers.get(adapter, {}).values()}
        telling = {name for name in plains if name.rpartition(".")[2] not in _EMBEDDINGS} or plains
        held = {module for module, _, end in (name.rpartition(".") for name in self.model) if end != "bias"}
        return not telling or bool(telling & held)

    def set_saved(self, adapter: str, ends: Iterable[str]) -> None:
        """Moves modules from the model to those that were trained whole. ends: of names, as modules_to_save has them.

        A checkpoint that get_peft_model_state_dict made has them under the model's own names.
        """
        every = tuple(ends)
        for name in self._untaken(adapter):
            module = next((module for module in ancestors(name) if module.endswith(every)), None)
            if module is not None:
                self.save(adapter, module, name, self.model.pop(name))

    def set_complete(self, adapter: str, known: Iterable[str]) -> None:
        """Moves the modules of which all tensors are here to those that were trained whole. known: the model's names.

        Of an adapter's state dict alone, in which no adapter_config.json names them.
        """
        own: dict[str, set[str]] = {}
        for name in known:
            own.setdefault(name.rpartition(".")[0], set()).add(name)
        adapted = {layer.plain for layer in self.layers.get(adapter, {}).values()}
        complete = {module for module, names in own.items() if names <= self.model.keys()} - adapted
        for name in self._untaken(adapter):
            if (module := name.rpartition(".")[0]) in complete:
                self.save(adapter, module, name, self.model.pop(name))

    def respell(self, known: Collection[str]) -> None:
        """Gives vision towers the names that the model has for them. known: the model's names."""
        modules = {module for name in known for module in ancestors(name)}
        self.model = respelled(self.model, known)
        self.saved = {adapter: respelled(tensors, known) for adapter, tensors in self.saved.items()}
        self.whole = {adapter: set(respelled(dict.fromkeys(names), modules)) for adapter, names in self.whole.items()}
        self.layers = {adapter: _respelled(layers.values(), modules) for adapter, layers in self.layers.items()}

    def _untaken(self, adapter: str) -> list[str]:
        """The model's tensors, without the originals of modules that were trained whole."""
        return [name for name in self.model if name not in self.saved.get(adapter, ())]


def adapter_names(names: Iterable[str], known: Container[str] = ()) -> list[str]:
    """Those of the names that only a model with an adapter has."""
    return [name for name in names if name not in known and _ANY.search(name)]


def without_base_layer(name: str) -> str:
    """`q_proj.base_layer.weight` → `q_proj.weight`."""
    return _BASE_LAYER.sub("", name)


def take_apart(tensors: Mapping[str, Expr], known: Container[str] = ()) -> Adapted:
    """The tensors by what they are. tensors: without wrappers' prefixes; known: names that the model itself has."""
    found = Adapted()
    sources: dict[tuple[str, ...], str] = {}

    def is_first(name: str, *meant: str) -> bool:
        first = sources.setdefault(meant, name)
        if first != name:
            found.doubles.append((first, name))
        return first == name

    for name, expr in tensors.items():
        own = name.removeprefix(MODEL_PREFIX)
        if name in known or own in known:
            plain = name if name in known else own
        elif _TOKENS.search(own):
            found.tokens.append(name)
            continue
        elif match := _TENSOR.fullmatch(own):
            part = match["part"] + (".bias" if match["kind"] == "bias" else "")
            adapter, module = match["adapter"] or DEFAULT, match["module"]
            if part not in _PARTS:
                found.unread.append(name)
            elif is_first(name, adapter, module, part):
                found.layers.setdefault(adapter, {}).setdefault(module, Layer(module)).parts[part] = expr
            continue
        elif match := _SAVED.fullmatch(own):
            found.save(match["adapter"], match["module"], f"{match['module']}.{match['rest']}", expr)
            continue
        elif match := _ORIGINAL.fullmatch(own):
            plain = f"{without_base_layer(match['module'])}.{match['rest']}"
        elif _LORA.search(own):
            found.unread.append(name)
            continue
        else:
            plain = without_base_layer(own)
        if is_first(name, plain):
            found.model[plain] = expr
    return found


def _respelled(layers: Collection[Layer], modules: Collection[str]) -> dict[str, Layer]:
    """The layers by module, as the model spells those. modules: all that it has."""
    plains = {layer.plain: layer.plain for layer in layers if layer.module.startswith(layer.plain)}
    news = {old: new for new, old in respelled(plains, modules).items() if new != old}
    found = (
        Layer(news[layer.plain] + layer.module.removeprefix(layer.plain), layer.parts, trained=layer.plain)
        if layer.plain in news
        else layer
        for layer in layers
    )
    return {layer.module: layer for layer in found}


def ancestors(name: str) -> Iterator[str]:
    """The modules that a tensor or module is in, the outermost first."""
    at = name.find(".")
    while at >= 0:
        yield name[:at]
        at = name.find(".", at + 1)


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


def shortest_saved(saved: Iterable[str], modules: Iterable[str]) -> list[str]:
    """modules_to_save that selects these modules and no other: ends of their names, as short as that allows.

    modules: all that the model has. peft's `_set_trainable` takes a module whose name ends so, at a dot or not.
    """
    wanted = set(saved)
    others = set(modules) - wanted
    found = set()
    for name in wanted:
        parts = name.split(".")
        ends = [".".join(parts[-count:]) for count in range(1, len(parts) + 1)]
        found.add(next((end for end in ends if not any(each.endswith(end) for each in others)), name))
    return sorted(found)
