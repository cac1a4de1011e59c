"""What loading says in other programs, read."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nbmerge.explaining.messages import read_message


class TestTorch:
    def test_sizes_missing_and_unexpected_keys_of_load_state_dict(self):
        model = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 5), "b": torch.nn.Linear(2, 4)})
        state = {
            "a.weight": torch.zeros(20, 3),
            "a.bias": torch.zeros(()),
            "b.weight": torch.zeros(4, 2),
            "c.d": torch.zeros(1),
        }
        with pytest.raises(RuntimeError) as caught:
            model.load_state_dict(state)
        read = read_message(str(caught.value))
        assert set(read.shapes) == {("a.weight", (20, 3), (5, 3)), ("a.bias", (), (5,))}
        assert (read.missing, read.unexpected) == (("b.bias",), ("c.d",))

    def test_a_list_of_many_keys(self):
        said = "Missing key(s) in state_dict: " + ", ".join(f'"l.{i}.w"' for i in range(500)) + ". "
        assert len(read_message(said).missing) == 500


class TestTransformers:
    def test_the_table_of_a_loading_report(self):
        report = pytest.importorskip("transformers.utils.loading_report", reason="transformers 4 has no such report")
        info = report.LoadStateDictInfo(
            missing_keys={f"model.layers.{i}.q.bias" for i in range(3)} | {"lm_head.weight"},
            unexpected_keys={f"model.layers.{i}.k.bias" for i in range(12)},
            mismatched_keys={(f"model.layers.{i}.norm.weight", (3600,), (3584,)) for i in range(2)},
            error_msgs=[],
            conversion_errors={},
            skipped_pp_keys=set(),
        )
        read = read_message(info.create_loading_report() or "")
        assert set(read.shapes) == {(f"model.layers.{i}.norm.weight", (3600,), (3584,)) for i in range(2)}
        assert set(read.missing) == {*(f"model.layers.{i}.q.bias" for i in range(3)), "lm_head.weight"}
        assert set(read.unexpected) == {f"model.layers.{i}.k.bias" for i in range(12)}

    def test_the_sentences_of_version_4(self):
        said = """Some weights of the model checkpoint at x were not used when initializing X: ['a.b', 'c']
Some weights of X were not initialized from the model checkpoint at x and are newly initialized: ['d']
- model.norm.weight: found shape torch.Size([3600]) in the checkpoint and torch.Size([3584]) in the model"""
        read = read_message(said)
        assert (read.unexpected, read.missing) == (("a.b", "c"), ("d",))
        assert read.shapes == (("model.norm.weight", (3600,), (3584,)),)


class TestAnyText:
    @given(st.text(max_size=400))
    def test_is_read_without_failing(self, text: str):
        assert read_message(text).ranks is None or read_message(text).ranks >= 0

    @given(st.text(alphabet='size mismatch for copying a param with shape torch.Size([],)"|{}.0123 ', max_size=400))
    def test_that_looks_like_one_of_ours_is_read_without_failing(self, text: str):
        read_message("size mismatch for " + text + " missing key(s) in state_dict: " + text)

    def test_without_anything_known_is_nothing(self):
        assert not read_message("CUDA out of memory")

    @pytest.mark.parametrize(
        "text", ['"' * 50_000, "Missing key(s) in state_dict: " + '"a", ' * 100_000, "{0...9}" * 2000, "x | " * 100_000,
                 "size mismatch for " * 50_000, "newly initialized" * 20_000, "expected " * 50_000]
    )  # fmt: skip
    def test_that_is_long_is_read_soon(self, text: str):
        import time

        start = time.monotonic()
        read_message(text)
        assert time.monotonic() - start < 5
