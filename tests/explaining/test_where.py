"""`where`: the bytes that it names are the element's."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import nbmerge
from nbmerge.dtypes import BY_NAME
from nbmerge.errors import NotACheckpointError, OptionError
from nbmerge.expressions import Cast, Compute, Fill, Paste, Permute, Reshape, Slice, Stored
from nbmerge.geometry import Box, contiguous_strides
from nbmerge.tracing import Location, checked_index, index_at, locate, where
from tests.display.objects import checkpoint
from tests.support.megatron_models import megatron_state, write_megatron
from tests.support.messages import assert_says, refusal
from tests.support.models import HAS_CONVERSIONS, memory_state, published_state, write_model_world
from tests.support.worlds import write_mesh_world, write_ranks


def bytes_at(location: Location, file: Path | None = None, offset: int | None = None) -> bytes:
    with (file or location.file).open("rb") as opened:
        opened.seek(location.offset if offset is None else offset)
        return opened.read(location.nbytes)


def element_bytes(tensor: torch.Tensor, index: tuple[int, ...]) -> bytes:
    return tensor[index].reshape(1).view(torch.uint8).numpy().tobytes()


def indices(shape: tuple[int, ...], count: int = 6) -> list[tuple[int, ...]]:
    rng = random.Random(str(shape))
    corners = [tuple(0 for _ in shape), tuple(size - 1 for size in shape)]
    return corners + [tuple(rng.randrange(size) for size in shape) for _ in range(count)]


class TestAnElementOfACheckpoint:
    @pytest.mark.parametrize(("mesh", "names"), [((4,), ("fsdp",)), ((2, 2), ("ddp", "fsdp"))])
    def test_is_at_the_byte_that_is_named(self, tmp_path: Path, mesh, names):
        from torch.distributed.tensor import Replicate, Shard

        state = memory_state("qwen2", "bfloat16")
        place = (lambda name, tensor: [Replicate(), Shard(0)]) if len(mesh) == 2 else (lambda name, tensor: [Shard(0)])
        write_mesh_world(tmp_path, state, mesh, names, place)
        opened = nbmerge.open_checkpoint(tmp_path)
        for name, tensor in state.items():
            for index in indices(tuple(tensor.shape)):
                found = where(opened, name, index)
                assert bytes_at(found) == element_bytes(tensor, index)
                assert f"rank_{found.rank}.pt" in found.file.name
                assert tuple(a + b for a, b in zip(found.box.offset, found.shard_index, strict=True)) == index
                assert len(found.copies) == (1 if len(mesh) == 2 else 0)
                for copy in found.copies:
                    assert bytes_at(found, copy.file, copy.offset) == element_bytes(tensor, index)
                    assert f"rank_{copy.rank}.pt" in copy.file.name

    def test_of_every_kind_of_tensor(self, tmp_path: Path):
        state = {"scalar": torch.tensor(3.5), "count": torch.arange(7), "whole": torch.randn(3, 5)}
        write_ranks(tmp_path, [state, state])
        found = where(nbmerge.open_checkpoint(tmp_path, mesh_shape=(2,), placements={"*": ["Replicate"]}), "scalar", ())
        assert bytes_at(found) == element_bytes(state["scalar"], ())
        assert [copy.rank for copy in found.copies] == [1]
        assert found.nbytes == 4

    def test_counts_row_by_row_or_from_the_end(self, tmp_path: Path):
        write_model_world(tmp_path, "llama")
        name, shape = "model.embed_tokens.weight", (37, 16)
        opened = nbmerge.open_checkpoint(tmp_path)
        assert where(opened, name, 5 * 16 + 3).index == (5, 3)
        assert where(opened, name, -1).index == (36, 15)
        assert where(opened, name, (-1, -2)).index == (36, 14)
        assert where(opened, name, torch.tensor(17).item()).shape == shape

    @pytest.mark.parametrize(
        ("index", "words"),
        [
            ((37, 0), ("[37, 0]", "outside", "[37, 16]")), ((0, -17), ("outside",)), (37 * 16, ("592", "outside")),
            ((1,), ("1 number;", "[37, 16]", "give 2 numbers")), ((1, 2, 3), ("3 numbers",)), ("x", ("no index",)),
            ((1.5, 2), ("no index",)),
            (None, ("no index",)),
        ],
    )  # fmt: skip
    def test_that_is_not_there_is_told(self, tmp_path: Path, index, words):
        write_model_world(tmp_path, "llama")
        assert_says(refusal(OptionError, where, tmp_path, "model.embed_tokens.weight", index), *words, "fix:")

    def test_of_an_unknown_name_is_told_with_the_near_ones(self, tmp_path: Path):
        write_model_world(tmp_path, "llama")
        assert_says(refusal(OptionError, where, tmp_path, "model.embed_token.weight", 0), "model.embed_tokens.weight")

    def test_of_a_vector_takes_one_number(self):
        assert_says(refusal(OptionError, checked_index, (1, 2), (4,), "x"), "2 numbers", "give 1 number")
        assert_says(refusal(OptionError, checked_index, (1,), (), "x"), "1 number;", "give ()")

    def test_is_not_looked_for_under_a_name_that_is_no_text(self, tmp_path: Path):
        write_model_world(tmp_path, "llama")
        assert_says(refusal(OptionError, where, tmp_path, 3, 0), "name=3", "fix:")

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"nope": 1}, "nope"),
            ({"dtype": "nope"}, "nope"),
            ({"dtype": "int8"}, "int8"),
            ({"dialect": "x"}, "dialect"),
        ],
    )
    def test_is_not_looked_for_with_options_that_are_none(self, tmp_path: Path, options, words: str):
        write_model_world(tmp_path, "llama")
        opened = nbmerge.open_checkpoint(tmp_path)
        for source in (tmp_path, opened, nbmerge.plan_merge(tmp_path)):
            assert_says(refusal(OptionError, where, source, "model.norm.weight", 3, **options), words)

    def test_is_not_looked_for_with_options_that_come_too_late(self, tmp_path: Path):
        write_model_world(tmp_path, "llama")
        opened, plan = nbmerge.open_checkpoint(tmp_path), nbmerge.plan_merge(tmp_path)
        assert_says(refusal(OptionError, where, opened, "model.norm.weight", 3, mesh_shape="2"), "mesh_shape")
        assert_says(refusal(OptionError, where, plan, "model.norm.weight", 3, dtype="bfloat16"), "change a plan")

    def test_of_no_checkpoint(self, tmp_path: Path):
        refusal(NotACheckpointError, where, tmp_path / "none", "x", 0)
        assert_says(refusal(OptionError, where, 3, "x", 0), "int is no checkpoint")


of_transformers_5 = pytest.mark.skipif(not HAS_CONVERSIONS, reason="transformers 4 keeps experts one by one")


class TestAnElementOfAnOutput:
    @of_transformers_5
    @pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
    def test_is_traced_through_fused_experts(self, tmp_path: Path, family: str):
        write_model_world(tmp_path, family, 2)
        plan = nbmerge.plan_merge(tmp_path)
        renamed = {name: tensor for name, tensor in published_state(family).items() if name not in memory_state(family)}
        assert renamed
        for name, tensor in renamed.items():
            index = indices(tuple(tensor.shape))[2]
            found = where(plan, name, index)
            assert bytes_at(found) == element_bytes(tensor, index)
            assert found.source in memory_state(family)

    @pytest.mark.parametrize("family", ["llama", "qwen3_moe", "deepseek_v3"])
    def test_is_traced_to_megatrons_tensors(self, tmp_path: Path, family: str):
        write_megatron(tmp_path / "ckpt", megatron_state(family), family)
        plan = nbmerge.plan_merge(tmp_path / "ckpt")
        for name, tensor in published_state(family).items():
            index = indices(tuple(tensor.shape))[3]
            found = where(plan, name, index)
            assert bytes_at(found) == element_bytes(tensor, index), name
            assert found.source in plan.checkpoint.tensors

    @of_transformers_5
    def test_through_a_cast_says_so(self, tmp_path: Path):
        write_model_world(tmp_path, "mixtral")
        name = next(name for name in published_state("mixtral") if name not in memory_state("mixtral"))
        found = where(tmp_path, name, 0, dtype="bfloat16")
        assert found.steps == ("cast from float32 to bfloat16",)
        assert (found.dtype, found.stored_dtype, found.nbytes) == (BY_NAME["bfloat16"], BY_NAME["float32"], 4)
        assert bytes_at(found) == element_bytes(published_state("mixtral")[name].reshape(-1), (0,))

    def test_through_a_cast_says_so_where_the_checkpoint_has_the_same_name(self, tmp_path: Path):
        write_model_world(tmp_path, "llama")
        plan = nbmerge.plan_merge(tmp_path, dtype="bfloat16")
        for source, options in ((tmp_path, {"dtype": "bfloat16"}), (plan, {})):
            found = where(source, "model.norm.weight", 3, **options)
            assert found.steps == ("cast from float32 to bfloat16",)
            assert bytes_at(found) == element_bytes(memory_state("llama")["model.norm.weight"], (3,))
        assert where(tmp_path, "model.norm.weight", 3).steps == ()

    def test_that_is_a_constant_is_in_no_file(self, tmp_path: Path):
        source = checkpoint()
        found = locate(source, "score.bias", Fill(0.0, (3,), BY_NAME["float32"]), 1)
        assert found.file is None
        assert_says(found.sentence, "score.bias[1] is in no file", "constant 0")

    def test_that_is_computed_names_the_operation_and_its_inputs(self):
        source = checkpoint()
        name, tensor = next(iter(source.tensors.items()))
        made = Compute("average", lambda *x: x[0], (tensor.expr, tensor.expr), tensor.shape, tensor.dtype)
        found = locate(source, "out", made, 0)
        assert found.file is None
        assert found.inputs == (name,)
        assert_says(found.sentence, "average", "2 tensors")

    def test_that_is_tied_is_where_the_other_is(self, tmp_path: Path):
        state = memory_state("qwen2_tied")
        del state["lm_head.weight"]
        write_model_world(tmp_path, "qwen2_tied", state=state)
        found = where(tmp_path, "lm_head.weight", (3, 4))
        assert found.source == "model.embed_tokens.weight"
        assert_says(found.steps[0], "tied to model.embed_tokens.weight")


class TestGeometry:
    @given(st.data())
    def test_the_element_of_any_view_is_the_one_that_numpy_takes(self, data):
        """Slices, permutations, reshapes and pastes over one stored tensor."""
        import numpy as np

        shape = tuple(data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
        stored = Stored("f", 16, shape, contiguous_strides(shape), BY_NAME["float32"])
        expr, array = stored, np.arange(stored.numel).reshape(shape)
        for _ in range(data.draw(st.integers(0, 4))):
            kind = data.draw(st.sampled_from(["slice", "permute", "reshape", "paste", "cast"]))
            if kind == "slice":
                offset = tuple(data.draw(st.integers(0, size - 1)) for size in array.shape)
                extent = tuple(
                    data.draw(st.integers(1, size - at)) for size, at in zip(array.shape, offset, strict=True)
                )
                expr = Slice(expr, Box(offset, extent))
                array = array[tuple(slice(a, a + n) for a, n in zip(offset, extent, strict=True))]
            elif kind == "permute":
                order = tuple(data.draw(st.permutations(range(array.ndim))))
                expr, array = Permute(expr, order), array.transpose(order)
            elif kind == "reshape":
                new = data.draw(st.sampled_from([(array.size,), (1, *array.shape), (*array.shape, 1)]))
                expr, array = Reshape(expr, new), array.reshape(new)
            elif kind == "paste":
                rows = array.shape[0]
                zero, after = (0,) * array.ndim, (rows, *(0,) * (array.ndim - 1))
                both = (2 * rows, *array.shape[1:])
                expr, array = Paste(both, expr.dtype, ((zero, expr), (after, expr))), np.concatenate([array, array])
            else:
                expr = Cast(expr, BY_NAME["float32"])
        index = tuple(data.draw(st.integers(0, size - 1)) for size in array.shape)
        found = locate(checkpoint(), "x", expr, index)
        assert (found.offset - 16) // 4 == array[index]

    @given(st.data())
    def test_an_offset_gives_back_the_index(self, data):
        shape = tuple(data.draw(st.lists(st.integers(1, 5), max_size=4)))
        order = data.draw(st.permutations(range(len(shape))))
        strides = [0] * len(shape)
        for dim, stride in zip(order, contiguous_strides(tuple(shape[dim] for dim in order)), strict=True):
            strides[dim] = stride * data.draw(st.sampled_from([1, 1])) if shape else 0
        stored = Stored("f", 8, shape, tuple(strides), BY_NAME["int16"])
        index = tuple(data.draw(st.integers(0, size - 1)) for size in shape)
        offset = 8 + 2 * sum(i * s for i, s in zip(index, strides, strict=True))
        assert index_at(stored, offset) == index
        assert index_at(stored, 7) is None and index_at(stored, offset + 1) is None
        assert index_at(stored, 8 + 2 * stored.numel) is None

    def test_padding_between_rows_belongs_to_no_element(self):
        stored = Stored("f", 0, (3, 2), (5, 1), BY_NAME["int8"])
        assert [index_at(stored, at) for at in range(12)] == [
            (0, 0), (0, 1), None, None, None, (1, 0), (1, 1), None, None, None, (2, 0), (2, 1)
        ]  # fmt: skip

    def test_a_tensor_without_elements_has_no_index(self):
        assert_says(refusal(OptionError, checked_index, 0, (0, 5), "x"), "no elements")
        assert checked_index((), (), "x") == checked_index(0, (), "x") == ()
