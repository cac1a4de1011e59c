"""Faults of the files themselves, one at a time, in directories that are whole otherwise."""

from __future__ import annotations

import json
import shutil
from importlib.metadata import version
from pathlib import Path

import pytest

import nbmerge
from nbmerge.validation.files import HeadersCheck, IndexCheck
from nbmerge.validation.findings import WARNING
from nbmerge.validation.recorded import DigestsCheck, ReceiptCheck
from nbmerge.validation.side import ConfigCheck, PathsCheck, TokenizerFilesCheck
from nbmerge.validation.subject import INDEX_NAME, Subject
from tests.support.models import write_model_world
from tests.validation.directories import (
    CLEAN,
    clean,
    edit_index,
    edit_json,
    edit_tensors,
    only,
    run,
    sentences,
    write_raw,
    write_tokenizer,
)

ALL = (HeadersCheck, IndexCheck, PathsCheck, ConfigCheck, TokenizerFilesCheck, ReceiptCheck, DigestsCheck)
ONE = b'{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """A tiny Llama in one file."""
    return clean(tmp_path / "whole", "llama")


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """The same in several files with an index."""
    return clean(tmp_path / "shards", "llama", shards=True)


@pytest.fixture(scope="module")
def _merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("merged")
    write_model_world(directory / "actor", "llama")
    write_tokenizer(directory / "actor" / "huggingface")
    nbmerge.merge(directory / "actor", directory / "out", max_shard_size="8KB", digests=True, progress=False)
    return directory / "out"


@pytest.fixture
def merged(_merged: Path, tmp_path: Path) -> Path:
    """What nbmerge wrote, with digests in the receipt."""
    return shutil.copytree(_merged, tmp_path / "merged")


def first_shard(directory: Path) -> Path:
    return min(directory.glob("model-*.safetensors"))


@pytest.mark.parametrize("shards", [False, True], ids=["one file", "shards"])
@pytest.mark.parametrize("family", CLEAN)
def test_what_save_pretrained_writes_has_no_findings(family: str, shards: bool, tmp_path: Path):
    directory = clean(tmp_path / "model", family, shards=shards)
    for check in ALL:
        assert sentences(run(check(), directory)) == []


def test_what_a_merge_writes_has_no_findings(merged: Path):
    outcomes = {check.name: run(check(), merged) for check in ALL}
    assert [name for name, outcome in outcomes.items() if outcome.findings] == []
    assert all(outcome.ran for outcome in outcomes.values())


def test_checks_that_have_nothing_to_look_at_say_so(whole: Path):
    assert not run(ReceiptCheck(), whole).ran
    assert "merge with digests=True" in run(DigestsCheck(), whole).said


@pytest.mark.parametrize("cut", [1, 100, 20_000])
def test_a_file_that_is_cut_short_is_damaged(whole: Path, cut: int):
    path = whole / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-cut])
    finding = only(run(HeadersCheck(), whole), "is damaged")
    assert finding.subject == "model.safetensors"
    assert "bytes" in finding.detail


@pytest.mark.parametrize(
    ("header", "data", "what"),
    [
        (b"{", b"", "is damaged"),
        (b"[1]", b"", "is damaged"),
        (ONE, b"\0" * 5, "is damaged"),
        (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}', b"\0" * 4, "is damaged"),
        (b'{"a":{"dtype":"F4","shape":[1],"data_offsets":[0,4]}}', b"\0" * 4, "holds a dtype that is not known"),
        (b'{"a":{"dtype":["F4"],"shape":[1],"data_offsets":[0,4]}}', b"\0" * 4, "is damaged"),
        (b'{"a":[3]}', b"\0" * 4, "is damaged"),
        (ONE.replace(b'"pt"', b"1"), b"\0" * 4, "is refused by the safetensors library"),
        (ONE[:-1] + b"," + ONE.partition(b'"pt"},')[2], b"\0" * 4, "names a tensor twice"),
    ],
)
def test_a_header_that_is_wrong_is_found(tmp_path: Path, header: bytes, data: bytes, what: str):
    write_raw(tmp_path / "model.safetensors", header, data)
    only(run(HeadersCheck(), tmp_path), what)


