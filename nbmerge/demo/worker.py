"""The processes that write checkpoints: `python -m nbmerge.demo.worker JOBS.json`, started by `launch`.

It imports the frameworks once and then forks the ranks, which share that memory: a world of eight starts as fast as
a world of two. Each world joins a real gloo process group on this machine.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from datetime import timedelta
from multiprocessing import connection, get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from nbmerge.demo.recipes import DemoCheckpoint, Recipe

_COLLECTIVE_TIMEOUT = timedelta(seconds=60)
# Where forking is not safe (macOS) or not possible (Windows) each rank imports for itself.
_START = "fork" if sys.platform == "linux" else "spawn"


def main(jobs_file: Path) -> int:
    """Writes the checkpoints of a file of jobs; exit code 1 and a traceback on stderr where a rank fails."""
    jobs = [
        DemoCheckpoint(Path(job["directory"]), Recipe.from_json(job["recipe"]))
        for job in json.loads(jobs_file.read_text(encoding="utf-8"))
    ]
    _import_frameworks(jobs)
    for world_size in sorted({job.recipe.world_size for job in jobs}):
        failure = _run_world([job for job in jobs if job.recipe.world_size == world_size], world_size, jobs_file.parent)
        if failure:
            print(failure, file=sys.stderr)
            return 1
    return 0


def _import_frameworks(jobs: list[DemoCheckpoint]) -> None:
    """All that the ranks will need, so that none of them imports it again."""
    import torch.distributed.fsdp
    import torch.distributed.tensor.parallel  # noqa: F401
    import transformers

    import nbmerge.demo.layouts
    from nbmerge.demo.models import architecture

    for job in jobs:
        model_class = architecture(job.recipe.arch).model_class
        if not hasattr(transformers, model_class):
            sys.exit(f"transformers {transformers.__version__} has no {model_class}: a newer one is needed")
        if job.recipe.is_megatron:
            import nbmerge.demo.megatron.save  # noqa: F401
        if job.recipe.lora_r:
            import peft  # noqa: F401


def _run_world(jobs: list[DemoCheckpoint], world_size: int, scratch: Path) -> str:
    """Runs the jobs in `world_size` processes. Returns the traceback of the rank that failed first, or nothing."""
    context: Any = get_context(_START)
    store = scratch / f"store_{world_size}"
    ranks: list[BaseProcess] = [
        context.Process(target=_rank_main, args=(jobs, rank, world_size, store), daemon=True)
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    running = dict(enumerate(ranks))
    while running:
        connection.wait([process.sentinel for process in running.values()])
        for rank, process in list(running.items()):
            if process.exitcode is None:
                continue
            del running[rank]
            if process.exitcode:
                for other in running.values():
                    other.terminate()
                return _first_error(store) or f"rank {rank} of {world_size} died: exit code {process.exitcode}"
    return ""


def _error_file(store: Path, rank: int) -> Path:
    return store.with_name(f"{store.name}_error_of_rank_{rank}.txt")


def _first_error(store: Path) -> str:
    """The traceback that was written first: the ranks that waited for that one fail after it."""
    reports = sorted(store.parent.glob(f"{store.name}_error_of_rank_*.txt"), key=lambda path: path.stat().st_mtime_ns)
    return reports[0].read_text(encoding="utf-8") if reports else ""


def _rank_main(jobs: list[DemoCheckpoint], rank: int, world_size: int, store: Path) -> None:
    """The life of one rank: join, write every job's share, leave."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    job = None
    try:
        dist.init_process_group(
            "gloo", init_method=store.as_uri(), rank=rank, world_size=world_size, timeout=_COLLECTIVE_TIMEOUT
        )
        for job in jobs:
            write_share(job, rank)
            dist.barrier()
        dist.destroy_process_group()
    except BaseException:  # noqa: BLE001 - whatever it is, the parent has to hear of it
        what = f"rank {rank} of {world_size}, " + (f"making {job.recipe}\n" if job else "joining the others\n")
        _error_file(store, rank).write_text(what + traceback.format_exc(), encoding="utf-8")
        os._exit(1)


