"""The panel that reads a tensor for its statistics: on a press of a button, on a thread, until it is stopped."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace

import ipywidgets as widgets
from markupsafe import escape

from nbmerge.display import words
from nbmerge.display.html import render_html
from nbmerge.display.model import PROBLEM, Alert, View
from nbmerge.display.tensor_views import stats_view
from nbmerge.display.widgets.explorer import bar, html
from nbmerge.display.widgets.histograms import magnitude_section
from nbmerge.engine.events import Advanced, Event
from nbmerge.errors import one_line
from nbmerge.layout import LazyTensor
from nbmerge.tensor_stats import TensorStats, stats_of

_DOUBLE_CLICK = 0.4  # seconds
_STEP = 0.02  # of the bar, below which it does not move


class _Stopped(Exception):
    """Somebody pressed Stop."""


class StatisticsPanel:
    """A button that starts and stops the reading, a bar, and what was found. What is found of a tensor is kept.

    It is one button, which stays where it is and keeps the focus, so that the keyboard can press it again.
    changed: called, on the reading thread, after something was found.
    """

    def __init__(self, changed: Callable[[], None]) -> None:
        self._changed = changed
        self._tensor: LazyTensor | None = None
        self._found: dict[str, View] = {}
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._busy = False
        self._reading = ""  # the name of the tensor that is being read, as HTML
        self._began = 0.0  # seconds of the clock when reading began
        self._done = 0
        self.button = widgets.Button(layout=widgets.Layout(width="170px"))
        self.bar = widgets.FloatProgress(value=0.0, min=0.0, max=1.0, layout=widgets.Layout(display="none"))
        self.said = html(width="auto")
        self.result = html()
        self.widget = widgets.VBox([bar(self.button, self.bar, self.said), self.result])
        self.button.on_click(lambda _: self.press())
        self._draw()

    @property
    def view(self) -> View | None:
        """What was found of the tensor; None where nobody has asked."""
        return self._found.get(self._tensor.name) if self._tensor else None

    def show(self, tensor: LazyTensor | None) -> None:
        """Offers to read another tensor. One that is being read goes on."""
        self._tensor = tensor
        self._draw()

    def press(self) -> None:
        """Starts to read, or stops what is being read; not within the time of a double click."""
        if not self._busy:
            self.start()
        elif time.monotonic() - self._began > _DOUBLE_CLICK:
            self._stop.set()

    def start(self) -> None:
        """Reads the tensor, on a thread of its own."""
        if self._tensor is None or self._busy:
            return
        self._busy, self._began = True, time.monotonic()
        self._reading = str(escape(words.elide(self._tensor.name)))
        self._stop.clear()
        self._done, self.bar.value = 0, 0.0
        self._thread = threading.Thread(target=self._work, args=(self._tensor,), daemon=True)
        self._draw()
        self._thread.start()

    def wait(self) -> None:
        """Waits until what is being read has been read."""
        if self._thread is not None:
            self._thread.join()

    def _work(self, tensor: LazyTensor) -> None:
        def listen(event: Event) -> None:
            if self._stop.is_set():
                raise _Stopped
            if isinstance(event, Advanced):
                self._advance(event.nbytes, tensor.nbytes)

        try:
            stats = stats_of(tensor.name, tensor.expr, listener=listen)
            self._found[tensor.name] = _view(stats)
        except _Stopped:
            pass  # what was found before stays
        except Exception as error:  # noqa: BLE001 - nobody sees what a thread raises
            alert = Alert(PROBLEM, words.elide(one_line(str(error)), words.PROSE_LIMIT))
            self._found[tensor.name] = View("Statistics", "the tensor could not be read", alerts=(alert,))
        finally:
            self._busy = False
            self._draw()
            self._changed()

    def _advance(self, nbytes: int, total: int) -> None:
        with self._lock:
            self._done += nbytes
            share = self._done / (total or 1)
            if share - self.bar.value >= _STEP:
                self.bar.value = share

    def _draw(self) -> None:
        tensor, busy, view = self._tensor, self._busy, self.view
        self.button.description = "Stop" if busy else "Compute again" if view else "Compute statistics"
        self.button.disabled = tensor is None and not busy
        self.bar.layout.display = None if busy else "none"
        size = f"reads {words.byte_size(tensor.nbytes)} from disk" if tensor else ""
        self.said.value = f"reading {self._reading} …" if busy else "" if view else size
        self.result.value = render_html(view) if view else ""


def _view(stats: TensorStats) -> View:
    histogram = magnitude_section("|x|", stats.magnitudes, stats.magnitudes)
    return replace(stats_view(stats), sections=(histogram,) if stats.magnitudes else ())
