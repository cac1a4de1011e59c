"""Time and memory of a diff, against `cmp` of the same bytes in the same run.

python -m tests.benchmarks.diff [--gigabytes 3] [--rounds 5] [--dir DIR]

Compares a bfloat16 model with one in which 15% of the elements of every matrix moved by 1 or 2 units in the last place,
with one in which every element moved as far as a tenth of its size, and with itself. Prints the medians and the ratios.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from tests.benchmarks.running import run_with_options, status

_RATIO, _MIB = 4.0, 300  # times cmp, for the first of the cases; MiB above imports
_CASES = ("trained", "all", "equal")
_HIDDEN, _WIDE, _VOCABULARY = 2048, 8192, 100_000


def one_diff(a: Path, b: Path, *options: str) -> dict[str, float]:
    """One diff in a process of its own: its seconds, and the MiB that it took above its imports."""
    words = [sys.executable, "-m", "tests.benchmarks.diff", "--measure", str(a), str(b), *options]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _measure(a: str, b: str) -> None:
    import torch  # noqa: F401 - whoever compares models has imported it: 1.3 s and 200 MiB that are no comparison's

    from nbmerge.comparing.differ import diff_weights
    from nbmerge.weights import weights_of

    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # from here on VmHWM is the peak of what follows
    start, cpu = time.perf_counter(), time.process_time()
    diff = diff_weights(weights_of(a), weights_of(b))
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    mib = (status("VmHWM") - before) / 1024
    print(json.dumps({"seconds": seconds, "cpu": cpu, "mib": mib, "share": diff.statistics.share}))


def make(directory: Path, gigabytes: float) -> None:
    """The model, and the two that it became: directories `base`, `trained` and `all`."""
    import torch

    layers = max(round((gigabytes * 1e9 / 2 - _VOCABULARY * _HIDDEN) / (4 * _HIDDEN**2 + 3 * _HIDDEN * _WIDE)), 1)
    chance = torch.Generator().manual_seed(0)
    _save(directory, "embed", {"model.embed_tokens.weight": (_VOCABULARY, _HIDDEN)}, chance)
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        shapes = {f"{prefix}.self_attn.{name}_proj.weight": (_HIDDEN, _HIDDEN) for name in "qkvo"}
        shapes |= {f"{prefix}.mlp.{name}_proj.weight": (_WIDE, _HIDDEN) for name in ("gate", "up")}
        shapes |= {f"{prefix}.mlp.down_proj.weight": (_HIDDEN, _WIDE), f"{prefix}.input_layernorm.weight": (_HIDDEN,)}
        _save(directory, f"layer{layer:03d}", shapes, chance)


def _save(directory: Path, file: str, shapes: dict[str, tuple[int, ...]], chance: object) -> None:
    import torch
    from safetensors.torch import save_file

    made: dict[str, dict[str, torch.Tensor]] = {"base": {}, "trained": {}, "all": {}}
    for name, shape in shapes.items():
        base = (torch.randn(shape, generator=chance) / 32).bfloat16()  # type: ignore[call-overload]
        bits = base.view(torch.int16).clone()
        if "proj" in name:
            moved = torch.rand(shape, generator=chance) < 0.15  # type: ignore[call-overload]
            bits += moved * torch.randint(1, 3, shape, generator=chance, dtype=torch.int16)  # type: ignore[call-overload]
        wide = base.float() * (1 + 0.1 * torch.randn(shape, generator=chance))  # type: ignore[call-overload]
        made["base"][name], made["trained"][name], made["all"][name] = base, bits.view(torch.bfloat16), wide.bfloat16()
    for case, tensors in made.items():
        (directory / case).mkdir(parents=True, exist_ok=True)
        save_file(tensors, directory / case / f"model-{file}.safetensors")


def _cmp(a: Path, b: Path) -> float:
    """Seconds of `cmp`, which goes on after a difference only with -l; so of the first directory with itself."""
    start = time.perf_counter()
    for file in sorted(a.glob("*.safetensors")):
        subprocess.run(["cmp", str(file), str(b / file.name)], check=True)
    return time.perf_counter() - start


def _run(directory: Path, gigabytes: float, rounds: int) -> None:
    if not (directory / "copy").is_dir():
        make(directory, gigabytes)
        subprocess.run(["cp", "-r", str(directory / "base"), str(directory / "copy")], check=True)
    base = directory / "base"
    nbytes = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    found: dict[str, list[dict[str, float]]] = {case: [] for case in _CASES}
    compared: list[float] = []
    for number in range(rounds + 1):  # the first warms the page cache, as far as there is room
        for case in _CASES:
            other = directory / ("copy" if case == "equal" else case)
            seconds = _cmp(base, directory / "copy")
            one = one_diff(base, other)
            if number:
                compared.append(seconds)
                found[case].append({**one, "ratio": one["seconds"] / seconds})
                print(f"round {number}, {case}: cmp {seconds:.2f} s, diff {one}", flush=True)
    print(f"bytes of each model   {nbytes:,}")
    print(f"processors            {os.cpu_count()}, load average {os.getloadavg()[0]:.1f}")
    print(f"cmp                   {statistics.median(compared):.2f} s (median)")
    for case, runs in found.items():
        ratio = statistics.median(run["ratio"] for run in runs)
        limit = f" (limit {_RATIO})" if case == "trained" else ""
        middle = {key: statistics.median(run[key] for run in runs) for key in ("seconds", "cpu", "share")}
        print(
            f"diff, {case:<15} {middle['seconds']:.2f} s = {ratio:.2f} × cmp{limit}, {middle['cpu']:.2f} s of CPU, "
            f"{middle['share']:.1%} of the elements changed"
        )
    print(f"memory above imports  {max(run['mib'] for runs in found.values() for run in runs):.0f} MiB (limit {_MIB})")


def main() -> None:
    """Reads the options and runs."""
    if sys.argv[1:2] == ["--measure"]:
        _measure(*sys.argv[2:4])
        return
    run_with_options(__doc__, lambda where, o: _run(where, o.gigabytes, o.rounds))


if __name__ == "__main__":
    main()
