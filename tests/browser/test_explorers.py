"""Explorers in a real JupyterLab: by mouse, by keyboard, interrupted, and in a notebook that is opened again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import pytest

from tests.browser.lab import LOOK, NEEDS, Lab, finished, keep, open_notebook, run_cell, with_cells

pytestmark = NEEDS

_OPEN = "import nbmerge\nckpt = nbmerge.open_checkpoint('actor', progress=False)\nckpt.explore()"
_DIFF = """\
import os, torch
from safetensors.torch import save_file
for name, more in (("a", 0), ("b", 0.1)):
    os.makedirs(name, exist_ok=True)
    save_file({f"model.layers.{n}.mlp.{w}_proj.weight": torch.full((8, 8), 1.0 + (n + 1) * more)
               for n in range(4) for w in ("up", "down")}, f"{name}/model.safetensors")
nbmerge.diff("a", "b", progress=False).explore()"""
_SLOW = """\
import time
from nbmerge.engine import sources
read = sources.LocalFiles.read_into
def slowly(self, *args):
    time.sleep(slow)
    return read(self, *args)
sources.LocalFiles.read_into, slow = slowly, 3
ckpt.explore()"""
_CELLS = """[document.querySelectorAll('.jp-Notebook .jp-Cell').length,
  [...document.querySelectorAll('.jp-Notebook .jp-Cell')].findIndex(cell => cell.matches('.jp-mod-active'))]"""
_FOCUS = """(() => { const at = document.activeElement, keys = at.closest('.nbm-keys');
  return keys ? keys.querySelector('label').textContent.split(':')[0]
    : at.closest('.nbm-explore') ? (at.labels?.[0] || at).innerText.split(' · ')[0] : 'outside'; })()"""


@pytest.fixture(scope="module")
def explorers(server: Lab, chromium: Any) -> Any:
    """A page with both explorers, and what it does that it should not."""
    server.wear("light")
    page, seen = with_cells(server, chromium, "explorers.ipynb", [_OPEN, _DIFF, "'the last cell'"])
    for number in range(3):
        run_cell(page, number)
        finished(page, number)
    yield page, seen
    assert (seen.errors, seen.dialogs) == ([], [])
    page.close()


def _cell(page: Any, number: int) -> Any:
    return page.locator(".jp-Notebook .jp-Cell").nth(number)


def _chosen(page: Any, cell: Any, row: str) -> None:
    """Waits until the row is chosen."""
    cell.locator(".nbm-on").filter(has_text=row).wait_for()


def _focus(page: Any, where: str) -> None:
    page.wait_for_function(f"{_FOCUS} === {where!r}", timeout=10_000)


def test_after_a_click_no_key_is_jupyterlabs_and_one_tab_leads_to_the_rows(explorers: Any) -> None:
    page, _ = explorers
    cell = _cell(page, 0)
    cell.locator(".nbm-row").nth(2).click()
    _focus(page, "Filter")
    _chosen(page, cell, "layers.0.self_attn.q_proj.bias")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Tab")
    _focus(page, "rows of the table")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    _chosen(page, cell, "layers.0.self_attn.k_proj.bias")
    page.keyboard.press("ArrowUp")
    _chosen(page, cell, "layers.0.self_attn.k_proj.weight")
    cell.get_by_text("model.layers.0.self_attn.k_proj.weight is").first.wait_for()
    page.keyboard.type("ddxab")
    cell.locator(".nbm-on").click()  # the row that is chosen already
    _focus(page, "Filter")
    page.keyboard.type("q_proj")
    cell.get_by_text("4 of 27 tensors").first.wait_for()
    assert page.evaluate(_CELLS) == [3, 0]
    cell.locator("input[type=text]").fill("")


def test_tab_comes_to_every_control_and_arrows_move_it(explorers: Any) -> None:
    page, _ = explorers
    cell = _cell(page, 0)
    cell.locator("input[type=text]").click()
    stops = ["Filter", "rows of the table", "dtype", "placement", "sort", "Page", "Shard map", "Compute statistics"]
    found = [page.evaluate(_FOCUS)]
    while len(found) < len(stops):
        page.keyboard.press("Tab")
        found.append(page.evaluate(_FOCUS))
        if found[-1] == "sort":
            page.keyboard.press("ArrowDown")
            cell.locator(".nbm-row").first.filter(has_text="lm_head.weight").wait_for()
            page.keyboard.press("ArrowUp")
        if found[-1] == "Page":
            page.keyboard.press("ArrowUp")
            cell.get_by_text("Row 16 of 27").wait_for()
    assert found == stops
    page.keyboard.press("Enter")
    cell.get_by_text("elements of float32").first.wait_for(timeout=30_000)
    _focus(page, "Compute again")
    assert page.evaluate(_CELLS) == [3, 0]


def test_a_slider_and_arrow_keys_move_the_histogram_of_a_diff(explorers: Any) -> None:
    page, _ = explorers
    cell = _cell(page, 1)
    cell.locator(".nbm-on").scroll_into_view_if_needed()
    knob = cell.locator(".noUi-touch-area").bounding_box()
    page.mouse.move(knob["x"] + 5, knob["y"] + 5)
    page.mouse.down()
    page.mouse.move(knob["x"] + 1000, knob["y"] + 5, steps=4)
    page.mouse.up()
    cell.get_by_text("model.layers.3: 2 tensors, 100.0% of the elements changed").first.wait_for()
    _focus(page, "Filter")
    page.keyboard.press("Shift+Tab")
    _focus(page, "module")
    page.keyboard.press("ArrowDown")
    cell.get_by_text("model.layers.3, mlp.up_proj: 1 tensor").first.wait_for()
    page.keyboard.press("Shift+Tab")
    _focus(page, "layer")
    page.keyboard.press("ArrowDown")
    cell.get_by_text("model.layers.2, mlp.up_proj: 1 tensor").first.wait_for()
    assert page.evaluate(_CELLS) == [3, 1]


@pytest.mark.parametrize("width", [1400, 640])
def test_explorers_are_legible_and_stay_in_their_cells(explorers: Any, width: int) -> None:
    page, _ = explorers
    page.set_viewport_size({"width": width, "height": 1000})
    page.wait_for_timeout(300)
    found = page.evaluate(LOOK)
    keep(page, f"explorers-{width}.ipynb")
    assert found["texts"] > 150
    assert (found["faint"], found["wide"]) == ([], [])
    page.set_viewport_size({"width": 1400, "height": 1000})


def test_an_interrupt_while_statistics_are_read_harms_neither_kernel_nor_explorer(working: Lab, chromium: Any) -> None:
    page, seen = with_cells(
        working, chromium, "interrupted.ipynb", [_OPEN, _SLOW, "slow = 0; print('the kernel lives')"]
    )
    for number in (0, 1):
        run_cell(page, number)
        finished(page, number)
    cell = _cell(page, 1)
    cell.get_by_role("button", name="Compute statistics").click()
    cell.get_by_text("reading model.embed_tokens.weight").wait_for()
    page.get_by_role("button", name="Interrupt the kernel").first.click()
    run_cell(page, 2)
    finished(page, 2)
    assert "the kernel lives" in _cell(page, 2).inner_text()
    cell.get_by_text("elements of float32").first.wait_for(timeout=30_000)
    cell.locator(".nbm-row").nth(1).click()
    _chosen(page, cell, "layers.0.self_attn.q_proj.weight")
    cell.get_by_role("button", name="Compute statistics").click()
    cell.get_by_text("layers.0.self_attn.q_proj.weight: ").first.wait_for(timeout=30_000)
    assert (seen.errors, seen.dialogs) == ([], [])
    page.close()


@pytest.fixture(scope="module")
def saved(server: Lab, chromium: Any) -> Path:
    """A notebook with an explorer, saved by JupyterLab."""
    page, _ = with_cells(server, chromium, "saved.ipynb", [_OPEN])
    run_cell(page, 0)
    finished(page, 0)
    _cell(page, 0).locator(".nbm-row").nth(1).click()
    _chosen(page, _cell(page, 0), "q_proj.weight")
    page.get_by_role("menuitem", name="File").click()
    page.get_by_text("Save Notebook", exact=True).click()
    page.wait_for_function("!document.querySelector('.jp-mod-dirty')")
    page.close()
    return server.root / "saved.ipynb"


@pytest.mark.parametrize(("theme", "trusted"), [("light", True), ("dark", False)])
def test_a_notebook_that_is_opened_again_shows_the_twin_alone(
    saved: Path, server: Lab, chromium: Any, theme: str, trusted: bool
) -> None:
    """With another kernel, and without the state of widgets. (The twins are in the gallery, in each theme.)"""
    server.wear(theme)
    name = f"reopened-{theme}-{'trusted' if trusted else 'untrusted'}.ipynb"
    notebook = nbformat.read(saved, as_version=4)
    notebook.metadata["copy"] = name  # else the signature of one copy would be that of the other
    nbformat.write(notebook, server.root / name)
    if trusted:
        server.trust(name)
    page, seen = open_notebook(chromium, server.address(name))
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for(timeout=120_000)
    page.get_by_text("model.layers.0.self_attn.q_proj.weight is").wait_for()
    if trusted:
        page.get_by_text("model not found").wait_for(state="attached", timeout=30_000)
    shown = _cell(page, 0).locator(".jp-OutputArea").first.inner_text()
    keep(page, name)
    assert "Error displaying" not in shown
    assert ("as it was last" in shown) is not trusted
    found = page.evaluate(LOOK)
    assert (found["faint"], found["wide"], seen.dialogs) == ([], [], [])
    assert [error for error in seen.errors if "widget model not found" not in error] == []  # ipywidgets' own
    page.close()
