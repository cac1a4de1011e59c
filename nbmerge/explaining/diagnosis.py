"""What is wrong with a config as a whole: it is of another family, or of another size, and of which."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from nbmerge.errors import Problem
from nbmerge.explaining.anatomy import SEES, Anatomy, and_list, sizes_in_words
from nbmerge.explaining.candidates import Known, Mismatch
from nbmerge.explaining.model_patterns import CONFIG_FIX
from nbmerge.explaining.table import why
from nbmerge.geometry import Shape

_FEWEST = 2  # sizes that must differ, if it is not the hidden size, before the whole model is said to be another
_ANOTHER = "the checkpoint is of another model than config.json"
NOT_THIS_MODELS = "config.json is not this model's, or the vocabulary was resized in training without the config"


@dataclass(frozen=True)
class Diagnosis:
    """How the model of a checkpoint differs from that of a config. Nothing is computed before it is asked.

    class_name: of the config's model; held, wanted: shapes by name, the checkpoint's (published or canonical Megatron
    names) and the model's.
    """

    class_name: str
    held: Mapping[str, Shape] = field(default_factory=dict, repr=False)
    wanted: Mapping[str, Shape] = field(default_factory=dict, repr=False)

    @cached_property
    def _got(self) -> Anatomy:
        return Anatomy.of(self.held)

    @cached_property
    def _want(self) -> Anatomy:
        return Anatomy.of(self.wanted)

    @property
    def extra(self) -> tuple[str, ...]:
        """Parts that only the checkpoint has."""
        return tuple(sorted(self._got.parts - self._want.parts))

    @property
    def lacking(self) -> tuple[str, ...]:
        """Parts that only the config's model has, but a vision tower, which training often leaves out."""
        return tuple(sorted(self._want.parts - self._got.parts - {SEES}))

    @cached_property
    def sizes(self) -> Mapping[str, tuple[int, int]]:
        """Sizes by name, (the checkpoint's, the config's), where both are known and differ."""
        both = ((name, size, self._want.sizes.get(name, size)) for name, size in self._got.sizes.items())
        return {name: (a, b) for name, a, b in both if a != b and not _is_padding(name, a, b)}

    @cached_property
    def named(self) -> tuple[str, ...]:
        """Published models with the checkpoint's sizes."""
        return tuple(model.name for model in self._got.published())

    @property
    def family(self) -> str:
        """Whose tensors are named as the checkpoint's; empty where none of the known families is."""
        return self._got.family

    @property
    def is_other_family(self) -> bool:
        """Whether the checkpoint has parts that the config's model has not, or the other way round."""
        return bool(self.extra or self.lacking)

    @property
    def is_other_size(self) -> bool:
        """Whether the hidden size differs, or several sizes do, beside the vocabulary."""
        return "hidden_size" in self.sizes or len(self.sizes.keys() - {"vocab_size", "qkv_rows"}) >= _FEWEST

    @cached_property
    def sentence(self) -> str:
        """What is wrong, in one sentence; empty where the model as a whole is the right one."""
        lost = "" if self.extra or self.is_other_size else ", or a part of the save is lost"
        like = f", and its tensors are named as those of {self.family}" if self.family else ""
        family = f"config.json is of another family{lost}: the checkpoint {self.other_family}{like}"
        said = [family] if self.is_other_family else []
        if self.is_other_size:
            mine = sizes_in_words({name: got for name, (got, _) in self.sizes.items()})
            theirs = sizes_in_words({name: want for name, (_, want) in self.sizes.items()})
            of = f", the sizes of {' or '.join(self.named)}" if self.named else ""
            begin = "its sizes are others too: it" if said else "config.json is of another size: the checkpoint"
            said.append(f"{begin} has {mine}{of}; config.json says {theirs}")
        return "; ".join(said)

    @property
    def other_family(self) -> str:
        """`has query and key norms, which LlamaForCausalLM has not`; empty where the parts are the same."""
        parts = [f"has {and_list(self.extra)}, which {self.class_name} has not"] if self.extra else []
        parts += [f"lacks {and_list(self.lacking)} of {self.class_name}"] if self.lacking else []
        return " and ".join(parts)

    def problem(self) -> list[Problem]:
        """The sentence as a problem, to be told first; nothing where there is none."""
        if not self.sentence:
            return []
        fix = CONFIG_FIX if not self.named else f"pass the config of {' or '.join(self.named)} that training used: "
        fix += "" if not self.named else "--hf_model_config_path DIR"
        return [Problem(self.sentence, why="what follows comes of it", fix=fix, kind="contradiction")]

    def why(self, asked: Mismatch) -> str:
        """Why one tensor of the checkpoint has another shape: said of the whole model, or the table's best."""
        return _ANOTHER if self.sentence else why(asked, NOT_THIS_MODELS)


def _is_padding(name: str, got: int, want: int) -> bool:
    """Whether a vocabulary is larger by what Megatron may have added."""
    return name == "vocab_size" and 0 < got - want < 16_384 and got % 64 == 0


def known_of(config: Mapping[str, object], ranks: int | None, diagnosis: Diagnosis | None = None) -> Known:
    """What naming knows.

    ranks: how many wrote the checkpoint and said how they cut it; None, and 1, where nothing says so: the file may be
    what another tool put together.
    """
    many = ranks if ranks is not None and ranks > 1 else None
    if diagnosis is None:
        return Known(many, config, recorded=many is not None)
    return Known(many, config, {}, {}, diagnosis.sizes, diagnosis.other_family, recorded=many is not None)
