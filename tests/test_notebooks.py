"""The tutorials run, and say what their committed outputs say."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import nbformat
import pytest

from tests.support.models import HAS_CONVERSIONS
from tests.support.worlds import IS_TORCH_2_7

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"


def _refresh_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("refresh", NOTEBOOKS / "refresh.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


REFRESH = _refresh_script()
_VOLATILE = (
    (re.compile(r"\b[\d.,]+ [kMGT]?B/s"), "<speed>"),
    (re.compile(r"\b[\d.,]+ (ms|s|min|seconds?|minutes?)\b"), "<time>"),
    # A .metadata is a pickle of what the ranks sent to the first: how much of it is shared is chance.
    (re.compile(r"(\s+[\d.,]+ [kMGT]?B){3}(?=\s+\S*\.metadata\b)"), " <sizes>"),
    (re.compile(r"(\b(?:Files:|uploaded) [\d,]+ files), [\d.,]+ [kMGT]?B"), r"\1, <size>"),
    (re.compile(r"(?<=127\.0\.0\.1:)\d+"), "<port>"),
)
# Sizes of the files that torch and transformers write, and the last digits of logits, change with their versions.
_SIZES = (
    (re.compile(r"[\d.,]+ ([kMGT]?B|bytes)\b"), "<size>"),
    (re.compile(r"[\d.]+%"), "<share>"),
    (re.compile(r"(logits?:) [\d.]+"), r"\1 <logit>"),  # torch sums 16-bit products in another order
)
# Tutorials whose checkpoints the installed frameworks cannot make, and why.
_LACKING = {
    "02": "" if IS_TORCH_2_7 else "torch 2.6 cannot shard by FSDP what tensor parallelism has cut unevenly",
    "03": "" if IS_TORCH_2_7 else "FSDP2 of torch 2.6 does not train on the CPU",
    "04": "" if HAS_CONVERSIONS else "transformers 4 has no Gemma 4",
}


def texts(notebook: Any, *, sizes: bool) -> list[list[str]]:
    """The text outputs of each code cell, without what differs from run to run; `sizes`: with sizes in bytes."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [[_normalised(_text(output), sizes=sizes) for output in cell.outputs] for cell in cells]


def _text(output: Any) -> str:
    if output.output_type == "stream":
        return f"{output.name}: {output.text}"
    return str(output.data.get("text/plain", "")) if "data" in output else f"{output.ename}: {output.evalue}"


def _normalised(text: str, *, sizes: bool) -> str:
    for pattern, word in _VOLATILE if sizes else _VOLATILE + _SIZES:
        text = pattern.sub(word, text)
    return " ".join(text.split())  # a longer word moves the line breaks


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_tutorial_runs_and_says_what_its_committed_outputs_say(path: Path, tmp_path: Path) -> None:
    if lacking := next((why for number, why in _LACKING.items() if path.stem.startswith(number) and why), ""):
        pytest.skip(lacking)
    committed = nbformat.read(path, as_version=4)
    executed = REFRESH.run(path, tmp_path)  # raises for an error in a cell
    assert len(texts(executed, sizes=False)) == len(texts(committed, sizes=False))
    if not HAS_CONVERSIONS:  # whose names and files are others than those of the committed outputs
        return
    sizes = committed.metadata.get("written_with") == executed.metadata["written_with"]
    assert texts(executed, sizes=sizes) == texts(committed, sizes=sizes)


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_tutorial_is_committed_with_the_outputs_of_one_run_from_top_to_bottom(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert any(cell.outputs for cell in cells)
    assert not [output for cell in cells if not _shows_an_error(cell) for output in _errors(cell)]
    assert all(_errors(cell) for cell in cells if _shows_an_error(cell))


def _shows_an_error(cell: Any) -> bool:
    """Whether the cell is there to fail: Run All goes on after it."""
    return "raises-exception" in cell.metadata.get("tags", ())


def _errors(cell: Any) -> list[Any]:
    return [output for output in cell.outputs if output.output_type == "error"]


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_tutorial_names_no_place_of_the_machine_that_ran_it(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not re.findall(r"/(?:tmp|home|root|work|opt|Users)/[\w./-]*", text)
    assert str(Path.home()) not in text or str(Path.home()) == "/"
