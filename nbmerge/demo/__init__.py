"""Makes small real sharded checkpoints: for a first run, for the tutorials and for the tests.

    from nbmerge.demo import make_checkpoint
    demo = make_checkpoint("demo_run")            # four gloo processes, a tiny Qwen2 under FSDP2
    nbmerge.merge(demo.path, "merged")

Trains nothing and downloads nothing. torch and transformers are imported by the processes that it starts.
"""

from __future__ import annotations

from nbmerge.demo.command import run
from nbmerge.demo.hub import DemoHub, start_hub
from nbmerge.demo.launch import DemoError, make_checkpoint, make_checkpoints
from nbmerge.demo.proof import differences, differences_on_disk, differences_when_loaded
from nbmerge.demo.recipes import DTYPES, LAYOUTS, DemoCheckpoint, Recipe

__all__ = [
    "DTYPES",
    "LAYOUTS",
    "DemoCheckpoint",
    "DemoError",
    "DemoHub",
    "Recipe",
    "differences",
    "differences_on_disk",
    "differences_when_loaded",
    "make_checkpoint",
    "make_checkpoints",
    "run",
    "start_hub",
]
