"""DeepSpeed checkpoints in their documented form, written in one process for any number of pretend ranks.

The form is that of DeepSpeed 0.19.8, read off its own files; tests/data has some of those.
"""

from __future__ import annotations

import itertools
import math
import sys
import types
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

Tensors = Mapping[str, torch.Tensor]

_CLASSES = {
    "deepspeed.runtime.fp16.loss_scaler": "LossScaler",
    "deepspeed.runtime.zero.config": "ZeroStageEnum",
    "deepspeed.utils.tensor_fragment": "fragment_address",
}


@dataclass(frozen=True)
class Run:
    """How a training run saves.

    masters: fp32 by name; groups: their names by parameter group (at stage 3: by sub-group), by default one of all;
    frozen, buffers: as the model has them; shared: alias → name; alignment: elements to which the offset of each
    parameter is padded; keeps_padding: BF16_Optimizer; excludes_frozen: exclude_frozen_parameters=True.
    """

    masters: Tensors
    stage: int = 2
    world: int = 2
    groups: Sequence[Sequence[str]] = ()
    dtype: torch.dtype = torch.bfloat16
    frozen: Tensors = field(default_factory=dict)
    buffers: Tensors = field(default_factory=dict)
    shared: Mapping[str, str] = field(default_factory=dict)
    alignment: int = 1
    keeps_padding: bool = False
    excludes_frozen: bool = False
    model_parallel: int = 1
    client_state: Mapping[str, Any] = field(default_factory=dict)

    @property
    def grouped(self) -> list[list[str]]:
        """The names of each group."""
        return [list(group) for group in self.groups] or [list(self.masters)]

    @property
    def prefix(self) -> str:
        """Of the optimizer's files."""
        return "bf16_" if self.dtype == torch.bfloat16 else ""


