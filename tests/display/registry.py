"""One of every kind of object that a notebook shows, and hostile twins of them: the tests' list of all displays."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

from nbmerge.display.widgets.checkpoint import CheckpointExplorer
from nbmerge.display.widgets.diff import DiffExplorer
from nbmerge.dtypes import BY_NAME
from nbmerge.errors import Problem
from nbmerge.explainer import explain
from nbmerge.explaining.explanation import Explanation
from nbmerge.geometry import Box
from nbmerge.layout import Drift
from nbmerge.loaders import LOADERS
from nbmerge.mergers import BaseModelMerger, FSDPModelMerger, MegatronModelMerger, ModelMergerConfig
from nbmerge.naming.notes import Filled, Trim
from nbmerge.plan import CastNote, MergePlan
from nbmerge.runs import Found, Run
from nbmerge.shown import Displayed
from nbmerge.tensor_stats import TensorStats
from nbmerge.validation.findings import Finding
from nbmerge.validator import Validator
from tests.export.test_push_views import REPORT as PUSHED

from .megatron_objects import rank_files, torch_dist, zarr
from .objects import SHARD, checkpoint, plan, report, small_model, tensor
from .test_diff_views import SHOWN as DIFFS
from .test_diff_views import diff
from .test_diff_views import tensor as tensor_diff
from .test_explanation_views import LOCATION
from .test_validation_views import LOST, made, result

HOSTILE = "a.<img src=x onerror=alert(1)>.</style><script>alert(2)</script>.\x1b[31m\u202e'\"&.weight"


def hostile_plan() -> MergePlan:
    source = checkpoint(
        tensor(HOSTILE, (7, 3), {"</div><svg onload=x>": (4, SHARD)}),
        notes=(HOSTILE,), overrides={HOSTILE: HOSTILE}, layout=HOSTILE, evidence=(HOSTILE,),
        problems=(Problem(HOSTILE, where=HOSTILE, why=HOSTILE, fix=HOSTILE),),
    )  # fmt: skip
    return plan(
        source, model_class=HOSTILE, problems=source.problems, unloaded=(HOSTILE,),
        config_edits={HOSTILE: (HOSTILE, HOSTILE)}, drift=(Drift(HOSTILE, (0, 1), Box((0,), (5,)), (1,)),),
        casts=(CastNote(HOSTILE, BY_NAME["float32"], BY_NAME["bfloat16"]),), dialect=HOSTILE, renamed=1,
        trims=(Trim(HOSTILE, HOSTILE, 3, 2),), fills=(Filled(HOSTILE, HOSTILE, HOSTILE),),
    )  # fmt: skip


PLAN = plan(
    drift=(Drift("w", (0, 1), Box((0,), (5,)), (3,)),),
    casts=tuple(CastNote(f"l.{i}.w", BY_NAME["float32"], BY_NAME["bfloat16"]) for i in range(40)),
)


def _merges() -> dict[str, Displayed]:
    """Checkpoints, tensors, plans and reports."""
    return {
        "checkpoint": checkpoint(),
        "checkpoint with problems": checkpoint(problems=(Problem("5 of 17 ranks", "here", "2 runs", "copy 3 files"),)),
        "tensor": small_model()[0],
        "tensor of many pieces": tensor("w", (512, 40), {"fsdp": (512, SHARD)}),
        "slice": tensor("w", (8, 2), {"fsdp": (2, SHARD)}).slice(Box((0, 0), (5, 2))),
        "torch_dist checkpoint": torch_dist(),
        "stacked tensor": torch_dist()["decoder.layers.mlp.linear_fc1.weight"],
        "rank files": rank_files(),
        "tensor in rank files": rank_files()["decoder.layers.1.self_attention.linear_qkv.weight"],
        "zarr checkpoint": zarr(),
        "hostile torch_dist checkpoint": replace(
            torch_dist(), tensors={HOSTILE: replace(torch_dist()["decoder.final_layernorm.weight"], name=HOSTILE)}
        ),
        "plan": PLAN,
        "report": report(PLAN),
        "dry run": report(PLAN, target=None),
        "hostile checkpoint": hostile_plan().checkpoint,
        "hostile plan": hostile_plan(),
        "hostile report": report(hostile_plan()),
    }


def _others() -> dict[str, Displayed]:
    """What does not come from a merge, and mergers, loaders and explorers."""
    whole, broken = checkpoint(), replace(checkpoint(), problems=(Problem("1 of 8 ranks is missing", fix="copy it"),))
    run = Run(Path("/run"), tuple(
        Found(Path(f"/run/global_step_{step}/actor"), step, ("fsdp",), of, (*of.problems, None)[0], step == 30)
        for step, of in ((10, whole), (20, broken), (30, whole))
    ), unopened=(Path("/run/global_step_5/actor"),))  # fmt: skip
    hostile_run = Run(Path(f"/run/{HOSTILE}"), (
        Found(Path(f"/run/{HOSTILE}/{HOSTILE}"), 7, (HOSTILE,), None, Problem(HOSTILE, HOSTILE, HOSTILE, HOSTILE)),
        Found(Path(f"/run/{HOSTILE}/x"), 8, ("fsdp",), hostile_plan().checkpoint),
    ))  # fmt: skip
    statistics = TensorStats("w", (4,), BY_NAME["float32"], 4, 0, 0, 1, 1, -4.0, 1.5, -0.4, 2.1, {0: 2, 2: 1})
    validation = made(result("source", *LOST), result("running", ran=False, said="too big"))
    problem = Finding(HOSTILE, HOSTILE, HOSTILE, HOSTILE, HOSTILE)
    return {
        "explanation": explain(got=(3600, 18), expected=(3584, 18), ranks=24),
        "hostile explanation": Explanation(HOSTILE, problems=(Problem(HOSTILE, HOSTILE, HOSTILE, HOSTILE),)),
        "location": LOCATION,
        "hostile location": replace(LOCATION, name=HOSTILE, source=HOSTILE, file=Path(f"/run/{HOSTILE}")),
        "validation": validation,
        "hostile validation": replace(validation, results=(result(HOSTILE, problem),), sources={HOSTILE: HOSTILE}),
        "validator": Validator("merged"),
        "run": run,
        "hostile run": hostile_run,
        "run with one directory": Run(Path("/run"), run.found[:1]),
        "push": PUSHED,
        "hostile push": replace(PUSHED, repo_id=HOSTILE, url=HOSTILE, files=(HOSTILE,), stale=(HOSTILE,)),
        "statistics": statistics,
        "hostile statistics": replace(statistics, name=HOSTILE),
        "hostile tensor": hostile_plan().checkpoint[HOSTILE],
        "hostile diff": diff(tensor_diff(HOSTILE, frozen=True), a=HOSTILE, b=HOSTILE, frozen=(HOSTILE,)),
        **{f"loader {loader.name}": loader for loader in LOADERS},
        "loader at a directory": LOADERS[0].at(Path("/run")),
        **{f"merger {merger.backend}": _opened(merger) for merger in (BaseModelMerger, MegatronModelMerger)},
        "hostile merger": _opened(FSDPModelMerger, HOSTILE),
        "checkpoint explorer": CheckpointExplorer(checkpoint()),
        "hostile checkpoint explorer": CheckpointExplorer(hostile_plan().checkpoint),
        "diff explorer": DiffExplorer(diff()),
        "hostile diff explorer": DiffExplorer(diff(tensor_diff(HOSTILE))),
    }


def _opened(kind: type[BaseModelMerger], local_dir: str = "run") -> BaseModelMerger:
    """A merger that has come as far as a plan."""
    merger = kind(ModelMergerConfig(local_dir=local_dir, target_dir="out"))
    merger.checkpoint, merger.plan_made = checkpoint(), plan()
    return merger


@cache
def every_object() -> dict[str, Displayed]:
    """By what it is; `hostile` in the name says that everything in it which a file could say is hostile."""
    return {**_merges(), **{f"diff {name}": shown for name, shown in DIFFS.items()}, **_others()}
