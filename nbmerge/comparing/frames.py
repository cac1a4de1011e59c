"""Reports as pandas data frames. pandas is no dependency: it is imported when one is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nbmerge.errors import NotSupportedError

if TYPE_CHECKING:
    import pandas as pd

    from nbmerge.comparing.model_diff import ModelDiff, TensorDiff
    from nbmerge.comparing.trajectory import Trajectory


def diff_frame(diff: ModelDiff) -> pd.DataFrame:
    """A row for each tensor. Raises NotSupportedError without pandas."""
    return _pandas().DataFrame([tensor_row(tensor) for tensor in diff.tensors.values()])


def trajectory_frame(trajectory: Trajectory) -> pd.DataFrame:
    """A row for each tensor of each step. Raises NotSupportedError without pandas."""
    return _pandas().DataFrame(
        [
            {"step": step.label, **tensor_row(tensor), "cosine_to_last_update": step.cosines.get(tensor.name)}
            for step in trajectory.steps
            for tensor in step.diff.tensors.values()
        ]
    )


def tensor_row(tensor: TensorDiff) -> dict[str, Any]:
    """What is known of a tensor, as a row of plain values."""
    found, place = tensor.statistics, tensor.place
    return {
        "tensor": tensor.name,
        "layer": place.layer,
        "kind": place.kind,
        "part": place.part,
        "shape": tensor.shape,
        "dtype_a": str(tensor.dtype_a),
        "dtype_b": str(tensor.dtype_b),
        "elements": found.elements,
        "changed": found.changed,
        "share": found.share,
        "share_rounded": found.share_rounded,
        "relative_l2": found.relative_l2,
        "update_norm": found.update_norm,
        "cosine": found.cosine,
        "one_minus_cosine": found.one_minus_cosine,
        "largest": found.largest.size if found.largest else 0.0,
        "largest_at": tensor.largest_at,
        "flips": found.flips,
        "nonfinite_a": found.nonfinite_a,
        "nonfinite_b": found.nonfinite_b,
        "ulps": found.ulps,
        "magnitudes": dict(found.magnitudes),
        "rank_one": tensor.rank_one,
        "frozen": tensor.frozen,
        "note": tensor.note,
    }


def _pandas() -> Any:
    try:
        import pandas
    except ImportError as error:
        raise NotSupportedError(
            "a data frame needs pandas, which is not installed", fix="pip install pandas"
        ) from error
    return pandas
