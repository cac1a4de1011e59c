from __future__ import annotations

import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbmerge.errors import OptionError
from nbmerge.magics.line import split_line


def _words(text: str, **names: object) -> list[object]:
    line = split_line(text, names)
    return [line.resolve(word) for word in line.words]


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Co"]), max_size=8)))
def test_what_a_shell_quotes_is_split_as_a_shell_does(words: list[str]) -> None:
    assert _words(shlex.join(words) + " # comment $nothing {") == words


def test_quotes_keep_spaces_and_join_what_touches() -> None:
    assert _words("""'my ckpt' "a b"c --x='1 2' ''  my\\ dir""") == ["my ckpt", "a bc", "--x=1 2", "", "my dir"]


def test_a_comment_begins_at_a_word_only() -> None:
    assert _words("a#b #c d") == ["a#b"]


def test_a_semicolon_that_silences_a_cell_is_no_part_of_the_path() -> None:
    assert _words("ckpt --target_dir out;") == ["ckpt", "--target_dir", "out"]


def test_a_backslash_of_windows_stays() -> None:
    assert _words(r"C:\models\new") == [r"C:\models\new"]


def test_names_and_expressions_become_text_where_they_have_one() -> None:
    names = {"root": Path("/my runs"), "n": 4, "run": SimpleNamespace(name="r1")}
    text = '$root/sub "{root / run.name}" --workers={n} $run.name.pt ${n + 1}'
    assert _words(text, **names) == ["/my runs/sub", "/my runs/r1", "--workers=4", "r1.pt", "5"]


def test_objects_are_passed_as_they_are() -> None:
    ckpt, table = object(), {"*": ["Shard(0)"]}
    assert _words("$ckpt --placements={table} {table} $none", ckpt=ckpt, table=table, none=None) == [
        ckpt, "--placements=\ue0001\ue000", table, None,
    ]  # fmt: skip
    line = split_line("--placements={table}", {"table": table})
    assert line.resolve(line.words[0].partition("=")[2]) is table


def test_braces_of_a_mapping_are_a_mapping() -> None:
    assert _words('{"*": ["Shard(0)", {"a": "}"}]}') == [{"*": ["Shard(0)", {"a": "}"}]}]


def test_a_comprehension_sees_the_notebooks_names() -> None:
    assert _words("{'-'.join(x for x in xs if x in keep)}", xs=["a", "b"], keep=["b"]) == ["b"]


def test_single_quotes_and_escapes_keep_the_characters_themselves() -> None:
    assert _words("'$x{y}' \\$x \\{y\\} $$x {{y}} 5$") == ["$x{y}", "$x", "{y}", "$x", "{y}", "5$"]


def test_a_mistyped_name_is_an_error_that_names_near_ones() -> None:
    with pytest.raises(OptionError, match=r"no variable 'nmae'") as error:
        _words("$nmae", name=1, other=2, _hidden=3)
    assert "near: $name" in str(error.value)
    assert "write $name" in error.value.problem.fix


def test_an_unknown_name_without_near_ones_says_how_to_write_it_literally() -> None:
    with pytest.raises(OptionError, match="single quotes"):
        _words("$zzz", name=1)


def test_an_expression_that_fails_says_so() -> None:
    with pytest.raises(OptionError, match="ZeroDivisionError: division by zero"):
        _words("{1 / 0}")
    with pytest.raises(OptionError, match="SyntaxError"):
        _words("{a b}")


@pytest.mark.parametrize(("text", "missing"), [("'a b", "a '"), ('"a b', 'a "'), ("{a + 'b}'", "a {")])
def test_a_quote_or_a_brace_without_its_end_is_an_error(text: str, missing: str) -> None:
    with pytest.raises(OptionError, match="has no end") as error:
        _words(text, a="x")
    assert str(error.value).startswith(missing)


def test_an_object_inside_a_word_is_an_error() -> None:
    with pytest.raises(OptionError, match="a SimpleNamespace cannot be part of a word"):
        _words("$ckpt/sub", ckpt=SimpleNamespace())


def test_the_character_that_marks_objects_cannot_be_smuggled_in() -> None:
    assert _words("\ue0000\ue000 $x", x=None) == ["0", None]
