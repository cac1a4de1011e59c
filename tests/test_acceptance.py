"""Real checkpoints, each with the truth beside it: those in tests/data, and more where the machine has them.

NBMERGE_CHECKPOINTS names a directory with a folder for each further case. A case.json holds
    source   the checkpoint's directory, `ckpt` by default
    options  keywords of nbmerge.merge; values that begin with ./ are paths in the folder
    truth    a directory of safetensors files to equal in names, dtypes, shapes and bytes
    adapter  a directory of the adapter to equal, tensors and config
    error    or, instead of both: words that the refusal must contain
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

import nbmerge
from nbmerge import NbmergeError
from tests.support.messages import assert_says
from tests.support.results import assert_same, saved_bits

VARIABLE = "NBMERGE_CHECKPOINTS"
COMMITTED = sorted(path.parent for path in (Path(__file__).parent / "data").glob("*/case.json"))


def further_cases() -> list[Path]:
    root = os.environ.get(VARIABLE)
    found = sorted(Path(root).glob("*/case.json")) if root else []
    return [path.parent for path in found]


@pytest.mark.parametrize("folder", COMMITTED, ids=lambda folder: folder.name)
def test_a_checkpoint_of_another_version_is_merged_bit_by_bit(folder: Path, tmp_path: Path):
    merged_or_refused(folder, tmp_path)


@pytest.mark.skipif(not further_cases(), reason=f"{VARIABLE} names no directory of checkpoints with their truth")
@pytest.mark.parametrize("folder", further_cases() or [None], ids=lambda folder: folder.name if folder else "none")
def test_a_real_checkpoint_is_merged_bit_by_bit_or_refused_in_words(folder: Path, tmp_path: Path):
    merged_or_refused(folder, tmp_path)


def merged_or_refused(folder: Path, tmp_path: Path) -> None:
    case = json.loads((folder / "case.json").read_text())
    options: dict[str, Any] = {
        key: str(folder / value) if isinstance(value, str) and value.startswith("./") else value
        for key, value in case.get("options", {}).items()
    }
    source, out = folder / case.get("source", "ckpt"), tmp_path / "out"
    if "error" in case:
        with pytest.raises(NbmergeError) as caught:
            nbmerge.merge(source, out, **options)
        assert_says(str(caught.value), *case["error"])
        assert not out.exists()
        return
    nbmerge.merge(source, out, **options)
    if "truth" in case:
        assert_same(saved_bits(out), saved_bits(folder / case["truth"]))
    if "adapter" in case:
        got, want = out / "lora_adapter", folder / case["adapter"]
        assert_same(saved_bits(got), saved_bits(want))
        assert_same_adapter(*(json.loads((each / "adapter_config.json").read_text()) for each in (got, want)))


def assert_same_adapter(got: dict[str, Any], want: dict[str, Any]) -> None:
    """What decides the arithmetic and where it is applied."""
    for key in ("peft_type", "task_type", "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern"):
        assert got.get(key) == want.get(key), key
    assert sorted(got["target_modules"]) == sorted(want["target_modules"])
