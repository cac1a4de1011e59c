"""`python -m nbmerge explain`, and the magic beside it."""

from __future__ import annotations

from pathlib import Path

import pytest

import nbmerge
from nbmerge import cli
from nbmerge.magics.commands import MAGICS
from tests.explaining.test_explain import SIZES, config
from tests.support.messages import assert_says
from tests.support.models import write_model_world


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]):
    """Runs the command: its exit code, and what it printed."""

    def call(*words: object) -> tuple[int, str]:
        code = cli.main(["explain", *(str(word) for word in words)])
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return call


class TestTheCommand:
    def test_exits_with_0_where_all_fits(self, tmp_path: Path, run):
        write_model_world(tmp_path, "llama", 2)
        code, printed = run(tmp_path)
        assert code == 0
        assert_says(printed, "every tensor fits")
        code, printed = run(tmp_path, "model.norm.weight")
        assert code == 0
        assert_says(printed, "fits: model.norm.weight", "Shard(0)")

    def test_exits_with_1_where_something_does_not(self, tmp_path: Path, run):
        write_model_world(tmp_path / "ckpt", "llama", 2)
        where = config(tmp_path, "llama", vocab_size=41)
        code, printed = run(tmp_path / "ckpt", "--hf-model-config-path", where)
        assert code == 1
        assert_says(printed, "vocabulary resized", "37 = 41 - 4")

    def test_takes_shapes_and_messages(self, run):
        code, printed = run("--got", "3600", "--expected", "3584", "--ranks", "24")
        assert code == 1
        assert_says(printed, "3600 = 24 · ⌈3584/24⌉")
        assert run(SIZES, "--ranks", "24") == (1, run(SIZES, "--ranks", "24")[1])
        assert run("--got", "4", "--expected", "4")[0] == 0

    @pytest.mark.parametrize("words", [(), ("RuntimeError: what",), ("--got", "3"), ("--ranks", "x"), ("--ranks", "0")])
    def test_exits_with_2_for_a_question_without_an_answer(self, words, run):
        code, printed = run(*words)
        assert code == 2
        assert "Traceback" not in printed

    def test_exits_with_1_for_what_is_no_checkpoint(self, tmp_path: Path, run):
        code, printed = run(tmp_path / "none")
        assert code == 1
        assert_says(printed, "no such directory")


class TestTheMagic:
    def test_gives_an_error_its_config(self, tmp_path: Path):
        said = ("size mismatch for layers.0.self_attn.k_proj.weight: copying a param with shape torch.Size([16, 16]) "
                "from checkpoint, the shape in current model is torch.Size([8, 16]).")  # fmt: skip
        where = config(tmp_path, "llama")
        found = MAGICS["explain_shapes"].run(f"$err --hf_model_config_path {where}", {"err": RuntimeError(said)})
        assert found.best.pattern == "query and key-value sizes exchanged"

    def test_refuses_what_it_cannot_honour(self):
        with pytest.raises(nbmerge.OptionError, match="is_value_model"):
            MAGICS["explain_shapes"].run("--got 4 --expected 5 --is_value_model", {})
