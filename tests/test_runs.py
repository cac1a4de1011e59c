"""A run's directory: every checkpoint in it is found, opened and told of, and the one to pass is named."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from IPython.core.interactiveshell import InteractiveShell

import nbmerge
from nbmerge import Checkpoint, NotACheckpointError, Run, cli
from nbmerge.run_search import step_of
from nbmerge.runs import survey
from tests.support.messages import assert_says, refusal
from tests.support.models import save_tiny_model, write_model_world

_DEEPSPEED = Path(__file__).parent / "data" / "deepspeed_z3_w3_bf16_tied_frozen" / "ckpt"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Three steps: one whole, one without a rank's file, one whole with a damaged critic; and one that is empty."""
    root = tmp_path / "my run"
    for step in (5, 10, 20):
        write_model_world(root / f"global_step_{step}" / "actor", "qwen2")
    write_model_world(root / "global_step_20" / "critic", "qwen2_value")
    (root / "latest_checkpointed_iteration.txt").write_text("20\n")
    (root / "global_step_10" / "actor" / "model_world_size_2_rank_1.pt").unlink()
    damaged = root / "global_step_20" / "critic" / "model_world_size_2_rank_1.pt"
    damaged.write_bytes(damaged.read_bytes()[:1000])
    (root / "global_step_30").mkdir()
    (root / "global_step_30" / "data.pt").write_bytes(b"x")
    return root


def test_says_what_is_where_and_what_is_whole(run: Path):
    found = nbmerge.inspect(run)
    assert isinstance(found, Run)
    assert [(each.path.relative_to(run).as_posix(), each.step, each.is_whole, each.is_latest) for each in found] == [
        ("global_step_5/actor", 5, True, False),
        ("global_step_10/actor", 10, False, False),
        ("global_step_20/actor", 20, True, True),
        ("global_step_20/critic", 20, False, True),
        ("global_step_30", 30, False, False),
    ]
    assert found.steps == [5, 10, 20, 30]
    assert found.latest is not None
    assert found.latest.path == run / "global_step_20" / "actor"
    assert found.latest.checkpoint is not None
    assert len(found.latest.checkpoint) == 27
    problems = {each.path.name: each.problem.what for each in found if each.problem}
    assert problems["actor"] == "1 rank of 2 is missing"
    assert "cut short" in problems["critic"]
    assert "nothing in it" in problems["global_step_30"]


def test_a_step_and_its_parts_are_answered_too(run: Path, monkeypatch: pytest.MonkeyPatch):
    step = nbmerge.inspect(run / "global_step_20")
    assert isinstance(step, Run)
    assert [(each.path.name, each.step, each.is_whole) for each in step] == [
        ("actor", 20, True), ("critic", 20, False),
    ]  # fmt: skip
    assert isinstance(nbmerge.inspect(run / "global_step_20" / "actor"), Checkpoint)
    monkeypatch.chdir(run / "global_step_20" / "actor")
    around = nbmerge.inspect("..")
    assert isinstance(around, Run)
    assert [(each.path, each.step) for each in around] == [(Path("../actor"), 20), (Path("../critic"), 20)]
    assert "in global_step_20:" in repr(around)


def test_of_two_models_of_a_step_the_first_is_to_be_passed_and_the_other_named(tmp_path: Path):
    for part in ("critic", "actor"):
        write_model_world(tmp_path / "it's mine" / "global_step_3" / part, "qwen2")
    found = survey(tmp_path / "it's mine")
    assert [each.path.name for each in found.newest] == ["actor", "critic"]
    assert found.latest is found.newest[0]
    passed = {fact.label: fact.value for fact in found.view().facts}
    quoted = str(tmp_path).replace("'", "") + "/it'\"'\"'s mine/global_step_3"
    assert passed["pass"] == f"'{quoted}/actor'"
    assert passed["or"] == f"'{quoted}/critic'"


def test_of_hundreds_of_steps_the_highest_are_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("nbmerge.runs._MOST", 2)
    write_model_world(tmp_path / "checkpoint-9", "qwen2")
    for step in (10, 99, 100):
        shutil.copytree(tmp_path / "checkpoint-9", tmp_path / f"checkpoint-{step}", copy_function=os.link)
    found = survey(tmp_path)
    assert [each.step for each in found] == [99, 100]
    assert found.latest is not None
    assert found.latest.step == 100
    assert [path.name for path in found.unopened] == ["checkpoint-10", "checkpoint-9"]
    assert found.steps == [9, 10, 99, 100]
    assert "4 directories of 4 steps" in repr(found)
    assert "2 of lower steps not opened" in repr(found)
    monkeypatch.setattr("nbmerge.run_search._DIRECTORIES", 3)
    assert survey(tmp_path).is_cut
    assert "too many" in repr(survey(tmp_path))


