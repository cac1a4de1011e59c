"""The demo: it makes real checkpoints, proves what it claims, and fails in words."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import nbmerge
from nbmerge.cli import main
from nbmerge.demo import (
    DemoCheckpoint,
    DemoError,
    Recipe,
    differences,
    differences_on_disk,
    differences_when_loaded,
    make_checkpoint,
    make_checkpoints,
    run,
    start_hub,
)
from nbmerge.demo.command import generate
from nbmerge.demo.models import ARCHITECTURES, VOCABULARY, build_model
from nbmerge.demo.tokenizer import build_tokenizer
from nbmerge.errors import OptionError, TargetError
from tests.support.models import HAS_CONVERSIONS


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[DemoCheckpoint]:
    """A checkpoint of two ranks, in a directory whose name has a space; and one with an adapter."""
    root = tmp_path_factory.mktemp("a demo")
    adapted = Recipe(world_size=2, dtype="bfloat16", lora_r=2)
    return make_checkpoints({root / "full": Recipe(world_size=2, optimizer=True), root / "lora": adapted})


@pytest.fixture(scope="module")
def demo(both: list[DemoCheckpoint]) -> DemoCheckpoint:
    return both[0]


@pytest.fixture(scope="module")
def merged(demo: DemoCheckpoint) -> Path:
    nbmerge.merge(demo.path, demo.directory / "merged", progress=False)
    return demo.directory / "merged"


def damaged(merged: Path, target: Path, *, at: int = -1) -> Path:
    """A copy of a merged directory with one bit of its weights flipped."""
    shutil.copytree(merged, target)
    weights = target / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[at] ^= 1
    weights.write_bytes(data)
    return target


def python_m_nbmerge(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "nbmerge", *words], capture_output=True, text=True, timeout=120)


def test_the_command_proves_the_merge_and_ends_with_zero(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--dir", str(tmp_path / "run")]) == 0
    said = capsys.readouterr()
    assert "Merge report" in said.out
    assert "39 tensors" in said.out
    assert said.out.count("bit for bit") == 2
    assert "Every rank of the mesh holds" in said.out
    assert "Traceback" not in said.err
    assert len(list((tmp_path / "run/global_step_0/actor").glob("model_world_size_4_rank_*.pt"))) == 4
    assert (tmp_path / "run/merged/nbmerge_receipt.json").is_file()


def test_the_command_refuses_a_directory_with_files_in_it(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    ended = python_m_nbmerge("demo", "--dir", str(tmp_path))
    assert ended.returncode == 1
    assert "TargetError" in ended.stderr
    assert "--dir" in ended.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


def test_the_command_ends_with_one_where_a_bit_differs(
    demo: DemoCheckpoint,
    merged: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def make(directory: Path, **_: object) -> DemoCheckpoint:
        return DemoCheckpoint(Path(shutil.copytree(demo.directory, directory)), demo.recipe)

    def merge_wrongly(path: Path, target: Path, **_: object) -> str:
        shutil.rmtree(target)  # came with the copy
        damaged(merged, target)
        return "a report"

    monkeypatch.setattr("nbmerge.demo.command.make_checkpoint", make)
    monkeypatch.setattr("nbmerge.merge", merge_wrongly)
    assert run(tmp_path / "run") == 1
    said = capsys.readouterr()
    assert "NOT equal: 2 differences" in said.err
    assert said.err.count(": 1 of ") == 2
    assert "bit for bit" not in said.out


def test_a_merge_of_the_demo_checkpoint_has_no_differences(demo: DemoCheckpoint, merged: Path) -> None:
    assert differences(merged, demo) == []


def test_one_flipped_bit_is_found_in_the_file_and_in_the_loaded_model(
    demo: DemoCheckpoint, merged: Path, tmp_path: Path
) -> None:
    wrong = damaged(merged, tmp_path / "wrong")
    (on_disk,), (loaded,) = differences_on_disk(wrong, demo.reference), differences_when_loaded(wrong, demo.state)
    assert on_disk == loaded
    assert on_disk.endswith(" bytes differ")
    assert ": 1 of " in on_disk


def test_missing_extra_and_recast_tensors_are_found(demo: DemoCheckpoint, merged: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(merged / "model.safetensors")
    tensors["model.norm.bias"] = tensors.pop("model.norm.weight")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].double()
    save_file(tensors, tmp_path / "model.safetensors")
    assert differences_on_disk(tmp_path, demo.reference) == [
        "missing: model.norm.weight",
        "not in the model: model.norm.bias",
        "lm_head.weight is F64 [257, 18], was F32 [257, 18]",
    ]


def test_the_checkpoint_lies_as_verl_lays_it_out(demo: DemoCheckpoint) -> None:
    assert sorted(path.name for path in demo.path.iterdir()) == [
        "extra_state_world_size_2_rank_0.pt",
        "extra_state_world_size_2_rank_1.pt",
        "fsdp_config.json",
        "huggingface",
        "model_world_size_2_rank_0.pt",
        "model_world_size_2_rank_1.pt",
        "optim_world_size_2_rank_0.pt",
        "optim_world_size_2_rank_1.pt",
    ]
    assert json.loads((demo.path / "fsdp_config.json").read_text()) == {"FSDP_version": 2, "world_size": 2}
    beside = {path.name for path in (demo.path / "huggingface").iterdir()}
    beside.discard("special_tokens_map.json")  # which transformers 5 no longer writes
    assert beside == {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}


def test_saving_an_optimizer_changes_no_weight(demo: DemoCheckpoint) -> None:
    import torch

    state = torch.load(demo.state, weights_only=True)
    whole = build_model(Recipe(world_size=2)).state_dict()
    assert all(torch.equal(state[name], whole[name]) for name in whole)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_no_two_tensors_of_a_model_can_be_taken_for_each_other(arch: str) -> None:
    if arch == "gemma4" and not HAS_CONVERSIONS:
        pytest.skip("transformers 4 has no Gemma 4")
    state = build_model(Recipe(arch=arch)).state_dict()
    floats = [value for value in state.values() if value.is_floating_point()]
    assert len({value.flatten()[0].item() for value in floats}) == len(floats)


def test_the_seed_decides_the_weights() -> None:
    import torch

    first, same, other = (build_model(Recipe(seed=seed)).lm_head.weight for seed in (3, 3, 4))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_the_tokenizer_has_a_token_for_every_row_and_gives_text_back() -> None:
    tokenizer = build_tokenizer()
    assert len(tokenizer) == VOCABULARY
    text = "Every rank holds a shard, once."
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert len(ids) < len(text) / 2


def test_the_tokenizer_loads_from_the_merged_directory(merged: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(merged)
    assert len(tokenizer) == VOCABULARY
    text = "the whole tensor"
    assert tokenizer(text)["input_ids"] == build_tokenizer()(text)["input_ids"]


def test_the_merged_model_continues_a_prompt(merged: Path) -> None:
    text = generate(merged, "the mesh", new_tokens=9)
    assert text.startswith("the mesh")
    assert len(text) > len("the mesh")


def test_importing_the_demo_costs_no_torch() -> None:
    code = "import sys, nbmerge.demo; print([m for m in ('torch', 'transformers', 'IPython') if m in sys.modules])"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.stdout == "[]\n", ended.stderr


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"layout": "fsdp3"}, "no layout 'fsdp3'"),
        ({"dtype": "int4"}, "no dtype 'int4'"),
        ({"arch": "gpt17"}, "no architecture 'gpt17'"),
        ({"layout": "plain"}, "plain checkpoint has a world of 4"),
        ({"world_size": 0}, "world of 0"),
        ({"layout": "hsdp", "world_size": 3}, "mesh of 2 × 1 does not fit a world of 3"),
        ({"mesh_shape": (2, 2)}, "mesh of fsdp2 has 1 dimensions, not 2"),
        ({"mesh_dim_names": ("a", "b")}, "mesh of fsdp2 has 1 dimensions, not 2"),
        ({"layout": "hsdp", "mesh_shape": (3, 2)}, "mesh of 3 × 2 does not fit a world of 4"),
        ({"lora_r": -1}, "no fsdp2 checkpoint with an adapter of rank -1"),
        ({"layout": "fsdp_tp", "lora_r": 4}, "no fsdp_tp checkpoint with an adapter of rank 4"),
        ({"layout": "megatron", "lora_r": 4}, "no megatron checkpoint with an adapter of rank 4"),
    ],
)
def test_a_recipe_that_cannot_be_made_is_refused(fields: dict[str, object], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        Recipe(**fields)  # type: ignore[arg-type]


def test_a_recipe_survives_its_way_to_the_processes() -> None:
    recipe = Recipe(layout="hsdp", mesh_shape=(2, 2), mesh_dim_names=("a", "b"), config={"num_hidden_layers": 1})
    assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe


def test_a_directory_with_files_is_refused_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(TargetError, match="files in it"):
        make_checkpoint(tmp_path)


def test_the_error_of_a_failing_rank_is_shown(tmp_path: Path) -> None:
    with pytest.raises(DemoError) as caught:
        make_checkpoint(tmp_path / "run", world_size=2, config={"hidden_size": -18})
    said = str(caught.value)
    assert "of 2, making Recipe(layout='fsdp2'" in said
    assert "RuntimeError: Trying to create tensor with negative dimension -18" in said
    assert len(said.splitlines()) < 8
    assert "Traceback" in str(caught.value.__cause__)


def test_no_process_is_left_behind_after_the_time_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = time.monotonic()
    workers: list[subprocess.Popen[str]] = []

    class Recorded(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *args: object, **options: object) -> None:
            super().__init__(*args, **options)  # type: ignore[call-overload]
            workers.append(self)

    monkeypatch.setattr("nbmerge.demo.launch.subprocess.Popen", Recorded)
    with pytest.raises(DemoError, match="within 1 seconds"):
        make_checkpoint(tmp_path / "run", timeout=1)
    assert time.monotonic() - started < 10
    (worker,) = workers
    assert worker.returncode is not None
    with pytest.raises(ProcessLookupError):
        os.killpg(worker.pid, 0)


def test_an_interrupt_ends_the_processes(tmp_path: Path) -> None:
    code = f"from nbmerge.demo import make_checkpoint; make_checkpoint({str(tmp_path / 'run')!r})"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    worker = _wait_for_child(process.pid)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert "KeyboardInterrupt" in said
    assert not Path(f"/proc/{worker}").exists()


def _wait_for_child(pid: int) -> int:
    children = Path(f"/proc/{pid}/task/{pid}/children")
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if found := children.read_text().split():
            return int(found[0])
        time.sleep(0.05)
    raise AssertionError("no worker was started")


def test_an_interrupt_while_the_worker_starts_waits_until_the_worker_is_known(monkeypatch, tmp_path: Path) -> None:
    started: list[subprocess.Popen[str]] = []
    real = subprocess.Popen

    def interrupted(*words: Any, **options: Any) -> subprocess.Popen[str]:
        started.append(real(*words, **options))
        signal.raise_signal(signal.SIGINT)
        return started[0]

    monkeypatch.setattr(subprocess, "Popen", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_checkpoint(tmp_path / "run")
    assert started[0].returncode == -signal.SIGKILL
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_checkpoint_with_an_adapter_holds_the_base_model_and_what_peft_saves(
    both: list[DemoCheckpoint], tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    made = both[1]
    assert json.loads((made.path / "lora_train_meta.json").read_text()) == {
        "r": 2,
        "lora_alpha": 4,
        "task_type": "CAUSAL_LM",
    }
    nbmerge.merge(made.path, tmp_path / "split", lora="split", progress=False)
    assert differences(tmp_path / "split", made) == []
    assert differences_on_disk(tmp_path / "split" / "lora_adapter", made.adapter) == []
    adapter = load_file(made.adapter / "adapter_model.safetensors")
    assert len(adapter) == 2 * 7 * 3
    assert all(tensor.any() for tensor in adapter.values())


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A client that may use the network, of which only this machine is asked."""
    import huggingface_hub.utils as utils
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    close = getattr(utils, "close_session", lambda: None)  # made anew, and not offline
    close()
    yield
    close()


