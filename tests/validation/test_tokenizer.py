"""The tokenizer and the embedding, with real tokenizers that transformers loads."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from nbmerge.demo.tokenizer import build_tokenizer
from nbmerge.validation.findings import WARNING
from nbmerge.validation.subject import Subject
from nbmerge.validation.tokenizer import TokenizerCheck, load_tokenizer
from tests.support.models import HAS_CONVERSIONS
from tests.validation.directories import CLEAN, END, clean, edit_json, only, run, sentences, write_tokenizer

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """A tiny Llama with a tokenizer of as many tokens as its embedding has rows."""
    return clean(tmp_path / "whole", "llama")


@pytest.mark.parametrize("family", CLEAN)
def test_a_tokenizer_that_fits_has_no_findings(family: str, tmp_path: Path):
    outcome = run(TokenizerCheck(), clean(tmp_path / "model", family))
    assert sentences(outcome) == []
    assert "37 tokens in 37 rows" in outcome.said


def test_a_smaller_tokenizer_fits_into_a_padded_embedding(whole: Path):
    write_tokenizer(whole, 30)
    assert "30 tokens in 37 rows of model.embed_tokens.weight" in run(TokenizerCheck(), whole).said


def test_ids_without_a_row_are_found(whole: Path):
    build_tokenizer().save_pretrained(whole)
    finding = only(run(TokenizerCheck(), whole), "gives ids that the embedding has no row for")
    assert "has 37 rows" in finding.detail
    assert "is 37" in finding.detail


def test_an_added_token_without_a_row_is_found(whole: Path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(whole)
    tokenizer.add_tokens(["<|im_start|>"])
    tokenizer.save_pretrained(whole)
    assert "'<|im_start|>' is 37" in only(run(TokenizerCheck(), whole), "no row for").detail


@pytest.mark.parametrize("eos", [7, [7, 8]])
def test_another_end_of_text_than_generation_stops_at_is_a_warning(whole: Path, eos: Any):
    edit_json(whole / "generation_config.json", eos_token_id=eos)
    finding = only(run(TokenizerCheck(), whole), "has another end of text", WARNING)
    assert finding.detail == f"its eos_token_id is {END}; generation_config.json says {eos}"


def test_one_of_several_ends_of_text_is_enough(whole: Path):
    edit_json(whole / "generation_config.json", eos_token_id=[7, END])
    assert sentences(run(TokenizerCheck(), whole)) == []


def test_a_generation_config_that_was_lost_leaves_the_config_to_say_the_end(whole: Path):
    (whole / "generation_config.json").unlink()
    assert sentences(run(TokenizerCheck(), whole)) == []
    edit_json(whole / "config.json", eos_token_id=None)
    assert "config.json states none" in only(run(TokenizerCheck(), whole), "has another end of text", WARNING).detail


def test_a_critic_generates_nothing_and_needs_no_end(tmp_path: Path):
    directory = clean(tmp_path / "model", "qwen2_value")
    edit_json(directory / "config.json", eos_token_id=5)
    assert sentences(run(TokenizerCheck(), directory)) == []


def test_a_special_token_beyond_the_embedding_is_found(whole: Path):
    edit_json(whole / "generation_config.json", eos_token_id=[END, 99], pad_token_id=-1)
    finding = only(run(TokenizerCheck(), whole), "names a special token")
    assert (finding.subject, finding.detail[:2]) == ("generation_config.json: eos_token_id", "99")


def test_a_special_token_of_the_config_beyond_the_embedding_is_a_warning(whole: Path):
    edit_json(whole / "config.json", bos_token_id=99)
    assert only(run(TokenizerCheck(), whole), "names a special token", WARNING).subject == "config.json: bos_token_id"


def test_a_token_for_images_may_lie_beyond_the_vocabulary(tmp_path: Path):
    directory = clean(tmp_path / "model", "qwen3_vl")
    assert json.loads((directory / "config.json").read_text())["image_token_id"] > 37
    assert sentences(run(TokenizerCheck(), directory)) == []


def test_without_weights_the_config_says_how_many_rows_there_are(whole: Path):
    (whole / "model.safetensors").unlink()
    edit_json(whole / "config.json", vocab_size=20)
    assert "the config's vocab_size has 20 rows" in only(run(TokenizerCheck(), whole), "no row for").detail


def test_a_directory_without_a_tokenizer_is_not_checked(whole: Path):
    (whole / "tokenizer.json").unlink()
    outcome = run(TokenizerCheck(), whole)
    assert (outcome.ran, outcome.said) == (False, "there is no tokenizer in the directory")


@pytest.mark.skipif(
    not HAS_CONVERSIONS and (find_spec("google") is None or find_spec("google.protobuf") is None),
    reason="transformers 4 asks for protobuf before it says what is wrong",
)
@pytest.mark.parametrize("content", ["{", "{}", '{"model": {"type": "BPE"}}'])
def test_a_tokenizer_that_does_not_load_is_found(whole: Path, content: str):
    (whole / "tokenizer.json").write_text(content)
    only(run(TokenizerCheck(), whole), "cannot be loaded by transformers")


def test_a_tokenizer_with_code_of_its_own_is_not_run_without_trust(whole: Path):
    (whole / "own.py").write_text("raise RuntimeError('ran')")
    edit_json(
        whole / "tokenizer_config.json",
        tokenizer_class="OwnTokenizer",
        auto_map={"AutoTokenizer": [None, "own.OwnTokenizer"]},
    )
    outcome = run(TokenizerCheck(), whole)
    assert not outcome.ran
    assert "trust_remote_code" in outcome.said
    assert "ran" in only(run(TokenizerCheck(), whole, trust_remote_code=True), "cannot be loaded").detail


def test_a_chat_template_that_renders_is_told_and_one_that_does_not_is_a_warning(whole: Path):
    write_tokenizer(whole, chat_template=CHATML)
    outcome = run(TokenizerCheck(), whole)
    assert (sentences(outcome), outcome.said.endswith("a chat template")) == ([], True)
    (whole / "chat_template.jinja").write_text("{{ raise_exception('only tools') }}")
    assert "only tools" in only(run(TokenizerCheck(), whole), "does not render", WARNING).detail


def test_a_template_for_parts_of_a_message_renders(whole: Path):
    template = "{% for m in messages %}{% for part in m.content %}{{ part.text.strip() }}{% endfor %}{% endfor %}"
    write_tokenizer(whole, chat_template=template)
    assert sentences(run(TokenizerCheck(), whole)) == []


def test_a_template_with_a_syntax_error_is_left_to_the_check_of_the_files(whole: Path):
    write_tokenizer(whole, chat_template="{% if %}")
    assert sentences(run(TokenizerCheck(), whole)) == []


def test_loading_shows_nothing(whole: Path, capfd: pytest.CaptureFixture[str]):
    edit_json(whole / "tokenizer_config.json", tokenizer_class="Nonsense")
    load_tokenizer(Subject.of(whole))
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(not HAS_CONVERSIONS, reason="transformers 4 adds no token to a tokenizer.json")
def test_a_token_that_the_class_adds_by_itself_is_a_warning(tmp_path: Path):
    model = clean(tmp_path / "model", "qwen2")
    for path in model.glob("tokenizer*.json"):
        path.write_text(path.read_text().replace("<|endoftext|>", "</s>"))
    finding = only(run(TokenizerCheck(), model), "gets tokens from transformers", WARNING)
    assert "'<|endoftext|>' is 37" in finding.detail
