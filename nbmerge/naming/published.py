"""Which output tensors the tensors of a checkpoint become: published names, or transformers' in-memory ones."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field

from nbmerge import expressions as ex
from nbmerge.errors import Problem
from nbmerge.explaining.alike import alike, and_more
from nbmerge.explaining.candidates import Mismatch
from nbmerge.explaining.diagnosis import Diagnosis, known_of
from nbmerge.explaining.model_patterns import CONFIG_FIX
from nbmerge.expressions import Expr, Input
from nbmerge.geometry import Shape
from nbmerge.layout import Absence
from nbmerge.naming.facts import ModelFacts
from nbmerge.naming.further_layers import further_layers
from nbmerge.naming.inverse import inverted
from nbmerge.naming.lora.keys import adapter_names
from nbmerge.naming.notes import Drop, Filled, Tie, Trim
from nbmerge.naming.prefixes import stripped_names
from nbmerge.naming.towers import respelled
from nbmerge.naming.turned import turned

HUB, TRANSFORMERS = "hub", "transformers"

# Buffers that older transformers saved and that every version computes anew when it loads.
_LEFTOVERS = re.compile(r"\.(rotary_emb\.inv_freq|masked_bias|attn\.bias)$")
_NEAREST_SOUGHT = 3  # as many as a message shows; each is compared with every name of the model


@dataclass(frozen=True)
class Named:
    """The outputs of a checkpoint, by name in the order in which files hold them, and what became of the rest.

    dialect: of the sources, `hub`, `transformers`, or the table that named them; unloaded: outputs that the class
    knows and does not load; mismatches: tensors of other shapes, missing or too many, for an explanation; diagnosis:
    of the config as a whole, where anything is wrong.
    """

    outputs: Mapping[str, Expr]
    expected: Mapping[str, Shape]
    dialect: str
    renamed: int = 0
    drops: tuple[Drop, ...] = ()
    ties: tuple[Tie, ...] = ()
    trims: tuple[Trim, ...] = ()
    fills: tuple[Filled, ...] = ()
    unloaded: tuple[str, ...] = ()
    problems: tuple[Problem, ...] = ()
    mismatches: tuple[Mismatch, ...] = ()
    diagnosis: Diagnosis | None = None


@dataclass(frozen=True)
class Given:
    """What is known of sources beside their names, much of it of those that a framework's own names were turned into.

    dialect: of their names now; sources: name → the checkpoint's own name for it; unloaded: those that the class
    publishes and does not load; reported: names whose absence has been told; diagnosis: of the config, from the
    framework's own names; absence: why saving left tensors out.
    """

    dialect: str | None = None
    sources: Mapping[str, str] = field(default_factory=dict)
    unloaded: Set[str] = frozenset()
    reported: Set[str] = frozenset()
    diagnosis: Diagnosis | None = None
    absence: Absence | None = None

    def why_missing(self, name: str) -> Absence | None:
        """Why saving left out the source of this name, where that is known."""
        return self.absence if self.absence is not None and self.absence.explains(name) else None


@dataclass(frozen=True)
class Base:
    """A base model that fills what the checkpoint does not hold: its tensors by published name, and where they are."""

    directory: str
    tensors: Mapping[str, Expr]


@dataclass
class _Naming:
    facts: ModelFacts
    sources: dict[str, Expr]
    tied: Mapping[str, str]  # name that is not written → the one that is, both in the dialect of the sources
    given: Given
    base: Base | None = None  # by the names of the outputs
    drops: list[Drop] = field(default_factory=list)
    ties: list[Tie] = field(default_factory=list)
    fills: list[Filled] = field(default_factory=list)
    unloaded: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    ranks: int | None = None
    mismatches: list[Mismatch] = field(default_factory=list)
    diagnosis: Diagnosis = field(default_factory=lambda: Diagnosis(""))

    def asked(self, name: str, got: Shape | None, expected: Shape | None) -> Mismatch:
        """The question why a tensor is not as the model has it, which is kept."""
        asked = Mismatch(got, expected, name, known_of(self.facts.config, self.ranks, self.diagnosis))
        self.mismatches.append(asked)
        return asked


def name_tensors(
    tensors: Mapping[str, Expr],
    facts: ModelFacts,
    target: str = HUB,
    *,
    base: Base | None = None,
    given: Given | None = None,
    ranks: int | None = None,
) -> Named:
    """The outputs of the tensors of a checkpoint for the model that the facts describe.

    target: `hub` for the names that `save_pretrained` writes, `transformers` for those in memory; ranks: how many
    wrote the checkpoint and recorded how they cut it.
    """
    given = given or Given()
    olds, collisions = stripped_names(tensors, facts.names)
    if adapters := adapter_names(olds, facts.names):
        return refused_adapters(adapters, problems=collisions)
    sources = as_installed({new: tensors[old] for new, old in olds.items()}, facts)
    dialect = given.dialect or _dialect(sources, facts)
    tied = facts.tied if dialect == TRANSFORMERS else facts.tied_on_hub
    work = _Naming(facts, sources, tied, given, problems=collisions, ranks=ranks)
    work.base = base if base is None or target == HUB else Base(base.directory, _in_memory(base.tensors, work))
    rules, wanted = _rules(work, dialect, target)
    outputs = _apply(work, rules, wanted)
    expected = {name: rule.shape for name, rule in rules.items()}
    diagnosed = work.diagnosis if work.problems else None
    if given.diagnosis is None and diagnosed is not None:
        work.problems[:0] = diagnosed.problem()
    renamed = sum(not isinstance(rule, Input) or rule.name != name for name, rule in rules.items())
    return Named(
        outputs, expected, dialect, renamed, tuple(work.drops), tuple(work.ties), fills=tuple(work.fills),
        unloaded=tuple(work.unloaded), problems=tuple(work.problems), mismatches=tuple(work.mismatches),
        diagnosis=diagnosed,
    )  # fmt: skip


def _rules(work: _Naming, dialect: str, target: str) -> tuple[Mapping[str, Expr], Mapping[str, Shape]]:
    """What makes each output of the target's dialect, and the shapes that it wants of tensors of the other dialect."""
    facts = work.facts
    if dialect == TRANSFORMERS:
        written = {name: shape for name, shape in facts.memory.items() if name not in facts.tied}
        return facts.published if target == HUB else _unchanged(written), written
    published = {name: expr.shape for name, expr in facts.published.items()}
    return _unchanged(published) if target == HUB else _inverted(work), published