@pytest.mark.usefixtures("online")
def test_what_the_demo_hub_takes_it_gives_back(tmp_path: Path) -> None:
    from huggingface_hub import HfApi, snapshot_download

    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "model.safetensors").write_bytes(bytes(range(256)) * 100)
    with start_hub() as hub:
        api = HfApi(endpoint=hub.url, token=hub.token)
        assert api.whoami()["name"] == hub.user
        api.create_repo("me/mine", private=True)
        api.upload_folder(repo_id="me/mine", folder_path=tmp_path / "model", commit_message="first")
        api.upload_folder(
            repo_id="me/mine", folder_path=tmp_path / "model", commit_message="second", delete_patterns="*.json",
            allow_patterns="*.safetensors",
        )  # fmt: skip
        assert list(hub.files("me/mine")) == ["model.safetensors"]
        assert hub.commits("me/mine") == ["first", "second"]
        assert api.model_info("me/mine").private
        copy = snapshot_download(
            "me/mine", endpoint=hub.url, token=hub.token, local_dir=tmp_path / "copy", cache_dir=tmp_path / "cache"
        )
        assert (Path(copy) / "model.safetensors").read_bytes() == bytes(range(256)) * 100
        assert hub.files("me/other") == {}


@pytest.mark.usefixtures("online")
def test_the_demo_hub_knows_who_may_write() -> None:
    from nbmerge.errors import HubError
    from nbmerge.export.access import check_access

    with start_hub() as hub:
        assert check_access("me/mine", token=hub.token, endpoint=hub.url).exists is False
        with pytest.raises(HubError, match="may only read"):
            check_access("me/mine", token=hub.read_token, endpoint=hub.url)
        with pytest.raises(HubError, match="token is not valid"):
            check_access("me/mine", token="hf_nobody", endpoint=hub.url)
