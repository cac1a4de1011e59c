"""A cast of a cast: what was widened and comes back is the tensor that it was; what was rounded is not."""

from __future__ import annotations

import pytest

from nbmerge.dtypes import BY_NAME
from nbmerge.expressions import Cast, Fill, cast


@pytest.mark.parametrize(("narrow", "wide"), [("bfloat16", "float32"), ("float16", "float32"), ("float32", "float64")])
def test_back_from_a_wider_type_is_the_tensor_itself(narrow: str, wide: str):
    stored = Fill(1.0, (2,), BY_NAME[narrow])
    assert cast(cast(stored, BY_NAME[wide]), BY_NAME[narrow]) is stored


@pytest.mark.parametrize(
    ("first", "second"), [("float32", "bfloat16"), ("bfloat16", "float16"), ("int32", "float64"), ("int8", "float32")]
)
def test_back_from_anything_else_stays_a_cast(first: str, second: str):
    stored = Fill(1.0, (2,), BY_NAME[first])
    back = cast(cast(stored, BY_NAME[second]), BY_NAME[first])
    assert isinstance(back, Cast)
    assert back.source == Cast(stored, BY_NAME[second])


def test_to_the_dtype_that_it_has_is_nothing():
    stored = Fill(1.0, (2,), BY_NAME["float32"])
    assert cast(stored, BY_NAME["float32"]) is stored
