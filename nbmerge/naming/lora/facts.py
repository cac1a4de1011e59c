"""What a merge does with an adapter, as plan, receipt and displays tell it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

ADAPTER_DIRECTORY = "lora_adapter"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class LoraFacts:
    """mode: `split`, `fold` or `adapter`; adapter: its name in the checkpoint; layers: adapted modules.

    r, alpha, scale: of most modules; ranks, alphas: those of modules with others; saved: modules that were trained
    whole; origins: where alpha, r and the rest were known from; precision: of a fold.
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
            f"r {self.r}, alpha {self.alpha:g}, scale {self.scale:.4g}{others}"
        )

    def as_record(self) -> dict[str, object]:
        """For the receipt."""
        return {
            "mode": self.mode, "adapter": self.adapter, "layers": self.layers, "r": self.r, "alpha": self.alpha,
            "scale": self.scale, "rank_pattern": dict(self.ranks), "alpha_pattern": dict(self.alphas),
            "use_rslora": self.use_rslora, "use_dora": self.use_dora, "modules_to_save": list(self.saved),
            **({"precision": self.precision} if self.precision else {}),
            "peft": self.peft, "known_from": dict(self.origins),
        }  # fmt: skip
