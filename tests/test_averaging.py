"""The average of checkpoints is what torch computes, is refused where there is none, and is proved as any merge."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import nbmerge
from nbmerge import ConfigError, InconsistentCheckpointError, OptionError, PlanError, TargetError, cli
from nbmerge.averaging import _mean, _shares, averaged_checkpoint
from nbmerge.dtypes import BY_NAME
from nbmerge.engine.read import read
from nbmerge.engine.sources import LocalFiles
from nbmerge.expressions import Compute, Fill, walk
from nbmerge.geometry import Box
from nbmerge.layout import Equality
from tests.support.adapters import adapted, save_adapter_config, write_world
from tests.support.messages import assert_says, refusal
from tests.support.models import memory_state, save_tiny_model, write_model_world
from tests.support.results import assert_same, bits, bits_of, bits_of_all, receipt_of, saved_bits

NORM, EMBEDDING = "model.norm.weight", "model.embed_tokens.weight"


def state_of(seed: int, dtype: str = "bfloat16", model: str = "qwen2") -> dict[str, torch.Tensor]:
    """The tiny model as another step of training left it."""
    chance = torch.Generator().manual_seed(seed)
    return {
        name: tensor + (torch.randn(tensor.shape, generator=chance) / 8).to(tensor.dtype)
        if tensor.is_floating_point()
        else tensor
        for name, tensor in memory_state(model, dtype).items()
    }


def mean_of(states: list[dict[str, torch.Tensor]], weights: list[float] | None = None) -> dict[str, torch.Tensor]:
    """Product by product, sum by sum, in float32."""
    shares = weights or [1.0] * len(states)
    found = {}
    for name, first in states[0].items():
        total = first.float() * shares[0]
        for state, share in zip(states[1:], shares[1:], strict=True):
            total = total + state[name].float() * share
        found[name] = (total / sum(shares)).to(first.dtype)
    return found


@pytest.fixture
def run(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"global_step_{seed}" for seed in range(3)]
    for seed, path in enumerate(paths):
        write_model_world(path, "qwen2", dtype="bfloat16", state=state_of(seed))
    return paths


@pytest.mark.parametrize("weights", [None, [1, 3, 0.5]])
def test_of_checkpoints_is_the_mean_and_is_proved(run: list[Path], tmp_path: Path, weights: list[float] | None):
    report = nbmerge.average(run, tmp_path / "out", weights=weights)
    want = mean_of([state_of(seed) for seed in range(3)], weights)
    assert_same(saved_bits(tmp_path / "out"), bits_of_all(want))
    recorded = receipt_of(tmp_path / "out")["source"]
    assert recorded["backend"] == "average"
    assert [each["path"] for each in recorded["averaged"]] == [str(path) for path in run]
    assert [each["weight"] for each in recorded["averaged"]] == (weights or [1, 1, 1])
    assert {Path(file["name"]).suffix for file in recorded["files"]} == {".pt"}
    assert nbmerge.validate(report, progress=False).ok
    assert nbmerge.validate(tmp_path / "out", checkpoint=run, no_run=True).ok
    assert not nbmerge.validate(tmp_path / "out", checkpoint=[run[0], run[0], run[2]], checks="source").ok
    one = nbmerge.validate(tmp_path / "out", checkpoint=run[0], checks="source")
    assert "the average of 3 checkpoints, and 1 passed" in str(one)
    assert not one.ok


def test_of_whatever_diff_takes(run: list[Path], tmp_path: Path):
    merged = nbmerge.merge(run[1], tmp_path / "merged")
    mixed = [nbmerge.open_checkpoint(run[0]), merged, nbmerge.plan_merge(run[2])]
    nbmerge.average(mixed, tmp_path / "out", max_shard_size="4KB")
    assert_same(saved_bits(tmp_path / "out"), bits_of_all(mean_of([state_of(seed) for seed in range(3)])))


def test_of_equal_checkpoints_is_the_checkpoint(run: list[Path], tmp_path: Path):
    state = state_of(0)
    state[NORM] = torch.tensor([-0.0, 0.0, 1e-40, -3e38] + [1 / 3] * 12, dtype=torch.bfloat16)
    write_model_world(tmp_path / "again", "qwen2", dtype="bfloat16", state=state)
    nbmerge.average([tmp_path / "again"] * 2, tmp_path / "out")
    got = saved_bits(tmp_path / "out")
    assert got[EMBEDDING] == bits(state[EMBEDDING])
    assert got[NORM][2][:3] == bits(state[NORM])[2][:3]


def test_a_weight_of_0_leaves_a_checkpoint_out(run: list[Path], tmp_path: Path):
    broken = {name: torch.full_like(tensor, torch.inf) for name, tensor in state_of(0).items()}
    write_model_world(tmp_path / "diverged", "qwen2", dtype="bfloat16", state=broken)
    nbmerge.average([run[0], tmp_path / "diverged"], tmp_path / "out", weights=[2, 0])
    assert_same(saved_bits(tmp_path / "out"), bits_of_all(state_of(0)))


def test_of_two_dtypes_is_in_the_wider_and_a_cast_rounds_it_again(run: list[Path], tmp_path: Path):
    save_tiny_model("qwen2", tmp_path / "base", "float32")
    wide = mean_of([memory_state("qwen2", "float32"), {n: t.float() for n, t in state_of(0).items()}])
    nbmerge.average([tmp_path / "base", run[0]], tmp_path / "out")
    assert_same(saved_bits(tmp_path / "out"), bits_of_all(wide))
    nbmerge.average([tmp_path / "base", run[0]], tmp_path / "cast", dtype="bfloat16")
    assert_same(saved_bits(tmp_path / "cast"), bits_of_all({name: t.bfloat16() for name, t in wide.items()}))


def test_of_fused_experts_is_that_of_the_published_ones(tmp_path: Path):
    for seed in range(2):
        write_model_world(tmp_path / str(seed), "qwen3_moe", state=state_of(seed, "float32", "qwen3_moe"))
    nbmerge.average([tmp_path / "0", tmp_path / "1"], tmp_path / "out")
    write_model_world(
        tmp_path / "mean", "qwen3_moe", state=mean_of([state_of(seed, "float32", "qwen3_moe") for seed in range(2)])
    )
    nbmerge.merge(tmp_path / "mean", tmp_path / "want")
    assert_same(saved_bits(tmp_path / "out"), saved_bits(tmp_path / "want"))


def test_checkpoints_of_two_models_are_refused_with_all_that_differs(run: list[Path], tmp_path: Path):
    save_tiny_model("llama", tmp_path / "llama", "bfloat16")
    message = refusal(InconsistentCheckpointError, nbmerge.average, [run[0], tmp_path / "llama"], tmp_path / "out")
    assert_says(message, "not of one model", "q_proj.bias", "only in", str(tmp_path / "llama"), "fix:")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("sources", "weights", "words"),
    [
        ("one", None, "nothing to average"),
        (["one"], None, "nothing to average"),
        (["one", "two"], [1], "1 weights for 2 checkpoints"),
        (["one", "two"], [0, 0], "not all 0"),
        (["one", "two"], [1, float("nan")], "nan"),
        (["one", "two"], [2, -1], "-1"),
        (["one", "two"], [1, float("inf")], "inf"),
        (["one", "two"], [1, "2"], "'2'"),
        (["one", "two"], [1, True], "True"),
        (["one", "two"], [1, 10**400], "finite"),
        (["one", "two"], "model", "open_checkpoint"),
        (["one", "two"], "12", "a list of numbers"),
        (["one", "two"], 3, "a list of numbers"),
    ],
)
def test_options_that_mean_nothing(sources: list[str], weights: list[float] | None, words: str):
    assert_says(refusal(OptionError, averaged_checkpoint, sources, weights), words, "fix:")


def test_an_average_is_a_checkpoint_like_any_other(run: list[Path], tmp_path: Path):
    mean = averaged_checkpoint(run)
    assert "the average of 3 checkpoints" in repr(mean)
    assert bits_of(mean[NORM].expr) == bits(mean_of([state_of(seed) for seed in range(3)])[NORM])
    assert not nbmerge.diff(run[0], mean).is_empty
    assert nbmerge.average(run, dry_run=True).plan.total_bytes > 0


@given(st.lists(st.floats(0.01, 100) | st.floats(1e300, 1e308) | st.floats(1e-300, 1e-290), min_size=2, max_size=4))
def test_the_mean_lies_between_its_parts(weights: list[float]):
    parts = [Fill(float(n), (3,), BY_NAME["float32"]) for n in range(len(weights))]
    mean = _mean(parts, _shares(["one"] * len(weights), weights), None)
    with LocalFiles() as files:
        found = read(mean, Box((0,), (3,)), files).view("float32")
    shares = [weight / max(weights) for weight in weights]
    exact = sum(n * share for n, share in enumerate(shares)) / sum(shares)
    assert found.tolist() == pytest.approx([exact] * 3, rel=1e-6)  # float32's rounding of each product


def test_a_cast_rounds_the_mean_once(run: list[Path], tmp_path: Path):
    """To a dtype that holds more than the stored one, too."""
    exact = mean_of([{name: t.float() for name, t in state_of(seed).items()} for seed in range(3)])
    for dtype in ("float32", "float16"):
        nbmerge.average(run, tmp_path / dtype, dtype=dtype)
        assert_same(
            saved_bits(tmp_path / dtype), bits_of_all({n: t.to(getattr(torch, dtype)) for n, t in exact.items()})
        )
        assert nbmerge.validate(tmp_path / dtype, checkpoint=run, checks="source", progress=False).ok


def test_no_checkpoint_of_an_average_is_written_over(run: list[Path], tmp_path: Path):
    models = [save_tiny_model("qwen2", tmp_path / "models" / name, "bfloat16") for name in ("a", "b")]
    for target in (models[1], tmp_path / "models", run[1] / "huggingface"):
        message = refusal(TargetError, nbmerge.average, [*models, run[1]], target, overwrite=True)
        assert_says(message, "the target", "choose another directory")
    assert (models[1] / "model.safetensors").exists()


def test_copies_that_drifted_apart_are_told_of_each_checkpoint(run: list[Path], tmp_path: Path):
    """Rank 1 of a checkpoint holds another copy of a tensor than rank 0, as a merge of it alone tells too."""
    plan = nbmerge.plan_merge(run[1])
    a, b = (Fill(value, (2,), BY_NAME["float32"]) for value in (1.0, 2.0))
    drifted = replace(plan, probed=(Equality("w", a, b, (0, 1), Box((0,), (2,))),))
    report = nbmerge.average([run[0], drifted], tmp_path / "out")
    assert [each.name for each in report.drift] == [f"w of {run[1]}"]
    untied = replace(plan, equalities=(Equality("head", a, b, kept="embedding"),))
    message = refusal(PlanError, nbmerge.average, [run[0], untied], tmp_path / "two")
    assert_says(message, f"head of {run[1]} is tied to embedding")


def test_settings_that_no_shape_shows_must_agree(run: list[Path], tmp_path: Path):
    path = run[2] / "huggingface" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "hidden_act": "gelu"}))
    message = refusal(InconsistentCheckpointError, nbmerge.average, run, tmp_path / "out")
    assert_says(message, "hidden_act is 'silu'", "'gelu' here", str(run[2]))
    assert nbmerge.average(run, dry_run=True, hf_model_config_path=run[0] / "huggingface").plan.total_bytes


def test_a_checkpoint_without_a_config_takes_anothers(run: list[Path], tmp_path: Path):
    shutil.rmtree(run[0] / "huggingface")
    nbmerge.average(run, tmp_path / "out")
    assert_same(saved_bits(tmp_path / "out"), bits_of_all(mean_of([state_of(seed) for seed in range(3)])))
    shutil.rmtree(run[1] / "huggingface")
    shutil.rmtree(run[2] / "huggingface")
    assert_says(refusal(ConfigError, nbmerge.average, run, tmp_path / "none"), "config.json", "--hf_model_config_path")


def test_adapters_are_folded_first(tmp_path: Path):
    model = adapted("qwen2")
    write_world(tmp_path / "run", model)
    save_adapter_config(model, tmp_path / "run")
    nbmerge.merge(tmp_path / "run", tmp_path / "folded", lora="fold")
    message = refusal(
        TargetError, nbmerge.merge, tmp_path / "run", tmp_path / "folded", lora="fold", overwrite=True,
        base_model=tmp_path / "folded",
    )  # fmt: skip
    assert_says(message, "the target is the base model itself")
    report = nbmerge.average([tmp_path / "run", tmp_path / "folded"], tmp_path / "out", lora="fold")
    assert_same(saved_bits(tmp_path / "out"), saved_bits(tmp_path / "folded"))
    assert report.receipt["options"]["lora"] == "fold"
    sources = [tmp_path / "run", tmp_path / "folded"]
    assert nbmerge.validate(tmp_path / "out", checkpoint=sources, checks="source", progress=False).ok
    message = refusal(OptionError, nbmerge.average, sources, tmp_path / "two", lora="split")
    assert_says(message, "lora='fold'")
    nbmerge.merge(tmp_path / "run", tmp_path / "split", lora="split")
    message = refusal(PlanError, nbmerge.average, [tmp_path / "split", tmp_path / "folded"], tmp_path / "two")
    assert_says(message, "an adapter lies beside the weights", "split")


def test_an_average_of_an_average_is_refused(run: list[Path]):
    message = refusal(OptionError, averaged_checkpoint, [averaged_checkpoint(run[:2]), run[2]])
    assert_says(message, "rounded twice", str(run[0]), str(run[1]))


def test_what_comes_too_late_for_opened_checkpoints_is_told(run: list[Path]):
    opened = [nbmerge.open_checkpoint(path) for path in run]
    assert_says(refusal(OptionError, nbmerge.average, opened, trust_pickle=True), "cannot change opened checkpoints")
    assert nbmerge.average([run[0], *opened[1:]], dry_run=True, trust_pickle=True).plan.total_bytes


def test_memory_does_not_grow_with_the_number_of_checkpoints(run: list[Path]):
    few, many = (nbmerge.average(run * times, dry_run=True).plan.execution for times in (1, 10))
    assert few.peak_bytes == many.peak_bytes


def test_a_tensor_of_three_dimensions_is_cut_by_rows():
    """One expert may be larger than a block: half of it is not made of the whole."""
    parts = [Fill(float(n), (2, 3, 4), BY_NAME["float32"]) for n in range(2)]
    mean = _mean(parts, [1.0, 1.0], None)
    assert mean.shape == (2, 3, 4)
    assert max(len(node.shape) for node in walk(mean) if isinstance(node, Compute)) == 2
    with LocalFiles() as files:
        assert read(mean, Box((1, 1, 0), (1, 2, 4)), files).view("float32").tolist() == [[[0.5] * 4] * 2]


def test_the_command_line_averages(run: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = ["average", *map(str, run), "--target_dir", str(tmp_path / "out"), "--weights", "1", "3", "0.5"]
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    for share, path in zip(("0.2222", "0.6667", "0.1111"), run, strict=True):
        assert f"from {share} ×" in out
        assert path.name in out
    assert_same(saved_bits(tmp_path / "out"), bits_of_all(mean_of([state_of(seed) for seed in range(3)], [1, 3, 0.5])))
    named = [word for path in run for word in ("--checkpoint", str(path))]
    assert cli.main(["validate", str(tmp_path / "out"), *named, "--checks", "source"]) == 0
