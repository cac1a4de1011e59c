"""What a DeepSpeed file says, checked for its form: model states and the optimizer's states of one rank."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nbmerge.errors import UnsupportedCheckpointError, listing
from nbmerge.expressions import Stored
from nbmerge.geometry import Shape
from nbmerge.loaders.deepspeed import pickles

Shapes = Mapping[str, Shape]
HALVES = ("bfloat16", "float16")
_PARTITIONS = ("single_partition_of_fp32_groups", "fp32_flat_groups")  # of stages 1 and 2, and of stage 3


@dataclass(frozen=True)
class ModelStates:
    """A model states file.

    module: the 16-bit weights, or placeholders of no elements at stage 3; objects: entries of it that are no tensors;
    groups: `param_shapes`, the shapes of each group of the optimizer in the order in which they were flattened;
    frozen_shapes, frozen: of frozen parameters, None where saving left them out; shared: alias → the name that holds
    the data; modules: names of all modules of the model, parameters or not; stage: of ds_config; step: of
    training; ranks, model_parallel: how many data-parallel and model-parallel ranks there were.
    """

    path: Path
    module: Mapping[str, Stored]
    objects: tuple[str, ...] = ()
    groups: tuple[Shapes, ...] = ()
    frozen_shapes: Shapes | None = None
    frozen: Mapping[str, Stored] | None = None
    buffers: frozenset[str] = frozenset()
    shared: Mapping[str, str] = field(default_factory=dict)
    modules: frozenset[str] = frozenset()
    stage: int | None = None
    step: int | None = None
    ranks: int | None = None
    model_parallel: int = 1

    @property
    def is_16_bit(self) -> bool:
        """Whether the model was trained in bf16 or fp16."""
        parameters = (stored for name, stored in self.module.items() if name not in self.buffers)
        return any(stored.dtype.name in HALVES for stored in parameters)

    def without_shards(self, whole: Container[str]) -> ModelStates:
        """Without what tensor-parallel ranks may have cut: of those, only what is `whole` elsewhere, and buffers."""
        if self.model_parallel == 1:
            return self
        kept = {name: stored for name, stored in self.module.items() if name in whole or name in self.buffers}
        return replace(self, module=kept)

    @staticmethod
    def read(path: Path, *, trust_pickle: bool = False) -> ModelStates:
        """The states of a file. Raises CheckpointError and UnsafePickleError, each naming the file."""
        form = _Form(path, pickles.read(path, trust_pickle=trust_pickle))
        if "module" not in form.content:
            raise form.error("it has no entry module")
        module = form.mapping("module")
        tensors = {str(name): value for name, value in module.items() if isinstance(value, Stored)}
        groups = form.content.get("param_shapes")
        frozen = form.content.get("frozen_param_fragments")
        config = form.mapping("ds_config")
        zero = config.get("zero_optimization")
        return ModelStates(
            path,
            tensors,
            tuple(str(name) for name in module if str(name) not in tensors),
            tuple(form.shapes(group, "param_shapes") for group in _as_list(groups)),
            None if frozen is None else form.shapes(form.content.get("frozen_param_shapes"), "frozen_param_shapes"),
            None if frozen is None else form.tensors(frozen, "frozen_param_fragments"),
            frozenset(map(str, form.sequence("buffer_names"))),
            {str(alias): str(holder) for alias, holder in form.mapping("shared_params").items()},
            _modules(module),
            pickles.number(zero.get("stage")) if isinstance(zero, Mapping) else None,
            pickles.number(form.content.get("global_steps")),
            pickles.number(form.content.get("dp_world_size")),
            pickles.number(form.content.get("mp_world_size")) or 1,
        )


@dataclass(frozen=True)
class OptimizerStates:
    """The partitions of the fp32 masters that one rank has.

    vectors: one flat vector for each group; is_parted: whether each parameter is cut over the ranks (stage 3), else
    each group is; partitions: how many ranks share them; paddings: elements that were appended to each group, and
    `keeps_padding` whether they were saved; alignment: elements to skip after each parameter of a group; rates: the
    learning rate of each group, where the file says it.
    """

    path: Path
    vectors: tuple[Stored, ...]
    is_parted: bool
    stage: int | None = None
    partitions: int | None = None
    paddings: tuple[int, ...] = ()
    keeps_padding: bool = False
    alignment: tuple[tuple[int, ...], ...] = ()
    rates: tuple[float, ...] = ()

    @staticmethod
    def read(path: Path, *, trust_pickle: bool = False) -> OptimizerStates:
        """The states of a file. Raises CheckpointError and UnsafePickleError, each naming the file."""
        outer = _Form(path, pickles.read(path, trust_pickle=trust_pickle))
        form = _Form(path, outer.mapping("optimizer_state_dict"))
        key = next((name for name in _PARTITIONS if name in form.content), None)
        if key is None:
            raise form.error(f"it has none of {' and '.join(_PARTITIONS)}")
        alignment = form.content.get("param_alignment_paddings") or ()
        return OptimizerStates(
            path,
            form.vectors(key),
            is_parted=key == _PARTITIONS[1],
            stage=pickles.number(form.content.get("zero_stage")),
            partitions=max(
                form.numbers(_as_list(form.content.get("partition_count")), "partition_count"), default=None
            ),
            paddings=form.numbers(form.sequence("group_paddings"), "group_paddings"),
            keeps_padding="zero_stage" not in form.content,  # BF16_Optimizer, which has none, does not strip it
            alignment=tuple(form.numbers(group, "param_alignment_paddings") for group in _as_list(alignment)),
            rates=_rates(form.content.get("base_optimizer_state") or form.content.get("optimizer_state_dict")),
        )


@dataclass(frozen=True)
class _Form:
    """The entries of a file, each checked to be what it should."""

    path: Path
    content: Mapping[str, Any]

    def error(self, what: str) -> UnsupportedCheckpointError:
        return UnsupportedCheckpointError(
            f"the file is not as DeepSpeed writes it: {what}",
            where=str(self.path),
            why=f"it has {listing(self.content, shown=8)}" if self.content else "it has no entries",
            fix="load it in the training job, and save it again with a DeepSpeed from 0.8 on",
        )

    def mapping(self, name: str) -> Mapping[Any, Any]:
        """An entry that is a dictionary; empty where it is None or not there."""
        value = self.content.get(name)
        if value is not None and not isinstance(value, Mapping):
            raise self.error(f"{name} is a {type(value).__name__}")
        return {} if value is None else value

    def sequence(self, name: str) -> Sequence[Any]:
        """An entry that is a list; empty where it is None or not there."""
        value = self.content.get(name)
        if value is not None and not isinstance(value, (list, tuple)):
            raise self.error(f"{name} is a {type(value).__name__}")
        return value or ()

    def shapes(self, value: Any, name: str) -> Shapes:
        """A dictionary of shapes."""
        if not isinstance(value, Mapping):
            raise self.error(f"{name} holds a {type(value).__name__}")
        return {str(key): self.numbers(shape, f"{name} of {key}") for key, shape in value.items()}

    def numbers(self, value: Any, name: str) -> tuple[int, ...]:
        """A list of numbers from 0 on."""
        found = [pickles.number(item) for item in value] if isinstance(value, (list, tuple)) else [None]
        numbers = tuple(item for item in found if item is not None and item >= 0)
        if len(numbers) != len(found):
            raise self.error(f"{name} is {value!r}")
        return numbers

    def tensors(self, value: Any, name: str) -> Mapping[str, Stored]:
        """A dictionary of tensors."""
        if not isinstance(value, Mapping) or not all(isinstance(item, Stored) for item in value.values()):
            raise self.error(f"{name} holds what is no tensor")
        return {str(key): tensor for key, tensor in value.items()}

    def vectors(self, name: str) -> tuple[Stored, ...]:
        """A list of flat tensors."""
        found = self.sequence(name)
        for value in found:
            if not isinstance(value, Stored) or len(value.shape) != 1 or not value.is_contiguous:
                raise self.error(f"{name} holds what is no flat vector")
        return tuple(found)


def _as_list(value: Any) -> Sequence[Any]:
    """A list as it is, one thing as a list of it, None as none."""
    return value if isinstance(value, (list, tuple)) else () if value is None else (value,)


def _rates(optimizer: Any) -> tuple[float, ...]:
    """The learning rates in the state of a torch optimizer; none where it has another form."""
    groups = optimizer.get("param_groups") if isinstance(optimizer, Mapping) else ()
    rates = [group.get("lr") for group in _as_list(groups) if isinstance(group, Mapping)]
    return tuple(rate for rate in rates if isinstance(rate, float))


def _modules(module: Mapping[Any, Any]) -> frozenset[str]:
    """The modules that torch noted when it made the state dict, those included that put nothing in."""
    attributes = getattr(module, "attributes", None)
    noted = attributes.get("_metadata") if isinstance(attributes, Mapping) else None
    return frozenset(str(name) for name in noted) if isinstance(noted, Mapping) else frozenset()
