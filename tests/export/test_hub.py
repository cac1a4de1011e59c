"""Uploads over the loopback device: what arrives is what was there, an interrupt costs nothing, errors say what to do.

The client's xet road needs the Hub's own storage and is not covered here.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from IPython.core.interactiveshell import InteractiveShell

import nbmerge
from nbmerge import HubError, NotACheckpointError, OptionError, VerificationError, cli
from nbmerge.export.contents import contents_of
from nbmerge.export.elsewhere import for_elsewhere
from nbmerge.export.model_card import base_model_of, model_card
from nbmerge.json_files import json_object
from nbmerge.receipt import RECEIPT_NAME
from tests.support.adapters import adapted, save_adapter_config, write_world
from tests.support.hub_server import _WHO, NARROW, READER, TOKEN, Hub, Repository
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


def without_receipt(found: dict[str, bytes]) -> dict[str, bytes]:
    """All but the receipt, which goes up without this machine's paths."""
    return {name: data for name, data in found.items() if name != RECEIPT_NAME}


def large_bytes(hub: Hub, directory: Path) -> int:
    """Bytes of the files that go up by the road for large ones."""
    sizes = contents_of(directory, json_object(directory / RECEIPT_NAME)).sizes()
    return sum(size for size in sizes.values() if size >= hub.large)


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
    assert set(pushed.files) == {*before, "README.md"}
    assert pushed.nbytes == sum(map(len, found.values())) + len(card.encode())
    assert without_receipt(found) == without_receipt(before)
    assert (pushed.card, pushed.revision, pushed.left_out) == ("written", "main", ())
    assert pushed.url == f"{hub.url}/me/model"
    assert len(hub.repositories["me/model"].commits) == 1
    assert hub.sent >= sum(len(data) for name, data in before.items() if name.endswith(".safetensors"))
    for words in ("library_name: transformers", "`Qwen2ForCausalLM`", "FSDP", "| training step | 40 |", "2 ranks"):
        assert words in card
    assert "base_model" not in card  # nothing names one


def test_the_receipt_goes_up_without_this_machines_paths(hub: Hub, checkpoint: Path, tmp_path: Path):
    nbmerge.average([checkpoint, checkpoint], tmp_path / "out", hf_model_config_path=checkpoint / "huggingface")
    before = content_of(tmp_path / "out")
    pushed = push(hub, tmp_path / "out")
    assert content_of(tmp_path / "out") == before
    sent = hub.repositories["me/model"].branches["main"][RECEIPT_NAME]
    assert RECEIPT_NAME in pushed.files
    assert str(tmp_path).encode() not in sent
    receipt, local = json.loads(sent), json.loads(before[RECEIPT_NAME])
    assert receipt["source"]["path"] == "…/run/global_step_40/actor"
    assert [each["path"] for each in receipt["source"]["averaged"]] == ["…/run/global_step_40/actor"] * 2
    assert (
        receipt["source"]["config_dir"]
        == receipt["options"]["hf_model_config_path"]
        == ("…/global_step_40/actor/huggingface")
    )
    assert {**receipt, "source": 0, "options": 0} == {**local, "source": 0, "options": 0}
    (tmp_path / "again").mkdir()
    downloaded(hub, "me/model", tmp_path / "again")
    (tmp_path / "again" / "README.md").unlink()
    assert nbmerge.validate(tmp_path / "again", checkpoint=[checkpoint, checkpoint], no_run=True, progress=False).ok


def test_a_config_that_names_a_directory_of_this_machine_is_told(hub: Hub, checkpoint: Path, tmp_path: Path):
    path = checkpoint / "huggingface" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "_name_or_path": str(tmp_path / "base")}))
    pushed = push(hub, nbmerge.merge(checkpoint, tmp_path / "out"))
    assert pushed.local_paths == ("config.json: _name_or_path",)
    assert "names a directory of this machine: config.json: _name_or_path" in repr(pushed)


@pytest.mark.parametrize(
    ("local", "public"),
    [
        ("/data/me/runs/grpo/step_2", "…/runs/grpo/step_2"),
        ("~/ckpt", "…/ckpt"),
        ("~me/ckpt", "…/ckpt"),
        ("../../me/a/b/c", "…/a/b/c"),
        ("/", "…/"),
        ("models/Qwen3-8B", "models/Qwen3-8B"),
    ],
)
def test_paths_are_cut_to_what_means_something_elsewhere(local: str, public: str):
    assert for_elsewhere({"options": {"base_model": local}}) == {"options": {"base_model": public}}