@pytest.mark.parametrize(("code", "is_one"), [("F8_E5M2FNUZ", True), ("F7", False)])
def test_a_dtype_that_is_not_known_is_not_called_damage(tmp_path: Path, code: str, is_one: bool):
    header = ONE.replace(b"F32", code.encode()).replace(b"[0,4]", b"[0,1]")
    write_raw(tmp_path / "model.safetensors", header, b"\0")
    finding = only(run(HeadersCheck(), tmp_path), "holds a dtype that is not known")
    assert finding.detail.startswith(f"a is {code}")
    is_known = is_one and version("safetensors") >= "0.6"
    assert ("this version of nbmerge does not" if is_known else "installed safetensors' dtypes") in finding.why


def test_an_index_of_files_that_cannot_be_read_is_not_compared(whole: Path, shards: Path):
    (whole / "model.safetensors").write_bytes(b"")
    outcome = run(IndexCheck(), whole)
    assert not outcome.ran
    assert "not readable: model.safetensors" in outcome.said
    first_shard(shards).write_bytes(b"")
    outcome = run(IndexCheck(), shards)
    assert outcome.ran
    assert outcome.said.endswith(f"not readable: {first_shard(shards).name}")


def test_a_file_without_the_framework_in_its_metadata_is_a_warning(whole: Path):
    from safetensors.torch import load_file, save_file

    save_file(load_file(whole / "model.safetensors"), whole / "model.safetensors")
    assert "transformers 4" in only(run(HeadersCheck(), whole), "does not say for which framework", WARNING).why


def test_a_link_or_directory_in_the_place_of_a_file_is_a_finding_and_no_error(whole: Path):
    (whole / "model.safetensors").unlink()
    (whole / "model.safetensors").symlink_to("gone")
    (whole / "other.safetensors").mkdir()
    assert sentences(run(HeadersCheck(), whole)) == ["is damaged"]
    assert Subject.of(whole).entries == {}


def test_a_directory_without_weights_says_what_it_has_instead(tmp_path: Path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert "pytorch_model.bin" in only(run(HeadersCheck(), tmp_path), "holds no safetensors files").detail
    assert not run(IndexCheck(), tmp_path).ran


def test_a_shard_that_is_missing_is_found(shards: Path):
    first_shard(shards).unlink()
    finding = only(run(IndexCheck(), shards), "is named by the index, and missing")
    assert finding.subject == "model-00001-of-00007.safetensors"


def test_a_shard_that_is_missing_is_found_without_an_index_too(shards: Path):
    first_shard(shards).unlink()
    (shards / INDEX_NAME).unlink()
    outcome = run(IndexCheck(), shards)
    assert [(finding.what, finding.subject) for finding in outcome.findings] == [
        ("is missing", INDEX_NAME),
        ("is missing", "model-00001-of-00007.safetensors"),
    ]


def test_shards_without_an_index_are_not_found_by_transformers(shards: Path):
    (shards / INDEX_NAME).unlink()
    assert only(run(IndexCheck(), shards), "is missing").subject == INDEX_NAME


def test_a_leftover_shard_of_another_merge_is_a_warning_and_its_tensors_are_not_looked_at(shards: Path):
    shutil.copy(first_shard(shards), shards / "model-00009-of-00009.safetensors")
    finding = only(run(IndexCheck(), shards), "is loaded by nothing", WARNING)
    assert finding.subject == "model-00009-of-00009.safetensors"
    assert "model-00009-of-00009.safetensors" not in {file for file, _ in Subject.of(shards).entries.values()}


def test_pickles_beside_the_weights_are_a_warning(whole: Path):
    (whole / "pytorch_model.bin").write_bytes(b"")
    (whole / "training_args.bin").write_bytes(b"")
    outcome = run(IndexCheck(), whole)
    assert [finding.subject for finding in outcome.findings] == ["pytorch_model.bin", "training_args.bin"]
    assert {(finding.what, finding.severity) for finding in outcome.findings} == {
        ("is a pickle beside the safetensors files", WARNING)
    }


def test_a_tensor_that_the_index_does_not_name_is_found(shards: Path):
    edit_index(shards, lambda index: index["weight_map"].pop("model.norm.weight"))
    assert only(run(IndexCheck(), shards), "is not in the index").subject == "model.norm.weight"


def test_a_tensor_that_is_in_no_file_is_found(shards: Path):
    edit_index(shards, lambda index: index["weight_map"].update({"extra": first_shard(shards).name}))
    assert "no file" in only(run(IndexCheck(), shards), "is not where the index says").detail


def test_a_tensor_in_another_file_than_the_index_says_is_found(shards: Path):
    name, other = "model.norm.weight", first_shard(shards).name
    assert Subject.of(shards).index[name] != other
    edit_index(shards, lambda index: index["weight_map"].update({name: other}))
    finding = only(run(IndexCheck(), shards), "is not where the index says")
    assert finding.subject == name
    assert "it is in model-0000" in finding.detail


def test_a_tensor_in_two_files_is_found(shards: Path):
    last = max(shards.glob("model-*.safetensors"))
    name = next(iter(Subject.of(shards).headers[first_shard(shards).name]))
    tensor = Subject.of(shards).tensors[name]
    import torch

    edit_tensors(shards, lambda tensors: tensors.update({name: torch.zeros(tensor.shape)}), last.name)
    assert "is in two files" in sentences(run(IndexCheck(), shards))


@pytest.mark.parametrize("size", [0, 20_417, None, "20416"])
def test_a_total_size_that_does_not_add_up_is_found(shards: Path, size: object):
    edit_index(shards, lambda index: index["metadata"].update(total_size=size))
    assert "20,416 bytes" in only(run(IndexCheck(), shards), "states another size").detail


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "no JSON"),
        ("[]", "no weight_map"),
        ('{"weight_map": 3}', "no weight_map"),
        ('{"weight_map": {"a": 3}}', "gives a something else"),
        ('{"weight_map": {"a": "model.safetensors"}}', "no metadata"),
        ("[" * 100_000, "no JSON"),
    ],
)
def test_an_index_that_cannot_be_used_is_found(shards: Path, content: str, words: str):
    (shards / INDEX_NAME).write_text(content)
    assert words in only(run(IndexCheck(), shards), "is no index of tensors").detail


