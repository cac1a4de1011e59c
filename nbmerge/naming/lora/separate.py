"""Takes a checkpoint's adapter apart from its model, and does with it what the user asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version

from nbmerge import expressions as ex
from nbmerge.errors import Problem
from nbmerge.expressions import Expr
from nbmerge.geometry import Shape
from nbmerge.layout import Checkpoint
from nbmerge.naming.facts import ModelFacts
from nbmerge.naming.inverse import inverted
from nbmerge.naming.lora import refusals
from nbmerge.naming.lora.config import adapter_config, most_common_rank, selected_modules
from nbmerge.naming.lora.facts import LoraFacts
from nbmerge.naming.lora.fold import folded, folded_bias, folded_experts
from nbmerge.naming.lora.keys import (
    DEFAULT,
    MODEL_PREFIX,
    Adapted,
    Layer,
    ancestors,
    saved_name,
    shortest_saved,
    take_apart,
)
from nbmerge.naming.lora.layers import Fitted, fit
from nbmerge.naming.lora.settings import Settings, read_settings
from nbmerge.naming.notes import Drop
from nbmerge.naming.prefixes import stripped_names
from nbmerge.naming.published import Base, by_published_name
from nbmerge.options import MergeOptions


@dataclass(frozen=True)
class Separated:
    """What is to be written. model: the model's tensors by its own names; adapter: those of adapter_model.safetensors.

    config: the adapter_config.json; facts: None where there are problems.
    """

    model: Mapping[str, Expr] = field(default_factory=dict)
    adapter: Mapping[str, Expr] = field(default_factory=dict)
    config: bytes = b""
    facts: LoraFacts | None = None
    drops: tuple[Drop, ...] = ()
    problems: tuple[Problem, ...] = ()


def separated(
    tensors: Mapping[str, Expr], checkpoint: Checkpoint, facts: ModelFacts, options: MergeOptions, base: Base | None
) -> Separated:
    """The tensors of a checkpoint with an adapter, as options.lora asks. Raises OptionError for a wrong lora_config."""
    olds, collisions = stripped_names(tensors, facts.names)
    parts = take_apart({new: tensors[old] for new, old in olds.items()}, facts.names)
    if problems := [*collisions, *refusals.unreadable(parts, options.lora)]:
        return Separated(problems=tuple(problems))
    adapter = DEFAULT if DEFAULT in parts.adapters else parts.adapters[0]
    places = [checkpoint.path / "lora_adapter", checkpoint.path, checkpoint.path.parent / "lora_adapter"]
    places += [checkpoint.path.parent] if checkpoint.backend == "deepspeed" else []
    places += [checkpoint.config_dir] if checkpoint.config_dir is not None else []
    places += [file.path.parent for file in checkpoint.files[:1]]  # of an iteration, where its root was opened
    settings = read_settings([checkpoint.path, *places], options.lora_config, options.lora_alpha)
    settings = _in_the_model(parts, adapter, settings, facts)
    work = _Work(parts, adapter, settings, facts, options, base)
    fitted, problems = fit(work.layers.values(), settings, facts, work.shape_of)
    problems = [*settings.problems, *problems, *work.problems(fitted)]
    if problems:
        return Separated(problems=tuple(problems))
    outputs = work.adapter_outputs(fitted) if options.lora != "fold" else {}
    return Separated(
        model=work.model(fitted),
        adapter=outputs,
        config=work.config(fitted) if outputs else b"",
        facts=work.summary(fitted),
        drops=tuple(work.drops()),
    )


@dataclass
class _Work:
    """One adapter, the model that it adapts, and what is known of both."""

    parts: Adapted
    adapter: str
    settings: Settings
    facts: ModelFacts
    options: MergeOptions
    base: Base | None

    def __post_init__(self) -> None:
        self.layers: Mapping[str, Layer] = self.parts.layers.get(self.adapter, {})
        self.saved: Mapping[str, Expr] = self.parts.saved.get(self.adapter, {})
        self._base: dict[str, Expr] = {}
        if self.base is not None:
            published = by_published_name(self.base.tensors, self.facts)
            self._base = {**_in_memory(published, self.facts), **published}

    def weight(self, name: str) -> Expr | None:
        """A tensor of the model, of the checkpoint or else of the base model."""
        return self.parts.model.get(name, self._base.get(name))

    def shape_of(self, name: str) -> Shape | None:
        """The shape of a tensor of the model, where it is held or config.json tells it."""
        if (held := self.weight(name)) is not None:
            return held.shape
        if name in self.facts.memory:
            return self.facts.memory[name]
        return self.facts.published[name].shape if name in self.facts.published else None

    def problems(self, fitted: Sequence[Fitted]) -> list[Problem]:
        """What forbids the mode that was asked for."""
        if found := refusals.of_another_kind(self.settings):
            return found
        if not self.parts.holds_model(self.adapter):
            found += refusals.layers_lost(self._lost(), self.settings)
        if self.options.lora == "adapter":
            return found + refusals.left_over(self._left_over())
        directory = self.base.directory if self.base else None
        wanted = [each.weight for each in fitted]
        wanted += [f"{each.layer.plain}.bias" for each in fitted if each.layer.bias is not None]
        found += refusals.lacking(wanted, self.parts.model, self._base, directory, self.settings)
        if self.base is not None and not self.parts.holds_model(self.adapter) and not found:
            held = {*self.parts.model, *self.saved}
            needed = [name for name in self.facts.published if name not in self.facts.tied_on_hub]
            found += refusals.of_another_family(needed, held, self._base, self.facts, self.base.directory)
        if self.options.lora == "fold":
            found += refusals.tied(fitted, {**self.facts.tied, **self.facts.tied_on_hub})
        return found

    def model(self, fitted: Sequence[Fitted]) -> dict[str, Expr]:
        """The model's tensors as they are written: with the adapter in them, without it, or none."""
        if self.options.lora == "adapter":
            return {}
        return self.folded_model(fitted) if self.options.lora == "fold" else dict(self.parts.model)

    def folded_model(self, fitted: Sequence[Fitted]) -> dict[str, Expr]:
        """The model with the adapter in it, and with the modules that were trained whole in place of the originals."""
        precision = self.options.fold_precision
        model = {**self.parts.model, **self.saved}
        for each in fitted:
            held, a, b = self.weight(each.weight), each.layer.a, each.layer.b
            if held is None or a is None or b is None:
                raise ValueError(f"{each.weight} was not looked for")  # `problems` tells of it before
            if each.kind.layer == "experts":
                model[each.weight] = folded_experts(each.kind, held, a, b, precision=precision)
            else:
                model[each.weight] = folded(each.kind, held, a, b, each.layer.magnitude, precision=precision)
            name = f"{each.layer.plain}.bias"
            if each.layer.bias is not None and (bias := self.weight(name)) is not None:
                model[name] = folded_bias(each.kind, bias, each.layer.bias, precision=precision)
        return model

    def adapter_outputs(self, fitted: Sequence[Fitted]) -> dict[str, Expr]:
        """The tensors of adapter_model.safetensors, under peft's names."""
        found = {saved_name(each.layer, part): expr for each in fitted for part, expr in each.layer.parts.items()}
        found |= {MODEL_PREFIX + name: expr for name, expr in self.saved.items()}
        adapted = {each.layer.plain for each in fitted}
        for name in self._trained_biases():
            module = name.rpartition(".")[0]
            wrapped = f"{module}.base_layer.bias" if module in adapted else name
            found[MODEL_PREFIX + wrapped] = self.parts.model[name]
        return found

    def _trained_biases(self) -> list[str]:
        """The biases that were trained beside the adapter."""
        kind = self.settings.values.get("bias", "none")
        adapted = {layer.plain for layer in self.layers.values()}
        return [
            name
            for name in self.parts.model
            if name.endswith(".bias") and name not in self.saved
            and (kind == "all" or (kind == "lora_only" and name.removesuffix(".bias") in adapted))
        ]  # fmt: skip

    def _left_over(self) -> list[str]:
        """Tensors beside an adapter alone that nothing says what they are for."""
        if self.parts.holds_model(self.adapter):
            return []
        known = {*self._trained_biases(), *self.saved, *(f"{layer.plain}.weight" for layer in self.layers.values())}
        return [name for name in self.parts.model if name not in known]

    def config(self, fitted: Sequence[Fitted]) -> bytes:
        """adapter_config.json."""
        return adapter_config(
            fitted, self.parts.whole.get(self.adapter, ()), self.settings, self.facts, self._modules(),
            base_model=self.options.base_model, base_is_beside=self.options.lora == "split",
        )  # fmt: skip

    def _saved_modules(self) -> list[str]:
        """Modules that were trained whole, as peft's modules_to_save has them."""
        return shortest_saved(self.parts.whole.get(self.adapter, ()), self._modules())

    def _modules(self) -> set[str]:
        """The model's modules, as far as tensors tell."""
        return {module for name in (*self.facts.memory, *self.parts.model) for module in ancestors(name)}

    def _lost(self) -> list[str]:
        """Linear and like modules that target_modules selects, and of which the adapter has nothing."""
        shapes = self.facts.memory
        modules = {
            name.removesuffix(".weight") for name in shapes if name.endswith(".weight") and len(shapes[name]) > 1
        }
        adapted = {layer.plain for layer in self.layers.values()}
        if not adapted <= modules:  # it is of parameters, or under other names than the config's
            return []
        whole = {name.rpartition(".")[0] for name in self.saved}
        return sorted((selected_modules(self.settings, modules) or set()) - adapted - whole)

    def drops(self) -> list[Drop]:
        """What is left out: other adapters, and in a fold the originals of modules that were trained whole."""
        dropped = [
            Drop(each.module, f"of the adapter {name!r}; {self.adapter!r} is taken")
            for name, layers in self.parts.layers.items()
            if name != self.adapter
            for each in layers.values()
        ]
        if self.options.lora == "fold":
            replaced = [name for name in self.saved if name in self.parts.model]
            dropped += [Drop(name, "its module was trained whole, and replaces it") for name in replaced]
        return dropped

    def summary(self, fitted: Sequence[Fitted]) -> LoraFacts:
        """What plan and receipt tell."""
        kinds = [each.kind for each in fitted]
        r = most_common_rank(fitted)
        alpha = Counter(kind.alpha for kind in kinds).most_common(1)[0][0] if kinds else 0
        scale = next(
            (kind.scale for kind in kinds if (kind.r, kind.alpha) == (r, alpha)), kinds[0].scale if kinds else 0
        )
        told = {key: self.settings.origins[key] for key in ("lora_alpha", "r", "use_rslora", "task_type")
                if key in self.settings.origins}  # fmt: skip
        return LoraFacts(
            mode=str(self.options.lora), adapter=self.adapter, layers=len(fitted), r=r, alpha=alpha, scale=scale,
            ranks={each.target: each.kind.r for each in fitted if each.kind.r != r},
            alphas={each.target: each.kind.alpha for each in fitted if each.kind.alpha != alpha},
            use_rslora=self.settings.use_rslora, use_dora=any(kind.use_dora for kind in kinds),
            saved=tuple(self._saved_modules()), peft=_peft_version(),
            precision=self.options.fold_precision if self.options.lora == "fold" else "",
            origins={"r": "the tensors", "use_rslora": "peft's default: nothing says otherwise", **told},
        )  # fmt: skip


