"""`view_of(object)`: the view of any object that a notebook shows. A new kind of object is one `register` line."""

from __future__ import annotations

from functools import singledispatch

from nbmerge.comparing.model_diff import ModelDiff, TensorDiff
from nbmerge.comparing.trajectory import Trajectory
from nbmerge.display.checkpoint_views import checkpoint_view, loader_view
from nbmerge.display.diff_views import diff_view, tensor_diff_view
from nbmerge.display.explanation_views import explanation_view, location_view
from nbmerge.display.fit import fit
from nbmerge.display.merge_views import plan_view, report_view
from nbmerge.display.merger_views import merger_view
from nbmerge.display.model import View
from nbmerge.display.push_views import push_view
from nbmerge.display.run_views import run_view
from nbmerge.display.tensor_views import stats_view, tensor_view
from nbmerge.display.trajectory_views import trajectory_view
from nbmerge.display.validation_views import validation_view, validator_view
from nbmerge.explaining.explanation import Explanation
from nbmerge.export.hub import PushReport
from nbmerge.layout import Checkpoint, LazyTensor
from nbmerge.loaders.base import Loader
from nbmerge.mergers import BaseModelMerger
from nbmerge.plan import MergePlan
from nbmerge.report import MergeReport
from nbmerge.runs import Run
from nbmerge.tensor_stats import TensorStats
from nbmerge.tracing import Location
from nbmerge.validation.report import ValidationReport
from nbmerge.validator import Validator


def view_of(shown: object) -> View:
    """What is shown of the object, small enough for a notebook. Reads no tensor data.

    Raises TypeError for an object of a kind that has no view.
    """
    return fit(_view_of(shown))


@singledispatch
def _view_of(shown: object) -> View:
    raise TypeError(f"nbmerge has no view of a {type(shown).__name__}")


_view_of.register(Checkpoint, checkpoint_view)
_view_of.register(LazyTensor, tensor_view)
_view_of.register(TensorStats, stats_view)
_view_of.register(Loader, loader_view)
_view_of.register(MergePlan, plan_view)
_view_of.register(MergeReport, report_view)
_view_of.register(BaseModelMerger, merger_view)
_view_of.register(ValidationReport, validation_view)
_view_of.register(Validator, validator_view)
_view_of.register(Explanation, explanation_view)
_view_of.register(Location, location_view)
_view_of.register(ModelDiff, diff_view)
_view_of.register(TensorDiff, tensor_diff_view)
_view_of.register(PushReport, push_view)
_view_of.register(Run, run_view)
_view_of.register(Trajectory, trajectory_view)
