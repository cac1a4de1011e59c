"""`explain`: a checkpoint, a plan, a Hugging Face directory, an error, a message or two shapes → an Explanation."""

from __future__ import annotations

import operator
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nbmerge.errors import ConfigError, NbmergeError, OptionError, PlanError, Problem, listing, one_line, plural
from nbmerge.explaining.candidates import Known, Mismatch, Strength
from nbmerge.explaining.chain import NOT_READ, TAKES, read_error
from nbmerge.explaining.diagnosis import Diagnosis
from nbmerge.explaining.explanation import MISMATCH, Explanation, Subject, in_order
from nbmerge.explaining.messages import Reading, read_message
from nbmerge.explaining.paths import is_like_a_path, is_there, path_of
from nbmerge.explaining.subjects import subjects_of
from nbmerge.geometry import Shape
from nbmerge.layout import Checkpoint
from nbmerge.loaders.hf import lone_adapter
from nbmerge.naming.model import HFModel
from nbmerge.naming.published import name_tensors
from nbmerge.opening import PathLike, merge_options, open_checkpoint, plan_merge
from nbmerge.options import OPEN_ONLY, OPEN_OPTIONS, expanded_path
from nbmerge.plan import MergePlan
from nbmerge.report import MergeReport
from nbmerge.tracing import check_name, locate, unknown_name
from nbmerge.weights import is_model_directory, weights_of

Explained = PathLike | Checkpoint | MergePlan | MergeReport | BaseException
ShapeLike = int | str | Sequence[int]
Config = Mapping[str, Any] | PathLike | None
_WORDS = re.compile(r"[\s,;()]+|:\s")  # what stands between the names of a problem's sentence


def explain(
    subject: Explained | None = None,
    name: str | None = None,
    *,
    got: ShapeLike | None = None,
    expected: ShapeLike | None = None,
    ranks: int | None = None,
    config: Mapping[str, Any] | PathLike | None = None,
    hf_model_config_path: PathLike | None = None,
    progress: bool | None = None,
    **options: Any,
) -> Explanation:
    """Why tensors do not fit a model: every candidate with its evidence, the strongest first.

        nbmerge.explain("global_step_100/actor", hf_model_config_path="qwen")      # a checkpoint and a config
        nbmerge.explain("global_step_100/actor", "model.norm.weight")              # one tensor of it
        nbmerge.explain(error)                                                     # an exception, or its text
        nbmerge.explain(got=(3600,), expected=(3584,), ranks=24)                   # two shapes

    subject: a checkpoint's directory, an opened checkpoint, a plan, a merge's report, a Hugging Face directory, an
    exception of nbmerge, or what torch, transformers, vLLM or DeepSpeed said on loading, as exception or as text. Of an
    exception, its notes, the members of a group, and what it was raised from are read too.
    name: the one tensor that is asked about; with shapes, what it is called. got, expected: shapes, as a tuple, a
    number or `62,18`. ranks: how many wrote it, where a checkpoint does not say so itself. config, or
    hf_model_config_path: of the model that was expected, a directory; for two shapes or a message a mapping too.
    options: the keywords of `nbmerge.merge` that open and plan a checkpoint.

    Raises OptionError for a question without a subject, for what is neither a path nor a message that is known, and for
    an option that the subject leaves no room for; ConfigError for a checkpoint without a config.
    """
    check_name(name)
    _check_ranks(ranks)
    where = _one_config(config, hf_model_config_path)
    if got is not None or expected is not None:
        _refuse(options, "two shapes")
        return _of_shapes(subject, name, got, expected, Known(ranks, _config(where)))
    if subject is None:
        raise OptionError(
            "there is nothing to explain",
            fix="pass a checkpoint, an error, or two shapes: got=(3600,), expected=(3584,)",
        )
    if isinstance(subject, BaseException):
        _refuse(options, "an error")
        return _only(_of_error(subject, type(subject).__name__, Known(ranks, _config(where)), name), name)
    if isinstance(subject, str) and (reading := _read_unless_a_path(subject)):
        _refuse(options, "a message")
        return _only(_of_reading(reading, "a message", Known(ranks, _config(where)), name), name)
    if where is not None:
        options["hf_model_config_path"] = _directory(where)
    return _of_weights(subject, name, ranks, options, progress)


def _check_ranks(ranks: int | None) -> None:
    if ranks is not None and (isinstance(ranks, bool) or not isinstance(ranks, int) or ranks < 1):
        raise OptionError(f"ranks={ranks!r}", fix="a number from 1 on, e.g. ranks=8")


