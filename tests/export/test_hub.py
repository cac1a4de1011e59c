"""Uploads over the loopback device: what arrives is what was there, an interrupt costs nothing, errors say what to do.

The client's xet road needs the Hub's own storage and is not covered here.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path

import pytest
from IPython.core.interactiveshell import InteractiveShell

import nbmerge
from nbmerge import HubError, NotACheckpointError, OptionError, VerificationError, cli
from nbmerge.receipt import RECEIPT_NAME
from tests.support.adapters import adapted, save_adapter_config, write_world
from tests.support.hub_server import NARROW, READER, TOKEN, Hub, Repository
from tests.support.messages import assert_says, refusal
from tests.support.models import memory_state, write_model_world
from tests.support.processes import ROOT


def push(hub: Hub, source: object, repo_id: str = "me/model", **options: object) -> nbmerge.PushReport:
    return nbmerge.push_to_hub(source, repo_id, endpoint=hub.url, progress=False, **options)  # type: ignore[arg-type]


def downloaded(hub: Hub, repo_id: str, target: Path, revision: str = "main") -> dict[str, bytes]:
    """Every file of a repository, as the client downloads it again."""
    from huggingface_hub import HfApi

    api = HfApi(endpoint=hub.url, token=TOKEN)
    found = {}
    for name in api.list_repo_files(repo_id, revision=revision):
        path = api.hf_hub_download(repo_id, name, revision=revision, local_dir=target)
        found[name] = Path(path).read_bytes()
    return found


def content_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


@pytest.mark.parametrize("part_bytes", [0, 5000])
def test_a_merge_arrives_bit_for_bit_with_a_card(hub: Hub, checkpoint: Path, tmp_path: Path, part_bytes: int):
    hub.part_bytes = part_bytes
    report = nbmerge.merge(checkpoint, tmp_path / "merged", max_shard_size="15KB")
    before = content_of(tmp_path / "merged")
    pushed = push(hub, report, private=True)
    assert hub.repositories["me/model"].private
    assert content_of(tmp_path / "merged") == before
    found = downloaded(hub, "me/model", tmp_path / "again")
    card = found.pop("README.md").decode()
    assert found == before
    assert set(pushed.files) == {*before, "README.md"}
    assert (pushed.card, pushed.revision, pushed.left_out) == ("written", "main", ())
    assert pushed.url == f"{hub.url}/me/model"
    assert len(hub.repositories["me/model"].commits) == 1
    assert hub.sent >= sum(len(data) for name, data in before.items() if name.endswith(".safetensors"))
    for words in ("library_name: transformers", "`Qwen2ForCausalLM`", "FSDP", "| training step | 40 |", "2 ranks"):
        assert words in card
    assert "base_model" not in card  # nothing names one


def test_an_upload_that_broke_off_goes_on_where_it_stopped(hub: Hub, checkpoint: Path, tmp_path: Path):
    nbmerge.merge(checkpoint, tmp_path / "merged", max_shard_size="1500B", dtype="float32")
    hub.large = 1000
    large = sum(len(data) for data in content_of(tmp_path / "merged").values() if len(data) >= hub.large)
    hub.break_after = 2 * large // 3  # more than is under way at a time, so that some files are through
    error = refusal(HubError, push, hub, tmp_path / "merged")
    assert_says(error, "cannot be reached, or the connection broke", "push again")
    assert hub.repositories["me/model"].branches["main"] == {}
    kept, sent = sum(len(data) for data in hub.blobs.values()), hub.sent
    assert 0 < kept < large
    hub.break_after = None
    push(hub, tmp_path / "merged")
    found = downloaded(hub, "me/model", tmp_path / "again")
    assert hub.sent - sent == large - kept + len(found.pop("README.md"))
    assert found == content_of(tmp_path / "merged")


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_process_that_is_stopped_in_the_middle_is_taken_up(
    hub: Hub, checkpoint: Path, tmp_path: Path, how: signal.Signals
):
    """A process of its own, with the client's real settings."""
    nbmerge.merge(checkpoint, tmp_path / "merged", max_shard_size="1500B", dtype="float32")
    hub.large = 1000
    large = sum(len(data) for data in content_of(tmp_path / "merged").values() if len(data) >= hub.large)
    hub.hold_after = 2 * large // 3
    settings = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}
    command = [sys.executable, "-m", "nbmerge", "push", str(tmp_path / "merged"), "me/model"]
    process = subprocess.Popen(command, env={**os.environ, **settings}, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 60
    while hub.sent <= hub.hold_after and process.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    assert process.poll() is None and hub.sent > hub.hold_after
    process.send_signal(how)
    if how is signal.SIGKILL:
        process.wait(30)
    hub.released.set()
    hub.hold_after = None
    said = process.communicate(timeout=60)[1]
    assert process.returncode != 0
    assert "Traceback" not in said and TOKEN not in said
    assert hub.repositories["me/model"].commits == []
    kept, sent = sum(len(data) for data in hub.blobs.values()), hub.sent
    assert kept > 0
    push(hub, tmp_path / "merged")
    found = downloaded(hub, "me/model", tmp_path / "again")
    assert hub.sent - sent == large - kept + len(found.pop("README.md"))
    assert found == content_of(tmp_path / "merged")


def test_pushing_again_sends_no_weights_twice_and_keeps_the_repositorys_card(hub: Hub, model: Path):
    push(hub, model)
    hub.repositories["me/model"].branches["main"]["README.md"] = b"written by hand"
    sent = hub.sent
    again = push(hub, model)
    assert (hub.sent, again.card) == (sent, "kept")
    assert hub.repositories["me/model"].branches["main"]["README.md"] == b"written by hand"
    assert push(hub, model, overwrite_card=True).card == "written"
    assert b"Qwen2ForCausalLM" in hub.repositories["me/model"].branches["main"]["README.md"]


def test_the_directorys_own_card_is_taken(hub: Hub, model: Path):
    (model / "README.md").write_text("mine")
    assert push(hub, model).card == "taken"
    assert hub.repositories["me/model"].branches["main"]["README.md"] == b"mine"


def test_a_branch_is_made_and_main_left_alone(hub: Hub, model: Path, tmp_path: Path):
    report = push(hub, model, revision="step-40", commit_message="forty")
    repository = hub.repositories["me/model"]
    assert repository.branches["main"] == {}
    assert "model.safetensors" in repository.branches["step-40"]
    assert repository.commits == ["forty"]
    assert "revision='step-40'" in repr(report)


def test_only_what_belongs_in_it(hub: Hub, model: Path, tmp_path: Path):
    (model / "notes.pdf").write_bytes(b"private")
    (model / ".env").write_text("SECRET=1")
    (model / "trainer_state.json").write_text("{}")
    (model / "training_args.bin").write_bytes(b"pickle")
    (model / "wandb").mkdir()
    (model / "wandb" / "run.json").write_text("{}")
    report = push(hub, model)
    assert set(report.left_out) == {"notes.pdf", ".env", "wandb/run.json", "trainer_state.json", "training_args.bin"}
    assert not set(report.left_out) & set(hub.repositories["me/model"].branches["main"])
    assert "wandb/run.json" in repr(report)


def test_a_link_out_of_the_directory_is_refused(hub: Hub, model: Path, tmp_path: Path):
    (tmp_path / "secret.json").write_text("{}")
    (model / "vocab.json").symlink_to(tmp_path / "secret.json")
    assert_says(refusal(OptionError, push, hub, model), "vocab.json is a link out of the directory", "fix:")
    assert "me/model" not in hub.repositories


def test_weights_of_another_model_in_the_repository_are_told(hub: Hub, model: Path):
    push(hub, model)
    hub.repositories["me/model"].branches["main"]["model-00001-of-00002.safetensors"] = b"old"
    report = push(hub, model)
    assert report.stale == ("model-00001-of-00002.safetensors",)
    assert "not of this model" in repr(report)
    assert "model-00001-of-00002.safetensors" in hub.repositories["me/model"].branches["main"]


def test_weights_that_were_not_merged_stay_here(hub: Hub, checkpoint: Path, tmp_path: Path):
    nbmerge.merge(checkpoint, tmp_path / "merged")
    (tmp_path / "merged" / "other.safetensors").write_bytes((tmp_path / "merged" / "model.safetensors").read_bytes())
    report = push(hub, tmp_path / "merged", force=True)
    assert report.left_out == ("other.safetensors",)
    assert "other.safetensors" not in hub.repositories["me/model"].branches["main"]


def test_weights_that_would_be_loaded_in_place_of_these_are_refused_or_replaced(
    hub: Hub, checkpoint: Path, tmp_path: Path
):
    repository = hub.repositories["me/model"] = Repository(private=False)
    repository.branches["main"] = {"model.safetensors": b"old", "LICENSE": b"mine"}
    sharded = nbmerge.merge(checkpoint, tmp_path / "merged", max_shard_size="4KB")
    message = refusal(HubError, push, hub, sharded)
    assert_says(message, "weights of another merge: model.safetensors", "--replace")
    assert repository.commits == []
    report = push(hub, sharded, replace=True)
    assert (report.removed, report.stale) == (("model.safetensors",), ())
    assert "model.safetensors deleted" in repr(report)
    assert "model.safetensors" not in repository.branches["main"]
    assert repository.branches["main"]["LICENSE"] == b"mine"
    assert len(repository.commits) == 1


def test_a_commit_that_lacks_a_file_is_told(hub: Hub, model: Path):
    hub.repositories["me/model"] = Repository(private=False, ignored={"config.json"})
    assert_says(refusal(HubError, push, hub, model), "does not hold what was uploaded: config.json", ".gitignore")


def test_a_public_repository_is_not_taken_for_a_private_model(hub: Hub, model: Path, checkpoint: Path, out: Path):
    push(hub, model)
    before = dict(hub.repositories["me/model"].branches["main"])
    assert_says(refusal(HubError, push, hub, model, private=True), "it is public", "fix:")
    message = refusal(HubError, nbmerge.merge, checkpoint, out, hf_upload_path="me/model", private=True)
    assert_says(message, "it is public")
    assert not out.exists()
    assert hub.repositories["me/model"].branches["main"] == before


def test_what_does_not_verify_is_not_uploaded_unless_forced(hub: Hub, checkpoint: Path, tmp_path: Path):
    state = memory_state("qwen2", "bfloat16")
    state["model.norm.weight"][3] = float("nan")
    write_model_world(checkpoint, "qwen2", dtype="bfloat16", state=state)
    report = nbmerge.merge(checkpoint, tmp_path / "merged")
    assert_says(refusal(VerificationError, push, hub, report), "model.norm.weight", "NaN", "not valid")
    assert hub.repositories == {}
    forced = push(hub, report, force=True)
    assert "by force" in repr(forced)
    assert b"did not pass" in hub.repositories["me/model"].branches["main"]["README.md"]


def test_an_adapter_alone_is_uploaded_as_it_was_merged(hub: Hub, tmp_path: Path):
    made = adapted("qwen2")
    write_world(tmp_path / "ckpt", made)
    save_adapter_config(made, tmp_path / "ckpt")
    nbmerge.merge(tmp_path / "ckpt", tmp_path / "out", lora="adapter")
    report = push(hub, tmp_path / "out")
    files = hub.repositories["me/model"].branches["main"]
    name = "lora_adapter/adapter_model.safetensors"
    assert files[name] == (tmp_path / "out" / name).read_bytes()
    assert "by force" not in repr(report)
    assert b"did not pass" not in files["README.md"]
    assert b"LoRA (adapter)" in files["README.md"]
    (tmp_path / "out" / name).write_bytes(b"cut")
    assert_says(refusal(VerificationError, push, hub, tmp_path / "out"), name, "not valid")


def test_a_changed_file_of_a_merge_is_found_before(hub: Hub, checkpoint: Path, tmp_path: Path):
    nbmerge.merge(checkpoint, tmp_path / "merged")
    with (tmp_path / "merged" / "config.json").open("a") as stream:
        stream.write("\n")
    message = refusal(VerificationError, push, hub, tmp_path / "merged")
    assert_says(message, "config.json", "not valid")


def test_a_validation_is_taken_for_its_own_directory_only(hub: Hub, model: Path, tmp_path: Path):
    proof = nbmerge.validate(model, no_run=True, progress=False)
    report = push(hub, model, validation=proof)
    assert report.validation is proof
    other = replace(proof, directory=tmp_path / "other")
    assert_says(refusal(OptionError, push, hub, model, validation=other), "the validation is of", "fix:")


class TestErrors:
    @pytest.mark.parametrize(
        ("repo_id", "words"),
        [("a/b/c", "cannot be the name"), ("me/-x", "cannot be the name"), ("strangers/x", "does not belong to")],
    )
    def test_names(self, hub: Hub, model: Path, repo_id: str, words: str):
        assert_says(refusal(HubError, push, hub, model, repo_id), words, "fix:")
        assert not any("create" in asked for asked in hub.requests)

    def test_no_token(self, hub: Hub, model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
        from huggingface_hub import constants

        monkeypatch.delenv("HF_TOKEN")
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "absent"))
        assert_says(refusal(HubError, push, hub, model), "no token", "hf auth login")
        assert hub.requests == []

    @pytest.mark.parametrize(("token", "words"), [("hf_wrong", "not valid"), (READER, "may only read")])
    def test_tokens_that_do_not_help_and_are_never_shown(self, hub: Hub, model: Path, token: str, words: str):
        message = refusal(HubError, push, hub, model, token=token)
        assert_says(message, words, "fix:")
        assert token not in message

    @pytest.mark.parametrize("token", ["hf_with\nline", "odd token\nwith a line"])
    def test_a_token_that_no_header_takes_is_not_shown(self, hub: Hub, model: Path, token: str):
        with pytest.raises(HubError) as caught:
            push(hub, model, token=token)
        shown = "".join(traceback.format_exception(caught.value))
        assert "fix:" in shown
        assert not any(secret in shown for secret in (token, repr(token)[1:-1], "hf_with", "odd token"))

    def test_a_fine_grained_token(self, hub: Hub, model: Path):
        message = refusal(HubError, push, hub, model, "me/other", token=NARROW)
        assert_says(message, "none of its 2 scopes", "repo.write for me")
        assert_says(refusal(HubError, push, hub, model, "team/x", token=NARROW), "may only read in team")
        assert push(hub, model, "me/mine", token=NARROW).commit

    def test_a_full_storage(self, hub: Hub, model: Path):
        hub.answers["POST /api/repos/create"], hub.saying = 403, "Private repository storage limit reached;"
        assert_says(refusal(HubError, push, hub, model), "no room left", "storage limit reached", "billing")

    def test_an_answer_in_the_middle_of_a_large_file(self, hub: Hub, model: Path):
        hub.large, hub.answers["PUT /lfs/blob"] = 1000, 403
        assert_says(refusal(HubError, push, hub, model), "may not write there", "me/model", "fix:")

    def test_offline(self, hub: Hub, model: Path, monkeypatch: pytest.MonkeyPatch):
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert_says(refusal(HubError, push, hub, model), "switched off", "HF_HUB_OFFLINE")

    def test_no_network(self, model: Path, hub: Hub):
        hub.url = "http://127.0.0.1:9"
        assert_says(refusal(HubError, push, hub, model), "cannot be reached", "network", "fix:")

    @pytest.mark.parametrize(
        ("where", "code", "words"),
        [
            ("POST /api/repos/create", 403, "may not write"),
            ("POST /api/repos/create", 402, "no room"),
            ("commit", 413, "larger than the Hub accepts"),
            ("commit", 409, "somebody else"),
            ("preupload", 404, "not there"),
            ("commit", 500, "fault of its own"),
            ("commit", 418, "the error 418"),
        ],
    )
    def test_answers(self, hub: Hub, model: Path, where: str, code: int, words: str):
        hub.answers[where] = code
        message = refusal(HubError, push, hub, model)
        assert_says(message, words, "me/model", "fix:")
        assert TOKEN not in message

    def test_directories(self, hub: Hub, tmp_path: Path, checkpoint: Path):
        assert_says(refusal(NotACheckpointError, push, hub, tmp_path / "absent"), "no such directory", "fix:")
        (tmp_path / "empty").mkdir()
        assert_says(refusal(NotACheckpointError, push, hub, tmp_path / "empty"), "no weights", "fix:")
        assert_says(refusal(OptionError, push, hub, nbmerge.merge(checkpoint, dry_run=True)), "dry run", "fix:")

    def test_a_second_process(self, hub: Hub, model: Path):
        from nbmerge.export.hub import _alone

        with _alone(model):
            assert_says(refusal(HubError, push, hub, model), "another process uploads", "wait")


