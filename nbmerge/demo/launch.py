"""Makes checkpoints in processes of their own, so that it works from a script, a notebook's kernel and a test."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import nbmerge
from nbmerge.demo.recipes import DemoCheckpoint, Recipe
from nbmerge.errors import NbmergeError, TargetError

_TIMEOUT = 300.0  # seconds for all checkpoints of one call
# What torchrun sets for a job that this process may be part of.
_OTHER_JOBS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_RUN_ID")


class DemoError(NbmergeError, RuntimeError):
    """A process that should have written a checkpoint failed."""


def make_checkpoint(directory: str | os.PathLike[str], *, timeout: float = _TIMEOUT, **recipe: Any) -> DemoCheckpoint:
    """Makes a small real sharded checkpoint, and the unsharded truth beside it.

        demo = make_checkpoint("demo_run", layout="hsdp", world_size=4, dtype="bfloat16")
        demo.path                       # demo_run/global_step_0/actor
        demo.reference                  # demo_run/reference

    recipe: the fields of `Recipe`. timeout: seconds. Takes about five seconds, most of them for imports.
    Raises OptionError, TargetError where the directory has files in it, and DemoError where a process fails.
    """
    return make_checkpoints({directory: Recipe(**recipe)}, timeout=timeout)[0]


def make_checkpoints(
    recipes: Mapping[str | os.PathLike[str], Recipe], *, timeout: float = _TIMEOUT
) -> list[DemoCheckpoint]:
    """Makes the checkpoint of each recipe in its directory, in the order of the recipes.

    All are made by one start of the frameworks and one process group for each world size: many cost little more
    than one. Raises as `make_checkpoint` does.
    """
    made = [DemoCheckpoint(Path(directory), recipe) for directory, recipe in recipes.items()]
    for demo in made:
        if demo.directory.is_dir() and any(demo.directory.iterdir()):
            raise TargetError(
                "the directory has files in it", where=str(demo.directory), fix="name a new directory, or empty it"
            )
    with tempfile.TemporaryDirectory(prefix="nbmerge-demo-") as scratch:
        jobs = [{"directory": str(demo.directory.resolve()), "recipe": demo.recipe.to_json()} for demo in made]
        jobs_file = Path(scratch) / "jobs.json"
        jobs_file.write_text(json.dumps(jobs), encoding="utf-8")
        _run_worker(jobs_file, timeout)
    return made


def _run_worker(jobs_file: Path, timeout: float) -> None:
    """Runs the worker to its end. Whatever happens, no process of it is left behind."""
    words = [sys.executable, "-m", "nbmerge.demo.worker", str(jobs_file)]
    process = None
    try:
        with _interrupts_held():  # an interrupt inside Popen would leave a worker that nobody knows
            process = subprocess.Popen(
                words, env=_environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                text=True, start_new_session=True,
            )  # fmt: skip
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired as error:
        raise DemoError(
            f"the processes did not finish within {timeout:g} seconds",
            why="the machine is very busy, or a rank waits for one that died",
            fix="try again, or pass a longer timeout",
        ) from error
    finally:
        if process is not None:
            _end_group(process)
    if process.returncode:
        lines = output.strip().splitlines() or [f"exit code {process.returncode}, and no word"]
        raise DemoError(
            "a process that should have written the checkpoint failed",
            where=next((line for line in lines if line.startswith("rank ")), ""),
            why=lines[-1],
            fix="choose another recipe, or install newer versions of torch and transformers",
        ) from RuntimeError(output)  # the whole traceback, for whoever looks


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Lets an interrupt that arrives within the block take effect at its end. Only the main thread gets any."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[tuple[int, FrameType | None]] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: held.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if held and callable(before):
        before(*held[0])


def _end_group(process: subprocess.Popen[str]) -> None:
    """Ends the worker and the ranks that it forked, if any still runs."""
    if hasattr(os, "killpg"):
        with suppress(ProcessLookupError, PermissionError):  # all have ended
            os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait()


def _environment() -> dict[str, str]:
    """This process's environment for ranks that talk over the loopback device, use no GPU and no network."""
    package = str(Path(nbmerge.__file__).resolve().parent.parent)
    loopback = {"linux": "lo", "darwin": "lo0"}.get(sys.platform)
    return {
        **{name: value for name, value in os.environ.items() if name not in _OTHER_JOBS},
        **({"GLOO_SOCKET_IFNAME": loopback} if loopback else {}),
        "MASTER_ADDR": "127.0.0.1",
        "PYTHONPATH": os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH", "")])),
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
