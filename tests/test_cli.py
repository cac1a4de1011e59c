"""The command line, in this process but where a process is the point: exit codes, and messages without a traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import nbmerge
from nbmerge import cli
from tests.support.messages import assert_says
from tests.support.models import memory_state, save_tiny_model, write_config, write_model_world
from tests.support.pickles import Call, Global, tensor, write_archive
from tests.support.results import assert_same, bits_of_all, receipt_of, saved_bits
from tests.support.worlds import rank_file, row_shards, write_ranks


@pytest.fixture
def ckpt(tmp_path: Path) -> Path:
    return write_model_world(tmp_path / "actor", "llama")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]):
    """Runs a command: its exit code, what it printed, and what it said on stderr."""

    def call(*words: object) -> tuple[int, str, str]:
        code = cli.main([str(word) for word in words])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.out + captured.err
        return code, captured.out, captured.err

    return call


def assert_is_the_merge(directory: Path) -> None:
    assert_same(saved_bits(directory), bits_of_all(memory_state("llama")))


class TestMerge:
    def test_exits_with_0_and_prints_the_report(self, ckpt: Path, out: Path, run):
        code, printed, _ = run("merge", "--backend", "fsdp", "--local_dir", ckpt, "--target_dir", out)
        assert code == 0
        assert_says(printed, "merged 21 tensors", "LlamaForCausalLM", str(out))
        assert_is_the_merge(out)

    def test_takes_flags_with_either_spelling(self, ckpt: Path, out: Path, run):
        code, _, _ = run("merge", "--local-dir", ckpt, f"--target-dir={out}", "--max-shard-size=4KB", "--dtype", "bf16")
        assert code == 0
        assert receipt_of(out)["options"] == {"max_shard_size": "4KB", "dtype": "bf16"}

    def test_takes_all_of_verls_flags(self, tmp_path: Path, out: Path, run):
        """python -m verl.model_merger merge --help, verl 0.9."""
        write_model_world(tmp_path / "critic", "qwen2_value")
        code, _, said = run(
            "merge", "--backend", "fsdp", "--local_dir", tmp_path / "critic", "--hf_model_config_path",
            tmp_path / "critic" / "huggingface", "--tie-word-embedding", "--trust-remote-code", "--is-value-model",
            "--use_cpu_initialization", "--target_dir", out, "--private",
        )  # fmt: skip
        assert code == 0
        assert said.count("--use_cpu_initialization is not needed any more") == 1
        assert_same(saved_bits(out), bits_of_all(memory_state("qwen2_value")))

    def test_a_dry_run_prints_the_plan_and_writes_nothing(self, ckpt: Path, out: Path, tmp_path: Path, run):
        before = sorted(tmp_path.rglob("*"))
        code, printed, _ = run("merge", "--local_dir", ckpt, "--dry_run")
        assert code == 0
        assert_says(printed, "LlamaForCausalLM", "model.safetensors")
        assert run("merge", "--local_dir", ckpt, "--target_dir", out, "--dry-run")[0] == 0
        assert sorted(tmp_path.rglob("*")) == before

    def test_without_a_target_writes_to_tmp_as_verl_does(self, ckpt: Path, tmp_path: Path, run, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert run("merge", "--local_dir", ckpt)[0] == 0
        assert_is_the_merge(tmp_path / "tmp")

    def test_overrides_of_the_layout(self, tmp_path: Path, out: Path, run):
        write_ranks(tmp_path / "ckpt", row_shards(memory_state("llama"), 2))
        write_config(tmp_path / "hf", "llama")
        (tmp_path / "p.json").write_text('{"*": ["Shard(0)"]}')
        code, _, _ = run(
            "merge", "--local_dir", tmp_path / "ckpt", "--target_dir", out, "--hf_model_config_path", tmp_path / "hf",
            "--mesh_shape", "2", "--mesh_dim_names", "dp", "--placements", tmp_path / "p.json",
        )  # fmt: skip
        assert code == 0
        assert_is_the_merge(out)

    def test_an_ambiguous_checkpoint_names_the_flags_that_decide(self, tmp_path: Path, out: Path, run):
        write_ranks(tmp_path / "ckpt", [{"w": torch.ones(2)}] * 2)
        code, _, said = run("merge", "--local_dir", tmp_path / "ckpt", "--target_dir", out)
        assert code == 1
        assert_says(said, "AmbiguousCheckpointError", "--hf_model_config_path", "--mesh_shape", "--placements")

    def test_verbose_says_what_happens_file_by_file(self, ckpt: Path, out: Path, run, caplog: pytest.LogCaptureFixture):
        import logging

        try:
            assert run("merge", "--local_dir", ckpt, "--target_dir", out, "-v")[0] == 0
        finally:
            logging.getLogger("nbmerge").setLevel(logging.NOTSET)
        assert_says(caplog.text, "model_world_size_2_rank_1.pt", "model.safetensors", "LlamaForCausalLM")


class TestProblems:
    """Exit code 1, and one readable block."""

    def refused(self, run, *words: object) -> str:
        code, printed, said = run(*words)
        assert (code, printed) == (1, "")
        assert len(said.splitlines()) < 25
        return said

    def test_a_missing_rank(self, ckpt: Path, out: Path, run):
        rank_file(ckpt, 2, 1).unlink()
        said = self.refused(run, "merge", "--local_dir", ckpt, "--target_dir", out)
        assert_says(said, "IncompleteCheckpointError: 1 rank of 2 is missing", "where:", "why:", "fix:")
        assert not out.exists()

    def test_a_target_that_exists(self, ckpt: Path, out: Path, run):
        assert run("merge", "--local_dir", ckpt, "--target_dir", out)[0] == 0
        said = self.refused(run, "merge", "--local_dir", ckpt, "--target_dir", out)
        assert_says(said, "TargetError", "--overwrite")
        assert run("merge", "--local_dir", ckpt, "--target_dir", out, "--overwrite")[0] == 0

    def test_a_directory_that_is_no_checkpoint(self, ckpt: Path, out: Path, run):
        said = self.refused(run, "merge", "--local_dir", ckpt.parent, "--target_dir", out)
        assert_says(said, "NotACheckpointError", f"pass {ckpt}")

    def test_a_config_of_another_model(self, ckpt: Path, out: Path, run):
        write_config(ckpt / "huggingface", "qwen2")
        said = self.refused(run, "merge", "--local_dir", ckpt, "--target_dir", out)
        assert_says(said, "PlanError", "4 problems", "its tensors are named as those of Llama", "biases of query, key")

    def test_a_hostile_pickle_and_the_flag_that_trusts_it(self, ckpt: Path, out: Path, tmp_path: Path, run):
        write_archive(
            rank_file(ckpt, 2, 1), {"w": tensor(), "x": Call(Global("os", "mkdir"), str(tmp_path / "it-ran"))}
        )
        said = self.refused(run, "merge", "--local_dir", ckpt, "--target_dir", out)
        assert_says(said, "UnsafePickleError: the pickle names os.mkdir", "--trust_pickle")
        assert not (tmp_path / "it-ran").exists()

    def test_a_plan_is_told_in_a_dry_run_as_in_a_merge(self, ckpt: Path, run):
        write_config(ckpt / "huggingface", "qwen2")
        assert_says(self.refused(run, "merge", "--local_dir", ckpt, "--dry_run"), "PlanError", "4 problems")

    def test_a_name_with_control_characters_cannot_paint_the_terminal(self, tmp_path: Path, run, out: Path):
        write_model_world(tmp_path / "c", "llama", state={**memory_state("llama"), "\x1b[2J\rok": torch.ones(2)})
        said = self.refused(run, "merge", "--local_dir", tmp_path / "c", "--target_dir", out)
        assert "\x1b" not in said and "\r" not in said
        assert_says(said, r"\x1b[2J\rok")


class TestUsage:
    """Exit code 2."""

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (["merge"], "--local_dir"),
            (["merge", "--local_dir", "x", "--no_such_flag"], "--no_such_flag"),
            (["merge", "--local_dir", "x", "--target_dir", "y", "--workers", "many"], "--workers"),
            (["merge", "--local_dir", "x", "--target_dir", "y", "--workers", "0"], "workers=0"),
            (["merge", "--local_dir", "x", "--target_dir", "y", "--dtype", "int8"], "dtype='int8'"),
            (["merge", "--local_dir", "x", "--target_dir", "y", "--dtype", "float17"], "float17"),
            (["merge", "--local_dir", "x", "--target_dir", "y", "--max_shard_size", "5 apples"], "5 apples"),
            (["merge", "--local_dir", "x", "--target_dir", "y", "--dialect", "latin"], "latin"),
            (["merge", "--local_dir", "x", "--target_dir", "y", "--backend", "nemo"], "nemo"),
            (["merge", "--local", "x"], "--local"),
            (["test", "--local_dir", "x"], "--test_hf_dir"),
            (["mrege"], "no command 'mrege'"),
            ([], "usage"),
        ],
        ids=lambda value: " ".join(value)[-40:] if isinstance(value, list) else "",
    )
    def test_is_told(self, run, words: list[str], said: str):
        code, printed, error = run(*words)
        assert code == 2
        assert_says(printed + error, said)

    def test_mesh_and_placements_that_do_not_fit(self, ckpt: Path, out: Path, run):
        code, _, said = run("merge", "--local_dir", ckpt, "--target_dir", out, "--mesh_shape", "3")
        assert code == 2
        assert_says(said, "3 ranks, the checkpoint has 2")

    @pytest.mark.parametrize("words", [["--help"], ["-h"], ["merge", "--help"], ["test", "-h"], ["demo", "--help"]])
    def test_help_is_printed_and_exits_with_0(self, run, words: list[str]):
        code, printed, said = run(*words)
        assert (code, said) == (0, "")
        assert_says(printed, "usage: python -m nbmerge")

    def test_help_names_every_option_of_a_merge(self, run):
        from dataclasses import fields

        from nbmerge.options import MergeOptions

        _, printed, _ = run("merge", "--help")
        assert_says(
            printed, "--local_dir", "--target_dir", "--verbose", *(f"--{item.name}" for item in fields(MergeOptions))
        )


class TestTest:
    """verl's `test`: what a merge would write, against a directory."""

    def test_an_equal_directory(self, ckpt: Path, tmp_path: Path, run):
        save_tiny_model("llama", tmp_path / "reference")
        code, printed, _ = run(
            "test", "--backend", "fsdp", "--local_dir", ckpt, "--test_hf_dir", tmp_path / "reference"
        )
        assert code == 0
        assert_says(printed, "equal: 21 tensors", "compared every element", "which holds the same bits")

    def test_a_directory_that_differs_in_one_bit(self, ckpt: Path, out: Path, run):
        nbmerge.merge(ckpt, out)
        path = out / "model.safetensors"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        code, printed, said = run("test", "--local_dir", ckpt, "--test_hf_dir", out)
        assert (code, printed) == (1, "")
        assert_says(said, f"1 difference from {out}", "model.norm.weight is not close", "1 of 16 elements", "at [15]")

    def test_a_directory_of_other_names_shapes_and_dtypes(self, ckpt: Path, tmp_path: Path, run):
        from safetensors.torch import save_file

        state = memory_state("llama")
        state["new.weight"] = state.pop("model.norm.weight")
        state["lm_head.weight"] = state["lm_head.weight"][:5].clone()
        state["model.embed_tokens.weight"] = state["model.embed_tokens.weight"].bfloat16()
        (tmp_path / "ref").mkdir()
        save_file(state, tmp_path / "ref" / "model.safetensors")
        code, _, said = run("test", "--local_dir", ckpt, "--test_hf_dir", tmp_path / "ref")
        assert code == 1
        assert_says(
            said, "4 differences", "model.norm.weight is not in the reference", "new.weight is in the reference only",
            "lm_head.weight has another shape or dtype", "float32 [37, 16] here, float32 [5, 16] there",
            "model.embed_tokens.weight has another", "float32 [37, 16] here, bfloat16 [37, 16] there",
        )  # fmt: skip

    def test_takes_verls_tolerance(self, ckpt: Path, out: Path, run):
        from safetensors.torch import load_file, save_file

        nbmerge.merge(ckpt, out)
        state = load_file(out / "model.safetensors")
        state["model.norm.weight"] += 2e-7
        save_file(state, out / "model.safetensors")
        code, printed, _ = run("test", "--local_dir", ckpt, "--test_hf_dir", out)
        assert code == 0
        assert_says(printed, "equal: 21 tensors", "1 differ within the tolerance")

    def test_a_directory_without_weights(self, ckpt: Path, tmp_path: Path, run):
        code, _, said = run("test", "--local_dir", ckpt, "--test_hf_dir", tmp_path)
        assert code == 1
        assert_says(said, "no safetensors files", str(tmp_path))


class TestAsAProcess:
    def python(self, *words: object, **more) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "nbmerge", *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, **more)

    def test_merges_without_a_terminal_and_without_unicode(self, tmp_path: Path, out: Path):
        ckpt = write_model_world(tmp_path / "a checkpoint", "qwen3_moe")
        ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C"}
        done = self.python("merge", "--local_dir", ckpt, "--target_dir", out, env=ascii_only)
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        assert_same(saved_bits(out), saved_bits(save_tiny_model("qwen3_moe", tmp_path / "reference")))

    def test_refuses_without_a_traceback(self, tmp_path: Path, out: Path):
        done = self.python("merge", "--local_dir", tmp_path, "--target_dir", out)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith("NotACheckpointError: ") and "Traceback" not in done.stderr
