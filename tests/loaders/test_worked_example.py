"""The loader that CONTRIBUTING.md shows runs as it is printed there, and keeps the contract of loaders."""

from __future__ import annotations

from pathlib import Path

from nbmerge.loaders import choose_loader
from nbmerge.testing import LoaderContract
from tests.support.guide import example

RowwiseLoader = example("RowwiseLoader")
TestRowwise = example("TestRowwise", RowwiseLoader=RowwiseLoader)


def test_the_loader_of_the_guide_is_chosen(tmp_path: Path) -> None:
    contract = TestRowwise()
    assert isinstance(contract, LoaderContract)
    contract.write(tmp_path, contract.uneven())
    loader = choose_loader(tmp_path, "auto", [RowwiseLoader()])
    assert isinstance(loader, RowwiseLoader)
