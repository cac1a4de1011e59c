"""What is shown of an upload, as text and as HTML."""

from __future__ import annotations

from dataclasses import replace

from nbmerge import PushReport
from nbmerge.display.html import render_html
from nbmerge.display.model import ATTENTION
from nbmerge.display.text import render_text
from nbmerge.display.views import view_of

_HOSTILE = "a.<img src=x onerror=alert(1)>.</style><script>alert(2)</script>.\x1b[31m\u202e'\"&"
REPORT = PushReport(
    "me/model", "main", "https://huggingface.co/me/model", "0123abcd", ("config.json", "model.safetensors"), 5_000,
    ("notes.pdf",), "written", seconds=2.5,
)  # fmt: skip


def test_text_and_html_say_where_it_is_what_went_and_what_stayed():
    view = view_of(REPORT)
    assert view.sentence == "uploaded 2 files, 5.00 kB, to me/model"
    assert view.alerts == ()
    for shown in (render_text(view), render_html(view)):
        for words in (REPORT.url, "0123abcd", "written from the receipt", "notes.pdf", "model.safetensors", "2.50 s"):
            assert words in shown


def test_weights_that_were_left_in_the_repository_are_an_alert_with_the_remedy():
    (alert,) = view_of(replace(REPORT, stale=("old.safetensors",))).alerts
    assert alert.kind == ATTENTION
    assert "old.safetensors" in alert.what
    assert "--replace" in dict(alert.details)["fix"]
    deleted = view_of(replace(REPORT, removed=("old.safetensors",)))
    assert deleted.alerts == ()
    assert "old.safetensors deleted in the same commit" in render_text(deleted)


def test_names_from_a_directory_and_a_repository_make_no_html():
    hostile = replace(
        REPORT, repo_id=_HOSTILE, revision=_HOSTILE, url=_HOSTILE, files=(_HOSTILE,) * 900,
        left_out=(_HOSTILE,) * 900, stale=(_HOSTILE,) * 900,
    )  # fmt: skip
    html, text = hostile._repr_html_(), repr(hostile)
    assert html is not None
    assert "<script>alert" not in html and "<img" not in html
    assert not {"\x1b", "\u202e"} & {*html, *text}
    assert len(html.encode()) <= 30_000
    assert "880 of 900 files not shown" in text


def test_the_lines_that_load_it_fit_the_model():
    critic = view_of(replace(REPORT, architecture="Qwen2ForTokenClassification", revision="v2")).code
    assert critic[-1] == "model = AutoModelForTokenClassification.from_pretrained('me/model', revision='v2')"
    split = view_of(replace(REPORT, architecture="Qwen2ForCausalLM", files=("lora_adapter/adapter_config.json",))).code
    assert split[-1] == "model = PeftModel.from_pretrained(model, 'me/model', subfolder='lora_adapter')"
    assert view_of(replace(REPORT, architecture="MyOwnThing")).code == ()