def test_a_single_file_beside_an_index_of_shards_hides_them(shards: Path):
    shutil.copy(first_shard(shards), shards / "model.safetensors")
    assert only(run(IndexCheck(), shards), "hides the shards").subject == "model.safetensors"


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", "..", "a\\b"])
def test_an_index_that_leads_out_of_the_directory_is_found(shards: Path, name: str):
    edit_index(shards, lambda index: index["weight_map"].update({"lm_head.weight": name}))
    assert only(run(PathsCheck(), shards), "is no name of a file in the directory").subject == name


def test_links_out_of_the_directory_are_found_and_those_inside_are_not(whole: Path, tmp_path: Path):
    (tmp_path / "secret.json").write_text("{}")
    (whole / "config2.json").symlink_to(whole / "config.json")
    (whole / "secret.json").symlink_to("../secret.json")
    assert only(run(PathsCheck(), whole), "is a link out of the directory").subject == "secret.json"
    (whole / "secret.json").unlink()
    (whole / "gone.json").symlink_to("nothing")
    assert only(run(PathsCheck(), whole), "is a link to nothing").subject == "gone.json"


def test_the_links_of_the_hubs_cache_are_fine(whole: Path, tmp_path: Path):
    repository = tmp_path / "models--a--b"
    snapshot = repository / "snapshots" / "0123"
    (repository / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in list(whole.iterdir()):
        path.rename(repository / "blobs" / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    for check in ALL:
        assert sentences(run(check(), snapshot)) == []


@pytest.mark.parametrize("content", ["{", "[]", "null", '"text"', '\ufeff{"architectures": ["A"]}', "[" * 100_000])
def test_a_config_that_is_no_json_object_is_found(whole: Path, content: str):
    (whole / "config.json").write_text(content)
    assert only(run(ConfigCheck(), whole), "cannot be read").subject == "config.json"


def test_a_config_that_is_missing_is_found(whole: Path):
    (whole / "config.json").unlink()
    only(run(ConfigCheck(), whole), "is missing")
    (whole / "adapter_config.json").write_text("{}")
    assert "LoRA adapter" in only(run(ConfigCheck(), whole), "is missing").why


def test_a_config_without_a_class_is_a_warning(whole: Path):
    edit_json(whole / "config.json", architectures=...)
    assert "None" in only(run(ConfigCheck(), whole), "names no class", WARNING).detail


@pytest.mark.parametrize("name", ["generation_config.json", "preprocessor_config.json"])
def test_another_config_that_cannot_be_read_is_found(whole: Path, name: str):
    (whole / name).write_text("[1]")
    assert only(run(ConfigCheck(), whole), "cannot be read").subject == name


def test_a_json_file_of_another_tool_may_hold_a_list(whole: Path):
    (whole / "results.json").write_text("[1]")
    assert sentences(run(ConfigCheck(), whole)) == []


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
def test_a_tokenizer_file_that_cannot_be_read_is_found(whole: Path, name: str):
    (whole / name).write_text("{")
    assert only(run(TokenizerFilesCheck(), whole), "cannot be read").subject == name


def test_a_model_of_text_without_a_tokenizer_is_a_warning(whole: Path):
    (whole / "tokenizer.json").unlink()
    assert "hf_model_config_path" in only(run(TokenizerFilesCheck(), whole), "has no tokenizer", WARNING).fix


def test_a_model_without_words_needs_no_tokenizer(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"model_type": "resnet"}')
    assert not run(TokenizerFilesCheck(), tmp_path).ran


@pytest.mark.parametrize("place", ["chat_template.jinja", "additional_chat_templates/tools.jinja", "config", "list"])
def test_a_chat_template_that_cannot_be_parsed_is_found(whole: Path, place: str):
    broken = "{% for message in messages %}{{ message"
    if place.endswith(".jinja"):
        (whole / place).parent.mkdir(exist_ok=True)
        (whole / place).write_text(broken)
    else:
        value = broken if place == "config" else [{"name": "default", "template": broken}]
        edit_json(whole / "tokenizer_config.json", chat_template=value)
    assert "line 1" in only(run(TokenizerFilesCheck(), whole), "cannot be parsed").detail


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m | tojson }}{% endfor %}",
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
        "{{ raise_exception('no') }}{{ strftime_now('%Y') }}",
    ],
)
def test_templates_with_what_transformers_adds_to_jinja_can_be_parsed(whole: Path, template: str):
    (whole / "chat_template.jinja").write_text(template)
    outcome = run(TokenizerFilesCheck(), whole)
    assert sentences(outcome) == []
    assert "1 chat template" in outcome.said