def _read_unless_a_path(text: str) -> Reading | None:
    """What a message says; None for a path. Raises OptionError for what is neither."""
    if is_there(text):
        return None
    if reading := read_message(text):
        return reading
    if not is_like_a_path(text):
        raise OptionError(
            "this is neither a path nor a message that is known",
            where=one_line(text, limit=200) or "an empty text",
            why=NOT_READ if text.strip() else "",
            fix=TAKES,
        )
    return None


def _one_config(config: Config, hf_model_config_path: PathLike | None) -> Config:
    """The config that was given, under either name."""
    for given in (config, hf_model_config_path):
        if given is not None and not isinstance(given, (str, os.PathLike, Mapping)):
            raise OptionError(f"config={given!r} is no config", fix="pass the directory of the model's config.json")
    if config is not None and hf_model_config_path is not None:
        raise OptionError("config and hf_model_config_path are two names of one option", fix="leave one of them out")
    return config if config is not None else hf_model_config_path


def _directory(config: Mapping[str, Any] | PathLike) -> PathLike:
    if isinstance(config, Mapping):
        raise OptionError(
            "config= is a mapping, which makes no model for a checkpoint to be held to",
            fix="pass the directory of the model's config.json: config=DIR; a mapping goes with shapes and messages",
        )
    return config


def _refuse(options: Mapping[str, Any], what: str) -> None:
    """Raises OptionError for options that are of no use to what is explained."""
    if given := merge_options(options).given():
        raise OptionError(
            f"{', '.join(given)} cannot change what is said of {what}",
            fix=f"leave {'it' if len(given) == 1 else 'them'} out, or pass the checkpoint",
        )


def parse_dims(text: ShapeLike) -> Shape:
    """(62, 18) of `62,18`, `62x18`, `[62, 18]` or (62, 18); (3600,) of 3600; () of `[]`. Raises OptionError."""
    try:
        if isinstance(text, str):
            words = text.strip().removeprefix("torch.Size").strip("()[] ").replace("x", ",").split(",")
            dims = tuple(int(word) for word in words if word.strip())
        else:
            dims = (text,) if isinstance(text, int) else tuple(operator.index(value) for value in text)
    except (TypeError, ValueError) as error:
        raise OptionError(f"{text!r} is no shape", fix="dimensions, e.g. 3600 or 62,18") from error
    if any(dim < 0 for dim in dims):
        raise OptionError(f"{text!r} is no shape: a dimension is negative", fix="dimensions from 0 on, e.g. 62,18")
    return dims


def _config(config: Config) -> Mapping[str, Any]:
    if config is None or isinstance(config, Mapping):
        return config or {}
    return HFModel(expanded_path(os.fspath(config))).config


def _of_shapes(
    subject: object, name: str | None, got: ShapeLike | None, expected: ShapeLike | None, known: Known
) -> Explanation:
    if subject is not None:
        raise OptionError("two shapes and a checkpoint are two questions", fix="leave one of them out")
    if got is None or expected is None:
        raise OptionError("one shape has no mismatch", fix="give both: got=(3600,), expected=(3584,)")
    asked = Mismatch(parse_dims(got), parse_dims(expected), name or "", known)
    return Explanation("two shapes", subjects_of([asked]), ranks=known.ranks, checked=1)


def _of_error(error: BaseException, asked: str, known: Known, name: str | None) -> Explanation:
    """What an error says. What of it cannot be read stays among the problems."""
    if isinstance(error, PlanError) and isinstance(error.plan, MergePlan) and not known.config:
        return _of_plan(error.plan, name, known.ranks)
    reading, others = read_error(error)
    explained = _of_reading(reading, asked, known, name)
    return replace(explained, problems=(*explained.problems, *others))


def _of_reading(reading: Reading, asked: str, known: Known, name: str | None) -> Explanation:
    """Shapes are known of what the message gives; of missing and unexpected names, `()` where it does not."""
    unexpected = {name: got for name, got, expected in reading.shapes if expected is None and got is not None}
    missing = {name: expected for name, got, expected in reading.shapes if got is None and expected is not None}
    known = replace(
        known,
        ranks=known.ranks or reading.ranks,
        held={**dict.fromkeys(reading.unexpected, ()), **unexpected},
        wanted={**dict.fromkeys(reading.missing, ()), **missing},
    )
    questions = [Mismatch(got, expected, name, known) for name, got, expected in reading.shapes]
    questions += [Mismatch(None, (), name, known) for name in reading.missing if name not in missing]
    questions += [Mismatch((), None, name, known) for name in reading.unexpected if name not in unexpected]
    failed = [Subject("", None, None, (cause,), message=said) for said, cause in reading.causes]
    subjects = in_order([*subjects_of(questions, name), *failed])
    diagnosis = "" if _share_a_cause(subjects) else _diagnosis(questions)
    cut = f"{reading.cut:,} characters at the end of the message were not read"
    problems = (Problem(cut, fix="pass the checkpoint itself, or the rest of it"),) if reading.cut else ()
    checked = sum(len(subject.names) for subject in subjects)
    return Explanation(asked, subjects, diagnosis, known.ranks, problems, checked)


