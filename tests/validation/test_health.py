"""Health: exact counts against torch, and findings in models that are damaged one way at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nbmerge.dtypes import BY_NAME
from nbmerge.engine.lower import blocks
from nbmerge.geometry import Box
from nbmerge.validation.bits import FORMATS, Counts, count
from nbmerge.validation.findings import ERROR, WARNING, Finding, Outcome
from nbmerge.validation.health import HealthTally
from nbmerge.validation.subject import Subject
from nbmerge.validation.values import look_through
from tests.validation.directories import CLEAN, clean, edit_tensors, sentences

QUERY, NORM = "model.layers.0.self_attn.q_proj.weight", "model.norm.weight"
BITS = {
    1: (np.uint8, torch.uint8),
    2: (np.uint16, torch.int16),
    4: (np.uint32, torch.int32),
    8: (np.uint64, torch.int64),
}


def words_of(tensor: torch.Tensor) -> np.ndarray:
    """The elements as unsigned integers."""
    unsigned, integers = BITS[tensor.element_size()]
    return tensor.contiguous().view(integers).numpy().view(unsigned)


def expected(tensor: torch.Tensor) -> dict[str, Any]:
    """The same counts, by torch, from the values instead of the bits."""
    info, values = torch.finfo(tensor.dtype), tensor.double()
    nan, infinity = values.isnan(), values.isinf()
    bits = words_of(tensor)
    return {
        "elements": tensor.numel(),
        "nan": int(nan.sum()),
        "infinity": int(infinity.sum()),
        "zero": int((values == 0).sum()),
        "denormal": int(((values != 0) & (values.abs() < info.smallest_normal)).sum()),
        "largest": int((values.abs() == info.max).sum()),
        "word": int(bits.flat[0]) if (bits == bits.flat[0]).all() else None,
        "first_nan": tuple(nan.nonzero()[0].tolist()) if nan.any() else None,
        "first_infinity": tuple(infinity.nonzero()[0].tolist()) if infinity.any() else None,
    }


def as_dict(counts: Counts) -> dict[str, Any]:
    return {name: getattr(counts, name) for name in Counts.__dataclass_fields__}


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Any bits of any floating dtype, special ones often, sometimes all the same."""
    dtype = draw(st.sampled_from(sorted(name for name in FORMATS if hasattr(torch, name))))
    form, size = FORMATS[dtype], BY_NAME[dtype].itemsize
    sign = 2 ** (8 * size - 1) if form.mask < 2 ** (8 * size - 1) else 0
    edges = [0, 1, form.normal - 1, form.normal, form.largest, form.infinity or form.largest, form.nan, form.mask]
    special = st.sampled_from([word | bit for word in edges if word >= 0 for bit in (0, sign)])
    word = special | st.integers(0, 2 ** (8 * size) - 1)
    shape = draw(st.lists(st.integers(1, 5), max_size=3))
    number = int(np.prod(shape))
    words = draw(st.lists(word, min_size=number, max_size=number) | word.map(lambda one: [one] * number))
    array = np.array(words, dtype=f"u{size}").reshape(shape)
    return torch.from_numpy(array.view("u1" if size == 1 else f"i{size}")).view(getattr(torch, dtype))


@given(tensors())
def test_counts_are_those_of_torch_for_any_bits_of_any_dtype(tensor: torch.Tensor):
    form = FORMATS[str(tensor.dtype).removeprefix("torch.")]
    assert as_dict(count(words_of(tensor), form, Box.whole(tuple(tensor.shape)))) == expected(tensor)


@given(tensors(), st.randoms(use_true_random=False), st.integers(1, 24))
def test_blocks_add_up_to_the_whole_in_any_order(tensor: torch.Tensor, random: Any, limit: int):
    form, whole = FORMATS[str(tensor.dtype).removeprefix("torch.")], Counts()
    regions = list(blocks(tuple(tensor.shape), tensor.element_size(), max(limit, tensor.element_size())))
    random.shuffle(regions)
    for region in regions:
        part = tensor[tuple(slice(a, a + n) for a, n in zip(region.offset, region.shape, strict=True))]
        whole.add(count(words_of(part).reshape(region.shape), form, region))
    assert as_dict(whole) == expected(tensor)


def test_every_floating_dtype_that_safetensors_files_hold_is_known():
    assert set(FORMATS) == {dtype.name for dtype in BY_NAME.values() if dtype.is_floating}


