"""Opens DeepSpeed's checkpoints: the fp32 master weights, or the weights of the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from nbmerge.errors import IncompleteCheckpointError, OptionError, listing, plural
from nbmerge.layout import Absence, Checkpoint, LazyTensor, MeshAxis, SourceFile
from nbmerge.loaders.base import Loader, OpenOptions, config_directory, index_error
from nbmerge.loaders.deepspeed.contents import Contents, master_contents, module_contents
from nbmerge.loaders.deepspeed.directories import Found, TagFiles
from nbmerge.loaders.deepspeed.masters import Masters, read_masters
from nbmerge.loaders.deepspeed.pipeline import NAMES_FILE, pipeline_states, universal_names
from nbmerge.loaders.deepspeed.refusals import check_one_step, check_ranks, refuse_forms, tensor_parallel
from nbmerge.loaders.deepspeed.rounding import roundings
from nbmerge.loaders.deepspeed.states import HALVES, ModelStates
from nbmerge.loaders.deepspeed.universal import universal_masters
from nbmerge.loaders.reading import read_files

MASTER, MODEL = "master", "model"


class DeepSpeedLoader(Loader):
    """Opens the checkpoints of DeepSpeed's `save_checkpoint`."""

    name = "deepspeed"
    recognises = "latest beside TAG/mp_rank_00_model_states.pt or TAG/zero_pp_rank_0_mp_rank_00_*_states.pt"

    def evidence(self, directory: Path) -> tuple[str, ...]:
        found = Found.scan(directory)
        if not found.is_deepspeed:
            return ()
        said = (f"{found.said[0]} ({found.said[1]})",) if found.said else ()
        if found.tag is None:
            return said + tuple(f"{tag.name}/*_states.pt" for tag in found.tags[:3])
        return said + TagFiles.scan(found.tag).words()

    def config_directory(self, directory: Path) -> Path | None:
        """Where config.json is: beside `latest` as the Trainer writes it, or in the directory that was given."""
        found = [config_directory(each) for each in (directory, Found.scan(directory).root)]
        return next((each for each in found if each is not None), None)

    def open(self, directory: Path, options: OpenOptions) -> Checkpoint:
        directory = directory.absolute()  # so that a later change of directory does not matter
        files = TagFiles.scan(Found.scan(directory).the_tag())
        refuse_forms(files)
        taken = _taken(files, _model_states(files, options), options)
        if taken.contents.problems:
            raise index_error(taken.contents.problems, files.path)
        is_master = taken.weights == MASTER
        return Checkpoint(
            path=directory,
            backend=self.name,
            layout=_layout(files, taken),
            tensors=taken.contents.tensors,
            world_size=taken.ranks,
            files=tuple(_source_files(files, is_master)),
            config_dir=options.config_dir or self.config_directory(directory),
            mesh=(MeshAxis("dp", taken.ranks, "Flat"),) if taken.ranks > 1 and is_master and files.optimizer else (),
            evidence=self.evidence(directory),
            notes=tuple(_notes(files, taken)),
            absence=_absence(taken),
            compared=roundings(taken.masters, taken.states.module),
        )


@dataclass(frozen=True)
class _Taken:
    """Which weights are taken, the tensors, over how many ranks they lie, and the stage, as far as files say it.

    states: of the first rank; of a pipeline those of all layers; masters: where they are taken, without what the
    optimizer does not have.
    """

    weights: str
    states: ModelStates
    contents: Contents
    ranks: int
    stage: int | None
    masters: Mapping[str, LazyTensor] = field(default_factory=dict)


def _model_states(files: TagFiles, options: OpenOptions) -> tuple[ModelStates, ...]:
    """The model states: of all ranks at stage 3, of all stages of a pipeline, else of the one rank that has them."""
    if not files.parted and not files.model:
        raise IncompleteCheckpointError(
            "there is no file of model states, which has the names and shapes",
            where=f"{files.path}: {listing(files.words())}",
            why="it was not copied, or saving was stopped",
            fix="copy mp_rank_00_model_states.pt (ZeRO stage 3: zero_pp_rank_*_model_states.pt) from the machine that "
            "trained",
        )
    parted = next(iter(files.parted.values()), {})
    paths = parted or (files.model if files.layers else dict([next(iter(files.model.items()))]))
    found = read_files(paths, options, partial(ModelStates.read, trust_pickle=options.trust_pickle))
    first = next(iter(found.values()))
    is_joined = files.universal and (options.weights != MODEL or not first.module)
    if first.model_parallel > 1 and not is_joined and not files.layers:
        raise tensor_parallel(files, first.model_parallel)
    if parted:
        check_ranks(parted, first.ranks or max(parted) + 1)
    check_one_step(tuple(found.values()), same_shapes=bool(parted))
    return tuple(found.values())


