"""Every display in a real JupyterLab: both themes, trusted and not, read by the computed styles of a real browser."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest

from tests.browser.gallery import KERNEL, write_gallery
from tests.browser.lab import CHROMIUM, Lab, Seen, browser, lab, open_notebook
from tests.display.registry import every_object
from tests.support.models import write_model_world
from tests.support.sanitizer import sanitized

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (Debian: apt install chromium)"),
    pytest.mark.skipif(importlib.util.find_spec("playwright") is None, reason="playwright is not installed"),
]
_LOOK = (Path(__file__).parent / "look.js").read_text("utf-8").partition("\n() =>")[2]
_LEFT = """() => [...document.querySelectorAll(".jp-OutputArea-output")].map(output => {
  const walker = document.createTreeWalker(output, NodeFilter.SHOW_TEXT), texts = [];
  while (walker.nextNode()) texts.push(walker.currentNode.textContent);
  const styles = [...output.querySelectorAll("[style]")].map(one => one.getAttribute("style"));
  return { text: texts.join(" "), styles };
})"""
_SCREENSHOTS = os.environ.get("NBMERGE_SCREENSHOTS")
"""A directory for pictures of all cells, for a designer's eye; without it none are taken."""


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as made:
        yield made


@pytest.fixture(scope="module", params=["light", "dark"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Lab, str]]:
    """A server in each theme."""
    with lab(tmp_path_factory.mktemp("lab"), request.param) as made:
        yield made, request.param


@pytest.mark.parametrize("trusted", [True, False], ids=["trusted", "untrusted"])
def test_every_display_is_legible(served: tuple[Lab, str], chromium: Any, trusted: bool) -> None:
    server, theme = served
    name = f"gallery-{theme}-{'trusted' if trusted else 'untrusted'}.ipynb"
    count = write_gallery(server.root / name)
    if trusted:
        server.trust(name)
    page, seen = open_notebook(chromium, server.address(name))
    page.wait_for_function(f"document.querySelectorAll('.jp-OutputArea-output').length >= {count}", timeout=60_000)
    page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    found = page.evaluate(f"() =>{_LOOK}")
    _keep(page, name)
    # The styles of a notebook that is not trusted are dropped, and what they improve with them.
    assert page.evaluate("document.querySelectorAll('.jp-OutputArea-output style').length > 0") is trusted
    assert found["texts"] > 1000
    assert found["faint"] == []
    assert found["wide"] == []
    assert (seen.errors, seen.dialogs) == ([], [])
    if not trusted:
        _is_what_the_tests_filter_leaves(page)
    page.close()


def _is_what_the_tests_filter_leaves(page: Any) -> None:
    """Holds the filter that the ordinary tests use against the real one, display by display."""
    shown = page.evaluate(_LEFT)
    for (name, display), real in zip(every_object().items(), shown, strict=True):
        left = sanitized(display._repr_html_() or "")
        assert left.text.split() == real["text"].split(), name
        assert [_plain(style) for style in left.styles] == [_plain(style) for style in real["styles"]], name


def _plain(style: str) -> str:
    return style.replace(" ", "").rstrip(";")


def _keep(page: Any, name: str) -> None:
    """Screenshots, where they are asked for."""
    if _SCREENSHOTS:
        Path(_SCREENSHOTS).mkdir(exist_ok=True)
        for number, cell in enumerate(page.locator(".jp-Cell").all()):
            cell.screenshot(path=f"{_SCREENSHOTS}/{Path(name).stem}-{number:02}.png")


_SLOW = """\
import time
from pathlib import Path
from nbmerge.engine import sources

first = sources.LocalFiles.read_into


def slowly(self, *args):
    time.sleep(slow)
    return first(self, *args)


sources.LocalFiles.read_into = slowly
slow = 0.2
%load_ext nbmerge
"""


