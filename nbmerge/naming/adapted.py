"""The outputs of a checkpoint that may hold an adapter, whoever named its tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from nbmerge.expressions import Expr
from nbmerge.layout import Checkpoint
from nbmerge.naming.lora.keys import adapter_names
from nbmerge.naming.lora.refusals import no_adapter
from nbmerge.naming.lora.separate import Separated, separated
from nbmerge.naming.megatron.adapters import is_adapter, take_adapters
from nbmerge.naming.model import HFModel
from nbmerge.naming.outputs import outputs_of
from nbmerge.naming.published import Base, Named, refused_adapters
from nbmerge.options import MergeOptions

_Name = Callable[[Mapping[str, Expr], str], Named]


def holds_adapter(checkpoint: Checkpoint) -> bool:
    """Whether there are tensors of an adapter among those of the checkpoint, by their names."""
    if checkpoint.is_adapter:
        return True
    if checkpoint.names == "megatron":
        return any(map(is_adapter, checkpoint.tensors))
    return bool(adapter_names(checkpoint.tensors))


def outputs_with_adapter(
    checkpoint: Checkpoint, model: HFModel, options: MergeOptions, base: Base | None
) -> tuple[Named, Separated | None]:
    """The model's outputs, and what is done with the adapter: None where nothing was asked for, or nothing can be.

    Outputs that a fold unties are named as those of `model.untied`.
    """
    exprs = {name: tensor.expr for name, tensor in checkpoint.tensors.items()}
    ranks = None if checkpoint.overrides else checkpoint.world_size

    def named(tensors: Mapping[str, Expr], names: str, *, is_untied: bool = False) -> Named:
        facts = (model.untied if is_untied else model).facts
        return outputs_of(
            tensors, names, facts, options.dialect, base, ranks, checkpoint.stated, checkpoint.absence
        )  # fmt: skip

    if options.lora is None:
        if checkpoint.is_adapter:
            return refused_adapters(list(exprs)), None
        return named(exprs, checkpoint.names), None
    if checkpoint.names == "megatron":
        return _from_megatron(exprs, checkpoint, model, options, base, named)
    if checkpoint.names != "transformers":
        found = adapter_names(exprs)
        lora = None if found else Separated(exprs, problems=(no_adapter(options.lora, checkpoint.path),))
        return named(exprs, checkpoint.names), lora
    lora = separated(exprs, checkpoint, model, options, base)
    if lora.problems or options.lora == "adapter":
        return Named({}, {}, options.dialect), lora
    return named(lora.model, checkpoint.names, is_untied=lora.is_untied), lora


def _from_megatron(
    exprs: Mapping[str, Expr],
    checkpoint: Checkpoint,
    hf_model: HFModel,
    options: MergeOptions,
    base: Base | None,
    named: _Name,
) -> tuple[Named, Separated | None]:
    """The model gets its published names first, and the adapter peft's: then one fits the other as anywhere."""
    nothing = Named({}, {}, options.dialect)
    taken = take_adapters(exprs, hf_model.facts)
    if not taken.adapter and not taken.problems:
        return nothing, Separated(exprs, problems=(no_adapter(options.lora, checkpoint.path),))
    model = named(taken.model, checkpoint.names) if taken.model else nothing
    if problems := (*taken.problems, *model.problems):
        return replace(model, problems=problems), None
    lora = separated({**model.outputs, **taken.adapter}, checkpoint, hf_model, options, base)
    if lora.problems or options.lora == "adapter":
        return nothing, lora
    if not taken.model:  # an adapter alone: what is folded, and the rest of the base model
        return named(lora.model, "transformers"), lora
    return replace(model, outputs=dict(lora.model)), lora
