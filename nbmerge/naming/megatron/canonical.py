"""One form for the names and stacked tensors of Megatron checkpoints, whatever wrote them.

Layers:   `decoder.layers.REST` of shape [layers, ...] and `decoder.layers.3.REST`  → `decoder.layers.3.REST`
Experts:  `experts.experts.linear_fc1.weight` of shape [experts, ...], `experts.experts.7.linear_fc1.weight`,
          `experts.local_experts.7.linear_fc1.weight`, `experts.linear_fc1.weight7`  → `experts.7.linear_fc1.weight`
Halves:   `linear_fc1.weight_w` and `linear_fc1.weight_v`, gate and up  → `linear_fc1.weight`
Wrappers: `module.`, `model.module.`, `language_model.`  → nothing
HybridModel numbers attention and MLP of one layer separately  → one number for both
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from nbmerge import expressions as ex
from nbmerge.errors import Problem, listing, plural
from nbmerge.expressions import Expr

_WRAPPERS = re.compile(r"^(?:(?:model|module)\.)+(?=[^.]+\.)")
_LANGUAGE = re.compile(r"^language_model\.(?=embedding\.|decoder\.|output_layer\.|mtp\.)")
# Qwen3-VL has a second stack in its vision tower.
_STACKED = re.compile(r"^(.*?\b(?:layers|deepstack_merger_list))\.(?!\d)(.+)$")
_LAYER = re.compile(r"^decoder\.layers\.(\d{1,9})\.(.+)$")
_EXPERT_STACK = re.compile(r"^(.*\bexperts)\.experts\.(linear_fc[12]\..+)$")
_EXPERT_FORMS = (
    re.compile(r"^(.*\bexperts)\.(?:experts|local_experts)\.(\d{1,9})\.(linear_fc[12]\..+)$"),
    re.compile(r"^(.*\bexperts)\.(linear_fc[12]\.(?:weight|bias))(\d{1,9})((?:_[wv])?)$"),
)
_HALF = re.compile(r"^(.*)_([wv])$")
# The transformer layer of a multi-token-prediction layer was renamed in core 0.17.
_MTP = re.compile(r"^(mtp\.layers\.\d+)\.mtp_model_layer\.")
# Norms after attention and MLP are slime's for GLM-4 (post_self_attn_, post_mlp_) and mbridge's for Gemma.
_ATTENTION_PARTS = {"self_attention", "input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm"}
_MLP_PARTS = {"mlp", "pre_mlp_layernorm", "post_mlp_layernorm", "post_feedforward_layernorm"}
_FINAL_NORM, _HYBRID_NORM = "decoder.final_layernorm.", "decoder.final_norm."


@dataclass
class Canonical:
    """tensors: by canonical name; sources: canonical name → the name in the checkpoint; halves: the same for tensors
    of which only one half is there; unusable: whether nothing can be made of the tensors, for reasons in `problems`.
    """

    tensors: dict[str, Expr] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    halves: dict[str, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    unusable: bool = False

    def add(self, name: str, expr: Expr, source: str) -> None:
        """Adds a tensor; two of one name are a problem."""
        if name in self.tensors:
            self.problems.append(
                Problem(
                    f"{self.sources[name]} and {source} are both {name}",
                    why="the checkpoint holds a wrapped and an unwrapped copy of one parameter",
                    fix="save the state dict of the unwrapped model",
                    kind="contradiction",
                )
            )
        self.tensors[name] = expr
        self.sources[name] = source


def canonical(tensors: Mapping[str, Expr]) -> Canonical:
    """The tensors of a checkpoint in one form. Nothing is dropped but lone halves, which are problems."""
    unwrapped = Canonical()
    for source, expr in tensors.items():
        name = _LANGUAGE.sub("", _WRAPPERS.sub("", source))
        unwrapped.add(_MTP.sub(r"\1.transformer_layer.", name), expr, source)
    found = Canonical(problems=unwrapped.problems)
    for name, expr in unwrapped.tensors.items():
        for layered, layer in _layers(name, expr):
            for single, part in _experts(layered, layer):
                found.add(single, part, unwrapped.sources[name])
    _join_halves(found)
    if any(name.startswith(_HYBRID_NORM) for name in found.tensors):
        _renumber_hybrid(found)
    return found


def _layers(name: str, expr: Expr) -> list[tuple[str, Expr]]:
    """The layers of a stacked tensor, or the tensor itself."""
    match = _STACKED.match(name)
    if match is None or not expr.shape:
        return [(name, expr)]
    return [(f"{match[1]}.{number}.{match[2]}", row) for number, row in enumerate(ex.rows_of(expr))]


def _experts(name: str, expr: Expr) -> list[tuple[str, Expr]]:
    """The experts of a tensor that holds all of them, or the tensor itself under its expert's number."""
    if (match := _EXPERT_STACK.match(name)) and expr.shape:
        return [(f"{match[1]}.{number}.{match[2]}", row) for number, row in enumerate(ex.rows_of(expr))]
    if match := _EXPERT_FORMS[0].match(name):
        return [(f"{match[1]}.{match[2]}.{match[3]}", expr)]
    if match := _EXPERT_FORMS[1].match(name):
        return [(f"{match[1]}.{match[3]}.{match[2]}{match[4]}", expr)]
    return [(name, expr)]


