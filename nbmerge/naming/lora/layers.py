"""Which weight each layer of an adapter belongs to, and how the two fit: decided by names and shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from nbmerge.errors import Problem, listing
from nbmerge.expressions import Expr
from nbmerge.geometry import Shape
from nbmerge.naming.facts import ModelFacts
from nbmerge.naming.lora.checks import is_size
from nbmerge.naming.lora.fold import Kind
from nbmerge.naming.lora.keys import Layer
from nbmerge.naming.lora.settings import Settings

_CONV = {3: "conv1d", 4: "conv2d", 5: "conv3d"}


@dataclass(frozen=True)
class Fitted:
    """A layer of the adapter with what it adapts. weight: the model's name for it; kind: for peft's arithmetic."""

    layer: Layer
    weight: str
    kind: Kind

    @property
    def is_parameter(self) -> bool:
        """Whether a parameter is adapted by its own name, and not a module (peft's target_parameters)."""
        return self.kind.layer in ("experts", "parameter")

    @property
    def target(self) -> str:
        """The name that peft's patterns are of: the parameter's where it adapts one, else the module's."""
        return self.weight if self.is_parameter else self.layer.plain

    @property
    def trained(self) -> str:
        """The target's name while it trained, which the files' patterns are of."""
        own = self.layer.plain
        return (self.layer.trained or own) + self.target.removeprefix(own)


def fit(
    layers: Iterable[Layer], settings: Settings, facts: ModelFacts, shape_of: Callable[[str], Shape | None]
) -> tuple[list[Fitted], list[Problem]]:
    """Every layer with its weight, and what is wrong. shape_of: of a tensor of the model by name, None for others."""
    fitted: list[Fitted] = []
    problems: list[Problem] = []
    for layer in layers:
        made = _fit(layer, settings, facts, shape_of)
        if isinstance(made, Problem):
            problems.append(made)
        else:
            fitted.append(made)
    return fitted, problems + _contradictions(fitted, settings)


def _fit(
    layer: Layer, settings: Settings, facts: ModelFacts, shape_of: Callable[[str], Shape | None]
) -> Fitted | Problem:
    a, b = layer.a, layer.b
    if a is None or b is None:
        lacking = "lora_A" if a is None else "lora_B"
        return Problem(
            f"{layer.module} has {listing(layer.parts)} and no {lacking}", why="a part of the adapter was not saved",
            fix="save the adapter whole, with peft's get_peft_model_state_dict or the model's state dict",
            kind="missing",
        )  # fmt: skip
    candidates = _candidates(layer, facts, shape_of)
    fits = [(name, kind) for name, shape in candidates.items() for kind in _ways(layer, a, b, shape)]
    names = {name for name, _ in fits}
    if len(names) != 1:
        return _misfit(layer, a, b, candidates, sorted(names))
    name = names.pop()
    turned = {is_turned for _, (_, is_turned) in fits}
    is_turned = turned.pop() if len(turned) == 1 else name in facts.turned
    how, r = fits[0][1][0], a.shape[0]
    if how == "experts":
        r //= candidates[name][0]
    elif (name, ("linear", False)) in fits and (name != f"{layer.plain}.weight" or settings.is_parameter(name)):
        how, is_turned = "parameter", False
    made = Fitted(layer, name, Kind(how, r, 1, settings.use_rslora, layer.magnitude is not None, is_turned))
    if not is_size(settings.values.get("lora_alpha")):  # there is a problem already, and no fold is made of this
        return made
    return replace(made, kind=replace(made.kind, alpha=settings.alpha_of(made.trained)))


def _candidates(layer: Layer, facts: ModelFacts, shape_of: Callable[[str], Shape | None]) -> dict[str, Shape]:
    """The tensors that the layer may adapt: the module's weight, else the matrices that it has as parameters."""
    name = f"{layer.plain}.weight"
    if (shape := shape_of(name)) is not None:
        return {name: shape}
    own = [each for each in facts.memory if each.rpartition(".")[0] == layer.plain]
    return {each: shape for each in own if (shape := shape_of(each)) is not None and len(shape) > 1}


def _ways(layer: Layer, a: Expr, b: Expr, shape: Shape) -> list[tuple[str, bool]]:
    """How the matrices fit a weight: peft's layer, and whether the weight is [in, out]. Two for a square one."""
    if len(b.shape) < 2 or len(a.shape) < 2 or a.shape[0] != b.shape[1] or not a.shape[0]:
        return []
    straight, turned = (b.shape[0], a.shape[1]), (a.shape[1], b.shape[0])
    if layer.is_embedding:
        return [("embedding", False)] if shape == turned else []
    if len(a.shape) > 2:
        is_whole = shape == (b.shape[0], *a.shape[1:]) and len(shape) in _CONV
        return [(_CONV[len(shape)], False)] if is_whole else []
    how = "linear"
    if len(shape) == 3 and shape[0] and a.shape[0] % shape[0] == 0:
        how, shape = "experts", shape[1:]
    return [(how, is_turned) for is_turned, want in ((False, straight), (True, turned)) if shape == want]


def _misfit(layer: Layer, a: Expr, b: Expr, candidates: dict[str, Shape], names: list[str]) -> Problem:
    matrices = f"A {list(a.shape)} and B {list(b.shape)}"
    if names:
        return Problem(
            f"{layer.module}: {matrices} fit {listing(names)}",
            why="the tensors do not say which parameter they adapt", kind="ambiguous",
            fix="fold the adapter in the training job (peft's merge_and_unload) and save again",
        )  # fmt: skip
    if not candidates:
        return Problem(
            f"the adapter adapts {layer.plain}, which the model does not have", where=layer.module,
            why="config.json, or the base model, is of another model",
            fix="pass the config of the model that was trained: --hf_model_config_path DIR",
        )  # fmt: skip
    shapes = "; ".join(f"{name} {list(shape)}" for name, shape in candidates.items())
    return Problem(
        f"{layer.module}: {matrices} do not fit {shapes}", where=layer.plain,
        why="adapter and model are of two runs, or the config is of another model",
        fix="pass the model that was trained: --hf_model_config_path DIR, --base_model DIR", kind="contradiction",
    )  # fmt: skip


def _contradictions(fitted: list[Fitted], settings: Settings) -> list[Problem]:
    """What the files say of the adapter, and its tensors say otherwise."""
    problems: list[Problem] = []
    wrong = {
        each.target: (each.kind.r, said)
        for each in fitted
        if (said := settings.rank_of(each.trained)) is not None and said != each.kind.r
    }
    if wrong:
        name, (held, said) = next(iter(wrong.items()))
        problems.append(
            Problem(
                f"r is {said} in the adapter's file and {held} in the tensors of {len(wrong):,} "
                f"{'layer' if len(wrong) == 1 else 'layers'}: {listing(wrong)}",
                where=settings.origins.get("r", name),
                why="the file is of another run",
                fix="pass the one of this run: --lora_config FILE",
                kind="contradiction",
            )
        )
    said_dora = settings.values.get("use_dora")
    plain = [each.layer.plain for each in fitted if each.kind.use_dora is not bool(said_dora)]
    if said_dora is not None and plain and not any(each.is_parameter for each in fitted):
        problems.append(
            Problem(
                f"use_dora is {said_dora} in the adapter's file, and {listing(plain)} "
                f"{'has no' if said_dora else 'has a'} lora_magnitude_vector",
                where=settings.origins["use_dora"],
                why="the file is of another run, or part of the adapter is missing",
                fix="pass the file of this run: --lora_config FILE",
                kind="contradiction",
            )
        )
    return problems