def test_only_rank_0_uploads(hub: Hub, model: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RANK", "3")
    report = push(hub, model)
    assert (report.commit, hub.repositories, hub.requests) == ("", {}, [])
    assert "left to rank 0" in repr(report)


class TestEverywhere:
    """The option of a merge, the merger objects, the magic and the command line."""

    def test_a_merge_asks_first(self, hub: Hub, tmp_path: Path):
        absent = tmp_path / "absent"
        message = refusal(HubError, nbmerge.merge, absent, tmp_path / "out", hf_upload_path="strangers/x")
        assert_says(message, "does not belong to", "me/x")
        assert hub.requests == ["GET /api/whoami-v2"]

    def test_a_merge_whose_upload_fails_is_complete(self, hub: Hub, checkpoint: Path, out: Path):
        hub.answers["commit"] = 500
        message = refusal(HubError, nbmerge.merge, checkpoint, out, hf_upload_path="me/model")
        assert_says(message, "the merge is complete, and not uploaded", f"python -m nbmerge push {out} me/model")
        assert nbmerge.validate(out, no_run=True, progress=False).ok

    def test_a_plan_that_says_where_to_is_uploaded(self, hub: Hub, checkpoint: Path, out: Path):
        plan = nbmerge.plan_merge(checkpoint, hf_upload_path="me/planned", private=True)
        assert nbmerge.merge(plan, out).pushed is not None
        assert hub.repositories["me/planned"].private

    def test_a_merge_uploads_at_the_end(self, hub: Hub, checkpoint: Path, tmp_path: Path):
        report = nbmerge.merge(checkpoint, tmp_path / "out", hf_upload_path="team/model", private=True)
        assert report.pushed is not None
        assert report.pushed.url == f"{hub.url}/team/model"
        assert report.pushed.url in repr(report)
        assert RECEIPT_NAME in hub.repositories["team/model"].branches["main"]
        again = nbmerge.merge(nbmerge.plan_merge(checkpoint), tmp_path / "again", hf_upload_path="me/two")
        assert again.pushed is not None
        nbmerge.merge(checkpoint, dry_run=True, hf_upload_path="me/three")
        assert set(hub.repositories) == {"team/model", "me/two"}

    def test_an_average_uploads(self, hub: Hub, checkpoint: Path, tmp_path: Path):
        nbmerge.average([checkpoint, checkpoint], tmp_path / "out", hf_upload_path="me/mean")
        card = hub.repositories["me/mean"].branches["main"]["README.md"].decode()
        assert "the average of 2 checkpoints" in card
        assert "training step" not in card

    def test_the_merger_objects_upload_as_verls_do(self, hub: Hub, checkpoint: Path, tmp_path: Path):
        config = nbmerge.ModelMergerConfig(
            backend="fsdp", local_dir=str(checkpoint), target_dir=str(tmp_path / "out"), hf_upload_path="me/verl",
            private=True,
        )  # fmt: skip
        report = nbmerge.FSDPModelMerger(config).merge_and_save()
        assert report.pushed is not None
        assert hub.repositories["me/verl"].private
        assert nbmerge.FSDPModelMerger(config).upload_to_huggingface().repo_id == "me/verl"
        nowhere = nbmerge.ModelMergerConfig(local_dir=str(checkpoint))
        assert_says(refusal(OptionError, nbmerge.BaseModelMerger(nowhere).upload_to_huggingface), "nowhere to upload")

    def test_the_magic(self, hub: Hub, model: Path, shell: InteractiveShell):
        report = shell.run_line_magic("push_ckpt", f"'{model}' me/magic --private")
        assert isinstance(report, nbmerge.PushReport)
        html = report._repr_html_()
        assert html is not None
        assert "me/magic" in html
        assert hub.repositories["me/magic"].private

    def test_the_command_line(self, hub: Hub, model: Path, capsys: pytest.CaptureFixture[str]):
        assert cli.main(["push", str(model), "me/cli"]) == 0
        assert "uploaded" in capsys.readouterr().out
        assert cli.main(["push", str(model), "strangers/cli"]) == 1
        assert "does not belong" in capsys.readouterr().err


def test_hostile_words_of_a_receipt_make_no_html_in_the_card(hub: Hub, checkpoint: Path, tmp_path: Path):
    from nbmerge.export.model_card import model_card

    nbmerge.merge(checkpoint, tmp_path / "out")
    receipt = json.loads((tmp_path / "out" / RECEIPT_NAME).read_text())
    receipt["fills"] = [{"tensor": "<script>alert(1)</script>|x"}]
    card = model_card(tmp_path / "out", "me/x", receipt, None)
    assert "<script>" not in card
    assert "nothing further was checked" in card


def test_the_base_model_is_named_where_the_config_names_one(model: Path):
    from nbmerge.export.model_card import base_model_of

    config = json.loads((model / "config.json").read_text())
    for said, want in (("Qwen/Qwen3-8B", "Qwen/Qwen3-8B"), ("/home/me/base", None), (str(model), None), (7, None)):
        (model / "config.json").write_text(json.dumps({**config, "_name_or_path": said}))
        assert base_model_of(model) == want


def test_the_card_names_a_base_model_that_the_hub_has_or_the_user_names(hub: Hub, model: Path):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "_name_or_path": "models/base"}))
    branch = hub.repositories.setdefault("me/model", Repository(private=False)).branches["main"]
    push(hub, model)
    assert b"base_model" not in branch["README.md"]
    hub.repositories["models/base"] = Repository(private=False)
    push(hub, model, overwrite_card=True)
    assert b"base_model: models/base\n" in branch["README.md"]
    push(hub, model, overwrite_card=True, base_model="Qwen/Qwen3-8B")
    assert b"base_model: Qwen/Qwen3-8B\n" in branch["README.md"]
