"""Time of the first text and HTML of indexes and plans of DeepSeek-V3's size, and of the demo's model.

python -m tests.benchmarks.displays [--rounds N]

The objects lie in memory, display is imported, and the sums that opening and comparing make are made before the
clock starts; each round takes a fresh object, so that nothing is kept from the one before. Given is the least of the
rounds in CPU time, beside a loop that splits every name: on a busy machine all of them grow together.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from nbmerge.comparing.model_diff import ModelDiff
from nbmerge.layout import Checkpoint
from nbmerge.shown import Displayed
from tests.display.large_objects import LARGE, published
from tests.display.objects import checkpoint

_LIMIT, _SMALL_LIMIT = 100, 10  # milliseconds


def _demo() -> tuple[Checkpoint, Displayed]:
    """The index and the plan of the checkpoint that `nbmerge demo` makes."""
    import nbmerge
    from nbmerge.demo import make_checkpoint

    with TemporaryDirectory(prefix="nbmerge-benchmark-") as directory:
        opened = nbmerge.open_checkpoint(make_checkpoint(Path(directory) / "demo").path, progress=False)
        return opened, nbmerge.plan_merge(opened)


def _least(work: Callable[[], object], rounds: int) -> float:
    """CPU milliseconds."""
    found = []
    for _ in range(rounds):
        start = time.process_time()
        work()
        found.append(1000 * (time.process_time() - start))
    return min(found)


def _opened(fresh: Displayed) -> Displayed:
    """With what opening and comparing find before anyone looks."""
    if isinstance(fresh, Checkpoint):
        _ = fresh.kinds
    if isinstance(fresh, ModelDiff):
        fresh.summed_up()
    return fresh


def _shown(shown: Displayed, rounds: int) -> tuple[float, float, int]:
    """Milliseconds of the first text, of the HTML after it, and the HTML's bytes."""
    texts, htmls, size = [], [], 0
    for _ in range(rounds):
        fresh = _opened(replace(shown))  # type: ignore[type-var]
        texts.append(_least(fresh.__repr__, 1))
        htmls.append(_least(fresh._repr_html_, 1))
        size = len((fresh._repr_html_() or "").encode())
    return min(texts), min(htmls), size


def main() -> None:
    """Reads the options and runs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    repr(checkpoint()), checkpoint()._repr_html_()  # what is imported at the first display of all
    index, plan = _demo()
    names = list(published())
    unit = _least(lambda: [name.split(".") for name in names], rounds)
    print(f"a split of {len(names):,} names   {unit:6.1f} ms")
    large = [(make.__name__, make(), _LIMIT) for make in LARGE]
    for label, shown, limit in (*large, ("demo's index", index, _SMALL_LIMIT), ("demo's plan", plan, _SMALL_LIMIT)):
        text, html, size = _shown(shown, rounds)
        print(
            f"{label:22} {text:6.1f} ms text, {html:4.1f} ms HTML (limit {limit} together), {text / unit:4.1f} splits, "
            f"{size:,} bytes (limit 30,000)"
        )


if __name__ == "__main__":
    main()
