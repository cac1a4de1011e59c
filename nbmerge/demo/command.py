"""`python -m nbmerge demo`: the whole of nbmerge's main job on a checkpoint that is made on the spot."""

from __future__ import annotations

import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import nbmerge
from nbmerge.demo.launch import make_checkpoint
from nbmerge.demo.proof import differences_on_disk, differences_when_loaded, load_model, raw_tensors
from nbmerge.demo.recipes import DemoCheckpoint
from nbmerge.errors import TargetError, plural

_PROMPT = "Every rank of the mesh holds"
_NEW_TOKENS = 12


def run(directory: Path | None) -> int:
    """Makes a checkpoint, merges it, loads the result and proves it equal to what was sharded; prints each step.

    directory: a new directory that keeps checkpoint and result; None for a temporary one.
    Returns 0 if all holds and 1 if a bit differs. Raises NbmergeError where a step fails.
    """
    if directory is not None and directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise TargetError("the directory exists", where=str(directory), fix="pass a new directory with --dir")
    holder = tempfile.TemporaryDirectory(prefix="nbmerge-demo-") if directory is None else nullcontext(str(directory))
    with holder as place:
        return _run_in(Path(place), kept=directory is not None)


def _run_in(directory: Path, *, kept: bool) -> int:
    print("Four gloo processes shard a tiny Qwen2 with FSDP2 and save it as verl does …")
    demo = make_checkpoint(directory, optimizer=True)
    print(_listing(demo))
    merged = directory / "merged"
    print("\nMerging …")
    print(nbmerge.merge(demo.path, merged, progress=False))
    print("\nComparing with the model that was sharded …")
    problems = _prove(merged, demo)
    if problems:
        print("\n".join([f"NOT equal: {plural(len(problems), 'difference')}", *problems]), file=sys.stderr)
        return 1
    print("\nGenerating (the weights are random, so the text means nothing):")
    print(f"  {generate(merged)}")
    if kept:
        print(f"\nThe checkpoint is in {demo.path}, the result in {merged}.")
    else:
        print("\nAll of it was in a temporary directory, which is deleted now; --dir DIR keeps it.")
    return 0


def _listing(demo: DemoCheckpoint) -> str:
    files = sorted(path for path in demo.path.rglob("*") if path.is_file())
    shards = [path for path in files if path.name.startswith("model_")]
    size = sum(path.stat().st_size for path in files)
    return f"  {plural(len(files), 'file')}, {size:,} bytes; {plural(len(shards), 'rank')}: {shards[0].name} …"


def _prove(merged: Path, demo: DemoCheckpoint) -> list[str]:
    """Compares files and loaded model with the truth and says what was compared; returns what differs."""
    on_disk = differences_on_disk(merged, demo.reference)
    if not on_disk:
        tensors = raw_tensors(merged)
        size = sum(len(data) for _, _, data in tensors.values())
        print(f"  the files hold {plural(len(tensors), 'tensor')} of {size:,} bytes: all equal, bit for bit")
    loaded = differences_when_loaded(merged, demo.state)
    if not loaded:
        print("  the model that transformers loads from them has the same state dict, bit for bit")
    return on_disk + loaded


def generate(merged: Path, prompt: str = _PROMPT, *, new_tokens: int = _NEW_TOKENS) -> str:
    """The prompt and `new_tokens` tokens that the merged model puts after it, the likeliest each time."""
    from transformers import AutoTokenizer

    model: Any = load_model(merged)
    tokenizer: Any = AutoTokenizer.from_pretrained(merged)
    inputs = tokenizer(prompt, return_tensors="pt")
    tokens = model.generate(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"],
        min_new_tokens=new_tokens, max_new_tokens=new_tokens, do_sample=False,
    )  # fmt: skip
    text: str = tokenizer.decode(tokens[0], skip_special_tokens=True)
    return text