WHAT_TO_DO_WITH_LORA = (
    "say what is to be written: lora='fold' (into the weights), 'split' (base model and lora_adapter/), or "
    "'adapter' (the adapter alone); on the command line --lora fold"
)


def refused_adapters(names: Sequence[str], problems: Sequence[Problem] = ()) -> Named:
    """Nothing but the problem that the checkpoint holds LoRA tensors."""
    problem = Problem(
        f"the checkpoint holds LoRA tensors, {names[0]} for one",
        why="the adapter and the model can be written in three ways, and nothing says which",
        fix=WHAT_TO_DO_WITH_LORA,
        kind="unsupported",
    )
    return Named({}, {}, HUB, problems=(*problems, problem))


def _dialect(sources: Mapping[str, Expr], facts: ModelFacts) -> str:
    """Whether the names are those in memory or those on the hub: whichever fits more of them, shapes included.

    Shapes decide where a family keeps its names and turns its tensors (experts of Qwen3-VL-MoE).
    """
    in_memory = sum(facts.memory.get(name) == source.shape for name, source in sources.items())
    on_hub = sum(
        name in facts.tied_on_hub or (name in facts.published and facts.published[name].shape == source.shape)
        for name, source in sources.items()
    )
    return HUB if on_hub > in_memory else TRANSFORMERS


def _inverted(work: _Naming) -> dict[str, Expr]:
    try:
        return inverted(work.facts.published)
    except ValueError as error:
        work.problems.append(
            Problem(
                f"{work.facts.class_name}'s published tensors cannot be turned into those in memory: {error}",
                why="the checkpoint holds published names, and this family's conversion is more than views",
                fix="leave dialect out (--dialect hub)",
                kind="unsupported",
            )
        )
        return {}


