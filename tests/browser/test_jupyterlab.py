"""Every display in a real JupyterLab: both themes, trusted and not, read by the computed styles of a real browser."""

from __future__ import annotations

from typing import Any

import pytest

from tests.browser.gallery import write_gallery
from tests.browser.lab import LOOK, NEEDS, Lab, finished, keep, open_notebook, run_cell, with_cells
from tests.display.registry import every_object
from tests.support.sanitizer import sanitized

pytestmark = NEEDS
_LEFT = """() => [...document.querySelectorAll(".jp-OutputArea-output")].map(output => {
  const walker = document.createTreeWalker(output, NodeFilter.SHOW_TEXT), texts = [];
  while (walker.nextNode()) texts.push(walker.currentNode.textContent);
  const styles = [...output.querySelectorAll("[style]")].map(one => one.getAttribute("style"));
  return { text: texts.join(" "), styles };
})"""


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
    found = page.evaluate(LOOK)
    keep(page, name)
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


def test_the_stop_button_stops_a_merge_and_a_second_run_takes_it_up(working: Lab, chromium: Any) -> None:
    root = working.root
    merge = "%merge_ckpt actor --target_dir out --max_shard_size 8kB --workers 1 --dtype bfloat16"
    cells = [_SLOW, merge, "print('the kernel lives', Path('out').exists())", f"slow = 0\n{merge}"]
    page, seen = with_cells(working, chromium, "stop.ipynb", cells)
    run_cell(page, 0)
    finished(page, 0)
    run_cell(page, 1)
    page.locator(".jp-Cell").nth(1).get_by_text("B/s").first.wait_for(timeout=90_000)
    keep(page, "stop-progress.ipynb")
    page.get_by_role("button", name="Interrupt the kernel").first.click()
    finished(page, 1)
    stopped = page.locator(".jp-Cell").nth(1).inner_text()
    assert "KeyboardInterrupt: stopped; nothing stands under the target's name" in stopped
    assert "Traceback" not in stopped
    run_cell(page, 2)
    finished(page, 2)
    assert "the kernel lives False" in page.locator(".jp-Cell").nth(2).inner_text()
    run_cell(page, 3)
    finished(page, 3)
    keep(page, "stop-done.ipynb")
    assert "of Qwen2ForCausalLM into out" in page.locator(".jp-Cell").nth(3).inner_text()
    assert (root / "out/model.safetensors.index.json").is_file()
    assert [path.name for path in root.iterdir() if "nbmerge" in path.name] == []
    assert (seen.errors, seen.dialogs) == ([], [])
    page.close()
