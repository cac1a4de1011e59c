"""The magics in a real shell, on a small real checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from IPython.core.completer import provisionalcompleter, rectify_completions
from IPython.core.interactiveshell import InteractiveShell

import nbmerge
from nbmerge.errors import PlanError, Problem


@pytest.fixture(scope="session")
def checkpoint_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """World size 1, plain tensors, beside the config of a tiny Qwen2."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    directory = tmp_path_factory.mktemp("run") / "my actor"
    config = Qwen2Config(
        vocab_size=257, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, architectures=["Qwen2ForCausalLM"],
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config).to(torch.bfloat16)
    config.save_pretrained(directory / "huggingface")
    torch.save(dict(model.state_dict()), directory / "model_world_size_1_rank_0.pt")
    return directory


def _run(shell: InteractiveShell, cell: str) -> Any:
    result = shell.run_cell(cell)
    result.raise_error()
    return result.result


def _completions(shell: InteractiveShell, code: str) -> list[str]:
    """As a kernel answers JupyterLab's `complete_request`: the code with each completion put in."""
    with provisionalcompleter():
        found = list(rectify_completions(code, shell.Completer.completions(code, len(code))))
    return [code[: one.start] + one.text + code[one.end :] for one in found]


def test_merge_ckpt_writes_a_model_that_transformers_loads(shell: InteractiveShell, checkpoint_dir: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    shell.user_ns["root"] = checkpoint_dir.parent
    report = _run(shell, "%merge_ckpt $root/'my actor' --target-dir=out  # a comment")
    assert isinstance(report, nbmerge.MergeReport)
    assert report.target is not None and report.target.resolve() == Path("out").resolve()
    source = torch.load(checkpoint_dir / "model_world_size_1_rank_0.pt", weights_only=True)
    loaded = AutoModelForCausalLM.from_pretrained("out", dtype="auto").state_dict()
    assert loaded.keys() == source.keys()
    assert all(torch.equal(loaded[name], source[name]) and loaded[name].dtype == torch.bfloat16 for name in source)


def test_inspect_returns_a_checkpoint_that_merge_takes_as_an_object(
    shell: InteractiveShell, checkpoint_dir: Path
) -> None:
    shell.user_ns["path"] = checkpoint_dir
    assert isinstance(_run(shell, "ckpt = %inspect_ckpt $path\nckpt"), nbmerge.Checkpoint)
    plan = _run(shell, "import nbmerge\nplan = nbmerge.plan_merge(ckpt, dtype='float32')\nplan")
    assert _run(shell, "%inspect_ckpt $ckpt") is shell.user_ns["ckpt"]
    report = _run(shell, "%merge_ckpt $plan --target_dir {'o' + 'ut'}")
    assert report.plan is plan
    dry = _run(shell, "%merge_ckpt {ckpt} --dry_run --max_shard_size 1MB")
    assert dry.target is None and dry.plan.checkpoint is shell.user_ns["ckpt"]


def test_local_dir_is_accepted_as_on_the_command_line(shell: InteractiveShell, checkpoint_dir: Path) -> None:
    report = _run(shell, f"%merge_ckpt --target_dir out --local_dir '{checkpoint_dir}'")
    assert report.target is not None


def test_options_may_stand_before_the_path(shell: InteractiveShell, checkpoint_dir: Path) -> None:
    assert _run(shell, f"%merge_ckpt --dry_run --backend fsdp '{checkpoint_dir}'").target is None


def test_a_magic_in_a_function_sees_its_variables(shell: InteractiveShell, checkpoint_dir: Path) -> None:
    cell = f"def inspect(where):\n    found = %inspect_ckpt $where\n    return found\ninspect({str(checkpoint_dir)!r})"
    assert isinstance(_run(shell, cell), nbmerge.Checkpoint)


def test_placements_can_be_a_mapping_of_the_notebook(shell: InteractiveShell, checkpoint_dir: Path) -> None:
    found = _run(
        shell, f"%inspect_ckpt '{checkpoint_dir}' --mesh_shape 1 --placements {{\"*\": [\"Replicate\"]}}"
    )  # fmt: skip
    assert found.overrides["placements"] == {"*": ["Replicate"]}


@pytest.mark.parametrize("magic", ["merge_ckpt", "inspect_ckpt"])
def test_help_prints_the_options_and_returns_nothing(
    shell: InteractiveShell, magic: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(shell, f"%{magic} --help") is None
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: %{magic} PATH [options]")
    assert "--mesh_shape" in printed and f"%{magic} global_step_100/actor" in printed
    assert shell.object_inspect(f"%{magic}")["docstring"].startswith(f"usage: %{magic}")


def test_nbmerge_lists_the_magics_with_an_example_each(
    shell: InteractiveShell, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(shell, "%nbmerge") is None
    printed = capsys.readouterr().out
    assert "%merge_ckpt global_step_100/actor --target_dir merged" in printed
    assert "%inspect_ckpt global_step_100/actor" in printed


@pytest.mark.parametrize(
    ("line", "what", "fix"),
    [
        ("%merge_ckpt nowhere --target_dir out", "there is no such directory", "pass the directory that holds"),
        ("%merge_ckpt $ckptt --target_dir out", "the notebook has no variable 'ckptt'", "write $ckpt"),
        ("%merge_ckpt", "arguments are required: PATH", "%merge_ckpt --help lists the options"),
        (
            "%merge_ckpt a --traget-dir=b",
            "unrecognized arguments: --traget_dir=b; did you mean --target_dir?",
            "--help",
        ),
        ("%merge_ckpt a b", "unrecognized arguments: b", "%merge_ckpt --help lists the options"),
        ("%merge_ckpt a --local_dir b", "unrecognized arguments: a", "%merge_ckpt --help lists the options"),
        ("%merge_ckpt a --workers {print}", "invalid int value: '<builtin_function_or_method>'", "--help"),
        ("%merge_ckpt {print} --dry_run", "a builtin_function_or_method is no checkpoint", "pass a path"),
        ("%inspect_ckpt {[]}", "a list is no checkpoint", "pass a path"),
    ],
)
def test_failures_raise_and_are_shown_in_a_few_lines_that_end_with_the_fix(
    shell: InteractiveShell, line: str, what: str, fix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shell.user_ns["ckpt"] = "x"
    result = shell.run_cell(line)
    assert isinstance(result.error_in_exec, nbmerge.NbmergeError)
    shown = capsys.readouterr().out.strip().splitlines()
    assert what in shown[0]
    assert shown[-1].strip().startswith("fix:") and fix in shown[-1]
    assert len(shown) <= 12 and "Traceback" not in "".join(shown)


def test_an_existing_target_is_refused(
    shell: InteractiveShell, checkpoint_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("out").mkdir()
    Path("out/thesis.txt").touch()
    result = shell.run_cell(f"%merge_ckpt '{checkpoint_dir}' --target_dir out")
    assert isinstance(result.error_in_exec, nbmerge.TargetError)
    assert "TargetError" in capsys.readouterr().out


def test_a_long_error_keeps_its_first_lines_and_its_fix() -> None:
    problems = [Problem(f"finding {i}", why=f"cause {i}", fix="do\x1b[2Jthis") for i in range(20)]
    lines = PlanError("the plan is bad", problems=problems)._render_traceback_()
    assert len(lines) == 12
    assert lines[0] == "PlanError: the plan is bad"
    assert lines[8] == "… 50 more lines in the error's text"
    assert lines[-1] == "  fix: do\\x1b[2Jthis"


def test_an_interrupt_passes_through(shell: InteractiveShell, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("nbmerge.api.merge", interrupted)
    assert isinstance(shell.run_cell("%merge_ckpt a --target_dir b").error_in_exec, KeyboardInterrupt)


def test_what_is_not_needed_any_more_is_said(
    shell: InteractiveShell, checkpoint_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _run(shell, f"%merge_ckpt '{checkpoint_dir}' --dry_run --use_cpu_initialization")
    assert "--use_cpu_initialization is not needed any more" in capsys.readouterr().out


def test_tab_completes_in_a_real_shell(shell: InteractiveShell) -> None:
    Path("my ckpt").mkdir()
    shell.user_ns["ckpt"] = SimpleNamespace()
    assert _completions(shell, "%merge_ckpt x --target") == ["%merge_ckpt x --target_dir"]
    assert _completions(shell, "r = %merge_ckpt x --backend=f") == ["r = %merge_ckpt x --backend=fsdp"]
    assert _completions(shell, "a = 1\n%inspect_ckpt m") == ["a = 1\n%inspect_ckpt my\\ ckpt/"]
    assert _completions(shell, '%merge_ckpt "my') == ['%merge_ckpt "my ckpt/']
    assert _completions(shell, "%merge_ckpt $ck") == ["%merge_ckpt $ckpt"]
    assert _completions(shell, "%merge_ckpt x \\\n  --dia") == ["%merge_ckpt x \\\n  --dialect"]
    assert "%merge_ckpt" in _completions(shell, "%merge_c")
    assert shell.complete(None, "%merge_ckpt x --dialect ")[1] == ["hub", "transformers"]


def test_other_lines_complete_as_before(shell: InteractiveShell) -> None:
    shell.user_ns["merge_ckpt_of_mine"] = 1
    assert "merge_ckpt_of_mine" in _completions(shell, "merge_ckpt_of")


def test_loading_twice_completes_once(shell: InteractiveShell) -> None:
    _run(shell, "%reload_ext nbmerge")
    assert _completions(shell, "%merge_ckpt x --target") == ["%merge_ckpt x --target_dir"]


def test_a_kernel_sends_the_short_error_and_both_forms_of_a_display(checkpoint_dir: Path, tmp_path: Path) -> None:
    import nbformat
    from nbclient import NotebookClient

    here = tmp_path / "here"
    shutil.copytree(checkpoint_dir, here)
    cells = ["%load_ext nbmerge", "%inspect_ckpt here", "%merge_ckpt ./hree --target_dir out"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    NotebookClient(notebook, allow_errors=True, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown, failed = notebook.cells[1].outputs[0].data, notebook.cells[2].outputs[0]
    assert shown["text/plain"].startswith("Checkpoint: FSDP") and '<div class="nbm"' in shown["text/html"]
    assert failed.ename == "NotACheckpointError"
    assert len(failed.traceback) <= 12 and failed.traceback[-1].startswith("  fix:")


def test_a_cell_takes_options_from_its_lines(shell: InteractiveShell, checkpoint_dir: Path) -> None:
    shell.user_ns.update(ckpt=nbmerge.open_checkpoint(checkpoint_dir), out="merged here")
    body = [
        "target_dir = $out  # as an object",
        "",
        "# a comment",
        "--dtype float16",
        "overwrite",
        "max-shard-size=1MB",
    ]
    report = _run(shell, "\n".join(["%%merge_ckpt $ckpt", *body]))
    assert isinstance(report, nbmerge.MergeReport)
    options = report.plan.options
    assert (options.dtype, options.max_shard_size) == ("float16", "1MB")
    assert report.target is not None and report.target.name == "merged here"
    assert isinstance(_run(shell, f"%%merge_ckpt\nlocal_dir '{checkpoint_dir}'\ndry_run"), nbmerge.MergeReport)


def test_a_mistake_in_a_cells_body_is_an_error(shell: InteractiveShell, checkpoint_dir: Path) -> None:
    with pytest.raises(nbmerge.OptionError, match="--dtpye"):
        _run(shell, f"%%merge_ckpt '{checkpoint_dir}'\ntarget_dir = out\ndtpye = float16")
    assert not Path("out").exists()


def test_options_are_completed_in_a_cells_body(shell: InteractiveShell) -> None:
    cell = "%%merge_ckpt somewhere\n"
    assert f"{cell}max_shard_size" in _completions(shell, f"{cell}max")
    assert f"{cell}--max_shard_size" in _completions(shell, f"{cell}--max")
    assert f"{cell}dtype = bfloat16" in _completions(shell, f"{cell}dtype = bf")
    assert f"{cell}backend megatron" in _completions(shell, f"{cell}backend meg")
    assert "print(1)\nmax_shard_size" not in _completions(shell, "print(1)\nmax")


def test_a_stop_is_told_in_a_line(
    shell: InteractiveShell, checkpoint_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("nbmerge.api.merge", stopped)
    with pytest.raises(KeyboardInterrupt, match="the same line takes the merge up again") as caught:
        _run(shell, f"%merge_ckpt '{checkpoint_dir}' --target_dir out")
    (line,) = caught.value._render_traceback_()  # type: ignore[attr-defined]
    assert line.startswith("KeyboardInterrupt: stopped; nothing stands under the target's name")