def as_installed(tensors: Mapping[str, Expr], facts: ModelFacts) -> dict[str, Expr]:
    """The tensors of another transformers as the installed one names and turns them."""
    return turned(respelled(tensors, facts.names), facts)


def by_published_name(tensors: Mapping[str, Expr], facts: ModelFacts) -> dict[str, Expr]:
    """The tensors of a model's files, under published names too where the files have the names in memory.

    transformers saves a model under the names that it was loaded under, and accepts either.
    """
    held = as_installed(tensors, facts)
    found = dict(held)
    for name, rule in facts.published.items():
        inputs = ex.input_names(rule)
        if name not in found and all(i in held and held[i].shape == facts.memory[i] for i in inputs):
            found[name] = ex.substitute(rule, held)
    return found


def _in_memory(published: Mapping[str, Expr], work: _Naming) -> dict[str, Expr]:
    """The tensors of a base model under in-memory names, those of them that its files fill."""
    rules = _inverted(work)
    whole = {name: rule for name, rule in rules.items() if all(each in published for each in ex.input_names(rule))}
    return {name: ex.substitute(rule, published) for name, rule in whole.items()}


def _unchanged(shapes: Mapping[str, Shape]) -> dict[str, Expr]:
    from nbmerge.dtypes import BY_NAME

    return {name: Input(name, shape, BY_NAME["float32"]) for name, shape in shapes.items()}


def _apply(work: _Naming, rules: Mapping[str, Expr], wanted: Mapping[str, Shape]) -> dict[str, Expr]:
    """The outputs of the rules over the sources. `wanted`: the shapes of the rules' inputs."""
    held = {name: source.shape for name, source in work.sources.items()}
    work.diagnosis = work.given.diagnosis or Diagnosis(work.facts.class_name, held, wanted)
    inputs = _inputs(work, wanted)
    outputs: dict[str, Expr] = {}
    missing: dict[str, list[str]] = {}
    for name, rule in rules.items():
        absent = [needed for needed in ex.input_names(rule) if needed not in inputs]
        if not absent:
            outputs[name] = ex.substitute(rule, inputs)
        elif (filling := _from_base(work, name, rule.shape, work.given.why_missing(absent[0]))) is not None:
            outputs[name] = filling
        else:
            for needed in absent:
                missing.setdefault(needed, []).append(name)
    told = {asked.name for asked in work.mismatches if asked.got is not None} | set(work.given.reported)
    _report_missing(work, {name: made for name, made in missing.items() if name not in told}, wanted)
    for name in work.unloaded:
        outputs[name] = work.sources[name]
    return outputs


def _report_missing(work: _Naming, missing: Mapping[str, list[str]], wanted: Mapping[str, Shape]) -> None:
    """The problems of inputs that are not there. missing: input → the outputs that need it."""
    for group in alike(missing, lambda name: name, work.given.why_missing):
        for name in group:
            work.asked(name, None, wanted.get(name))
        made = missing[group[0]]
        left_out = work.given.why_missing(group[0])
        work.problems.append(
            Problem(
                f"no tensor of the checkpoint fills {made[0]}"
                + (f" and {len(made) - 1} more" if made[1:] else "")
                + and_more(len(group)),
                where=group[0] if group[0] != made[0] else "",
                why=left_out.why if left_out else f"{work.facts.class_name} has it; the checkpoint does not",
                fix=left_out.fix
                if left_out
                else "check that config.json is the trained model's and that the checkpoint is complete",
                kind="missing",
            )
        )