@pytest.fixture(scope="module")
def working(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A server with a checkpoint beside its notebooks."""
    root = tmp_path_factory.mktemp("lab")
    write_model_world(root / "actor", "qwen2")
    with lab(root, "light") as server:
        yield server


def test_the_stop_button_stops_a_merge_and_a_second_run_takes_it_up(working: Lab, chromium: Any) -> None:
    root = working.root
    merge = "%merge_ckpt actor --target_dir out --max_shard_size 8kB --workers 1 --dtype bfloat16"
    cells = [_SLOW, merge, "print('the kernel lives', Path('out').exists())", f"slow = 0\n{merge}"]
    page, seen = _with_cells(working, chromium, "stop.ipynb", cells)
    _run_cell(page, 0)
    _finished(page, 0)
    _run_cell(page, 1)
    page.locator(".jp-Cell").nth(1).get_by_text("B/s").first.wait_for(timeout=90_000)
    _keep(page, "stop-progress.ipynb")
    page.get_by_role("button", name="Interrupt the kernel").first.click()
    _finished(page, 1)
    stopped = page.locator(".jp-Cell").nth(1).inner_text()
    assert "KeyboardInterrupt: stopped; nothing stands under the target's name" in stopped
    assert "Traceback" not in stopped
    _run_cell(page, 2)
    _finished(page, 2)
    assert "the kernel lives False" in page.locator(".jp-Cell").nth(2).inner_text()
    _run_cell(page, 3)
    _finished(page, 3)
    _keep(page, "stop-done.ipynb")
    assert "of Qwen2ForCausalLM into out" in page.locator(".jp-Cell").nth(3).inner_text()
    assert (root / "out/model.safetensors.index.json").is_file()
    assert [path.name for path in root.iterdir() if "nbmerge" in path.name] == []
    assert (seen.errors, seen.dialogs) == ([], [])
    page.close()


def test_an_explorer_works_by_keyboard_and_by_mouse(working: Lab, chromium: Any) -> None:
    cells = ["import nbmerge\nnbmerge.open_checkpoint('actor', progress=False).explore()"]
    page, seen = _with_cells(working, chromium, "explore.ipynb", cells)
    _run_cell(page, 0)
    _finished(page, 0)
    cell = page.locator(".jp-Cell").first
    rows = cell.locator("select[size]")
    rows.wait_for(timeout=60_000)
    cell.locator("input[type=text]").first.focus()
    page.keyboard.type("q_proj.weight")
    page.wait_for_function("document.querySelectorAll('select[size] option').length === 2")
    assert all("q_proj.weight" in text for text in rows.locator("option").all_inner_texts())
    _tab_to(page, "document.activeElement.type === 'number'")
    page.keyboard.press("ArrowUp")
    cell.get_by_text("model.layers.1.self_attn.q_proj.weight is").first.wait_for()
    _tab_to(page, "document.activeElement.innerText.includes('Compute')")
    page.keyboard.press("Enter")
    cell.get_by_text("model.layers.1.self_attn.q_proj.weight: 256 elements").first.wait_for(timeout=60_000)
    rows.locator("option").first.click()
    cell.get_by_text("model.layers.0.self_attn.q_proj.weight is").first.wait_for()
    found = page.evaluate(f"() =>{_LOOK}")
    _keep(page, "explore.ipynb")
    assert (found["faint"], found["wide"]) == ([], [])
    assert (seen.errors, seen.dialogs) == ([], [])
    page.close()


def _with_cells(server: Lab, chromium: Any, name: str, cells: list[str]) -> tuple[Any, Seen]:
    """A page with a notebook of these cells, whose kernel is ready."""
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells], metadata=KERNEL)
    nbformat.write(made, server.root / name)
    page, seen = open_notebook(chromium, server.address(name))
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for(timeout=120_000)
    return page, seen


def _tab_to(page: Any, condition: str) -> None:
    """Presses Tab until the focus is where it should be."""
    for _ in range(20):
        page.keyboard.press("Tab")
        if page.evaluate(condition):
            return
    raise AssertionError(f"the keyboard does not reach {condition}")


def _run_cell(page: Any, number: int) -> None:
    page.locator(".jp-Cell").nth(number).locator(".jp-InputArea-editor").click()
    page.keyboard.press("Control+Enter")


def _finished(page: Any, number: int) -> None:
    """Waits until the cell has the number of a run that is over."""
    prompt = f"document.querySelectorAll('.jp-Cell')[{number}].querySelector('.jp-InputPrompt').innerText"
    page.wait_for_function(f"/\\[\\d+\\]/.test({prompt})", timeout=120_000)
