"""A real JupyterLab, and a real Chromium that looks at it."""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbformat.sign import NotebookNotary

from tests.browser.gallery import KERNEL

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
          "--disable-sync"]  # fmt: skip
NEEDS = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (Debian: apt install chromium)"),
    pytest.mark.skipif(importlib.util.find_spec("playwright") is None, reason="playwright is not installed"),
]
LOOK = "() =>" + (Path(__file__).parent / "look.js").read_text("utf-8").partition("\n() =>")[2]
_SCREENSHOTS = os.environ.get("NBMERGE_SCREENSHOTS")
"""A directory for pictures of all cells, for a designer's eye; without it none are taken."""
DATA, _SETTINGS = ".data", ".settings"
_BARS = 300  # pixels of the window that JupyterLab takes above and below a notebook, and some more
_START = 90  # seconds that a server may take on a busy machine


@dataclass
class Lab:
    """A server for the notebooks of a directory."""

    root: Path
    url: str
    token: str

    def address(self, notebook: str) -> str:
        """Where the notebook opens, in a workspace of its own."""
        return f"{self.url}/lab/tree/{notebook}?token={self.token}&reset"

    def wear(self, theme: str) -> None:
        """The theme of the pages that are opened from now on: `light` or `dark`."""
        _set(self.root, "apputils-extension/themes", {"theme": f"JupyterLab {theme.capitalize()}"})

    def trust(self, notebook: str) -> None:
        """Signs the notebook, as JupyterLab does for one that its user ran."""
        path = self.root / notebook
        NotebookNotary(data_dir=str(self.root / DATA)).sign(nbformat.read(path, as_version=4))


def _set(root: Path, plugin: str, content: dict[str, object]) -> None:
    """A plugin's settings, which the server reads for each page anew."""
    path = root / _SETTINGS / "@jupyterlab" / f"{plugin}.jupyterlab-settings"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


@contextmanager
def lab(root: Path) -> Iterator[Lab]:
    """Serves the notebooks in `root`."""
    _set(root, "apputils-extension/notification", {"fetchNews": "false", "checkForUpdates": False})
    _set(root, "notebook-extension/tracker", {"windowingMode": "none", "recordTiming": False})
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(8)
    env = {**os.environ, "JUPYTERLAB_SETTINGS_DIR": str(root / _SETTINGS), "JUPYTER_DATA_DIR": str(root / DATA),
           "JUPYTER_CONFIG_DIR": str(root / ".config"), "JUPYTERLAB_WORKSPACES_DIR": str(root / ".workspaces"),
           "IPYTHONDIR": str(root / ".ipython")}  # fmt: skip
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}",
               f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={root}"]  # fmt: skip
    with (root / ".log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env)
    try:
        url = f"http://127.0.0.1:{port}"
        _wait(f"{url}/api/status?token={token}", root / ".log")
        yield Lab(root, url, token)
    finally:
        server.terminate()
        server.wait(30)


def _wait(url: str, log: Path) -> None:
    deadline = time.monotonic() + _START
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(url):
                return
        except OSError:
            time.sleep(0.3)
    raise RuntimeError(f"JupyterLab did not start:\n{log.read_text()[-2000:]}")


@dataclass
class Seen:
    """What a page did that it should not: errors on the console, dialogs that opened."""

    errors: list[str] = field(default_factory=list)
    dialogs: list[str] = field(default_factory=list)


@contextmanager
def browser() -> Iterator[Any]:
    """A Chromium of Playwright's."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        made = play.chromium.launch(executable_path=CHROMIUM, args=_FLAGS)
        try:
            yield made
        finally:
            made.close()


def open_notebook(chromium: Any, address: str) -> tuple[Any, Seen]:
    """A page with the notebook, and what it does from now on."""
    page = chromium.new_page(viewport={"width": 1400, "height": 1000})
    seen = Seen()
    page.on("console", lambda said: seen.errors.append(said.text) if said.type == "error" else None)
    page.on("pageerror", lambda error: seen.errors.append(str(error)))
    page.on("dialog", lambda dialog: (seen.dialogs.append(dialog.message), dialog.dismiss()))
    page.goto(address)
    page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=60_000)
    return page, seen


def with_cells(server: Lab, chromium: Any, name: str, cells: list[str]) -> tuple[Any, Seen]:
    """A page with a notebook of these cells, whose kernel is ready."""
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells], metadata=KERNEL)
    nbformat.write(made, server.root / name)
    page, seen = open_notebook(chromium, server.address(name))
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for(timeout=120_000)
    return page, seen


def tab_to(page: Any, condition: str) -> None:
    """Presses Tab until the focus is where it should be."""
    for _ in range(20):
        page.keyboard.press("Tab")
        if page.evaluate(condition):
            return
    raise AssertionError(f"the keyboard does not reach {condition}")


def run_cell(page: Any, number: int) -> None:
    """Runs a cell by the keyboard."""
    page.locator(".jp-Cell").nth(number).locator(".jp-InputArea-editor").click()
    page.keyboard.press("Control+Enter")


def finished(page: Any, number: int) -> None:
    """Waits until the cell has the number of a run that is over."""
    prompt = f"document.querySelectorAll('.jp-Cell')[{number}].querySelector('.jp-InputPrompt').innerText"
    page.wait_for_function(f"/\\[\\d+\\]/.test({prompt})", timeout=120_000)


def keep(page: Any, name: str) -> None:
    """Screenshots, where they are asked for, each in a window that is as high as the cell."""
    if not _SCREENSHOTS:
        return
    Path(_SCREENSHOTS).mkdir(exist_ok=True)
    before = page.viewport_size
    for number, cell in enumerate(page.locator(".jp-Cell").all()):
        height = cell.evaluate("one => one.scrollHeight")
        page.set_viewport_size({**before, "height": int(height) + _BARS})
        cell.scroll_into_view_if_needed()
        cell.screenshot(path=f"{_SCREENSHOTS}/{Path(name).stem}-{number:02}.png")
    page.set_viewport_size(before)
