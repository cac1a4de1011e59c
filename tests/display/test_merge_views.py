from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from nbmerge.display.model import ATTENTION, View
from nbmerge.display.views import view_of
from nbmerge.dtypes import BY_NAME
from nbmerge.errors import Problem
from nbmerge.geometry import Box
from nbmerge.layout import Drift, SourceFile
from nbmerge.naming.notes import Drop, Filled, Tie, Trim
from nbmerge.options import MergeOptions
from nbmerge.plan import CastNote, OutputFile

from .objects import checkpoint, plan, report

_DRIFT = (
    Drift("model.norm.weight", (0, 1), Box((0,), (5,)), (3,)),
    Drift("model.norm.weight", (2, 3), Box((5,), (5,)), (5,)),
)


def _facts(view: View) -> dict[str, str]:
    return {fact.label: fact.value for fact in view.facts}


def _tables(view: View) -> dict[str, list[list[str]]]:
    return {
        table.title or section.title: [[cell.text for cell in row] for row in table.rows]
        for section in view.sections
        for table in section.tables
    }


def test_a_plan_says_what_it_will_write_and_what_it_needs() -> None:
    view = view_of(plan())
    assert view.sentence == "will write 14 tensors, 11.7 kB, of Qwen2ForCausalLM to 1 safetensors file"
    facts = _facts(view)
    assert facts["peak memory"] == "67.1 MB at most: 4 workers, 8.39 MB at a time each"
    assert facts["execution"] == "threads: bytes are copied from file to file"
    assert facts["dtype"] == "bfloat16, as stored"
    assert facts["bytes"] == "17.2 kB (17,211 bytes) in all files"
    assert _tables(view)["Files to write"][0][:3] == ["model.safetensors", "14", "12.9 kB"]


def test_a_plan_with_problems_says_that_nothing_will_be_written() -> None:
    view = view_of(plan(problems=(Problem("a tensor is missing", fix="copy it"),)))
    assert view.sentence == "cannot be carried out: 1 problem; nothing will be written"
    assert view.alerts[0].what == "a tensor is missing"
    assert view.code == ()


def test_casts_drops_ties_unloaded_and_edits_are_each_listed() -> None:
    bf16, f32 = BY_NAME["bfloat16"], BY_NAME["float32"]
    view = view_of(
        plan(
            casts=tuple(CastNote(f"l.{i}.w", f32, bf16) for i in range(5)),
            drops=(Drop("rotary_emb.inv_freq", "a buffer"),),
            ties=(Tie("lm_head.weight", "model.embed_tokens.weight", None, None),),
            unloaded=("mtp.0.weight", "mtp.1.weight"),
            config_edits={"dtype": ("float32", "bfloat16")},
            renamed=30,
        )
    )
    assert _tables(view) | {"Files to write": []} == {
        "Files to write": [],
        "5 casts: rounded to the nearest, ties to even": [["float32 → bfloat16", "5", "l.{0..4}.w"]],
        "1 drop: in the checkpoint and not written": [["rotary_emb.inv_freq", "1", "a buffer"]],
        "1 tie: not written, because another tensor holds the same values": [
            ["lm_head.weight", "1", "model.embed_tokens.weight"]
        ],
        "2 unloaded: written, and known to Qwen2ForCausalLM, which does not load them": [["mtp.{0..1}.weight", "2"]],
        "1 config edit: keys of config.json that the merge changes": [["dtype", "float32", "bfloat16"]],
    }
    assert (
        _facts(view)["names"]
        == "as published checkpoints have them; 30 tensors renamed or cut from transformers' names in memory"
    )


_VALUE_HEAD = "Megatron's value head has no bias; the class expects one"
_CHANGED = plan(
    dialect="megatron (qwen2)",
    renamed=14,
    trims=tuple(
        Trim(name, source, 152, 151)
        for name, source in (
            ("model.embed_tokens.weight", "embedding.word_embeddings.weight"),
            ("lm_head.weight", "output_layer.weight"),
        )
    ),
    fills=(
        Filled("score.bias", "zeros", _VALUE_HEAD),
        *(Filled(f"visual.blocks.{i}.w", "/models/base", "the checkpoint does not hold it") for i in range(24)),
    ),
    base_files=(SourceFile(Path("/models/base/model.safetensors"), 1_000, 0, "weights"),),
    unloaded=("model.layers.4.enorm.weight",),
)


@pytest.mark.parametrize("made", [_CHANGED, report(_CHANGED), report(_CHANGED, target=None)])
def test_trims_and_fills_are_counted_in_the_sentence_and_listed(made: object) -> None:
    view = view_of(made)
    assert view.sentence.endswith(
        "; 2 trimmed of padding, 1 filled with zeros, 24 taken from the base model, 1 not loaded by the class"
    )
    tables = _tables(view)
    assert tables["2 trims: rows of the padded vocabulary that are cut off"] == [
        ["model.embed_tokens.weight", "rows 151:152 of embedding.word_embeddings.weight are padding", "151 of 152"],
        ["lm_head.weight", "rows 151:152 of output_layer.weight are padding", "151 of 152"],
    ]
    assert tables["25 fills: not in the checkpoint, and written"] == [
        ["score.bias", "1", "zeros", _VALUE_HEAD],
        ["visual.blocks.{0..23}.w", "24", "/models/base", "the checkpoint does not hold it"],
    ]
    assert _facts(view)["base model"] == "/models/base: 24 tensors from 1 file"


