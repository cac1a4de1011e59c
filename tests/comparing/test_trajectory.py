"""Runs: their checkpoints, each step, and the cosine between successive updates."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from nbmerge.comparing.running import trajectory_of
from nbmerge.comparing.sources import run_checkpoints, run_weights
from nbmerge.errors import NbmergeError, NotACheckpointError, NotSupportedError, OptionError
from nbmerge.weights import Weights
from tests.comparing.making import weights
from tests.support.models import memory_state, write_model_world

NAMES = ("model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight")


def run(tmp_path: Path, updates: list[torch.Tensor], dtype: torch.dtype = torch.float64) -> list[Weights]:
    """A model and what these updates, added to its first tensor, make of it one after the other."""
    state = {name: torch.randn(30, 20, generator=torch.Generator().manual_seed(1)).double() for name in NAMES}
    made = [weights(tmp_path / "global_step_0", {name: tensor.to(dtype) for name, tensor in state.items()})]
    for number, update in enumerate(updates, 1):
        state = {**state, NAMES[0]: state[NAMES[0]] + update}
        made.append(weights(tmp_path / f"global_step_{number}", {n: t.to(dtype) for n, t in state.items()}))
    return made


def cosine(x: torch.Tensor, y: torch.Tensor) -> float:
    return float((x * y).sum() / x.norm() / y.norm())


@pytest.mark.parametrize("workers", [1, 3])
def test_successive_updates_have_their_cosine(tmp_path: Path, workers: int) -> None:
    updates = [torch.from_numpy(np.random.default_rng(i).standard_normal((30, 20))) * 1e-3 for i in range(3)]
    updates[2] = -2 * updates[1]
    trajectory = trajectory_of(run(tmp_path, updates), workers=workers)
    assert len(trajectory) == 3
    assert trajectory[0].cosine is None
    assert trajectory[1].cosine == pytest.approx(cosine(updates[0], updates[1]), rel=1e-6)
    assert trajectory[2].cosine == pytest.approx(-1.0)
    assert trajectory[2].cosines[NAMES[0]] == pytest.approx(-1.0)
    assert trajectory[2].cosines[NAMES[1]] is None
    assert trajectory[1].cosines_by_kind["mlp.up_proj"] == pytest.approx(cosine(updates[0], updates[1]), rel=1e-6)
    assert [step.diff.statistics.changed for step in trajectory.steps] == [600, 600, 600]
    assert [Path(step.label).name for step in trajectory.steps] == ["global_step_1", "global_step_2", "global_step_3"]
    assert trajectory.sentence == (
        f"each of 3 updates changed 33.3% of all elements; successive updates have a cosine of -1.00 to "
        f"{trajectory[1].cosine:+.2f}"
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_cosines_are_of_the_stored_values(tmp_path: Path, dtype: torch.dtype) -> None:
    updates = [torch.from_numpy(np.random.default_rng(i).standard_normal((30, 20))) * 0.1 for i in range(2)]
    models = run(tmp_path, updates, dtype)
    first = torch.randn(30, 20, generator=torch.Generator().manual_seed(1)).double()
    stored = [tensor.to(dtype).double() for tensor in (first, first + updates[0], first + updates[0] + updates[1])]
    want = cosine(stored[1] - stored[0], stored[2] - stored[1])
    assert trajectory_of(models)[1].cosine == pytest.approx(want, rel=1e-9)


def test_what_is_not_finite_spoils_no_cosine(tmp_path: Path) -> None:
    updates = [torch.ones(30, 20, dtype=torch.float64), torch.ones(30, 20, dtype=torch.float64)]
    updates[1][3, 4] = float("nan")
    assert trajectory_of(run(tmp_path, updates))[1].cosine == pytest.approx(1.0)


def test_a_frozen_tensor_that_moved_once_is_told(tmp_path: Path) -> None:
    updates = [torch.zeros(30, 20), torch.ones(30, 20)]
    trajectory = trajectory_of(run(tmp_path, updates), frozen="*layers.0*")
    assert trajectory.sentence.endswith("tensors declared frozen moved 1 time")
    assert "✗ problem: to global_step_2: 1 tensor declared frozen moved" in repr(trajectory)
    still = trajectory_of(run(tmp_path, updates), frozen="*norm*")
    assert still.sentence.endswith("nothing declared frozen moved")


def test_a_runs_checkpoints_are_found_in_the_order_of_their_steps(tmp_path: Path) -> None:
    for name in ("global_step_100/actor", "global_step_20/actor", "global_step_3", "latest", "notes_1"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("100")
    found = [str(path.relative_to(tmp_path)) for path in run_checkpoints(tmp_path)]
    assert found == ["global_step_3", "global_step_20/actor", "global_step_100/actor"]


@pytest.mark.parametrize("made", [[], ["global_step_1"]])
def test_a_run_of_fewer_than_two_checkpoints(tmp_path: Path, made: list[str]) -> None:
    for name in made:
        (tmp_path / name).mkdir()
    with pytest.raises(NotACheckpointError, match=f"the run has {len(made)} checkpoint"):
        run_checkpoints(tmp_path)


def test_one_checkpoint_is_no_trajectory(tmp_path: Path) -> None:
    models = run(tmp_path, [])
    for given in ([], models):
        with pytest.raises(OptionError, match="two checkpoints or more"):
            trajectory_of(given)


def test_unmerged_checkpoints_are_followed(tmp_path: Path) -> None:
    for step in range(3):
        state = memory_state("qwen2")
        state["model.layers.0.mlp.up_proj.weight"] += step * 0.25
        write_model_world(tmp_path / f"global_step_{step}" / "actor", "qwen2", 2, state=state)
    trajectory = trajectory_of(run_weights(tmp_path))
    assert trajectory[1].cosine == pytest.approx(1.0, abs=1e-6)
    assert [len(step.diff.changed) for step in trajectory.steps] == [1, 1]
    assert "global_step_2/actor" in repr(trajectory)


def test_a_data_frame_needs_pandas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    trajectory = trajectory_of(run(tmp_path, [torch.ones(30, 20)]))
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(NotSupportedError, match="pip install pandas"):
        trajectory.to_dataframe()
    assert issubclass(NotSupportedError, NbmergeError)
    assert trajectory.sentence.startswith("1 update changed 33.3% of all elements")
