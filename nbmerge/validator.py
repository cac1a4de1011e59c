"""Compares what a merge would write with a directory that is there: names, shapes, dtypes and every bit."""

from __future__ import annotations

from pathlib import Path

from nbmerge.engine.comparison import first_difference
from nbmerge.engine.safetensors_file import stored_tensors
from nbmerge.engine.sources import LocalFiles
from nbmerge.errors import Problem
from nbmerge.plan import MergePlan


def differences(plan: MergePlan, directory: Path) -> list[Problem]:
    """Everything in which the plan's outputs and the directory's tensors differ. Streams; holds one block."""
    theirs, ours = stored_tensors(directory, "--test_hf_dir DIR"), plan.tensors
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