def write_deepspeed(directory: Path, run: Run, tag: str = "global_step3", *, latest: bool = True) -> Path:
    """What `save_checkpoint` writes: the tag's directory, and `latest`. Gives the tag's directory."""
    folder = directory / tag
    folder.mkdir(parents=True)
    ranks = range(run.world)
    if run.stage == 3:
        for rank in ranks:
            torch.save(model_states(run, rank), folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
    else:
        torch.save(model_states(run), folder / "mp_rank_00_model_states.pt")
    if run.stage:
        with deepspeed_classes() as classes:
            for rank, state in enumerate(optimizer_states(run, classes)):
                torch.save(state, folder / f"{run.prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    if latest:
        (directory / "latest").write_text(tag)
    return folder


def write_universal(directory: Path, run: Run, tag: str = "global_step3_universal") -> Path:
    """What ds_to_universal.py makes of the run's checkpoint."""
    folder = write_deepspeed(directory, run, tag, latest=False)
    for path in folder.glob("*_optim_states.pt"):
        path.unlink()
    for name, master in run.masters.items():
        (folder / "zero" / name).mkdir(parents=True)
        flat = master.reshape(-1).clone()
        content = flat if run.stage == 3 else {"cat_dim": 0, "param": master.clone()}
        torch.save(content, folder / "zero" / name / "fp32.pt")
        torch.save(torch.tensor(3.0), folder / "zero" / name / "step.pt")
    (directory / "latest_universal").write_text(tag)
    return folder


def write_pipeline(directory: Path, run: Run, tag: str = "global_step3") -> Path:
    """What a PipelineModule of one stage saves: names are `0.weight`, layer and name within it. Gives the tag's."""
    folder = write_deepspeed(directory, run, tag)
    path = folder / "mp_rank_00_model_states.pt"
    content = torch.load(path)
    layers: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in content["module"].items():
        number, _, local = name.partition(".")
        layers.setdefault(int(number), {})[local] = tensor.clone()
    for number, layer in layers.items():
        torch.save(layer, folder / f"layer_{number:02d}-model_states.pt")
    torch.save({**content, "module": None}, path)
    return folder


def model_states(run: Run, rank: int = 0) -> dict[str, Any]:
    """The content of a model states file."""
    parted = run.stage == 3
    of_fragments = run.stage > 1 and not run.excludes_frozen
    shapes = [OrderedDict((name, run.masters[name].shape) for name in group) for group in run.grouped]
    fragments = {name: _piece(tensor, rank, run.world) if parted else tensor for name, tensor in run.frozen.items()}
    return {
        "module": _module(run, parted=parted),
        "buffer_names": list(run.buffers),
        "optimizer": None,
        "param_shapes": shapes if run.stage else None,
        "frozen_param_shapes": OrderedDict((n, t.shape) for n, t in run.frozen.items()) if of_fragments else None,
        "shared_params": dict(run.shared) if rank == 0 else {},
        "frozen_param_fragments": OrderedDict(fragments) if of_fragments else None,
        "lr_scheduler": None,
        "global_steps": 3,
        "dp_world_size": run.world,
        "mp_world_size": run.model_parallel,
        "ds_config": {"zero_optimization": {"stage": run.stage}, "bf16": {"enabled": run.dtype == torch.bfloat16}},
        "ds_version": "0.19.8",
        **run.client_state,
    }


def _module(run: Run, *, parted: bool) -> OrderedDict[str, torch.Tensor]:
    parameters = {name: tensor.to(run.dtype) for name, tensor in run.masters.items()}
    if not run.excludes_frozen:
        parameters |= run.frozen
    parameters |= {alias: parameters[name] for alias, name in run.shared.items()}
    if parted:
        parameters = {name: torch.empty(0, dtype=tensor.dtype) for name, tensor in parameters.items()}
    module = OrderedDict({**parameters, **run.buffers})
    names = [*run.masters, *run.frozen, *run.shared, *run.buffers]
    module._metadata = {"": {"version": 1}, **{name.rpartition(".")[0]: {"version": 1} for name in names}}
    return module


def _piece(tensor: torch.Tensor, rank: int, world: int) -> torch.Tensor:
    """Stage 3's part of a parameter, its padding in place."""
    size = math.ceil(tensor.numel() / world)
    flat = torch.nn.functional.pad(tensor.reshape(-1), (0, size * world - tensor.numel()))
    return flat[rank * size : (rank + 1) * size].clone()


def optimizer_states(run: Run, classes: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The content of each rank's optimizer file."""
    for rank in range(run.world):
        state = _parted(run, rank) if run.stage == 3 else _grouped(run, rank)
        vectors = state.get("fp32_flat_groups") or state["single_partition_of_fp32_groups"]
        moments = {
            number: {"step": torch.tensor(3.0), "exp_avg": torch.randn_like(v)} for number, v in enumerate(vectors)
        }
        moment_key = "optimizer_state_dict" if run.stage == 3 else "base_optimizer_state"
        state[moment_key] = {"state": moments, "param_groups": [{"lr": 1e-3} for _ in vectors]}
        if not run.keeps_padding:
            scaler = classes["LossScaler"]()
            scaler.cur_scale = 1.0
            state |= {"loss_scaler": scaler, "zero_stage": classes["ZeroStageEnum"](run.stage)}
        if run.stage < 3:
            address = classes["fragment_address"]()
            address.numel, address.start = 1, 0
            state["param_slice_mappings"] = [OrderedDict((name, address) for name in group) for group in run.grouped]
        yield {"optimizer_state_dict": state, "ds_version": "0.19.8"}


def _grouped(run: Run, rank: int) -> dict[str, Any]:
    """Stages 1 and 2: each group is one vector, cut over the ranks."""
    vectors, paddings, alignments = [], [], []
    for group in run.grouped:
        parts, between, at = [], [], 0
        for number, name in enumerate(group):
            flat = run.masters[name].reshape(-1)
            at += flat.numel()
            skipped = -at % run.alignment if number < len(group) - 1 else 0
            at += skipped
            between.append(skipped)
            parts += [flat, torch.full((skipped,), 7.0)]
        size = math.ceil(at / (2 * run.world)) * 2
        vector = torch.nn.functional.pad(torch.cat(parts), (0, size * run.world - at), value=9.0)
        own = vector[rank * size : (rank + 1) * size]
        padding = min(max((rank + 1) * size - at, 0), size)
        is_last = rank == run.world - 1
        paddings.append((size * run.world - at if is_last else 0) if run.keeps_padding else padding)
        vectors.append(own.clone() if run.keeps_padding else own[: size - padding].clone())
        alignments.append(between)
    state = {
        "clip_grad": 1.0,
        "single_partition_of_fp32_groups": vectors,
        "group_paddings": paddings,
        "partition_count": [run.world] * len(vectors),
    }
    return state | ({"param_alignment_paddings": alignments} if run.alignment > 1 else {})


def _parted(run: Run, rank: int) -> dict[str, Any]:
    """Stage 3: each parameter is cut over the ranks."""
    pieces = [[_piece(run.masters[name], rank, run.world) for name in group] for group in run.grouped]
    return {"fp32_flat_groups": [torch.cat(group) for group in pieces], "partition_count": run.world}


def tensors_of(shapes: Sequence[tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """fp32 tensors that no 16-bit number equals, each value another one."""
    starts = itertools.accumulate((math.prod(shape) for shape in shapes), initial=0)
    return {
        f"model.layers.{number}.weight": (torch.arange(math.prod(shape)) + start + 1 / 3).reshape(shape)
        for number, (shape, start) in enumerate(zip(shapes, starts, strict=False))
    }


def run_of(model: Tensors, **how: Any) -> Run:
    """A run that trained all parameters of a model, which is in fp32."""
    return replace(Run({name: tensor.float() for name, tensor in model.items()}), **how)


@contextmanager
def deepspeed_classes() -> Iterator[Mapping[str, Any]]:
    """The classes that DeepSpeed's pickles name, importable only while this is open: it is not installed."""
    made: dict[str, Any] = {}
    before = dict(sys.modules)
    for module in _CLASSES:
        for end in (at for at in range(len(module) + 1) if module[at : at + 1] in (".", "")):
            sys.modules[module[:end]] = types.ModuleType(module[:end])
    for module, name in _CLASSES.items():
        base: tuple[type, ...] = (int,) if name == "ZeroStageEnum" else ()
        made[name] = type(
            name, base, {"__module__": module, "__reduce__": _as_enum} if base else {"__module__": module}
        )
        setattr(sys.modules[module], name, made[name])
    try:
        yield made
    finally:
        for name in [name for name in sys.modules if name.startswith("deepspeed")]:
            if name in before:
                sys.modules[name] = before[name]
            else:
                del sys.modules[name]


def _as_enum(self: Any) -> tuple[type, tuple[int]]:
    """As members of an enum are pickled: the class, called with the value."""
    return type(self), (int(self),)