def test_links_and_loops_make_no_second_checkpoint(run: Path, tmp_path: Path):
    before = [each.path for each in survey(run)]
    (run / "a_loop").symlink_to(run)
    (run / "latest").symlink_to("global_step_20")
    assert [each.path for each in survey(run)] == before
    outside = write_model_world(tmp_path / "scratch", "qwen2")
    (run / "global_step_40").symlink_to(outside)
    linked = survey(run).latest
    assert linked is not None
    assert (linked.path, linked.step) == (run / "global_step_40", 40)


def test_a_root_that_is_a_checkpoint_itself_does_not_hide_the_steps(tmp_path: Path):
    root = save_tiny_model("qwen2", tmp_path / "output", "bfloat16")
    assert isinstance(nbmerge.inspect(root), Checkpoint)
    shutil.copytree(root, root / "checkpoint-500")
    found = nbmerge.inspect(root)
    assert isinstance(found, Run)
    assert [(each.path, each.step) for each in found] == [(root, None), (root / "checkpoint-500", 500)]
    assert found.latest is found.found[1]


def test_a_tracker_file_names_a_step_and_hides_none(tmp_path: Path):
    root = tmp_path / "run"
    shutil.copytree(_DEEPSPEED, root)
    assert isinstance(nbmerge.inspect(root), Checkpoint)
    shutil.copytree(root / "global_step3", root / "global_step30")
    found = nbmerge.inspect(root)
    assert isinstance(found, Run)
    assert [(each.step, each.is_latest) for each in found] == [(3, True), (30, False)]
    (root / "latest").write_text("global_step99")
    lost = survey(root).found[0]
    assert lost.path == root
    assert lost.problem is not None
    assert "global_step99" in lost.problem.what


def test_is_shown_as_text_and_as_html(run: Path):
    found = survey(run)
    text, html = repr(found), found._repr_html_()
    assert html is not None
    for words in (
        "5 directories of 4 steps",
        "3 not",
        "step 20",
        "global_step_10/actor",
        "is missing",
        "open_checkpoint",
    ):
        assert words in text
        assert words in html


def test_the_magic_and_the_command_line_give_the_same(
    run: Path, shell: InteractiveShell, capsys: pytest.CaptureFixture[str]
):
    found = shell.run_line_magic("inspect_ckpt", f"'{run}'")
    assert isinstance(found, Run)
    assert cli.main(["inspect", str(run)]) == 1
    assert repr(found) in capsys.readouterr().out
    assert cli.main(["inspect", str(run / "global_step_5")]) == 0


def test_a_hostile_tree_is_told_and_nothing_of_it_is_run(tmp_path: Path):
    import pickle

    name = "<img src=x onerror=alert(1)>"
    write_model_world(tmp_path / name / "global_step_1", "qwen2")
    file = tmp_path / name / "global_step_1" / "model_world_size_2_rank_0.pt"
    file.write_bytes(pickle.dumps({"a": 1}))
    found = nbmerge.inspect(tmp_path)
    assert isinstance(found, Run)
    assert not found.found[0].is_whole
    html = found._repr_html_()
    assert html is not None
    assert "<img" not in html


def test_a_directory_without_any_is_refused(tmp_path: Path):
    (tmp_path / "notes").mkdir()
    assert_says(refusal(NotACheckpointError, nbmerge.inspect, tmp_path), "no checkpoint that can be read", "fix:")
    assert_says(refusal(NotACheckpointError, nbmerge.inspect, tmp_path / "absent"), "no such directory")
    assert len(survey(tmp_path)) == 0
    assert survey(tmp_path).latest is None
    assert "0 directories" in repr(survey(tmp_path))


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("global_step_100", 100), ("global_step7", 7), ("checkpoint-12", 12), ("iter_0000030", 30), ("step-9", 9),
        ("actor", None), ("step", None), ("steps_3", None),
    ],
)  # fmt: skip
def test_steps_are_told_by_name(name: str, step: int | None):
    assert step_of(Path("run") / name) == step
