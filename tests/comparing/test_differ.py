"""Two models compared: what is found, what is said, and that threads change nothing."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nbmerge.comparing.differ import diff_weights
from nbmerge.comparing.model_diff import ModelDiff
from nbmerge.engine.events import Event, Started
from nbmerge.errors import NotSupportedError, OptionError
from nbmerge.weights import weights_of
from tests.comparing.making import save, weights
from tests.comparing.reference import bits_of, reference
from tests.support.library import SAVED

_SLOW = settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


def model(seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """Two layers of a small model."""
    chance = torch.Generator().manual_seed(seed)
    shapes = {"model.embed_tokens.weight": (37, 16), "model.norm.weight": (16,)}
    for layer in range(2):
        shapes[f"model.layers.{layer}.self_attn.q_proj.weight"] = (16, 16)
        shapes[f"model.layers.{layer}.self_attn.q_proj.bias"] = (16,)
        shapes[f"model.layers.{layer}.mlp.up_proj.weight"] = (24, 16)
        shapes[f"model.layers.{layer}.input_layernorm.weight"] = (16,)
    return {name: (torch.randn(shape, generator=chance) / 8).to(dtype) for name, shape in shapes.items()}


def moved(tensors: dict[str, torch.Tensor], *names: str) -> dict[str, torch.Tensor]:
    """A copy in which every element of these tensors is one unit in the last place further."""
    return {
        name: (bits_of(tensor) + 1).view(tensor.dtype).reshape(tensor.shape) if name in names else tensor
        for name, tensor in tensors.items()
    }


def diff_of(tmp_path: Path, a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], **options: Any) -> ModelDiff:
    return diff_weights(weights(tmp_path / "a", a), weights(tmp_path / "b", b), **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn])
def test_a_model_and_itself_differ_in_nothing(tmp_path: Path, dtype: torch.dtype) -> None:
    same = weights(tmp_path / "a", model(dtype=dtype))
    diff = diff_weights(same, same)
    assert diff.is_empty
    assert diff.changed == ()
    assert diff.sentence == "no element of 10 tensors changed"
    assert (diff.statistics.relative_l2, diff.statistics.cosine) == (0.0, 1.0)


@_SLOW
@given(
    planted=st.sets(st.integers(0, 24 * 16 - 1), max_size=40), dtype=st.sampled_from([torch.bfloat16, torch.float32])
)
def test_planted_changes_are_found_exactly(tmp_path: Path, planted: set[int], dtype: torch.dtype) -> None:
    a = model(dtype=dtype)
    b = {name: tensor.clone() for name, tensor in a.items()}
    name = "model.layers.1.mlp.up_proj.weight"
    flat = bits_of(b[name]).clone()
    for place in planted:
        flat[place] += 1
    b[name] = flat.view(dtype).reshape(24, 16)
    diff = diff_of(tmp_path, a, b)
    assert diff.statistics.changed == len(planted)
    assert [tensor.name for tensor in diff.changed] == ([name] if planted else [])
    assert diff[name].statistics.ulps == ((0, len(planted)) if planted else ())
    assert diff.is_empty is not bool(planted)


def test_the_sentence_says_what_moved_and_what_did_not(tmp_path: Path) -> None:
    a = model()
    matrices = [name for name in a if "proj.weight" in name]
    diff = diff_of(tmp_path, a, moved(a, *matrices), frozen="*norm*")
    assert diff.sentence == (
        "training changed 65.6% of all elements, in all 4 matrices; embeddings, norms and biases did not move; "
        "nothing declared frozen moved"
    )
    half = diff_of(tmp_path, a, moved(a, matrices[0], "model.norm.weight", "model.embed_tokens.weight"))
    assert half.sentence == (
        "training changed 44.3% of all elements, in 1 of 4 matrices; the embedding and 1 of 3 norms moved too; "
        "biases did not move"
    )


def test_a_frozen_tensor_that_moved_is_an_alarm(tmp_path: Path) -> None:
    a = model()
    b = moved(a, "model.embed_tokens.weight")
    diff = diff_of(tmp_path, a, b, frozen=["*.embed_tokens.*", "lm_head.*", "*.norm.weight"])
    assert [tensor.name for tensor in diff.frozen_moved] == ["model.embed_tokens.weight"]
    assert diff.sentence.endswith("1 tensor declared frozen moved")
    assert diff.idle_patterns == ("lm_head.*",)
    text = repr(diff)
    assert "✗ problem: 1 tensor declared frozen moved" in text
    assert "no tensor has a name like lm_head.*" in text


def test_a_frozen_tensor_that_cannot_be_compared_is_told(tmp_path: Path) -> None:
    a = model()
    b = {name: tensor for name, tensor in a.items() if "embed" not in name}
    diff = diff_of(tmp_path, a, b, frozen="*embed*")
    assert diff.frozen_unseen == ("model.embed_tokens.weight",)
    assert "1 tensor declared frozen could not be compared" in repr(diff)


@pytest.mark.parametrize("share", [0.1, 0.7])
def test_any_number_of_workers_and_blocks_gives_the_same(
    tmp_path: Path, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nbmerge.comparing import differ
    from nbmerge.engine import scan

    chance = torch.Generator().manual_seed(1)
    a = {f"model.layers.{i}.mlp.up_proj.weight": torch.randn(130, 70, generator=chance) for i in range(3)}
    b = {
        name: torch.where(torch.rand(130, 70, generator=chance) < share, tensor * 1.01, tensor)
        for name, tensor in a.items()
    }
    monkeypatch.setattr(differ, "scan", lambda *args, **kw: scan.scan(*args, **{**kw, "block_bytes": 1_000}))
    found = [diff_of(tmp_path, a, b, workers=workers, rank_one=True) for workers in (1, 2, 3, 4)]
    assert all(one.tensors == found[0].tensors for one in found)
    want = reference(a["model.layers.0.mlp.up_proj.weight"], b["model.layers.0.mlp.up_proj.weight"])
    first = found[0]["model.layers.0.mlp.up_proj.weight"]
    assert (first.changed, dict(first.statistics.magnitudes)) == (want.changed, dict(want.magnitudes))
    assert first.statistics.largest is not None
    assert (first.statistics.largest.size, first.statistics.largest.place) == want.largest
    assert want.largest is not None
    assert first.largest_at == (want.largest[1] // 70, want.largest[1] % 70)
    assert first.statistics.relative_l2 == pytest.approx(math.sqrt(want.dd / want.aa), rel=1e-6)
    assert first.statistics.cosine == pytest.approx(want.ab / math.sqrt(want.aa * want.bb), rel=1e-6)


def test_tensors_of_two_dtypes_are_compared_in_the_wider(tmp_path: Path) -> None:
    a = model(dtype=torch.float32)
    b = {name: tensor.bfloat16() for name, tensor in a.items()}
    diff = diff_of(tmp_path, a, b)
    name = "model.layers.0.mlp.up_proj.weight"
    assert str(diff[name].compared_as) == "float32"
    assert diff[name].changed == int((a[name] != b[name].float()).sum())
    assert diff.statistics.changed_rounded == 0
    assert "differ, compared as float32 (0.0% after rounding to the narrower dtype)" in diff.sentence
    back = diff_of(tmp_path, b, a)
    assert (back.statistics.changed, back.statistics.changed_rounded) == (diff.statistics.changed, 0)
    assert diff_of(tmp_path, b, moved(b, name)).statistics.changed_rounded is None


@pytest.mark.skipif("complex64" not in SAVED, reason="this safetensors saves no complex numbers")
def test_integers_and_complex_numbers_are_counted(tmp_path: Path) -> None:
    a = {"steps": torch.tensor([1, -5, 2**62]), "mask": torch.tensor([True, False]), "z": torch.tensor([1 + 1j, 2j])}
    b = {"steps": torch.tensor([1, 3, -(2**62)]), "mask": torch.tensor([True, True]), "z": torch.tensor([1 + 1j, 3j])}
    diff = diff_of(tmp_path, a, b)
    assert diff["steps"].statistics.largest is not None
    assert diff["steps"].statistics.largest.size == 2**63
    assert diff["steps"].statistics.magnitudes == {3: 1, 63: 1}
    assert (diff["mask"].changed, diff["z"].changed) == (1, 1)
    assert diff["steps"].statistics.relative_l2 is None
    assert "other tensors" in diff.sentence
    assert repr(diff["steps"]).startswith("Tensor diff")


def test_a_sample_is_said_and_frozen_tensors_are_looked_at_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nbmerge.comparing import differ
    from nbmerge.engine import scan

    monkeypatch.setattr(differ, "scan", lambda *args, **kw: scan.scan(*args, **{**kw, "block_bytes": 64}))
    a = {"model.embed_tokens.weight": torch.zeros(100, 16), "model.layers.0.mlp.up_proj.weight": torch.zeros(100, 16)}
    b = {name: tensor.clone() for name, tensor in a.items()}
    b["model.embed_tokens.weight"][50, 3] = 1
    diff = diff_of(tmp_path, a, b, sample=0.1, frozen="*embed*")
    assert not diff.looked.whole
    assert diff["model.embed_tokens.weight"].statistics.elements == 1600
    assert 0 < diff["model.layers.0.mlp.up_proj.weight"].statistics.elements < 800
    assert diff.sentence.startswith(f"an estimate from {100 * diff.looked.share:.1f}% of the elements: ")
    assert diff_of(tmp_path, a, b, sample=0.1, frozen="*embed*").tensors == diff.tensors


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sample": 0}, "sample=0"),
        ({"sample": 1.5}, "sample=1.5"),
        ({"sample": 0.5, "rank_one": True}, "rank_one needs whole matrices"),
        ({"workers": 0}, "workers=0"),
    ],
)
def test_options_that_make_no_sense(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        diff_of(tmp_path, model(), model(), **options)


@pytest.mark.parametrize("turned", [False, True])
def test_the_rank_one_share_of_an_outer_product(tmp_path: Path, turned: bool) -> None:
    rng = np.random.default_rng(0)
    update = np.outer(rng.standard_normal(60), rng.standard_normal(40)) * 1e-3
    noise = rng.standard_normal((60, 40)) * 3e-4
    a = {"model.layers.0.mlp.up_proj.weight": torch.from_numpy(rng.standard_normal((60, 40)))}
    for added in (update, update + noise, noise):
        b = {name: tensor + torch.from_numpy(added) for name, tensor in a.items()}
        delta = (b["model.layers.0.mlp.up_proj.weight"] - a["model.layers.0.mlp.up_proj.weight"]).numpy()
        values = np.linalg.svd(delta, compute_uv=False)
        x, y = (a, b) if not turned else ({n: t.T for n, t in a.items()}, {n: t.T for n, t in b.items()})
        found = diff_of(tmp_path, x, y, rank_one=True)["model.layers.0.mlp.up_proj.weight"].rank_one
        assert found == pytest.approx(values[0] ** 2 / (values**2).sum(), rel=5e-3)
        assert found is not None
        assert found <= values[0] ** 2 / (values**2).sum() * (1 + 1e-9)


def test_rank_one_of_long_rows_and_of_values_near_the_end_of_the_range(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nbmerge.comparing import rank_one

    monkeypatch.setattr(rank_one, "BLOCK_BYTES", 64)
    a = {"w": torch.zeros(9, 50, dtype=torch.bfloat16)}
    b = {"w": torch.outer(torch.arange(9) + 1.0, torch.randn(50)).bfloat16() * 2.0**110}
    values = torch.linalg.svdvals(b["w"].double() / 2.0**110)
    found = diff_of(tmp_path, a, b, rank_one=True)["w"].rank_one
    assert found == pytest.approx(float(values[0] ** 2 / (values**2).sum()), rel=1e-6)


def test_roll_ups_add_up(tmp_path: Path) -> None:
    a = model()
    diff = diff_of(tmp_path, a, moved(a, *[name for name in a if "layers.1" in name]))
    assert sum(found.changed for found in diff.by_layer.values()) == diff.statistics.changed
    assert sum(found.elements for found in diff.by_kind.values()) == diff.statistics.elements
    assert diff.by_layer["model.layers", 0].changed == 0
    assert diff.by_layer["model.layers", 1].share == 1
    assert set(diff.by_kind) == {"embed_tokens", "norms", "self_attn.q_proj", "mlp.up_proj"}


def test_progress_is_told(tmp_path: Path) -> None:
    events: list[Event] = []
    a = model()
    diff_of(tmp_path, a, moved(a, "model.layers.0.mlp.up_proj.weight"), rank_one=True, listener=events.append)
    phases = [event.phase for event in events if isinstance(event, Started)]
    assert phases == ["comparing", "rank one"]


def test_an_empty_model_is_told(tmp_path: Path) -> None:
    diff = diff_of(tmp_path, {"a": torch.zeros(3)}, {"b": torch.zeros(3)})
    assert diff.sentence == "nothing could be compared; 1 tensor is only in A; 1 tensor is only in B"
    assert not diff.is_empty
    assert ([one.name for one in diff.only_a], [one.name for one in diff.only_b]) == (["a"], ["b"])


def test_tensors_without_elements(tmp_path: Path) -> None:
    diff = diff_of(tmp_path, {"a": torch.zeros(0, 4)}, {"a": torch.zeros(0, 4)})
    assert diff.is_empty
    assert diff["a"].share == 0


def test_a_data_frame_needs_pandas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    diff = diff_of(tmp_path, model(), model(1))
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(NotSupportedError, match="pip install pandas"):
        diff.to_dataframe()


def test_a_data_frame_has_a_row_for_each_tensor(tmp_path: Path) -> None:
    pytest.importorskip("pandas")
    diff = diff_of(tmp_path, model(), model(1))
    frame = diff.to_dataframe()
    assert list(frame.tensor) == list(diff.tensors)
    assert int(frame.changed.sum()) == diff.statistics.changed


def test_a_report_can_be_pickled(tmp_path: Path) -> None:
    import pickle

    diff = diff_of(tmp_path, model(), model(1))
    again = pickle.loads(pickle.dumps(diff))  # noqa: S301 - our own
    assert repr(again) == repr(diff)


def test_comparing_imports_no_display(tmp_path: Path) -> None:
    import subprocess
    import sys

    save(tmp_path / "a", model())
    code = (
        "import sys; from nbmerge.comparing.differ import diff_weights; from nbmerge.weights import weights_of; "
        f"w = weights_of({str(tmp_path / 'a')!r}); assert diff_weights(w, w).is_empty; "
        "print([m for m in sys.modules if m in ('torch', 'pandas', 'IPython', 'nbmerge.display', 'transformers')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert weights_of(tmp_path / "a").nbytes