def _in_the_model(parts: Adapted, adapter: str, settings: Settings, facts: ModelFacts) -> Settings:
    """Gives the parts the model's names, and finds what was trained beside an adapter that stands alone.

    Returns the settings, with `bias` where only the names told it.
    """
    is_alone = not parts.holds_model(adapter)
    if is_alone and (ends := settings.values.get("modules_to_save")):
        parts.set_saved(adapter, ends)  # the files have the names of training
    parts.respell(facts.names)
    return _take_trained(parts, adapter, settings, facts) if is_alone else settings


def _take_trained(parts: Adapted, adapter: str, settings: Settings, facts: ModelFacts) -> Settings:
    """Of an adapter's tensors alone: what was trained whole, and whether biases were, as the names tell it."""
    parts.set_complete(adapter, [*facts.memory, *facts.published])
    biases = {module for module, _, end in (name.rpartition(".") for name in parts.model) if end == "bias"}
    if not biases or "bias" in settings.values:
        return settings
    adapted = {layer.plain for layer in parts.layers[adapter].values()}
    kind = "lora_only" if biases <= adapted else "all"
    return replace(
        settings, values={**settings.values, "bias": kind}, origins={**settings.origins, "bias": "the tensors' names"}
    )


def _in_memory(published: Mapping[str, Expr], facts: ModelFacts) -> dict[str, Expr]:
    """The tensors of a base model under in-memory names, where its conversion can be undone."""
    try:
        rules = inverted(facts.published)
    except ValueError:
        return {}
    whole = {name: rule for name, rule in rules.items() if all(each in published for each in ex.input_names(rule))}
    return {name: ex.substitute(rule, published) for name, rule in whole.items()}


def _peft_version() -> str:
    try:
        return version("peft")
    except PackageNotFoundError:
        return "not installed as a package"