def _share_a_cause(subjects: Sequence[Subject]) -> bool:
    """Whether one number of ranks explains all shapes, so that no config needs to be wrong."""
    best = [subject.best for subject in subjects if subject.kind == MISMATCH]
    return any(each is not None and each.counts and each.strength == Strength.STRONG for each in best)


def _diagnosis(questions: Sequence[Mismatch]) -> str:
    held = {each.name: each.got for each in questions if each.got and each.expected}
    wanted = {each.name: each.expected for each in questions if each.got and each.expected}
    return Diagnosis("the model", held, wanted).sentence


def _only(explanation: Explanation, name: str | None) -> Explanation:
    """The explanation of the one tensor, by its name. Raises OptionError where it says nothing of it."""
    if name is None:
        return explanation
    found = [subject.only(name) for subject in explanation.subjects if subject.is_about(name)]
    if not found:
        raise unknown_name(name, [each for s in explanation.subjects for each in (*s.names, *s.held_as)])
    return replace(explanation, subjects=tuple(found))


def _of_weights(
    subject: Any, name: str | None, ranks: int | None, options: dict[str, Any], progress: bool | None
) -> Explanation:
    """A checkpoint, a plan, a report, or a directory of safetensors files."""
    given = merge_options(options).given()
    if isinstance(subject, MergeReport):
        subject = subject.plan
    if isinstance(subject, MergePlan) and given:
        raise OptionError(
            f"{', '.join(given)} cannot change a plan", fix="pass the checkpoint instead: plan.checkpoint"
        )
    if isinstance(subject, (str, os.PathLike)):
        path = path_of(subject)
        if is_model_directory(path) and lone_adapter(path) is None:
            return _of_directory(path, name, ranks, options)
        opening = {key: value for key, value in options.items() if key in OPEN_OPTIONS}
        try:
            subject = open_checkpoint(path, progress=progress, **opening)
        except NbmergeError as error:
            explained = _of_error(error, str(path), Known(ranks), name)
            if not explained.subjects:
                raise
            return _only(explained, name)
        options = {key: value for key, value in options.items() if key not in OPEN_ONLY}
    if isinstance(subject, Checkpoint):
        _refuse_other_ranks(subject, ranks)
        if name in subject.tensors and subject.config_dir is None and given.keys() <= OPEN_ONLY | {"workers"}:
            return _fits(subject, None, str(name))
        subject = plan_merge(subject, progress=progress, **options)
    if not isinstance(subject, MergePlan):
        raise OptionError(f"a {type(subject).__name__} cannot be explained", fix=TAKES)
    _refuse_other_ranks(subject.checkpoint, ranks)
    return _of_plan(subject, name, ranks)


def _refuse_other_ranks(checkpoint: Checkpoint, ranks: int | None) -> None:
    """Raises OptionError for another number of ranks than the checkpoint's own; one rank's file may be of many."""
    wrote = checkpoint.world_size
    if ranks is not None and wrote is not None and wrote > 1 and ranks != wrote:
        raise OptionError(
            f"ranks={ranks}, and {wrote} ranks wrote the checkpoint", where=str(checkpoint.path),
            fix="leave ranks out: the checkpoint says it",
        )  # fmt: skip


def _of_plan(plan: MergePlan, name: str | None, ranks: int | None) -> Explanation:
    held = {
        **{n: t.shape for n, t in plan.checkpoint.tensors.items()},
        **{n: t.expr.shape for n, t in plan.tensors.items()},
    }
    asked = _completed(_of_other_names(plan.mismatches, plan), held, plan.expected, ranks)
    subjects = subjects_of(asked, name)
    told = {subject.names[0] for subject in subjects}
    others = [p for p in plan.problems if p.what != _sentence(plan) and told.isdisjoint(_WORDS.split(p.what))]
    wrote = plan.checkpoint.world_size if ranks is None else ranks
    explained = Explanation(str(plan.checkpoint.path), subjects, _sentence(plan), wrote, tuple(others), len(held))
    if name is None:
        return explained
    if any(subject.is_about(name) for subject in subjects):
        return _only(explained, name)
    return _fits(plan.checkpoint, plan, name)


