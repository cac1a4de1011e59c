"""What all benchmarks need: their options, a directory to work in, and fields of /proc."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path


def status(field: str) -> int:
    """A field of /proc/self/status, in KiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise LookupError(field)


def run_with_options(doc: str | None, run: Callable[[Path, argparse.Namespace], None], *layouts: str) -> None:
    """Reads the options and runs in --dir, or in a directory that is gone afterwards. layouts: to choose from."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0] if doc else None)
    if layouts:
        parser.add_argument("--layout", choices=layouts, default=layouts[0])
    parser.add_argument("--gigabytes", type=float, default=3.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dir", type=Path, help="keep what is made here for the next run")
    options = parser.parse_args()
    if options.dir:
        run(options.dir, options)
        return
    with tempfile.TemporaryDirectory(prefix="nbmerge-benchmark-") as directory:
        run(Path(directory), options)
