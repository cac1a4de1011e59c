"""A real JupyterLab, and a real Chromium that looks at it."""

from __future__ import annotations

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
from nbformat.sign import NotebookNotary

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
          "--disable-sync"]  # fmt: skip
DATA = ".data"
_START = 90  # seconds that a server may take on a busy machine


@dataclass
class Lab:
    """A server for the notebooks of a directory, in one theme."""

    root: Path
    url: str
    token: str

    def address(self, notebook: str) -> str:
        """Where the notebook opens, in a workspace of its own."""
        return f"{self.url}/lab/tree/{notebook}?token={self.token}&reset"

    def trust(self, notebook: str) -> None:
        """Signs the notebook, as JupyterLab does for one that its user ran."""
        path = self.root / notebook
        NotebookNotary(data_dir=str(self.root / DATA)).sign(nbformat.read(path, as_version=4))


@contextmanager
def lab(root: Path, theme: str) -> Iterator[Lab]:
    """Serves the notebooks in `root`. theme: `light` or `dark`."""
    settings = root / ".settings/@jupyterlab"
    for plugin, content in {
        "apputils-extension/themes": {"theme": f"JupyterLab {theme.capitalize()}"},
        "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
        "notebook-extension/tracker": {"windowingMode": "none", "recordTiming": False},
    }.items():
        path = settings / f"{plugin}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(8)
    env = {**os.environ, "JUPYTERLAB_SETTINGS_DIR": str(settings.parent), "JUPYTER_DATA_DIR": str(root / DATA),
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
