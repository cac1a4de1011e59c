"""An output tensor as a small expression over stored bytes. Pure description: nothing here reads a file.

Stored    bytes in a file                        Cast     another dtype
Fill      a constant                             Compute  an operation, with the axis it can be cut along
Input     a tensor that a naming rule will be given
Slice, Permute, Reshape   views of another node  Paste    boxes put together
"""

from nbmerge.expressions.making import cast, cat, narrow, permute, reshape, rows_of, select, slice_of, stack
from nbmerge.expressions.nodes import Cast, Compute, Expr, Fill, Input, Paste, Permute, Reshape, Slice, Stored
from nbmerge.expressions.walking import fingerprint, input_names, is_copy, substitute, walk

__all__ = [
    "Cast",
    "Compute",
    "Expr",
    "Fill",
    "Input",
    "Paste",
    "Permute",
    "Reshape",
    "Slice",
    "Stored",
    "cast",
    "cat",
    "fingerprint",
    "input_names",
    "is_copy",
    "narrow",
    "permute",
    "reshape",
    "rows_of",
    "select",
    "slice_of",
    "stack",
    "substitute",
    "walk",
]
