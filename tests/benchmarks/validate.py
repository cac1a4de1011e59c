"""Time and memory of a bitwise validation, against `cmp` of the same bytes in the same run.

python -m tests.benchmarks.validate [--layout fsdp|megatron] [--gigabytes 3] [--rounds 5] [--dir DIR]

Compares a merged directory with its shards, and looks at the health of every tensor. `cmp` compares the merged file
with a copy of itself. Both find all files in the page cache.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from tests.benchmarks.merge import one_merge
from tests.benchmarks.running import run_with_options, status

_LIMIT, _MIB = 2.5, 300  # times cmp, MiB


def _measure(checkpoint: str, merged: str, *checks: str) -> None:
    import nbmerge
    from nbmerge.naming.model import HFModel
    from nbmerge.validation import value_checks  # noqa: F401 - what it imports is no part of the pass

    _ = HFModel(Path(merged)).facts
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # from here on VmHWM is the peak of what follows
    start = time.perf_counter()
    report = nbmerge.validate(merged, checkpoint=checkpoint, checks=checks, progress=False)
    stop = time.perf_counter()
    report.raise_if_failed()
    mib = (status("VmHWM") - before) / 1024
    print(
        json.dumps({"seconds": stop - start, "mib": mib, "bytes": report.nbytes, "said": report["source"].outcome.said})
    )


def _one(checkpoint: Path, merged: Path, *checks: str) -> dict[str, float]:
    words = [sys.executable, "-m", "tests.benchmarks.validate", "--measure", str(checkpoint), str(merged), *checks]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _compared(files: list[Path], copies: list[Path]) -> float:
    start = time.perf_counter()
    for one, other in zip(files, copies, strict=True):
        subprocess.run(["cmp", str(one), str(other)], check=True)
    return time.perf_counter() - start


def _run(directory: Path, layout: str, gigabytes: float, rounds: int) -> None:
    from tests.benchmarks import large_checkpoint, large_megatron

    checkpoint = directory / ("checkpoint" if layout == "fsdp" else f"checkpoint_{layout}")
    if not (checkpoint / "huggingface").is_dir():
        (large_checkpoint.make if layout == "fsdp" else large_megatron.make)(checkpoint, gigabytes)
    for name in ("validated", "validated_copy"):
        shutil.rmtree(directory / name, ignore_errors=True)
    merged = directory / "validated"
    one_merge(checkpoint, merged)
    shutil.copytree(merged, directory / "validated_copy")
    files = sorted(merged.glob("*.safetensors"))
    copies = [directory / "validated_copy" / file.name for file in files]
    for file in (*files, *copies, *checkpoint.rglob("*")):  # warm the page cache
        if file.is_file():
            subprocess.run(["cat", str(file)], stdout=subprocess.DEVNULL, check=True)
    compared: list[float] = []
    found: dict[str, list[dict[str, float]]] = {"source": [], "source, health": []}
    for number in range(rounds):
        compared.append(_compared(files, copies))
        for checks, results in found.items():
            results.append(_one(checkpoint, merged, *checks.split(", ")))
        print(f"round {number + 1}: cmp {compared[-1]:.2f} s, {[r[-1]['seconds'] for r in found.values()]}", flush=True)
    print(f"bytes of weights     {found['source'][0]['bytes']:,.0f}")
    print(f"cmp                  {statistics.median(compared):.2f} s (median of {rounds})")
    for checks, results in found.items():
        ratio = statistics.median(r["seconds"] / c for r, c in zip(results, compared, strict=True))
        seconds = statistics.median(r["seconds"] for r in results)
        print(f"{checks:20} {seconds:.2f} s = {ratio:.2f} × cmp (limit {_LIMIT}), "
              f"{max(r['mib'] for r in results):.0f} MiB above imports (limit {_MIB})")  # fmt: skip
    for name in ("validated", "validated_copy"):
        shutil.rmtree(directory / name)


def main() -> None:
    """Reads the options and runs."""
    if sys.argv[1:2] == ["--measure"]:
        _measure(*sys.argv[2:])
        return
    run_with_options(__doc__, lambda where, o: _run(where, o.layout, o.gigabytes, o.rounds), "fsdp", "megatron")


if __name__ == "__main__":
    main()
