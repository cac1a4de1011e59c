"""Which entries of an index are the model's, and under which root their names stand.

A state dict that is saved as `{"model": …, "optimizer": …}`, or by a Stateful application as `{"app": …}`, has the
model's names behind `model.` or `app.model.`; a flat one has them as they are.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from nbmerge.errors import AmbiguousCheckpointError, listing, plural
from nbmerge.geometry import Shape

Expected = Callable[[str], Shape | None]
"""The shape that the model of config.json has for a name; None for a name that it does not have."""

OPTIMIZER, EXTRA = "optimizer", "extra state"

_OPTIMIZER = re.compile(r"(?:optim|optims|optimizer|optimizers|opt|opt_state|optim_state|optimizer_state)(?:_\w+|\d+)?")
_EXTRA = re.compile(
    r"(?:lr_)?schedulers?|lr_scheduler_\w+|data_?loaders?|sampler|train(?:er|ing)?_state|rng(?:_states?)?|random_states?"
    r"|grad_scaler|scaler|epochs?|(?:global_)?steps?|iterations?|args|hparams|metadata|loss|best_\w+|extra_state"
)
_STATE = re.compile(r"\.(?:exp_avg|exp_avg_sq|max_exp_avg_sq|momentum_buffer|exp_inf)$")
_DEPTH = 3  # `app.optim.state…`: parts of a name among which the optimizer's own is looked for
# Tensors that stand directly in a model, whatever is in it: what is before them is the root.
_LANDMARK = re.compile(r"^((?:.+\.)?)(?:lm_head|score|v_head|embed_out|tok_embeddings)\.(?:weight|bias)$")
# Parts that training loops put before a model's names, and parts with which a model's names begin themselves.
_ROOTS = frozenset({
    "app", "state", "state_dict", "model_state", "model_state_dict", "module", "model", "models", "net", "network",
    "policy", "actor", "weights", "params", "generator", "_orig_mod", "_fsdp_wrapped_module",
})  # fmt: skip
_BASES = frozenset({"model", "transformer", "backbone", "gpt_neox", "bert", "roberta", "encoder", "decoder"})
_CHILDREN = frozenset({"embed_tokens", "layers", "norm", "language_model", "visual", "vision_tower", "h", "wte"})
_TORCHTITANS = re.compile(
    r"tok_embeddings\.weight|layers\.\d+\.(?:(?:attention|ffn)_norm|feed_forward\.w[123]|attention\.(?:qkv_linear\.)?wq)\."
)


@dataclass(frozen=True)
class Division:
    """root: what stands before the model's names, with its dot; weights: name in the model → name in the index;
    beside: names of optimizer and extra state by role; outside: other names that are not under the root.
    """

    root: str
    weights: dict[str, str]
    beside: dict[str, list[str]]
    outside: list[str]


def divide(names: Iterable[str], expected: Expected | None, where: str) -> Division:
    """The names of an index's tensors, divided. expected: what a config says, asked where the names do not decide.

    Raises AmbiguousCheckpointError where two models are in the index.
    """
    beside: dict[str, list[str]] = {}
    rest: list[str] = []
    names = list(names)
    of_optimizer = _with_state(names)
    for name in names:
        role = OPTIMIZER if name.rpartition(".")[0] in of_optimizer else role_of(name)
        if role is None:
            rest.append(name)
        else:
            beside.setdefault(role, []).append(name)
    root = _root(rest, [name for names in beside.values() for name in names], expected, where)
    weights = {name.removeprefix(root): name for name in rest if name.startswith(root)}
    return Division(root, weights, beside, [name for name in rest if not name.startswith(root)])


def _with_state(names: Sequence[str]) -> set[str]:
    """What stands before the names of an optimizer's state where its own key is missing: `state.norm.weight`.

    torch's get_optimizer_state_dict(flatten_optimizer_state_dict=True) puts it so beside a flat model.
    """
    parents, known = {name.rpartition(".")[0] for name in names}, frozenset(names)
    with_moments = {name.rpartition(".")[0] for name in names if _STATE.search(name)}
    return with_moments | {parent for parent in parents if parent.partition("state.")[2] in known}


def role_of(name: str) -> str | None:
    """`optimizer` or `extra state`, by the name of an entry; None for what may be a weight."""
    parts = name.split(".")[:_DEPTH]
    if _STATE.search(name) or any(_OPTIMIZER.fullmatch(part) for part in parts):
        return OPTIMIZER
    is_parameter = name.endswith((".weight", ".bias"))
    return EXTRA if not is_parameter and any(_EXTRA.fullmatch(part) for part in parts) else None


def has_torchtitan_names(names: Iterable[str]) -> bool:
    """Whether a model's tensors are named as torchtitan (and Meta before it) names them."""
    return any(_TORCHTITANS.match(name) for name in names)


def _root(names: Sequence[str], beside: Sequence[str], expected: Expected | None, where: str) -> str:
    found = Counter(match[1] for name in names if (match := _LANDMARK.match(name)))
    covering = [root for root in found if all(name.startswith(root) for name in names)]
    if covering:
        return min(covering, key=len)
    if expected is not None and (known := _known_roots(names, expected)):
        return _only(known, where)
    usual = [root for root in found if set(root.split(".")[:-1]) <= _ROOTS]
    return _only(usual, where) if usual else _common(names, beside)


def _known_roots(names: Iterable[str], expected: Expected) -> list[str]:
    """The prefixes behind which most names are the model's."""
    votes: Counter[str] = Counter()
    for name in names:
        parts = name.split(".")
        for at in range(min(len(parts), _DEPTH + 1)):
            if expected(".".join(parts[at:])) is not None:
                votes[".".join(parts[:at]) + "." if at else ""] += 1
    most = max(votes.values(), default=0)
    return [root for root, count in votes.items() if count == most]


def _only(roots: Sequence[str], where: str) -> str:
    """The one root, or the shortest where they are one in another; of several, the one that is named like a model."""
    shortest = min(roots, key=len)
    if all(root.startswith(shortest) for root in roots):
        return shortest
    usual = [root for root in roots if set(root.split(".")[:-1]) <= _ROOTS]
    if len(usual) == 1:
        return usual[0]
    raise AmbiguousCheckpointError(
        f"{plural(len(roots), 'model')} are in one checkpoint, under {listing(sorted(roots))}", where=where,
        why="each has the names of a whole model, and nothing says which of them is meant",
        fix="load the state dict of one in torch and save it into a directory of its own",
    )  # fmt: skip


def _common(names: Sequence[str], beside: Sequence[str]) -> str:
    """The root by the parts that all names begin with: of `model.model.` the first, of `model.layers.` none.

    beside: names of the optimizer and the like; where they stand beside `model.`, it is no part of the model's names
    unless what follows is what a model of transformers has there.
    """
    if not names:
        return ""
    common = _common_parts([name.split(".")[:-1] for name in names])
    root = ""
    for at, part in enumerate(common):
        last_base = part in _BASES and not any(later in _BASES for later in common[at + 1 :])
        below = {name.split(".")[at + 1] for name in names}
        is_key = not below & _CHILDREN and any(name.startswith(root) for name in beside)
        if part not in _ROOTS or (last_base and not is_key):
            break
        root += f"{part}."
    return root


def _common_parts(names: Sequence[Sequence[str]]) -> list[str]:
    common: list[str] = []
    for parts in zip(*names, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return common
