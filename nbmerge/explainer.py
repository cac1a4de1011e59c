"""`explain`: a checkpoint, a plan, a Hugging Face directory, an error, a message or two shapes → an Explanation."""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nbmerge.errors import ConfigError, NbmergeError, OptionError, listing, plural
from nbmerge.explaining.candidates import Known, Mismatch, Strength
from nbmerge.explaining.diagnosis import Diagnosis
from nbmerge.explaining.explanation import MISMATCH, Explanation, Subject, in_order
from nbmerge.explaining.messages import Reading, read_message
from nbmerge.explaining.subjects import subjects_of
from nbmerge.geometry import Shape
from nbmerge.layout import Checkpoint
from nbmerge.naming.model import HFModel
from nbmerge.naming.published import name_tensors
from nbmerge.opening import PathLike, open_checkpoint, plan_merge
from nbmerge.options import OPEN_OPTIONS, expanded_path
from nbmerge.plan import MergePlan
from nbmerge.report import MergeReport
from nbmerge.tracing import locate, unknown_name
from nbmerge.weights import is_model_directory, weights_of

Explained = PathLike | Checkpoint | MergePlan | MergeReport | BaseException
ShapeLike = int | str | Sequence[int]


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
    exception of nbmerge, or what torch, transformers, vLLM or DeepSpeed said on loading, as exception or as text.
    name: the one tensor that is asked about; with shapes, what it is called. got, expected: shapes, as a tuple, a
    number or `62,18`. ranks: how many wrote it. config: of the model that was expected, for two shapes or a message:
    a mapping or a directory. options: the keywords of `nbmerge.merge` that open and plan a checkpoint.

    Raises OptionError for a question without a subject, ConfigError for a checkpoint without a config.
    """
    if got is not None or expected is not None:
        return _of_shapes(subject, name, got, expected, Known(ranks, _config(config)))
    if subject is None:
        raise OptionError(
            "there is nothing to explain",
            fix="pass a checkpoint, an error, or two shapes: got=(3600,), expected=(3584,)",
        )
    known = Known(ranks, _config(config))
    if isinstance(subject, BaseException):
        return _only(_of_error(subject, f"{type(subject).__name__}", known), name)
    if isinstance(subject, str) and not _is_there(subject) and (reading := read_message(subject)):
        return _only(_of_reading(reading, "a message", known), name)
    if hf_model_config_path is not None:
        options["hf_model_config_path"] = hf_model_config_path
    return _of_weights(subject, name, options, progress)


def _is_there(text: str) -> bool:
    """Whether a text is a path of something; a message is too long for one, or has a zero byte."""
    try:
        return Path(text).expanduser().exists()
    except (OSError, ValueError, RuntimeError):
        return False


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


def _config(config: Mapping[str, Any] | PathLike | None) -> Mapping[str, Any]:
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
    if known.ranks is not None and known.ranks < 1:
        raise OptionError(f"ranks={known.ranks}", fix="a number from 1 on")
    asked = Mismatch(parse_dims(got), parse_dims(expected), name or "", known)
    return Explanation("two shapes", subjects_of([asked]), ranks=known.ranks, checked=1)


def _of_error(error: BaseException, asked: str, known: Known) -> Explanation:
    """What the text of an error says; of ours, all its problems."""
    if not isinstance(error, NbmergeError):
        return _of_reading(read_message(str(error)), asked, known)
    read: list[Reading] = []
    others = []
    for problem in error.problems:
        reading = read_message("\n".join((problem.what, problem.where)))
        read.append(reading)
        if not reading:
            others.append(problem)
    return replace(_of_reading(_joined(read), asked, known), problems=tuple(others))


def _joined(read: Sequence[Reading]) -> Reading:
    return Reading(
        tuple(each for reading in read for each in reading.shapes),
        tuple(each for reading in read for each in reading.missing),
        tuple(each for reading in read for each in reading.unexpected),
        tuple(each for reading in read for each in reading.causes),
        next((reading.ranks for reading in read if reading.ranks), None),
    )


def _of_reading(reading: Reading, asked: str, known: Known) -> Explanation:
    """Shapes are known of what the message gives; of missing and unexpected names, `()` where it does not."""
    unexpected = {name: got for name, got, expected in reading.shapes if expected is None and got is not None}
    known = replace(
        known,
        ranks=known.ranks or reading.ranks,
        held={**dict.fromkeys(reading.unexpected, ()), **unexpected},
        wanted=dict.fromkeys(reading.missing, ()),
    )
    questions = [Mismatch(got, expected, name, known) for name, got, expected in reading.shapes]
    questions += [Mismatch(None, (), name, known) for name in reading.missing]
    questions += [Mismatch((), None, name, known) for name in reading.unexpected if name not in unexpected]
    failed = [Subject("", None, None, (cause,), message=said) for said, cause in reading.causes]
    subjects = in_order([*subjects_of(questions), *failed])
    diagnosis = "" if _share_a_cause(subjects) else _diagnosis(questions)
    return Explanation(asked, subjects, diagnosis, known.ranks, checked=len(questions))


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
    found = [subject for subject in explanation.subjects if name in (subject.name, *subject.names)]
    if not found:
        known = [each for subject in explanation.subjects for each in subject.names or (subject.name,) if each]
        raise unknown_name(name, known)
    return replace(explanation, subjects=tuple(replace(each, name=name, names=(name,)) for each in found))


def _of_weights(subject: Any, name: str | None, options: dict[str, Any], progress: bool | None) -> Explanation:
    """A checkpoint, a plan, a report, or a directory of safetensors files."""
    if isinstance(subject, MergeReport):
        subject = subject.plan
    if isinstance(subject, (str, os.PathLike)):
        path = expanded_path(os.fspath(subject))
        if is_model_directory(path):
            return _of_directory(path, name, options)
        opening = {key: value for key, value in options.items() if key in OPEN_OPTIONS}
        try:
            subject = open_checkpoint(path, progress=progress, **opening)
        except NbmergeError as error:
            explained = _of_error(error, str(path), Known())
            if not explained.subjects:
                raise
            return _only(explained, name)
        options = {key: value for key, value in options.items() if key not in OPEN_OPTIONS or key in _PLANNING}
    if isinstance(subject, Checkpoint):
        if name in subject.tensors and subject.config_dir is None and "hf_model_config_path" not in options:
            return _fits(subject, None, str(name))
        subject = plan_merge(subject, progress=progress, **options)
    if not isinstance(subject, MergePlan):
        raise OptionError(
            f"a {type(subject).__name__} cannot be explained",
            fix="pass a checkpoint, a plan, an error, its text, or two shapes",
        )
    return _of_plan(subject, name)


_PLANNING = {"hf_model_config_path", "trust_remote_code", "workers"}


def _of_plan(plan: MergePlan, name: str | None) -> Explanation:
    held = {
        **{n: t.shape for n, t in plan.checkpoint.tensors.items()},
        **{n: t.expr.shape for n, t in plan.tensors.items()},
    }
    asked = [_completed(each, held, plan.expected) for each in _of_other_names(plan.mismatches, plan)]
    subjects = subjects_of(asked)
    told = {subject.name for subject in subjects}
    others = [p for p in plan.problems if not _is_told(p.what, told) and p.what != _sentence(plan)]
    explained = Explanation(
        str(plan.checkpoint.path), subjects, _sentence(plan), plan.checkpoint.world_size, tuple(others), len(held)
    )
    if name is None:
        return explained
    if any(name in (subject.name, *subject.names) for subject in subjects):
        return _only(explained, name)
    return _fits(plan.checkpoint, plan, name)


def _is_told(what: str, names: Iterable[str]) -> bool:
    return any(name in what for name in names if name)


def _sentence(plan: MergePlan) -> str:
    return plan.diagnosis.sentence if plan.diagnosis is not None else ""


def _of_other_names(asked: Sequence[Mismatch], plan: MergePlan) -> list[Mismatch]:
    """Without what a base model fills."""
    filled = {fill.name for fill in plan.fills}
    return [each for each in asked if each.got is not None or each.name not in filled]


def _completed(asked: Mismatch, held: Mapping[str, Shape], wanted: Mapping[str, Shape]) -> Mismatch:
    """The question with all names of both sides, which decide on prefixes and the like."""
    mine = {asked.name: asked.got} if asked.got is not None else {}
    theirs = {asked.name: asked.expected} if asked.expected is not None else {}
    known = replace(asked.known, held={**held, **mine}, wanted={**wanted, **theirs})
    return replace(asked, known=known)


def _of_directory(path: Path, name: str | None, options: Mapping[str, Any]) -> Explanation:
    """A Hugging Face directory, which another tool may have put together wrong."""
    given = options.get("hf_model_config_path")
    config_dir = expanded_path(os.fspath(given)) if given is not None else path
    weights = weights_of(path)
    if not (config_dir / "config.json").is_file():
        raise ConfigError("there is no config.json", where=str(config_dir), fix="pass --hf_model_config_path DIR")
    said = {key: bool(options[key]) for key in ("trust_remote_code", "is_value_model") if key in options}
    named = name_tensors(weights.tensors, HFModel(config_dir, **said).facts)
    held = {each: expr.shape for each, expr in weights.tensors.items()}
    asked = [_completed(each, held, named.expected) for each in named.mismatches]
    diagnosis = named.diagnosis.sentence if named.diagnosis is not None else ""
    explained = Explanation(str(path), subjects_of(asked), diagnosis, None, checked=len(held))
    if name is not None and name in held and not any(name in subject.names for subject in explained.subjects):
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