def _from_base(work: _Naming, name: str, shape: Shape, left_out: Absence | None) -> Expr | None:
    """The base model's tensor for an output that the checkpoint does not fill, in the dtype that it would have."""
    if work.base is None or name not in work.base.tensors:
        return None
    filling = work.base.tensors[name]
    if filling.shape != shape:
        work.problems.append(
            Problem(
                f"{name} has shape {list(filling.shape)} in the base model; {work.facts.class_name} has {list(shape)}",
                where=work.base.directory,
                why="the base model is another one",
                fix="pass the model that training started from: --base_model DIR",
                kind="contradiction",
            )
        )
    reason = "frozen, and left out on saving" if left_out else "the checkpoint does not hold it"
    work.fills.append(Filled(name, work.base.directory, reason))
    if left_out is not None and left_out.dtype is not None and filling.dtype.is_floating:
        return ex.cast(filling, left_out.dtype)
    return filling


def _inputs(work: _Naming, wanted: Mapping[str, Shape]) -> dict[str, Expr]:
    """The sources that the rules may take, with every other one accounted for."""
    inputs: dict[str, Expr] = {}
    strays: list[str] = []
    misfits: list[str] = []
    further = further_layers(work.sources, work.facts.config)
    for name, source in work.sources.items():
        if name in wanted:
            if source.shape == wanted[name]:
                inputs[name] = source
            else:
                misfits.append(name)
        elif name in work.tied:
            continue
        elif name in work.facts.buffers or _LEFTOVERS.search(name):
            work.drops.append(Drop(name, "a buffer that the model computes when it is loaded"))
        elif name in work.given.unloaded or name in further or work.facts.is_ignored(name):
            work.unloaded.append(name)
        else:
            strays.append(name)
    for same in alike(misfits, str, lambda name: work.sources[name].shape, lambda name: wanted[name]):
        work.problems.append(_shape_problem(same, work.sources[same[0]].shape, wanted[same[0]], work))
    for number, same in enumerate(alike(strays, str, lambda name: work.sources[name].shape)):
        work.problems.append(_stray_problem(work, same, wanted if number < _NEAREST_SOUGHT else ()))
    _tie(work, inputs, wanted)
    return inputs


def _stray_problem(work: _Naming, names: Sequence[str], candidates: Iterable[str]) -> Problem:
    """The problem of tensors of one row that the model does not have."""
    name = names[0]
    near = difflib.get_close_matches(name, candidates, n=1)
    source, shape = work.given.sources.get(name), work.sources[name].shape
    for each in names:
        work.asked(each, shape, None)
    what = (
        f"{source} becomes {name} of shape {list(shape)}, which nothing takes"
        if source
        else f"no rule takes {name} of shape {list(shape)}"
    )
    return Problem(
        what + and_more(len(names)),
        where=f"nearest: {near[0]}" if near else "",
        why=f"{work.facts.class_name} has no such tensor",
        fix="check that config.json is the trained model's: --hf_model_config_path DIR",
    )


def _tie(work: _Naming, inputs: dict[str, Expr], wanted: Mapping[str, Shape]) -> None:
    for name, kept in work.tied.items():
        source, kept_source = work.sources.get(name), inputs.get(kept)
        if source is not None and source.shape != wanted.get(kept, source.shape):
            work.problems.append(_shape_problem([name], source.shape, wanted[kept], work))
        elif source is not None and kept_source is None:
            inputs[kept] = source  # some wrappers save a shared parameter under its other name only
            kept_source = source
        elif source is not None and kept_source is not None and source.dtype != kept_source.dtype:
            work.problems.append(
                Problem(
                    f"{name} is tied to {kept}, and is {source.dtype} where that is {kept_source.dtype}",
                    why="config.json ties the two, but they are not stored as one tensor; writing one loses the other",
                    fix="set tie_word_embeddings to false in the config, and merge again",
                    kind="contradiction",
                )
            )
        work.ties.append(Tie(name, kept, source, kept_source))


def _shape_problem(names: Sequence[str], got: Shape, want: Shape, work: _Naming) -> Problem:
    """The problem of tensors of one row that have one other shape."""
    asked = [work.asked(name, got, want) for name in names]
    return Problem(
        f"{names[0]} has shape {list(got)} in the checkpoint; the config's {work.facts.class_name} has {list(want)}"
        + and_more(len(names)),
        where=work.given.sources.get(names[0], names[0]),
        why=work.diagnosis.why(asked[0]),
        fix=CONFIG_FIX,
        kind="contradiction",
    )
