"""Whole and clean model directories, as `save_pretrained` writes them, for tests to damage."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from nbmerge.validation.findings import ERROR, Check, Finding, Outcome
from nbmerge.validation.subject import INDEX_NAME, Subject
from tests.support import scratch

# One of each kind: plain, tied, experts under other names in memory, fp32 biases, 1 + norm, a critic, a vision tower.
CLEAN = ("llama", "qwen2_tied", "qwen3_moe", "deepseek_v3", "gemma2", "qwen2_value", "qwen3_vl")
END = 0  # the id that ends text, in the tokenizer and in every config


def clean(directory: Path, family: str, dtype: str = "float32", *, shards: bool = False) -> Path:
    """A model of the family with config, generation config and tokenizer that agree. shards: in several files."""
    shutil.copytree(_made(family, dtype, shards), directory)
    return directory


@cache
def _made(family: str, dtype: str, shards: bool) -> Path:
    from tests.support.models import tiny_model

    directory = scratch.new_directory("clean")
    tiny_model(family, dtype).save_pretrained(directory, max_shard_size="4KB" if shards else "5GB")
    write_tokenizer(directory)
    ends = {"eos_token_id": END, "pad_token_id": None, "bos_token_id": None}
    config = json.loads((directory / "config.json").read_text())
    edit_json(directory / "config.json", **ends)
    if "text_config" in config:
        edit_json(directory / "config.json", text_config={**config["text_config"], **ends})
    if (directory / "generation_config.json").exists():
        edit_json(directory / "generation_config.json", **ends)
    return directory


def write_tokenizer(directory: Path, size: int = 37, *, chat_template: str | None = None) -> None:
    """A real tokenizer of this many tokens, the first of which ends text."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    tokens = ["<|endoftext|>", *"Thecapitlofrns Ġ", *(f"<extra{i}>" for i in range(size))]
    vocab = {token: i for i, token in enumerate(list(dict.fromkeys(tokens))[:size])}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    made.chat_template = chat_template
    made.save_pretrained(directory)


def edit_json(path: Path, **changes: Any) -> None:
    """Sets keys of a JSON object; a key whose value is `...` is removed."""
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def edit_index(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Changes the content of the index in place."""
    content = json.loads((directory / INDEX_NAME).read_text())
    change(content)
    (directory / INDEX_NAME).write_text(json.dumps(content))


def edit_tensors(directory: Path, change: Callable[[dict[str, Any]], Any], file: str = "model.safetensors") -> None:
    """Changes the tensors of a file, a dict by name, in place."""
    from safetensors.torch import load_file, save_file

    tensors = {name: tensor.clone() for name, tensor in load_file(directory / file).items()}
    change(tensors)
    save_file(tensors, directory / file, metadata={"format": "pt"})


def write_raw(path: Path, header: bytes, data: bytes = b"") -> None:
    """A safetensors file of this header and these bytes, right or wrong."""
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)


def run(check: Check, directory: Path, **options: Any) -> Outcome:
    """The outcome of one check of the directory. A finding must say what, and how to mend it."""
    outcome = check.run(Subject.of(directory, **options))
    assert isinstance(outcome, Outcome)
    assert outcome.said
    for finding in outcome.findings:
        assert finding.what
        assert finding.fix
        assert finding.subject
    return outcome


def only(outcome: Outcome, what: str, severity: str = ERROR) -> Finding:
    """The one finding of an outcome, whose sentence has these words."""
    assert [finding.what for finding in outcome.findings if what not in finding.what] == []
    (finding,) = outcome.findings
    assert finding.severity == severity
    return finding


def sentences(outcome: Outcome) -> Sequence[str]:
    """What the findings say, each once."""
    return list(dict.fromkeys(finding.what for finding in outcome.findings))
