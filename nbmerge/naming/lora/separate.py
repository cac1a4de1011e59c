"""Takes a checkpoint's adapter apart from its model, and does with it what the user asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version

from nbmerge import expressions as ex
from nbmerge.errors import Problem
from nbmerge.expressions import Expr
from nbmerge.geometry import Shape
from nbmerge.layout import Checkpoint
from nbmerge.naming.facts import ModelFacts
from nbmerge.naming.inverse import inverted
from nbmerge.naming.lora import refusals
from nbmerge.naming.lora.config import adapter_config, most_common_rank
from nbmerge.naming.lora.facts import LoraFacts
from nbmerge.naming.lora.fold import folded, folded_bias, folded_experts
from nbmerge.naming.lora.keys import DEFAULT, MODEL_PREFIX, Adapted, Layer, saved_name, take_apart
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
    known = {*facts.memory, *facts.published, *facts.tied_on_hub}
    olds, collisions = stripped_names(tensors, known)
    parts = take_apart({new: tensors[old] for new, old in olds.items()}, known)
    if problems := [*collisions, *refusals.unreadable(parts, options.lora)]:
        return Separated(problems=tuple(problems))
    adapter = DEFAULT if DEFAULT in parts.adapters else parts.adapters[0]
    places = [checkpoint.path / "lora_adapter", checkpoint.path, checkpoint.path.parent / "lora_adapter"]
    places += [checkpoint.path.parent] if checkpoint.backend == "deepspeed" else []
    places += [checkpoint.config_dir] if checkpoint.config_dir is not None else []
    places += [file.path.parent for file in checkpoint.files[:1]]  # of an iteration, where its root was opened
    settings = read_settings([checkpoint.path, *places], options.lora_config, options.lora_alpha)
    if adapter not in parts.saved and not parts.has_base:
        parts.set_saved(adapter, settings.values.get("modules_to_save") or ())
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
        if self.options.lora == "adapter":
            return []
        directory = self.base.directory if self.base else None
        wanted = [each.weight for each in fitted]
        wanted += [f"{each.layer.plain}.bias" for each in fitted if each.layer.bias is not None]
        found = refusals.lacking(wanted, self.parts.model, self._base, directory, self.settings)
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
        biases = self.settings.values.get("bias", "none")
        adapted = {each.layer.plain for each in fitted}
        for name, expr in self.parts.model.items():
            module, _, end = name.rpartition(".")
            if end == "bias" and (biases == "all" or (biases == "lora_only" and module in adapted)):
                wrapped = f"{module}.base_layer.bias" if module in adapted else name
                found[MODEL_PREFIX + wrapped] = expr
        return found

    def config(self, fitted: Sequence[Fitted]) -> bytes:
        """adapter_config.json."""
        names = {*self.facts.memory, *self.parts.model}
        return adapter_config(
            fitted, self._saved_modules(), self.settings, self.facts, {name.rpartition(".")[0] for name in names},
            base_model=self.options.base_model, base_is_beside=self.options.lora == "split",
        )  # fmt: skip

    def _saved_modules(self) -> list[str]:
        """Modules that were trained whole, by the last part of their names, as peft's modules_to_save has them."""
        return sorted({module.rpartition(".")[2] for module in self.parts.whole.get(self.adapter, ())})

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
            ranks={each.layer.plain: each.kind.r for each in fitted if each.kind.r != r},
            alphas={each.layer.plain: each.kind.alpha for each in fitted if each.kind.alpha != alpha},
            use_rslora=self.settings.use_rslora, use_dora=any(kind.use_dora for kind in kinds),
            saved=tuple(self._saved_modules()), peft=_peft_version(),
            precision=self.options.fold_precision if self.options.lora == "fold" else "",
            origins={"r": "the tensors", "use_rslora": "peft's default: nothing says otherwise", **told},
        )  # fmt: skip


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
