from __future__ import annotations

import pytest

from nbmerge.display import words


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1_000, "1.00 kB"),
        (80_640, "80.6 kB"),
        (999_500, "1.00 MB"),
        (15_231_233_024, "15.2 GB"),
        (1_333_102_379_008, "1.33 TB"),
        (5 * 10**18, "5,000 PB"),
    ],
)
def test_bytes_have_three_digits_and_a_decimal_unit(nbytes: int, text: str) -> None:
    assert words.byte_size(nbytes) == text


def test_a_byte_count_names_both_the_rounded_and_the_exact_number() -> None:
    assert words.exact_bytes(80_640) == "80.6 kB (80,640 bytes)"
    assert words.exact_bytes(1) == "1 byte"


def test_a_big_count_is_rounded_and_a_small_one_is_exact() -> None:
    assert words.big_count(7_615_616_512, "parameter") == "7.62 billion parameters"
    assert words.big_count(20_160, "parameter") == "20,160 parameters"


def test_a_share_that_rounds_to_nothing_is_still_told_from_nothing() -> None:
    assert [words.percent(part, 10_000) for part in (0, 1, 10, 1_130)] == ["0.0%", "<0.1%", "0.1%", "11.3%"]
    assert words.percent(0, 0) == "0.0%"


def test_durations_are_in_seconds_and_then_in_minutes() -> None:
    assert [words.duration(s) for s in (0.123, 35.4, 260.0)] == ["0.12 s", "35 s", "4 min 20 s"]


def test_control_and_direction_marks_are_written_out() -> None:
    assert words.visible("a\x1b[31mb\n\u202ec\ud800") == "a\\x1b[31mb\\n\\u202ec\\ud800"


def test_a_long_name_keeps_both_ends() -> None:
    shown = words.elide("a" * 50 + "\x07" + "b" * 5_000_000, 20)
    assert len(shown) == 20
    assert shown.startswith("aaaaaaaaa…") and shown.endswith("b" * 10)


def test_a_value_of_a_config_is_shown_short() -> None:
    assert words.value_in_words({"*": ["Shard(0)", "Replicate"]}) == "*: [Shard(0), Replicate]"
    assert len(words.value_in_words(["x" * 1000])) <= words.NAME_LIMIT