@pytest.mark.parametrize("size", [2**17 - 1, 2**17, 2**18 + 3])
def test_small_values_are_counted_across_parts(size: int):
    tensor = torch.full((size,), 1.0, dtype=torch.float16)
    tensor[-1], tensor[0], tensor[size // 2] = 0.0, 1e-7, -0.0
    found = count(words_of(tensor), FORMATS["float16"], Box.whole((size,)))
    assert (found.zero, found.denormal) == (2, 1)


def look(directory: Path, *, sample: float = 1.0) -> Outcome:
    """The outcome of the check of a directory, in one pass."""
    subject, tally = Subject.of(directory), HealthTally()
    return tally.outcome(subject, look_through(subject.tensors, (), tally, sample=sample))


def only(directory: Path, what: str, severity: str = ERROR) -> Finding:
    (finding,) = look(directory).findings
    assert (finding.what, finding.severity) == (what, severity)
    assert finding.why
    assert finding.fix
    return finding


def damage(tmp_path: Path, name: str, change: Any, dtype: str = "float32") -> Path:
    """A tiny Llama with one tensor changed."""
    directory = clean(tmp_path / "model", "llama", dtype)
    edit_tensors(directory, lambda tensors: tensors.update({name: change(tensors[name])}))
    return directory


def put(*index: int, value: float) -> Any:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor[index] = value
        return tensor

    return change


def cast_receipt(directory: Path, name: str, dtype: str = "float32") -> None:
    casts = [{"tensor": name, "from": dtype, "to": "whatever"}]
    (directory / "nbmerge_receipt.json").write_text(json.dumps({"casts": casts}))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("family", CLEAN)
def test_a_clean_model_has_no_findings(family: str, dtype: str, tmp_path: Path):
    assert sentences(look(clean(tmp_path / "model", family, dtype))) == []


def test_nan_and_infinity_are_found_with_their_number_and_the_first(tmp_path: Path):
    directory = damage(tmp_path, QUERY, put(3, value=float("nan")))
    finding = only(directory, "holds NaN")
    assert (finding.subject, finding.detail) == (QUERY, "16 of 256 elements, the first at [3, 0]")
    edit_tensors(directory, lambda tensors: tensors[QUERY].fill_(1).__setitem__((0, 7), float("-inf")))
    assert only(directory, "holds infinity").detail == "1 of 256 elements, the first at [0, 7]"


def test_a_scalar_is_looked_at_too(tmp_path: Path):
    directory = clean(tmp_path / "model", "llama")
    edit_tensors(directory, lambda t: t.update({"zero": torch.tensor(0.0), "nan": torch.tensor(float("nan"))}))
    assert only(directory, "holds NaN").detail == "1 of 1 element, a scalar"


@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_a_matrix_of_zeros_is_a_warning(tmp_path: Path, zero: float):
    directory = damage(tmp_path, QUERY, lambda tensor: tensor.fill_(zero))
    assert only(directory, "is zero everywhere", WARNING).subject == QUERY


def test_biases_of_zeros_are_as_they_were_initialised(tmp_path: Path):
    directory = clean(tmp_path / "model", "qwen2_tied")
    edit_tensors(directory, lambda tensors: [t.zero_() for name, t in tensors.items() if name.endswith("bias")])
    assert sentences(look(directory)) == []


def test_a_matrix_of_one_value_is_a_warning_and_a_norm_of_ones_is_not(tmp_path: Path):
    directory = damage(tmp_path, NORM, torch.ones_like)
    assert sentences(look(directory)) == []
    edit_tensors(directory, lambda tensors: tensors[QUERY].fill_(0.5))
    assert only(directory, "holds one value everywhere", WARNING).detail == "256 elements, all 0.5"
    edit_tensors(directory, lambda tensors: tensors[QUERY][15, 15].mul_(-1))
    assert sentences(look(directory)) == []


def test_a_matrix_of_denormals_is_a_warning(tmp_path: Path):
    directory = damage(tmp_path, QUERY, lambda tensor: tensor / 1e5, "float16")
    assert "of 2" in only(directory, "is mostly denormal", WARNING).detail
    edit_tensors(directory, lambda tensors: tensors[QUERY][:9].fill_(1.0))
    assert sentences(look(directory)) == []


def test_infinity_after_a_cast_is_called_an_overflow(tmp_path: Path):
    directory = damage(tmp_path, QUERY, lambda tensor: (tensor * 1e6).half(), "float16")
    assert [finding.what for finding in look(directory).findings] == ["holds infinity"]
    cast_receipt(directory, QUERY)
    finding = only(directory, "holds infinity after a cast to float16")
    assert "float32 values are beyond the range" in finding.why


def test_fp8_without_infinity_overflows_to_nan(tmp_path: Path):
    directory = damage(tmp_path, QUERY, lambda tensor: (tensor * 1e6).to(torch.float8_e5m2).float())
    edit_tensors(
        directory, lambda t: t.update({QUERY: torch.full((4, 4), 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)})
    )
    cast_receipt(directory, QUERY)
    assert "holds NaN after a cast to float8_e4m3fn" in sentences(look(directory))


def test_the_largest_value_is_suspicious_after_a_cast_only(tmp_path: Path):
    directory = damage(tmp_path, QUERY, put(1, 1, value=-65504.0), "float16")
    assert sentences(look(directory)) == []
    cast_receipt(directory, QUERY)
    assert only(directory, "reaches the largest float16 after a cast", WARNING).detail == "1 of 256 elements"


@pytest.mark.parametrize("receipt", ["[]", '{"casts": 3}', '{"casts": [3, {}]}'])
def test_a_receipt_of_another_form_does_no_harm(tmp_path: Path, receipt: str):
    directory = clean(tmp_path / "model", "llama")
    (directory / "nbmerge_receipt.json").write_text(receipt)
    assert sentences(look(directory)) == []


def test_integers_and_empty_tensors_have_nothing_to_look_for(tmp_path: Path):
    directory = clean(tmp_path / "model", "llama")
    edit_tensors(directory, lambda t: t.update({"ids": torch.zeros(4, 4, dtype=torch.int64), "none": torch.ones(0, 3)}))
    outcome = look(directory)
    assert sentences(outcome) == []
    assert outcome.said == "looked at 5,104 elements of 21 floating tensors"


def test_a_sample_says_how_much_it_looked_at(tmp_path: Path):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(2048, 1024)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    outcome = look(tmp_path, sample=0.01)
    (finding,) = outcome.findings
    assert finding.detail == "the 524,288 elements looked at, of 2,097,152, float32"
    assert outcome.said.endswith("a sample")
