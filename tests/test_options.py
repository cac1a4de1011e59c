"""Options are written once: the functions, the command line and the options dataclass cannot drift apart."""

from __future__ import annotations

import inspect
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import nbmerge
from nbmerge import NotACheckpointError, OptionError
from nbmerge.arguments import Parser, add_options, given_options, with_underscores
from nbmerge.options import MergeOptions, expanded_path, parse_size
from tests.support.messages import assert_says, refusal

KEYWORDS = {
    name: parameter.default
    for name, parameter in inspect.signature(nbmerge.merge).parameters.items()
    if parameter.kind is inspect.Parameter.KEYWORD_ONLY
}


def parser() -> Parser:
    made = Parser("merge", "")
    add_options(made, MergeOptions)
    return made


def test_the_keywords_of_merge_are_the_options_with_their_defaults():
    assert KEYWORDS.pop("progress") is None
    assert {item.name: item.default for item in fields(MergeOptions)} == KEYWORDS
    assert all(item.default is not MISSING and item.kw_only for item in fields(MergeOptions))


def test_the_flags_of_the_command_line_are_the_options_with_their_defaults():
    assert given_options(parser().parse([]), MergeOptions) == {item.name: item.default for item in fields(MergeOptions)}


def test_every_option_has_a_help_that_fits_a_line():
    assert all(0 < len(item.metadata["help"]) < 90 for item in fields(MergeOptions))


def test_the_keywords_of_open_checkpoint_are_options_of_the_same_name():
    names = set(inspect.signature(nbmerge.open_checkpoint).parameters) - {"path", "progress"}
    assert names <= {item.name for item in fields(MergeOptions)}


def test_only_what_changes_the_result_shapes_the_digest():
    shaping = set(MergeOptions().shaping())
    assert shaping >= {"dtype", "max_shard_size", "dialect", "mesh_shape", "placements", "is_value_model", "lora"}
    assert not shaping & {"workers", "overwrite", "dry_run", "backend", "digests", "trust_pickle", "hf_upload_path"}


def test_what_was_given_is_what_differs_from_the_defaults():
    assert MergeOptions().given() == {}
    assert MergeOptions(dtype="bfloat16", workers=3).given() == {"dtype": "bfloat16", "workers": 3}


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("--max-shard-size", "--max_shard_size"), ("--max-shard-size=5-6", "--max_shard_size=5-6"),
        ("--max_shard_size", "--max_shard_size"), ("-v", "-v"), ("a-b", "a-b"), ("--", "--"),
    ],
)  # fmt: skip
def test_flags_are_spelled_as_the_user_likes(word: str, said: str):
    assert with_underscores(word) == said


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5_000_000_000), ("500 MB", 500_000_000), ("2GiB", 2**31), ("1kb", 1000), ("0.5TB", 500_000_000_000),
        ("123", 123), (123, 123), ("7B", 7), (" 1 KiB ", 1024),
    ],
)  # fmt: skip
def test_sizes_are_read(text: str | int, size: int):
    assert parse_size(text) == size


@given(size=st.integers(1, 10**15))
def test_a_number_of_bytes_is_read_as_it_is(size: int):
    assert parse_size(str(size)) == size


@pytest.mark.parametrize("text", ["", "GB", "-5GB", "5 apples", "0", "0.1B", "5GB5", "1e3", "nan", "∞", None])
def test_what_is_no_size_is_told(text: str):
    assert_says(refusal(OptionError, parse_size, text), repr(text), "is no size", "5GB")


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"dtype": "int8"}, ["int8", "round every weight"]),
        ({"dtype": "float17"}, ["float17", "known"]),
        ({"workers": 0}, ["workers=0"]),
        ({"workers": -1}, ["workers=-1"]),
        ({"backend": "nemo"}, ["nemo", "megatron"]),
        ({"dialect": "latin"}, ["latin", "hub, transformers"]),
        ({"max_shard_size": "big"}, ["'big' is no size"]),
    ],
    ids=str,
)
def test_a_wrong_value_is_told_with_the_right_ones(option: dict[str, object], words: list[str]):
    assert_says(refusal(OptionError, MergeOptions, **option), *words, "fix:")
    assert isinstance(OptionError("x"), ValueError)


@pytest.mark.parametrize("name", ["backend", "dialect", "lora", "weights"])
def test_a_choice_that_is_none_lists_the_choices(name: str):
    assert_says(refusal(OptionError, MergeOptions, **{name: "x"}), f"{name}='x'", "one of")


def test_a_path_of_a_user_that_is_not_there_is_a_path_like_any_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expanded_path("~/a") == tmp_path / "a"
    assert expanded_path("~no_such_user/a") == Path("~no_such_user/a")
    for work in (nbmerge.open_checkpoint, nbmerge.merge, nbmerge.validate):
        with pytest.raises(NotACheckpointError, match="no such directory"):
            work("~no_such_user/a")