def test_paths_in_a_receipts_sentences_are_cut_too(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/home/me")
    said = {
        "source": {"path": "/home/me/my runs/step 2"},
        "drops": [{"reason": "found in /home/me/my runs/step 2/actor, not in '/data/x/y/z/w'; 3/4 of a/b"}],
        "config_edits": {"_name_or_path": {"from": "/home/me/q", "to": None}},
        "left_out": ["a/b"], "total_size": 3, "digests": None,
    }  # fmt: skip
    found = for_elsewhere(said)
    assert found["source"] == {"path": "…/my runs/step 2"}
    assert found["drops"] == [{"reason": "found in …/my runs/step 2/actor, not in '…/y/z/w'; 3/4 of a/b"}]
    assert found["config_edits"] == {"_name_or_path": {"from": "…/q", "to": None}}
    assert (found["left_out"], found["total_size"], found["digests"]) == (["a/b"], 3, None)


def test_a_receipt_that_cannot_be_read_stays_here(hub: Hub, model: Path):
    (model / RECEIPT_NAME).write_text("/home/me {")
    pushed = push(hub, model, force=True)
    assert RECEIPT_NAME in pushed.left_out
    assert RECEIPT_NAME not in hub.repositories["me/model"].branches["main"]


def test_an_upload_that_broke_off_goes_on_where_it_stopped(hub: Hub, checkpoint: Path, tmp_path: Path):
    nbmerge.merge(checkpoint, tmp_path / "merged", max_shard_size="1500B", dtype="float32")
    hub.large = 1000
    large = large_bytes(hub, tmp_path / "merged")
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
    assert without_receipt(found) == without_receipt(content_of(tmp_path / "merged"))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_process_that_is_stopped_in_the_middle_is_taken_up(
    hub: Hub, checkpoint: Path, tmp_path: Path, how: signal.Signals
):
    """A process of its own, with the client's real settings."""
    nbmerge.merge(checkpoint, tmp_path / "merged", max_shard_size="1500B", dtype="float32")
    hub.large = 1000
    large = large_bytes(hub, tmp_path / "merged")
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
    assert without_receipt(found) == without_receipt(content_of(tmp_path / "merged"))


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
    os.mkfifo(model / "merges.txt")
    belongs = {path.name for path in model.glob("*.safetensors")} | {"config.json", "generation_config.json"}
    report = push(hub, model)
    left = {"notes.pdf", ".env", "wandb/", "trainer_state.json", "training_args.bin", "merges.txt"}
    assert set(report.left_out) == left
    assert set(hub.repositories["me/model"].branches["main"]) == belongs | {"README.md"}
    assert "wandb/" in repr(report)


def test_a_link_out_of_the_directory_is_refused(hub: Hub, model: Path, tmp_path: Path):
    (tmp_path / "secret.json").write_text("{}")
    (model / "vocab.json").symlink_to(tmp_path / "secret.json")
    assert_says(refusal(OptionError, push, hub, model), "vocab.json is a link out of the directory", "fix:")
    (model / "vocab.json").unlink()
    (tmp_path / "adapter").mkdir()
    (model / "lora_adapter").symlink_to(tmp_path / "adapter")  # the adapter must not be missing in silence
    assert_says(refusal(OptionError, push, hub, model), "lora_adapter/ is a link to a directory", "fix:")
    assert "me/model" not in hub.repositories


@pytest.mark.parametrize("when", ["checked", "uploaded"])
def test_a_file_that_changes_meanwhile_is_told(hub: Hub, model: Path, monkeypatch: pytest.MonkeyPatch, when: str):
    """Of the same size, so that nothing but the time of its change tells it."""
    from huggingface_hub import HfApi

    def rewrite(api: HfApi, repo_id: str, *rest: object, **options: object) -> object:
        done = genuine(api, repo_id, *rest, **options)
        os.utime(model / "model.safetensors", ns=(1, 1))
        return done

    step = "list_repo_files" if when == "checked" else "create_commit"
    genuine = getattr(HfApi, step)
    monkeypatch.setattr(HfApi, step, rewrite)
    words = "changed since they were checked" if when == "checked" else "does not hold what was uploaded"
    assert_says(refusal(HubError, push, hub, model), words, "model.safetensors", "push again")
    assert len(hub.repositories["me/model"].commits) == (when == "uploaded")


def test_weights_that_another_push_added_meanwhile_are_told(hub: Hub, model: Path, monkeypatch: pytest.MonkeyPatch):
    from huggingface_hub import HfApi

    genuine = HfApi.create_commit

    def beside(api: HfApi, repo_id: str, *rest: object, **options: object) -> object:
        hub.repositories[repo_id].branches["main"]["model-00001-of-00002.safetensors"] = b"theirs"
        return genuine(api, repo_id, *rest, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(HfApi, "create_commit", beside)
    assert push(hub, model).stale == ("model-00001-of-00002.safetensors",)


def test_a_repository_that_somebody_made_public_meanwhile_gets_nothing(
    hub: Hub, model: Path, monkeypatch: pytest.MonkeyPatch
):
    from huggingface_hub import HfApi

    def public(api: HfApi, repo_id: str, **options: object) -> None:
        hub.repositories[repo_id] = Repository(private=False)

    monkeypatch.setattr(HfApi, "create_repo", public)
    assert_says(refusal(HubError, push, hub, model, private=True), "it is public", "fix:")
    assert hub.repositories["me/model"].branches["main"] == {}


def test_a_pull_request_is_pushed_to_and_no_branch_is_made_of_it(hub: Hub, model: Path):
    repository = hub.repositories["me/model"] = Repository(private=False)
    repository.branches["refs/pr/1"] = {}
    assert push(hub, model, revision="refs/pr/1").revision == "refs/pr/1"
    assert "model.safetensors" in repository.branches["refs/pr/1"]
    assert not any("/branch/" in asked for asked in hub.requests)


def test_the_client_is_asked_for_one_commit_and_names_are_no_patterns(hub: Hub, model: Path):
    """`upload_folder` takes patterns, and makes a commit every few minutes over xet."""
    repository = hub.repositories["me/model"] = Repository(private=False)
    repository.branches["main"] = {"*.safetensors": b"old", "a[1].bin": b"old", "keep.json": b"mine"}
    report = push(hub, model, replace=True)
    assert report.removed == ("*.safetensors", "a[1].bin")
    assert "keep.json" in repository.branches["main"]
    assert "model.safetensors" in repository.branches["main"]
    assert not {"*.safetensors", "a[1].bin"} & set(repository.branches["main"])
    assert len(repository.commits) == 1


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
    assert b"library_name: peft" in files["README.md"]
    assert "PeftModel.from_pretrained(base_model, 'me/model', subfolder='lora_adapter')" in repr(report)
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
    weights = model / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-100])  # since it was validated
    assert_says(refusal(VerificationError, push, hub, model, validation=proof), "model.safetensors", "not valid")
    weights.write_bytes(content)
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

    def test_roles_and_scopes_that_leave_room_are_not_refused(
        self, hub: Hub, model: Path, monkeypatch: pytest.MonkeyPatch
    ):
        """A reader of an organisation may write in a group of its repositories; a scope may be of such a group."""
        who = json.loads(json.dumps(_WHO[NARROW]))
        who["orgs"][0]["resourceGroups"] = [{"name": "group", "role": "write"}]
        scopes = who["auth"]["accessToken"]["fineGrained"]["scoped"]
        scopes.append({"entity": {"type": "resource-group", "name": "group"}, "permissions": ["repo.write"]})
        monkeypatch.setitem(_WHO, NARROW, who)
        assert push(hub, model, "team/x", token=NARROW).commit

    def test_a_full_storage(self, hub: Hub, model: Path):
        hub.answers["POST /api/repos/create"], hub.saying = 403, "Private repository storage limit reached;"
        assert_says(refusal(HubError, push, hub, model), "no room left", "storage limit reached", "billing")

    def test_a_large_file_that_is_refused_for_want_of_room(self, hub: Hub, model: Path):
        hub.large, hub.refused = 1000, "You have exceeded your storage limit"
        assert_says(refusal(HubError, push, hub, model), "no room left", "exceeded your storage", "billing")

    def test_what_is_no_name(self, hub: Hub, model: Path):
        assert_says(refusal(OptionError, push, hub, model, None), "a NoneType is no repository", "fix:")

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
        (tmp_path / "file").write_text("x")
        assert_says(refusal(NotACheckpointError, push, hub, tmp_path / "file"), "this is a file", "fix:")
        assert_says(refusal(NotACheckpointError, push, hub, checkpoint), "no weights", "merged first")
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
        out = out.parent / "my model"
        message = refusal(HubError, nbmerge.merge, checkpoint, out, hf_upload_path="me/model")
        assert_says(message, "the merge is complete, and not uploaded", f"python -m nbmerge push '{out}' me/model")
        assert nbmerge.validate(out, no_run=True, progress=False).ok

    def test_an_interrupt_of_the_upload_says_that_the_merge_is_complete(
        self, hub: Hub, checkpoint: Path, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ):
        from huggingface_hub import HfApi

        def interrupted(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(HfApi, "create_commit", interrupted)
        words = ["merge", "--local_dir", str(checkpoint), "--target_dir", str(out), "--hf_upload_path", "me/model"]
        assert cli.main([*words, "--private"]) == cli.INTERRUPTED
        again = f"to upload it: python -m nbmerge push {out} me/model --private"
        assert f"interrupted; the merge is complete; {again}" in capsys.readouterr().err

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
        assert "merged from the average of 2 checkpoints" in card
        assert "| training steps | 40 (0.5), 40 (0.5) |" in card
        assert hub.repositories["me/mean"].commits[0].startswith("Upload the average of 2 checkpoints")

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


def test_hostile_words_make_no_html_markdown_or_metadata_in_the_card(hub: Hub, checkpoint: Path, tmp_path: Path):
    hostile = "x`<script>alert(1)</script>|[click](http://evil)\nlicense: mit\n---\n# Mine"
    target = tmp_path / "out"
    nbmerge.merge(checkpoint, target)
    receipt = json.loads((target / RECEIPT_NAME).read_text())
    receipt["fills"] = [{"tensor": hostile}]
    receipt["casts"] = [{"tensor": "a", "from": hostile, "to": "b"}]
    receipt["lora"] = {"mode": hostile, "r": hostile}
    receipt["config_edits"] = {hostile: {}}
    receipt["source"]["layout"] = receipt["versions"]["nbmerge-ckpt"] = hostile
    config = json.loads((target / "config.json").read_text())
    hostile_config = {"architectures": [hostile], "dtype": hostile, "_name_or_path": f"a/b\n{hostile}"}
    (target / "config.json").write_text(json.dumps({**config, **hostile_config}))
    card = model_card(target, "me/x", receipt, None, base_model_of(target))
    assert "<script>" not in card
    assert not re.search(r"(?<!\\)\[click\]", re.sub(r"(?<!\\)`[^`]*`", "", card))
    assert not any(line.startswith(("license", "# Mine")) for line in card.splitlines())
    assert yaml.safe_load(card.split("---\n")[1]) == {"library_name": "transformers"}
    assert "nothing further was checked" in card


def test_the_card_says_of_dtypes_and_samples_what_is_true(model: Path):
    from safetensors.torch import load_file, save_file

    state = load_file(model / "model.safetensors")
    state["model.norm.weight"] = state["model.norm.weight"].float()  # beside the bfloat16 that config.json names
    save_file(state, model / "model.safetensors")
    source = {"path": "/run", "backend": "hf", "layout": "Hugging Face directory", "world_size": 1}
    found = nbmerge.validate(model, checks=["health"], no_run=True, progress=False)
    sampled = [replace(result, outcome=replace(result.outcome, share=0.01)) for result in found.results]
    found = replace(found, results=tuple(sampled))
    card = model_card(model, "me/x", {"source": source}, found)
    assert "| dtype | bfloat16, float32 |" in card
    assert "merged from a checkpoint (Hugging Face directory)" in card
    assert "written by" not in card
    assert "(of a sample of 1.0% of the bytes)" in card


@pytest.mark.parametrize("name", ["a/b\nlicense: mit", "/home/me/base", "base", "a/b: c", 7])
def test_a_base_model_that_the_hub_cannot_have_is_refused(hub: Hub, model: Path, name: object):
    assert_says(refusal(OptionError, push, hub, model, base_model=name), "is no model on the Hub", "fix:")
    assert hub.requests == []


@pytest.mark.parametrize(
    ("path", "step"),
    [
        ("/step_5/run/checkpoint-100", "100"), ("/run/global_step_1200/actor", "1,200"), ("/step_5/a/b/c", None),
        ("/run/checkpoint-9/pytorch_model_fsdp_0", "9"), ("run", None),
    ],
)  # fmt: skip
def test_the_step_is_that_of_the_nearest_directory(model: Path, path: str, step: str | None):
    card = model_card(model, "me/x", {"source": {"path": path}}, None)
    assert f"| training step | {step} |" in card if step else "training step" not in card


def test_the_base_model_is_named_where_the_config_names_one(model: Path):
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
    (model / "config.json").write_text(json.dumps({**config, "_name_or_path": "me/model"}))
    push(hub, model, overwrite_card=True)
    assert b"base_model" not in branch["README.md"]  # trained further, and not its own base
    push(hub, model, overwrite_card=True, base_model="Qwen/Qwen3-8B")
    assert b"base_model: Qwen/Qwen3-8B\n" in branch["README.md"]
