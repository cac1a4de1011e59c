"""Makes the lazy tensors of a whole model from what all rank files hold under each name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from nbmerge.errors import Problem, listing, plural
from nbmerge.geometry import Shape
from nbmerge.layout import LazyTensor
from nbmerge.loaders.megatron.experts import expert_shards, starts_alike
from nbmerge.loaders.megatron.grid import Grid
from nbmerge.loaders.megatron.grouped import Stack, stacks, take_grouped
from nbmerge.loaders.megatron.names import Gathered, Held, experts_by_layer
from nbmerge.loaders.megatron.parallel import tensor_cut
from nbmerge.loaders.megatron.settings import Settings
from nbmerge.loaders.megatron.whole import Sharding, disagreement, put_together

_PROBED = 64 * 1024  # bytes of each copy of a tensor that no rule names


@dataclass
class Assembly:
    """What came of it: tensors by their names in the whole model, all problems, and notes."""

    grid: Grid
    settings: Settings
    found: Gathered
    tensors: dict[str, LazyTensor] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    _unknown: dict[str, list[Held]] = field(default_factory=dict)

    def run(self) -> Assembly:
        """Fills tensors, problems and notes."""
        self.problems += self.found.problems
        stacked = list(self._stacks())
        self._check_router_rows(stacked)
        dense = Sharding("tp", self.grid.tp, lambda at: at.tp)
        experts = self._expert_sharding(stacked)
        for name, held in self.found.tensors.items():
            self._add(name, held, experts if name in self.found.experts else dense)
        for stack in stacked:
            self._keep(put_together(stack.name, stack.held, self.grid, stack.cut, experts, stacked=True), stack.name)
        self._settle_unknown()
        return self

    def _stacks(self) -> Iterator[Stack]:
        for prefix, pair in take_grouped(self.found.tensors).items():
            faults = [
                fault
                for number, held in pair.items()
                if (fault := disagreement(f"{prefix}weight{number}", held, self.grid, of_one_expert=False))
            ]
            made = faults or stacks(prefix, pair, self.found.tensors, self.grid, self.settings)
            for item in [made] if isinstance(made, Problem) else made:
                if isinstance(item, Problem):
                    self.problems.append(item)
                else:
                    yield item

    def _expert_sharding(self, stacked: list[Stack]) -> Sharding:
        down = {name: held for name, held in self.found.tensors.items()
                if name in self.found.experts and "linear_fc2.weight" in name}  # fmt: skip
        down |= {stack.name: stack.held for stack in stacked if "linear_fc2" in stack.name}
        made = expert_shards(down, self.grid, self.settings)
        if isinstance(made, Problem):
            self.problems.append(made)
            return Sharding("etp", 1, lambda at: 0)
        if made.note:
            self.notes.append(made.note)
        count = made.count
        return Sharding("etp", count, lambda at: at.tp % count)

    def _check_router_rows(self, stacked: list[Stack]) -> None:
        """The router has a row for each expert of the whole model, wherever the experts are."""
        counts = experts_by_layer(self.found.experts)
        counts |= {stack.name.split("experts.")[0] + "experts.": stack.local * self.grid.ep for stack in stacked}
        for prefix, count in counts.items():
            router = self.found.tensors.get(f"{prefix.removesuffix('experts.')}router.weight")
            rows = router[0].stored.shape[0] if router and router[0].stored.shape else count
            if rows != count:
                self.problems.append(
                    Problem(
                        f"{prefix}* are {count} experts, and the router of the layer has {rows} rows",
                        where=f"expert parallel size {self.grid.ep}",
                        why="the files of some expert parallel ranks are missing, or are of another model",
                        fix="copy the files of all ranks from one save",
                        kind="missing" if count < rows else "contradiction",
                    )
                )

    def _shape_of(self, name: str) -> Shape | None:
        held = self.found.tensors.get(name)
        return held[0].stored.shape if held else None

    def _add(self, name: str, held: list[Held], sharding: Sharding) -> None:
        fault = disagreement(name, held, self.grid, of_one_expert=name in self.found.experts)
        if fault:
            self.problems.append(fault)
            return
        cut = tensor_cut(name, held[0].stored.shape, sharding.shards, self._shape_of, self.settings)
        if isinstance(cut, Problem):
            self.problems.append(cut)
            return
        if not cut.known:
            self._unknown[name] = held
        self._keep(put_together(name, held, self.grid, cut, sharding), name)

    def _keep(self, made: LazyTensor | Problem, name: str) -> None:
        if isinstance(made, Problem):
            self.problems.append(made)
        else:
            self.tensors[name] = made

    def _settle_unknown(self) -> None:
        """What no rule names is only assumed to be copies: the first bytes are compared, so that shards are seen."""
        for name, held in self._unknown.items():
            if not starts_alike([one.stored for one in held], _PROBED):
                self.problems.append(
                    Problem(
                        f"no rule says how {name} lies on the {self.grid.tp} tensor parallel ranks, and they hold "
                        "different values",
                        where=listing(self.grid.files[one.at] for one in held),
                        why="it is no parameter of a layer that this version knows; the ranks' parts may be shards",
                        fix="save with --ckpt-format torch_dist, which says how each tensor is cut",
                        kind="unsupported",
                    )
                )
        if self._unknown:
            self.notes.append(
                f"{plural(len(self._unknown), 'tensor')} under names without a rule taken as copies on every tensor "
                f"parallel rank: {listing(self._unknown)}"
            )