def _taken(files: TagFiles, states: Sequence[ModelStates], options: OpenOptions) -> _Taken:
    """The weights that were asked for, by default the masters where there are any."""
    weights = _chosen(files, states[0], options.weights)
    masters = Masters({}, max((len(ranks) for ranks in files.optimizer.values()), default=1), states[0].stage)
    if files.layers:
        stages = dict(zip(files.model, states, strict=True))
        joined, masters = pipeline_states(files, stages, options, with_masters=weights == MASTER)
        states = (joined,)
    elif weights == MASTER and files.universal:
        tensors = universal_masters(files.universal, states, options)
        if not any(state.module for state in states):
            tensors = universal_names(files, tensors)
        states = tuple(state.without_shards(tensors) for state in states)
        masters = Masters(tensors, states[0].ranks or len(states), states[0].stage)
    elif weights == MASTER:
        masters = read_masters(next(iter(files.optimizer.values())), states[0], options)
    stage = states[0].stage if masters.stage is None else masters.stage
    if weights == MODEL:
        return _Taken(MODEL, states[0], module_contents(states[0]), masters.ranks, stage)
    contents = master_contents(masters.tensors, states, masters.ranks)
    contents.remarks += masters.remarks
    contents.problems[:0] = masters.problems
    return _Taken(MASTER, states[0], contents, masters.ranks, stage, masters.tensors)


def _chosen(files: TagFiles, states: ModelStates, wanted: str | None) -> str:
    """`master` or `model`. Raises where the checkpoint does not have what is wanted."""
    if wanted == MODEL:
        if files.parted and states.is_16_bit:
            raise OptionError(
                "weights='model': ZeRO stage 3 does not save the 16-bit weights, only the fp32 masters",
                why="the model's own tensors were cut over the ranks and are empty in its files",
                fix="take the masters, rounded: --dtype bfloat16 (or float16, if trained so) gives the trained bits",
            )
        if files.universal and not states.module:
            raise OptionError(
                "weights='model': a universal checkpoint of a PipelineModule has the fp32 masters only",
                fix="leave it out, with --dtype bfloat16 to round them; or pass the checkpoint that it was made of",
            )
        return MASTER if files.parted else MODEL  # trained in fp32, the two are the same
    if files.optimizer or files.universal:
        return MASTER
    if states.groups or states.stage or files.parted:
        raise IncompleteCheckpointError(
            "there are no optimizer files, which have the fp32 masters",
            where=f"{files.path}: *zero_pp_rank_*_mp_rank_00_optim_states.pt",
            why="they were not copied, or were deleted",
            fix="copy them from the machines that trained"
            + ("" if files.parted else ", or take the 16-bit weights: --weights model"),
        )
    if wanted == MASTER and states.is_16_bit:
        raise OptionError(
            "weights='master': without ZeRO, the masters are saved without their names",
            why="ZeRO stage 0 keeps them in the optimizer's state by number only",
            fix="leave it out: the model's own weights are taken",
        )
    return MODEL


def _layout(files: TagFiles, taken: _Taken) -> str:
    form = "universal" if files.universal else "pipeline" if files.layers else ""
    stage = "" if taken.stage is None else f"ZeRO stage {taken.stage}"
    size = "16-bit" if taken.states.is_16_bit else "own"
    dtype = taken.contents.dtype
    masters = "fp32 masters" if dtype is None or dtype.name not in HALVES else f"{dtype.name} masters"
    which = masters if taken.weights == MASTER else f"the model's {size} weights"
    return f"DeepSpeed {', '.join(filter(None, (stage, form, which)))}"


def _source_files(files: TagFiles, is_master: bool) -> Iterator[SourceFile]:
    """The files by role. The optimizer's are weights where the masters are taken from them."""
    parted = (path for ranks in files.parted.values() for path in ranks.values())
    for path in (*files.model.values(), *parted, *files.layers.values()):
        yield SourceFile.of(path, "weights")
    masters = (*(path for ranks in files.optimizer.values() for path in ranks.values()), *files.universal.values())
    for path in masters:
        yield SourceFile.of(path, "weights" if is_master else "optimizer")


def _notes(files: TagFiles, taken: _Taken) -> Iterator[str]:
    optimizer = sum(len(ranks) for ranks in files.optimizer.values())
    if files.layers:
        yield f"{plural(len(files.layers), 'layer')} named by {NAMES_FILE}"
    if taken.weights == MODEL and optimizer:
        yield f"{plural(optimizer, 'optimizer file')} left alone"
    if objects := taken.states.objects:
        yield f"{plural(len(objects), 'entry')} without a tensor left alone: {listing(objects)}"
    yield from taken.contents.notes()


def _absence(taken: _Taken) -> Absence | None:
    """Why tensors of the model may not be there, unless the files list every frozen one and hold all that they list."""
    lost = taken.contents.lost
    if taken.states.frozen_shapes is None:
        why = (
            "the module was there when it was saved, and the tensor was not: DeepSpeed's exclude_frozen_parameters "
            "leaves frozen weights out"
        )
        modules = taken.states.modules
    elif lost:
        why = (
            "the parameter was neither frozen nor given to the optimizer, and ZeRO stage 3 saves no other data of it: "
            f"so with {listing(lost)}"
        )
        modules = frozenset(name.rpartition(".")[0] for name in lost)
    else:
        return None
    dtypes = {tensor.dtype for tensor in taken.contents.tensors.values() if tensor.dtype.is_floating}
    return Absence(
        why,
        "take the weights that did not change from the model that training started from: --base_model DIR",
        modules,
        dtypes.pop() if len(dtypes) == 1 and taken.weights == MASTER else None,
    )
