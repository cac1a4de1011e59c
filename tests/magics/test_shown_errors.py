"""Errors as a notebook shows them: real ones, in at most twelve lines of which the last is the fix."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from IPython.core.interactiveshell import InteractiveShell

import nbmerge
from tests.support.adapters import adapted, write_world
from tests.support.models import write_model_world

_HOSTILE = "<img src=x onerror=alert(1)>\x1b[31m"


def _shards(directory: Path) -> list[Path]:
    return sorted(directory.glob("model_world_size_*.pt"))


def _whole(directory: Path) -> None:
    write_model_world(directory, "qwen2")


def _without_a_rank(directory: Path) -> None:
    _whole(directory)
    _shards(directory)[-1].unlink()


def _cut_short(directory: Path) -> None:
    _whole(directory)
    file = _shards(directory)[0]
    file.write_bytes(file.read_bytes()[:2000])


def _of_something_else(directory: Path) -> None:
    (directory / "photos").mkdir(parents=True)
    (directory / "notes.txt").touch()


def _hostile(directory: Path) -> None:
    _of_something_else(directory)
    (directory / _HOSTILE.replace("/", "")).mkdir()


def _with_another_config(directory: Path) -> None:
    _whole(directory)
    path = directory / "huggingface" / "config.json"
    config = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps({**config, "hidden_size": 3 * config["hidden_size"]}), "utf-8")


def _with_a_config_that_makes_no_model(directory: Path) -> None:
    _whole(directory)
    path = directory / "huggingface" / "config.json"
    config = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps({**config, "layer_types": ["no such layer"]}), "utf-8")


def _with_an_adapter_of_unknown_alpha(directory: Path) -> None:
    write_world(directory, adapted())
    for path in (*directory.rglob("adapter_config.json"), *directory.rglob("lora_train_meta.json")):
        path.unlink()


MERGE, OPEN = "%merge_ckpt actor --target_dir out", "nbmerge.open_checkpoint('actor')"


@pytest.mark.parametrize(
    ("make", "cell", "error", "says"),
    [
        (_without_a_rank, MERGE, nbmerge.IncompleteCheckpointError, "missing"),
        (_without_a_rank, OPEN, nbmerge.IncompleteCheckpointError, "missing"),
        (_cut_short, MERGE, nbmerge.CorruptFileError, "cut short or damaged"),
        (_cut_short, OPEN, nbmerge.CorruptFileError, "cut short or damaged"),
        (_of_something_else, "%inspect_ckpt actor", nbmerge.NotACheckpointError, "it holds 1 .txt"),
        (_hostile, OPEN, nbmerge.NotACheckpointError, r"onerror=alert(1)>\x1b[31m"),
        (_whole, "%merge_ckpt actor --target_dir /proc/out", nbmerge.NbmergeError, "/proc"),
        (_whole, "%merge_ckpt actor --target_dir taken", nbmerge.TargetError, "holds thesis.txt"),
        (_whole, "nbmerge.merge('actor', 'taken')", nbmerge.TargetError, "holds thesis.txt"),
        (_with_another_config, MERGE, nbmerge.PlanError, "the merge cannot be planned"),
        (_with_another_config, "nbmerge.merge('actor', 'out')", nbmerge.PlanError, "the merge cannot be planned"),
        (_with_a_config_that_makes_no_model, MERGE, nbmerge.ConfigError, "no such layer"),
        (_whole, f"{MERGE} --backend fsdb", nbmerge.NbmergeError, "invalid choice: 'fsdb'"),
        (_whole, "nbmerge.open_checkpoint('actor', backend='fsdb')", nbmerge.OptionError, "'fsdb'"),
        (_with_an_adapter_of_unknown_alpha, f"{MERGE} --lora fold", nbmerge.PlanError, "nothing says lora_alpha"),
    ],
)
def test_a_real_error_is_shown_in_at_most_twelve_lines_that_end_with_the_fix(
    shell: InteractiveShell, capsys: pytest.CaptureFixture[str], make: Callable[[Path], None], cell: str,
    error: type[Exception], says: str,
) -> None:  # fmt: skip
    make(Path("actor"))
    Path("taken").mkdir()
    Path("taken/thesis.txt").touch()
    _is_shown_short(shell, capsys, cell, error, says)


def test_a_full_disk_is_told_before_anything_is_written(
    shell: InteractiveShell, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _whole(Path("actor"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=9))
    _is_shown_short(shell, capsys, MERGE, nbmerge.SpaceError, "the disk has 9 free")
    assert not Path("out").exists()


def _is_shown_short(
    shell: InteractiveShell, capsys: pytest.CaptureFixture[str], cell: str, error: type[Exception], says: str
) -> None:
    shell.user_ns["nbmerge"] = nbmerge
    capsys.readouterr()
    result = shell.run_cell(cell)
    assert isinstance(result.error_in_exec, error)
    text = capsys.readouterr().out.strip()
    lines = text.splitlines()
    assert says in text
    assert len(lines) <= 12
    assert lines[-1].strip().startswith("fix:")
    assert "Traceback" not in text and "\x1b" not in text