def write_share(job: DemoCheckpoint, rank: int) -> None:
    """Builds and shards the model of a job and writes this rank's files; rank 0 also writes what is written once."""
    if job.recipe.is_megatron:
        write_megatron_share(job, rank)
    else:
        write_fsdp_share(job, rank)


def write_fsdp_share(job: DemoCheckpoint, rank: int) -> None:
    """A file of this rank's state dict, as verl saves FSDP models."""
    import torch

    from nbmerge.demo.layouts import adamw_state, shard, state_dict
    from nbmerge.demo.models import build_model, with_adapter

    recipe = job.recipe
    model = build_model(recipe)
    job.path.mkdir(parents=True, exist_ok=True)
    if rank == 0:
        write_truth(job, model)
        write_config(job, model)
    if recipe.lora_r:
        model = with_adapter(model, recipe)
        if rank == 0:
            write_adapter(job, model)
    model = shard(model, recipe)
    ending = f"world_size_{recipe.world_size}_rank_{rank}.pt"
    torch.save(state_dict(model, recipe), job.path / f"model_{ending}")
    if recipe.optimizer:
        torch.save(adamw_state(model), job.path / f"optim_{ending}")
    torch.save({"lr_scheduler": {"last_epoch": 0}, "rng": torch.get_rng_state()}, job.path / f"extra_state_{ending}")


def write_megatron_share(job: DemoCheckpoint, rank: int) -> None:
    """This rank's pieces of the model, as Megatron would hold them, in containers that all ranks write together."""
    import torch.distributed as dist
    from safetensors.torch import load_file

    from nbmerge.demo.megatron.pieces import ParallelSizes
    from nbmerge.demo.megatron.save import save_checkpoint
    from nbmerge.demo.models import build_model

    recipe = job.recipe
    model = build_model(recipe)
    if rank == 0:
        job.path.mkdir(parents=True, exist_ok=True)
        write_truth(job, model)
        write_model_config(job, model)
    dist.barrier()
    published = load_file(job.reference / "model.safetensors")
    pp, ep, tp = recipe.mesh
    experts = recipe.model_values.get("num_experts", 0)
    sizes = ParallelSizes(layers=model.config.num_hidden_layers, experts=experts, tp=tp, pp=pp, ep=ep)
    save_checkpoint(job.path, recipe.layout, published, model.config, sizes, optimizer=recipe.optimizer)


def write_truth(job: DemoCheckpoint, model: Any) -> None:
    """The whole model: as transformers publishes it, and its state dict as it is in memory."""
    import torch

    model.save_pretrained(job.reference)
    torch.save(model.state_dict(), job.state)


def write_config(job: DemoCheckpoint, model: Any) -> None:
    """fsdp_config.json and huggingface/, as verl's FSDPCheckpointManager writes them."""
    recipe = job.recipe
    about = {"FSDP_version": recipe.fsdp_version, "world_size": recipe.world_size}
    (job.path / "fsdp_config.json").write_text(json.dumps(about, indent=4), encoding="utf-8")
    write_model_config(job, model)


def write_adapter(job: DemoCheckpoint, model: Any) -> None:
    """The adapter as peft saves it, beside the checkpoint, and in it the few facts that verl keeps of LoRA."""
    model.save_pretrained(job.adapter)
    config = model.peft_config["default"]
    facts = {"r": config.r, "lora_alpha": config.lora_alpha, "task_type": config.task_type}
    (job.path / "lora_train_meta.json").write_text(json.dumps(facts, indent=4), encoding="utf-8")


def write_model_config(job: DemoCheckpoint, model: Any) -> None:
    """Config, generation config and tokenizer."""
    from nbmerge.demo.models import architecture
    from nbmerge.demo.tokenizer import build_tokenizer

    target = job.huggingface
    model.config.save_pretrained(target)
    if model.can_generate():
        model.generation_config.save_pretrained(target)
    if architecture(job.recipe.arch).has_tokenizer:
        build_tokenizer().save_pretrained(target)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