def _join_halves(found: Canonical) -> None:
    """Gate and up halves that lie under names of their own, put together as Megatron has them in memory."""
    halves: dict[str, dict[str, str]] = {}
    for name in found.tensors:
        if match := _HALF.match(name):
            halves.setdefault(match[1], {})[match[2]] = name
    for name, by_half in halves.items():
        if len(by_half) < 2:
            (half,) = by_half.values()
            found.halves[name] = found.sources[half]
            del found.tensors[half]
            found.problems.append(
                Problem(
                    f"{name} has only one of its halves: {found.sources[half]}",
                    why="_w is the gate projection and _v the up projection of one parameter",
                    fix="the checkpoint is incomplete: copy it again from the machine that trained",
                    kind="missing",
                )
            )
            continue
        source = found.sources[by_half["w"]]
        gate, up = (found.tensors.pop(by_half[half]) for half in "wv")
        found.add(name, ex.cat([gate, up], 0), source)


def _renumber_hybrid(found: Canonical) -> None:
    """HybridModel (core 0.19 on) counts attention and MLP as layers of their own: 2N and 2N + 1 of layer N."""
    numbers: dict[int, set[str]] = {}
    for name in found.tensors:
        if match := _LAYER.match(name):
            numbers.setdefault(int(match[1]), set()).add(match[2].partition(".")[0])
    if problem := _faulty_hybrid(numbers):
        found.problems.append(problem)
        found.unusable = True
        return
    tensors, sources = found.tensors, found.sources
    found.tensors, found.sources = {}, {}
    for name, expr in tensors.items():
        new = _LAYER.sub(lambda match: f"decoder.layers.{int(match[1]) // 2}.{match[2]}", name)
        if name.startswith(_HYBRID_NORM):
            new = _FINAL_NORM + name.removeprefix(_HYBRID_NORM)
        found.add(new, expr, sources[name])


def _faulty_hybrid(numbers: Mapping[int, set[str]]) -> Problem | None:
    """What keeps layers from being attention and MLP in turns. numbers: the modules of each."""
    odd = [n for n, parts in numbers.items() if not parts <= (_MLP_PARTS if n % 2 else _ATTENTION_PARTS)]
    if odd:
        return Problem(
            f"a HybridModel of {plural(len(numbers), 'layer')} that do not alternate between attention and MLP",
            where=f"layer {listing(sorted(odd))}",
            why="layers of other kinds (Mamba, say) have no counterpart in the families that are known",
            fix="convert this model with the framework that trained it",
            kind="unsupported",
        )
    absent = sorted(set(range(2 * (max(numbers, default=-1) // 2 + 1))) - numbers.keys())
    if absent:
        return Problem(
            f"{plural(len(absent), 'layer')} of the HybridModel {'is' if len(absent) == 1 else 'are'} not in the "
            f"checkpoint: {listing(absent)}",
            why="attention and MLP of a layer N are 2N and 2N + 1; a pipeline stage is missing",
            fix="copy the checkpoint again from all machines that trained",
            kind="missing",
        )
    return None
