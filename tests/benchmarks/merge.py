"""Time and memory of a merge, against `cp` and `sync` of the same bytes in the same run.

python -m tests.benchmarks.merge [--layout fsdp|megatron|dcp|hf|colossalai|zero2|zero3] [--gigabytes 3] [--rounds 5]
    [--dir DIR]

Prints the median of each and their ratio; also of processor time, which other work on the machine disturbs less. The
fixed start (imports and the meta model) is timed apart.
"""

from __future__ import annotations

import json
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from tests.benchmarks.running import run_with_options, status

# times cp and sync, MiB
_LIMITS = {
    "fsdp": (1.5, 150), "megatron": (1.6, 200), "dcp": (1.5, 150), "hf": (1.5, 150), "colossalai": (1.5, 150),
    "zero2": (1.5, 150), "zero3": (1.5, 150),
}  # fmt: skip
_WEIGHTS = ("*.pt", "*.distcp", "*.safetensors", "*.bin", "dist_ckpt/*.distcp", "*/*_optim_states.pt")


def one_merge(checkpoint: Path, target: Path, *options: str) -> dict[str, float]:
    """One merge in a process of its own: its seconds, and the MiB that it took above its imports."""
    words = [sys.executable, "-m", "tests.benchmarks.merge", "--measure", str(checkpoint), str(target), *options]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _measure(checkpoint: str, target: str, **options: str) -> None:
    start = time.perf_counter()
    import nbmerge
    from nbmerge.naming.model import HFModel

    light = time.perf_counter()
    _ = nbmerge.merge, HFModel(_config_dir(Path(checkpoint))).facts  # what they import is no part of the merge
    ready = time.perf_counter()
    before, cpu = status("VmRSS"), time.process_time()
    Path("/proc/self/clear_refs").write_text("5")  # from here on VmHWM is the peak of what follows
    report = nbmerge.merge(checkpoint, target, progress=False, **options)
    stop = time.perf_counter()
    print(
        json.dumps(
            {
                "import": light - start,
                "start": ready - start,
                "merge": stop - ready,
                "write": report.seconds,
                "cpu": time.process_time() - cpu,
                "mib": (status("VmHWM") - before) / 1024,
                "bytes": report.written_bytes,
            }
        )
    )


def _config_dir(checkpoint: Path) -> Path:
    return checkpoint / "huggingface" if (checkpoint / "huggingface").is_dir() else checkpoint


def _copy(files: list[Path], target: Path) -> tuple[float, float]:
    """Seconds of `cp` and `sync`, by the clock and of the processor."""
    target.mkdir()
    start, cpu = time.perf_counter(), _children()
    subprocess.run(["cp", *map(str, files), str(target)], check=True)
    subprocess.run(["sync"], check=True)
    return time.perf_counter() - start, _children() - cpu


def _children() -> float:
    """Processor seconds of all processes that this one has run."""
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


def _run(directory: Path, layout: str, gigabytes: float, rounds: int) -> None:
    from tests.benchmarks import large_checkpoint, large_layouts, large_megatron  # --measure sees the imports' time

    checkpoint = directory / ("checkpoint" if layout == "fsdp" else f"checkpoint_{layout}")
    if not (_config_dir(checkpoint) / "config.json").is_file():
        makers = {
            "fsdp": large_checkpoint.make, "megatron": large_megatron.make, "dcp": large_layouts.make_dcp,
            "hf": large_layouts.make_hf, "colossalai": large_layouts.make_colossalai,
            "zero2": large_layouts.make_zero2, "zero3": large_layouts.make_zero3,
        }  # fmt: skip
        makers[layout](checkpoint, gigabytes)
    files = sorted(path for pattern in _WEIGHTS for path in checkpoint.glob(pattern))
    for file in files:  # warm the page cache
        subprocess.run(["cat", str(file)], stdout=subprocess.DEVNULL, check=True)
    subprocess.run(["sync"], check=True)
    copies: list[tuple[float, float]] = []
    merges: list[dict[str, float]] = []
    for number in range(rounds):
        copies.append(_copy(files, directory / "copy"))
        shutil.rmtree(directory / "copy")
        merges.append(one_merge(checkpoint, directory / "merged"))
        shutil.rmtree(directory / "merged")
        print(f"round {number + 1}: cp+sync {copies[-1][0]:.2f} s, merge {merges[-1]}", flush=True)
    copy = statistics.median(seconds for seconds, _ in copies)
    most_ratio, most_mib = _LIMITS[layout]
    merge = statistics.median(m["merge"] for m in merges)
    ratio = statistics.median(m["merge"] / seconds for m, (seconds, _) in zip(merges, copies, strict=True))
    cpu, copy_cpu = statistics.median(m["cpu"] for m in merges), statistics.median(spent for _, spent in copies)
    print(f"bytes of weights       {merges[0]['bytes']:,.0f}")
    print(f"cp + sync              {copy:.2f} s (median of {rounds})")
    print(f"merge beyond its start {merge:.2f} s = {ratio:.2f} × cp + sync (limit {most_ratio})")
    print(f"processor time         {cpu:.2f} s, cp + sync {copy_cpu:.2f} s: {cpu / copy_cpu:.2f} ×")
    print(f"fixed start            {statistics.median(m['start'] for m in merges):.2f} s (imports, meta model)")
    print(f"import nbmerge         {statistics.median(m['import'] for m in merges):.3f} s (limit 0.3)")
    print(f"memory above imports   {max(m['mib'] for m in merges):.0f} MiB (limit {most_mib})")


def main() -> None:
    """Reads the options and runs."""
    if sys.argv[1:2] == ["--measure"]:
        _measure(*sys.argv[2:4], **dict(word.split("=", 1) for word in sys.argv[4:]))
        return
    run_with_options(__doc__, lambda where, o: _run(where, o.layout, o.gigabytes, o.rounds), *_LIMITS)


if __name__ == "__main__":
    main()
