from __future__ import annotations

from pathlib import Path

import pytest

from nbmerge.magics import MAGICS
from nbmerge.magics.completion import Completions, complete_line


def _complete(text: str, **names: object) -> Completions:
    return complete_line(text, MAGICS["merge_ckpt"].actions, names)


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("my ckpt", "merged", ".hidden"):
        (tmp_path / name).mkdir()
    (tmp_path / "merged" / "inner").mkdir()
    (tmp_path / "map.json").touch()


def test_options_complete_in_either_spelling() -> None:
    assert _complete("x --target").texts == ("--target_dir",)
    assert _complete("x --max-s").texts == ("--max-shard-size",)


def test_options_that_were_given_are_not_offered_again() -> None:
    assert "--overwrite" not in _complete("x --overwrite --").texts
    assert "--dtype" not in _complete("x --dtype=bfloat16 --").texts


def test_values_with_choices_complete() -> None:
    assert _complete("x --dialect ").texts == ("hub", "transformers")
    assert _complete("x --backend=f") == Completions("f", ("fsdp",), "value")
    assert _complete("x --dtype b").texts == ("bfloat16",)
    assert _complete("x --workers ").texts == ()


def test_directories_complete_and_files_only_where_a_file_is_wanted() -> None:
    assert _complete("").texts == ("merged/", "my\\ ckpt/")
    assert _complete("merged/").texts == ("merged/inner/",)
    assert _complete("x --target_dir m").texts == ("merged/", "my\\ ckpt/")
    assert _complete("x --placements m").texts == ("map.json", "merged/", "my\\ ckpt/")
    assert _complete(".h").texts == (".hidden/",)
    assert _complete("nothing/here/").texts == ()


def test_a_directory_with_a_space_completes_in_the_users_quoting() -> None:
    assert _complete('"my c') == Completions('"my c', ('"my ckpt/',), "path")
    assert _complete("my\\ c") == Completions("my\\ c", ("my\\ ckpt/",), "path")


def test_the_home_directory_stays_a_tilde(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert _complete("~/mer").texts == ("~/merged/",)


def test_variables_complete_after_a_dollar() -> None:
    assert _complete("$c", ckpt=1, config=2, _c=3, other=4).texts == ("$ckpt", "$config")


def test_after_the_checkpoint_options_are_offered() -> None:
    assert _complete("{a + 'b c'} ").texts[0] == "--target_dir"
    assert _complete("--target_dir out ").texts == ("merged/", "my\\ ckpt/")