def test_a_plan_says_whose_names_the_sources_have() -> None:
    assert _facts(view_of(_CHANGED))["names"] == (
        "as published checkpoints have them; 14 tensors renamed or cut from megatron (qwen2) names"
    )


def test_many_trims_and_fills_are_cut_and_their_number_is_said() -> None:
    fills = tuple(Filled(f"module_{i:x}", "zeros", "absent") for i in range(200))
    trims = tuple(Trim(f"head_{i:x}", "w", 9, 7) for i in range(200))
    changes = next(s for s in view_of(plan(fills=fills, trims=trims)).sections if s.title == "Changes")
    assert changes.summary == "200 trims, 200 fills"
    assert [len(table.rows) + table.hidden for table in changes.tables] == [200, 200]
    assert changes.tables[1].cut == "… 184 of 200 rows not shown; all are in .fills"


@pytest.mark.parametrize("made", [plan(drift=_DRIFT), report(drift=_DRIFT), report(plan(drift=_DRIFT), target=None)])
def test_drift_is_an_alert_that_says_which_copy_is_written(made: object) -> None:
    view = view_of(made)
    (alert,) = view.alerts
    assert alert.kind == ATTENTION
    assert alert.what == "2 copies of 1 tensor differ between ranks; the lowest rank's is written"
    assert _tables(view)["Drift"] == [
        ["model.norm.weight", "ranks 0 and 1", "[0:5]", "[3]"],
        ["model.norm.weight", "ranks 2 and 3", "[5:10]", "[5]"],
    ]


def test_options_and_overrides_of_the_user_are_shown() -> None:
    source = checkpoint(overrides={"mesh_shape": [4, 2]})
    view = view_of(plan(source, options=MergeOptions(dtype="bfloat16", max_shard_size="1GB")))
    assert _facts(view)["options"] == "dtype=bfloat16, max_shard_size=1GB"
    section = next(section for section in view.sections if section.title == "Overrides")
    assert [(fact.label, fact.value) for fact in section.facts] == [("mesh_shape", "[4, 2]")]


def test_many_files_are_cut_and_config_stays_in_sight() -> None:
    source = plan()
    files = tuple(OutputFile(f"model-{i:05}-of-00163.safetensors", b"", source.files[0].tensors) for i in range(163))
    view = view_of(replace(source, files=files))
    (table,) = view.sections[0].tables
    assert len(table.rows) + table.hidden == 165
    assert table.rows[-1][0].text == "tokenizer.json"
    assert view.sections[0].summary.startswith("165 files, ")


def test_a_report_says_what_was_done_how_fast_and_what_was_proved() -> None:
    view = view_of(report(reused=("model-00001-of-00002.safetensors",)))
    assert view.sentence == "merged 14 tensors, 11.7 kB, of Qwen2ForCausalLM into /out and verified them"
    facts = _facts(view)
    assert facts["written"] == "5.00 MB (5,000,000 bytes) in 2.50 s, 2.00 MB/s"
    assert facts["verified"].startswith("re-read 1 file")
    assert facts["reused"].startswith("1 file of an earlier, interrupted run: model-00001-of-00002")
    assert facts["receipt"] == "nbmerge_receipt.json"


def test_a_report_ends_with_the_lines_that_load_the_model() -> None:
    assert view_of(report(target=Path("/my out/it's"))).code == (
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        'model = AutoModelForCausalLM.from_pretrained("/my out/it\'s")',
        'tokenizer = AutoTokenizer.from_pretrained("/my out/it\'s")',
    )


@pytest.mark.parametrize(
    ("model_class", "loader"),
    [
        ("Qwen2ForTokenClassification", "AutoModelForTokenClassification"),
        ("Qwen3VLForConditionalGeneration", "AutoModelForImageTextToText"),
        ("MyOwnNet", "MyOwnNet"),
    ],
)
def test_the_class_decides_what_loads_the_model(model_class: str, loader: str) -> None:
    code = view_of(report(plan(model_class=model_class, side_files=()))).code
    assert code == (f"from transformers import {loader}", f"model = {loader}.from_pretrained('/out')")


def test_a_dry_run_says_that_nothing_was_written() -> None:
    view = view_of(report(target=None, verification=None, receipt=None))
    assert view.title == "Dry run"
    assert view.sentence.startswith("nothing was written; the same merge without dry_run will write 14")
    assert "peak memory" in _facts(view)
    assert view.code == ()
