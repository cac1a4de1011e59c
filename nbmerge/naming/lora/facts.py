"""What a merge does with an adapter, as plan, receipt and displays tell it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from nbmerge.errors import listing

ADAPTER_DIRECTORY = "lora_adapter"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class LoraFacts:
    """mode: `split`, `fold` or `adapter`; adapter: its name in the checkpoint; layers: adapted modules.

    r, alpha, scale: of most modules; ranks, alphas: those of modules with others; saved: modules that were trained
    whole; origins: where alpha, r and the rest were known from; precision: of a fold; untied: tensors that a fold
    writes apart from those that config.json ties them to; also_changed: tensors that are tied to adapted ones, and
    change with them; trained_on: the base model that the adapter's file names, where one of another name was given.
    """

    mode: str
    adapter: str
    layers: int
    r: int
    alpha: float
    scale: float
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    use_dora: bool = False
    saved: tuple[str, ...] = ()
    precision: str = ""
    peft: str = ""
    origins: Mapping[str, str] = field(default_factory=dict)
    untied: tuple[str, ...] = ()
    also_changed: tuple[str, ...] = ()
    trained_on: str = ""

    @property
    def sentence(self) -> str:
        """What is done, in a line: `14 layers folded into the weights: r 3, alpha 16, scale 5.33`."""
        done = {
            "fold": f"folded into the weights, {'as peft adds' if self.precision == 'exact' else 'added in fp32'}",
            "split": f"written to {ADAPTER_DIRECTORY}/ beside the base model",
            "adapter": f"written to {ADAPTER_DIRECTORY}/, without the base model",
        }[self.mode]
        kind = "DoRA" if self.use_dora else "rank-stabilised LoRA" if self.use_rslora else "LoRA"
        others = " for most" if self.ranks or self.alphas else ""
        return (
            f"{kind} of {self.layers:,} {'layer' if self.layers == 1 else 'layers'} {done}: "
            f"r {self.r}, alpha {self.alpha:g}, scale {self.scale:.4g}{others}{self._of_ties}{self._of_base}"
        )

    @property
    def _of_ties(self) -> str:
        """What became of tied embeddings, for the end of the sentence."""
        found = f"; {listing(self.untied)} untied, as the adapter trained one of the two whole" if self.untied else ""
        if self.also_changed:
            found += f"; {listing(self.also_changed)}, tied to what is adapted, changed with it, as in peft's merge"
        return found

    @property
    def _of_base(self) -> str:
        return f"; its file names another base model, {self.trained_on}" if self.trained_on else ""

    def as_record(self) -> dict[str, object]:
        """For the receipt."""
        return {
            "mode": self.mode, "adapter": self.adapter, "layers": self.layers, "r": self.r, "alpha": self.alpha,
            "scale": self.scale, "rank_pattern": dict(self.ranks), "alpha_pattern": dict(self.alphas),
            "use_rslora": self.use_rslora, "use_dora": self.use_dora, "modules_to_save": list(self.saved),
            **({"precision": self.precision} if self.precision else {}),
            **({"untied": list(self.untied)} if self.untied else {}),
            **({"also_changed": list(self.also_changed)} if self.also_changed else {}),
            **({"trained_on": self.trained_on} if self.trained_on else {}),
            "peft": self.peft, "known_from": dict(self.origins),
        }  # fmt: skip
