"""Takes a checkpoint's adapter apart from its model, and does with it what the user asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from nbmerge import expressions as ex
from nbmerge.adapter_files import base_fix
from nbmerge.dtypes import BY_NAME
from nbmerge.errors import Problem
from nbmerge.expressions import Expr, Input
from nbmerge.geometry import Shape
from nbmerge.layout import Checkpoint
from nbmerge.naming.facts import ModelFacts
from nbmerge.naming.inverse import inverted
from nbmerge.naming.lora import refusals
from nbmerge.naming.lora.config import adapter_config, most_common_rank, selected_modules
from nbmerge.naming.lora.facts import LoraFacts
from nbmerge.naming.lora.fold import Kind, folded, folded_bias, folded_experts
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
from nbmerge.naming.lora.tied import Ties
from nbmerge.naming.model import HFModel
from nbmerge.naming.notes import Drop, Tie
from nbmerge.naming.prefixes import stripped_names
from nbmerge.naming.published import Base, by_published_name
from nbmerge.options import MergeOptions


@dataclass(frozen=True)
class Separated:
    """What is to be written. model: the model's tensors by its own names; adapter: those of adapter_model.safetensors.

    config: the adapter_config.json; facts: None where there are problems; is_untied: whether the model holds head and
    embedding apart, where its config ties them; ties: stored tensors under both names of a tie, which must be equal.
    """

    model: Mapping[str, Expr] = field(default_factory=dict)
    adapter: Mapping[str, Expr] = field(default_factory=dict)
    config: bytes = b""
    facts: LoraFacts | None = None
    drops: tuple[Drop, ...] = ()
    problems: tuple[Problem, ...] = ()
    is_untied: bool = False
    ties: tuple[Tie, ...] = ()


def separated(
    tensors: Mapping[str, Expr], checkpoint: Checkpoint, model: HFModel, options: MergeOptions, base: Base | None
) -> Separated:
    """The tensors of a checkpoint with an adapter, as options.lora asks. Raises OptionError for a wrong lora_config."""
    facts = model.facts
    olds, collisions = stripped_names(tensors, facts.names)
    parts = take_apart({new: tensors[old] for new, old in olds.items()}, facts.names)
    settings = read_settings(_places(checkpoint), options.lora_config, options.lora_alpha)
    lone = checkpoint.path if checkpoint.is_adapter else None
    if problems := [*collisions, *refusals.unreadable(parts, options.lora, checkpoint.path, is_alone=lone is not None)]:
        others = [problem for problem in settings.problems if lone is not None and problem.kind == "unsupported"]
        return Separated(problems=tuple(others or problems))
    adapter = DEFAULT if DEFAULT in parts.adapters else parts.adapters[0]
    is_alone = lone is not None or not parts.holds_model(adapter)
    if is_alone and (ends := settings.values.get("modules_to_save")):
        parts.set_saved(adapter, ends)  # the files have the names of training
    parts.respell(facts.names)
    if is_alone:
        settings = _take_trained(parts, adapter, settings, facts, is_loaded=lone is not None)
    work = _Work(parts, adapter, settings, facts, options, base, is_alone, lone)
    fitted, problems = fit(work.layers.values(), settings, facts, work.shape_of)
    problems = [*settings.problems, *problems, *work.problems(fitted)]
    is_untied = options.lora == "fold" and bool(work.ties.untied)
    if options.lora == "fold":
        untied = model.untied.facts if is_untied else facts
        problems += work.ties.problems(fitted, untied, forced=options.tie_word_embedding)
    if problems:
        return Separated(problems=tuple(problems))
    outputs = work.adapter_outputs(fitted) if options.lora != "fold" else {}
    return Separated(
        model=work.model(fitted),
        adapter=outputs,
        config=work.config(fitted) if outputs else b"",
        facts=work.summary(fitted),
        drops=tuple(work.drops()),
        is_untied=is_untied,
        ties=tuple(work.ties.compared(fitted, work.own)) if options.lora == "fold" else (),
    )


def _places(checkpoint: Checkpoint) -> list[Path]:
    """The directories in which files may say more of the adapter, those that say most first."""
    if checkpoint.is_adapter:  # what lies beside it may be of other adapters
        return [checkpoint.path]
    places = [checkpoint.path, checkpoint.path / "lora_adapter", checkpoint.path.parent / "lora_adapter"]
    places += [checkpoint.path.parent] if checkpoint.backend == "deepspeed" else []
    places += [checkpoint.config_dir] if checkpoint.config_dir is not None else []
    return places + [file.path.parent for file in checkpoint.files[:1]]  # of an iteration, where its root was opened


@dataclass
class _Work:
    """One adapter, the model that it adapts, and what is known of both.

    is_alone: whether the checkpoint holds no model; directory: of an adapter as peft writes it, which is then read as
    peft loads it: what replaces the model's own tensors gets their dtype, and what is of 16 bits is folded in float32.
    """

    parts: Adapted
    adapter: str
    settings: Settings
    facts: ModelFacts
    options: MergeOptions
    base: Base | None
    is_alone: bool
    directory: Path | None = None

    def __post_init__(self) -> None:
        self.layers: Mapping[str, Layer] = self.parts.layers.get(self.adapter, {})
        self.saved: Mapping[str, Expr] = self.parts.saved.get(self.adapter, {})
        self._base: dict[str, Expr] = {}
        if self.base is not None:
            published = by_published_name(self.base.tensors, self.facts)
            self._base = {**_in_memory(published, self.facts), **published}
        self.ties = Ties.of(self.facts, self.saved, self.settings)
        self.held = self._as_loaded(self.parts.model)

    def _as_loaded(self, tensors: Mapping[str, Expr]) -> dict[str, Expr]:
        """Tensors beside an adapter, in the dtype of those that they replace, if peft's loading puts them there."""
        if self.directory is None:
            return dict(tensors)
        bases = {name: next((self._base[each] for each in self.ties.same(name) if each in self._base), None)
                 for name in tensors}  # fmt: skip
        return {
            name: ex.cast(expr, base.dtype) if (base := bases[name]) is not None and base.dtype.is_floating else expr
            for name, expr in tensors.items()
        }

    def own(self, name: str) -> Expr | None:
        """The tensor of this very name, of the checkpoint or else of the base model."""
        return self.held.get(name, self._base.get(name))

    def weight(self, name: str) -> Expr | None:
        """A tensor of the model, of the checkpoint or else of the base model; under another name where it is tied."""
        held = (
            tensors[each] for tensors in (self.held, self._base) for each in self.ties.same(name) if each in tensors
        )
        return next(held, None)

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
        if self.directory is not None:
            known = {*self.facts.memory, *self.facts.published, *self.facts.tied_on_hub}
            found += refusals.strangers([name for name in (*self.held, *self.saved) if name not in known], self.facts)
        if self.is_alone:
            found += refusals.layers_lost(self._lost(), self.settings)
        if self.options.lora == "adapter":
            return found + refusals.left_over(self._left_over())
        directory = self.base.directory if self.base else None
        wanted = [
            next((same for same in self.ties.same(each.weight) if self.own(same)), each.weight) for each in fitted
        ]
        wanted += [f"{each.layer.plain}.bias" for each in fitted if each.layer.bias is not None]
        fix = base_fix(self.directory or Path())
        found += refusals.lacking(wanted, self.parts.model, self._base, directory, self.settings, fix)
        if self.base is not None and self.is_alone and not found:
            held = {*self.parts.model, *self.saved}
            needed = [name for name in self.facts.published if name not in self.facts.tied_on_hub]
            found += refusals.of_another_family(needed, held, self._base, self.facts, self.base.directory)
        return found

    def model(self, fitted: Sequence[Fitted]) -> dict[str, Expr]:
        """The model's tensors as they are written: with the adapter in them, without it, or none."""
        if self.options.lora == "adapter":
            return {}
        return self.folded_model(fitted) if self.options.lora == "fold" else self.held

    def folded_model(self, fitted: Sequence[Fitted]) -> dict[str, Expr]:
        """The model with the adapter in it, and with the modules that were trained whole in place of the originals."""
        precision = self.options.fold_precision
        model = {**self.held, **self._as_loaded(self.saved)}
        changed: dict[str, Expr] = {}
        order = {name: number for number, name in enumerate(self.facts.memory)}  # as peft merges: two may be tied
        for each in sorted(fitted, key=lambda each: order.get(each.weight, len(order))):
            name = self.ties.kept(each.weight)
            held, a, b = changed.get(name, self.weight(name)), self._loaded(each.layer.a), self._loaded(each.layer.b)
            if held is None or a is None or b is None:
                raise ValueError(f"{each.weight} was not looked for")  # `problems` tells of it before
            if each.kind.layer == "experts":
                changed[name] = folded_experts(each.kind, held, a, b, precision=precision)
            else:
                magnitude = self._loaded(each.layer.magnitude)
                changed[name] = folded(self._kind(each), held, a, b, magnitude, precision=precision)
            name = f"{each.layer.plain}.bias"
            added = self._loaded(each.layer.bias)
            if added is not None and (bias := self.weight(name)) is not None:
                changed[name] = folded_bias(each.kind, bias, added, precision=precision)
        model |= changed
        self.ties.settle(model, changed, self.weight)
        return model

    def _kind(self, each: Fitted) -> Kind:
        """How it is folded: on loading, peft adapts the fused parameter in place of the single experts in it."""
        rule = self.facts.published.get(each.weight)
        is_part = self.directory is not None and rule is not None and not isinstance(rule, Input)
        return replace(each.kind, layer="parameter") if is_part and each.kind.layer == "linear" else each.kind

    def _loaded(self, part: Expr | None) -> Expr | None:
        """A part of the adapter as it is folded: peft widens those of 16 bits when it loads a directory."""
        if part is None or self.directory is None or not part.dtype.is_floating or part.dtype.itemsize > 2:
            return part
        return ex.cast(part, BY_NAME["float32"])

    def adapter_outputs(self, fitted: Sequence[Fitted]) -> dict[str, Expr]:
        """The tensors of adapter_model.safetensors, under peft's names."""
        found = {saved_name(each.layer, part): expr for each in fitted for part, expr in each.layer.parts.items()}
        found |= {MODEL_PREFIX + name: expr for name, expr in self.saved.items()}
        adapted = {each.layer.plain: each.layer.module for each in fitted}
        # Rewritten alone, an adapter keeps what else was saved with it: resized embeddings, say.
        is_all = self.directory is not None and self.options.lora == "adapter"
        for name in self.parts.model if is_all else self._trained_biases():
            module, _, end = name.rpartition(".")
            wrapped = f"{adapted[module]}.base_layer.{end}" if module in adapted else name
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
        if not self.is_alone or self.directory is not None:
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
            why = "its original: the module was trained whole, and what was trained is written"
            dropped += [Drop(name, why) for name in replaced]
        return dropped

    def _other_base(self) -> str:
        """The base model that the adapter's file names, where another was given."""
        named, given = self.settings.values.get("base_model_name_or_path") or "", self.options.base_model
        return named if named and given and _last_part(named) != _last_part(given) else ""

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
            trained_on=self._other_base(),
            untied=tuple(sorted(self.ties.untied)) if self.options.lora == "fold" else (),
            also_changed=tuple(self.ties.also_changed(fitted)) if self.options.lora == "fold" else (),
            origins={"r": "the tensors", "use_rslora": "peft's default: nothing says otherwise", **told},
        )  # fmt: skip


def _last_part(name: str) -> str:
    """Of a model's path or name on the Hub, what two are compared by."""
    return name.rstrip("/").rpartition("/")[2].lower()


def _take_trained(parts: Adapted, adapter: str, settings: Settings, facts: ModelFacts, *, is_loaded: bool) -> Settings:
    """Of an adapter's tensors alone: what was trained whole, and whether biases were; the files' word, else the names'.

    is_loaded: whether it is peft's directory, whose file names all that was trained; other modules are the model's,
    saved with the adapter (peft's save_embedding_layers). Returns the settings, with `bias` where only names told it.
    """
    if not (is_loaded and settings.base):
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