def test_a_file_that_changed_after_the_merge_is_found_by_its_size(merged: Path):
    path = first_shard(merged)
    path.write_bytes(path.read_bytes() + b"\0")
    assert only(run(ReceiptCheck(), merged), "has another size").subject == path.name


@pytest.mark.parametrize("name", ["model-00001-of-00003.safetensors", "config.json", "tokenizer.json"])
def test_a_file_of_the_merge_that_is_missing_is_found(merged: Path, name: str):
    (merged / name).unlink()
    assert only(run(ReceiptCheck(), merged), "was written by the merge, and is missing").subject == name


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"files": 3}', '{"files": [{"name": "/etc/passwd", "bytes": 1}]}']
)
def test_a_receipt_that_cannot_be_read_is_found(merged: Path, content: str):
    (merged / "nbmerge_receipt.json").write_text(content)
    only(run(ReceiptCheck(), merged), "cannot be read")
    assert not run(DigestsCheck(), merged).ran


def test_one_bit_that_changed_is_found_by_the_digest(merged: Path):
    path = first_shard(merged)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert sentences(run(ReceiptCheck(), merged)) == []
    assert only(run(DigestsCheck(workers=2), merged), "has another digest").subject == path.name


def test_a_missing_file_has_no_digest_and_is_left_to_the_receipt(merged: Path):
    first_shard(merged).unlink()
    outcome = run(DigestsCheck(), merged)
    assert (sentences(outcome), outcome.said) == ([], "hashed 2 files")


def test_hostile_names_reach_the_findings_as_they_are(shards: Path):
    name = "<script>\n" + "x" * 50
    edit_index(shards, lambda index: index["weight_map"].update({name: "model-00099-of-00007.safetensors"}))
    outcome = run(IndexCheck(), shards)
    assert "model-00099-of-00007.safetensors" in {finding.subject for finding in outcome.findings}
    assert json.dumps([finding.subject for finding in outcome.findings])