def _sentence(plan: MergePlan) -> str:
    return plan.diagnosis.sentence if plan.diagnosis is not None else ""


def _of_other_names(asked: Sequence[Mismatch], plan: MergePlan) -> list[Mismatch]:
    """Without what a base model fills."""
    filled = {fill.name for fill in plan.fills}
    return [each for each in asked if each.got is not None or each.name not in filled]


def _completed(
    asked: Sequence[Mismatch], held: Mapping[str, Shape], wanted: Mapping[str, Shape], ranks: int | None
) -> list[Mismatch]:
    """The questions with all names of both sides, which decide on prefixes and the like, and the number of ranks."""
    mine = {**held, **{each.name: each.got for each in asked if each.got is not None}}
    theirs = {**wanted, **{each.name: each.expected for each in asked if each.expected is not None}}
    made: list[tuple[Known, Known]] = []  # few, each with tables of all names that its questions share
    completed = []
    for each in asked:
        known = next((new for old, new in made if old is each.known or old == each.known), None)
        if known is None:
            known = replace(each.known, held=mine, wanted=theirs, ranks=each.known.ranks or ranks)
            made.append((each.known, known))
        completed.append(replace(each, known=known))
    return completed


_OF_MODEL = ("trust_remote_code", "is_value_model")
_OF_NO_USE = frozenset({"workers", "trust_pickle"})  # to a directory, which has neither pickles nor long headers


def _of_directory(path: Path, name: str | None, ranks: int | None, options: Mapping[str, Any]) -> Explanation:
    """A Hugging Face directory, which another tool may have put together wrong."""
    given = merge_options(options)
    taken = {*_OF_MODEL, *_OF_NO_USE, "hf_model_config_path", "tie_word_embedding"}
    if late := [key for key, value in given.given().items() if key not in taken and (key, value) != ("backend", "hf")]:
        raise OptionError(
            f"{', '.join(late)} cannot change a Hugging Face directory", where=str(path), fix="leave it out"
        )
    config_dir = expanded_path(given.hf_model_config_path) if given.hf_model_config_path is not None else path
    weights = weights_of(path)
    if not (config_dir / "config.json").is_file():
        raise ConfigError("there is no config.json", where=str(config_dir), fix="pass --hf_model_config_path DIR")
    said = {key: bool(getattr(given, key)) for key in _OF_MODEL}
    model = HFModel(config_dir, tie_word_embedding=given.tie_word_embedding or None, **said)
    named = name_tensors(weights.tensors, model.facts)
    held = {each: expr.shape for each, expr in weights.tensors.items()}
    asked = _completed(named.mismatches, held, named.expected, ranks)
    subjects = subjects_of(asked, name)
    told = named.diagnosis is None or _share_a_cause(subjects)
    diagnosis = "" if told or named.diagnosis is None else named.diagnosis.sentence
    explained = Explanation(str(path), subjects, diagnosis, ranks, checked=len(held))
    if name is not None and name in held and not any(each.is_about(name) for each in subjects):
        return replace(explained, subjects=(Subject(name, held[name], held[name], names=(name,)),))
    return _only(explained, name)


def _fits(checkpoint: Checkpoint, plan: MergePlan | None, name: str) -> Explanation:
    """A tensor that is as it should be: how it lies on the ranks, or what it is made of."""
    tensors = checkpoint.tensors
    outputs = plan.tensors if plan is not None else {}
    if name in tensors:
        shape, lies = tensors[name].shape, _lies(checkpoint, name)
    elif name in outputs:
        expr = outputs[name].expr
        shape = expr.shape
        at = locate(checkpoint, name, expr, (0,) * len(shape)) if expr.numel else None
        lies = f"and is taken from {at.source}, {_lies(checkpoint, at.source)}" if at and at.source else "from no file"
    else:
        raise unknown_name(name, [*tensors, *outputs])
    subject = Subject(name, shape, shape, names=(name,), lies=lies)
    return Explanation(str(checkpoint.path), (subject,), ranks=checkpoint.world_size, checked=1)


def _lies(checkpoint: Checkpoint, name: str) -> str:
    """`Shard(0)×8 in 8 pieces`."""
    tensor = checkpoint.tensors[name]
    filled = [chunk for chunk in tensor.chunks if chunk.box.numel]
    shapes = list(dict.fromkeys(str(list(chunk.box.shape)) for chunk in filled))
    return f"{tensor.placement} in {plural(len(filled), 'stored piece')} of {listing(shapes)}"
