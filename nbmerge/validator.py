"""Compares what a merge would write with a directory that is there: names, shapes, dtypes and every bit."""

from __future__ import annotations

from pathlib import Path

from nbmerge.engine.comparison import first_difference
from nbmerge.engine.safetensors_file import read_header
from nbmerge.engine.sources import LocalFiles
from nbmerge.errors import NotACheckpointError, Problem
from nbmerge.expressions import Stored
from nbmerge.geometry import contiguous_strides
from nbmerge.plan import MergePlan


def stored_tensors(directory: Path) -> dict[str, Stored]:
    """The tensors of the safetensors files in a directory, by name. Raises NotACheckpointError without any."""
    paths = sorted(directory.glob("*.safetensors")) if directory.is_dir() else []
    if not paths:
        raise NotACheckpointError(
            "there are no safetensors files to compare with", where=str(directory),
            fix="pass a Hugging Face model directory: --test_hf_dir DIR",
        )  # fmt: skip
    return {
        name: Stored(str(path), entry.offset, entry.shape, contiguous_strides(entry.shape), entry.dtype)
        for path in paths
        for name, entry in read_header(path).items()
    }


def differences(plan: MergePlan, directory: Path) -> list[Problem]:
    """Everything in which the plan's outputs and the directory's tensors differ. Streams; holds one block."""
    theirs, ours = stored_tensors(directory), plan.tensors
    problems = [Problem(f"{name} is not in the directory") for name in ours if name not in theirs]
    problems += [Problem(f"{name} is in the directory only") for name in theirs if name not in ours]
    with LocalFiles() as sources:
        for name in ours:
            if name not in theirs:
                continue
            a, b = ours[name].expr, theirs[name]
            if (a.shape, a.dtype) != (b.shape, b.dtype):
                problems.append(Problem(f"{name} is {a.dtype} {list(a.shape)}, there {b.dtype} {list(b.shape)}"))
                continue
            index = first_difference(a, b, plan.execution.buffer_bytes, sources)
            if index is not None:
                problems.append(Problem(f"{name} differs, first at {list(index)}"))
    return problems
