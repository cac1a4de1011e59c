"""It runs: transformers loads it, it computes finite logits, and they are those of the reference where one is given."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nbmerge.errors import NbmergeError, listing
from nbmerge.validation.computing import forward, generated, is_out_of_memory, prompt
from nbmerge.validation.expectation import names_unloaded
from nbmerge.validation.findings import Check, Finding, Outcome
from nbmerge.validation.loading import LoadedModel, load_model, obstacle
from nbmerge.validation.quiet import first_line, quiet_transformers
from nbmerge.validation.subject import Subject
from nbmerge.validation.tokenizer import load_tokenizer


class RunningCheck(Check):
    """transformers loads the model and it computes; with a reference, the same logits as that.

    reference: a Hugging Face directory; atol, rtol: as torch.testing.assert_close has them; new_tokens: how many are
    generated. Takes memory for the weights, and is not run where less is free.
    """

    name = "running"
    title = "transformers loads it, and its logits are finite"

    def __init__(
        self, reference: Path | None = None, *, atol: float = 0.0, rtol: float = 0.0, new_tokens: int = 12
    ) -> None:
        self._reference, self._new_tokens = reference, new_tokens
        self._atol, self._rtol = atol, rtol

    def run(self, subject: Subject) -> Outcome:
        """Loads the model, makes one pass, generates, and then does the pass with the reference."""
        if reason := obstacle(subject):
            return Outcome(said=reason, ran=False)
        with _undisturbed(), _rest_not_collected():
            try:
                loaded = load_model(subject.directory, trust_remote_code=subject.trust_remote_code)
            except Exception as error:  # noqa: BLE001 - a model directory can break a library in any way
                return _not_loaded(error)
            outcome, logits, tokens = self._computed(subject, loaded)
            del loaded  # before the reference is loaded, so that both are never in memory
            gc.collect()
            if logits is None or self._reference is None:
                return outcome
            return _joined(outcome, self._compared(self._reference, subject, logits, tokens))

    def _computed(self, subject: Subject, loaded: LoadedModel) -> tuple[Outcome, Any, list[int]]:
        """The outcome of loading, a pass and generation; the logits, None where there are none; the prompt's tokens."""
        findings = loaded.findings(names_unloaded(subject))
        model = loaded.model
        said = f"{type(model).__name__} in {str(model.dtype).removeprefix('torch.')}"
        if loaded.missing or loaded.mismatched:
            return Outcome(tuple(findings), f"{said}; not computed, since not all of it is loaded"), None, []
        tokenizer = load_tokenizer(subject).tokenizer
        tokens = prompt(model, tokenizer)
        if not tokens:
            return _nothing_computed(findings, f"{said}; it takes no tokens, and nothing was computed"), None, []
        passed = forward(model, tokens)
        if passed.logits is None:
            return _nothing_computed([*findings, *passed.findings], f"{said}; {passed.said}"), None, tokens
        text, more = generated(model, tokenizer, tokens, self._new_tokens)
        whole = Outcome((*findings, *passed.findings, *more), "; ".join(filter(None, (said, passed.said, text))))
        return whole, passed.logits, tokens

    def _compared(self, reference: Path, subject: Subject, logits: Any, tokens: list[int]) -> Outcome:
        theirs = Subject(reference, subject.trust_remote_code)
        if reason := obstacle(theirs):
            return Outcome(said=f"the reference was not run: {reason}")
        try:
            loaded = load_model(reference, trust_remote_code=subject.trust_remote_code)
        except Exception as error:  # noqa: BLE001 - as above
            detail = first_line(error)
            return Outcome((Finding("cannot be loaded", "the reference", detail, fix="pass a model directory"),))
        if lacking := [*loaded.missing, *(name for name, _ in loaded.mismatched)]:
            fix = "pass a model directory that is whole"
            return Outcome((Finding("does not fill its own model", "the reference", listing(lacking), fix=fix),))
        passed = forward(loaded.model, tokens)
        if passed.logits is None:
            return Outcome(said=f"the reference computes nothing: {passed.said}")
        return _difference(logits, passed.logits, self._atol, self._rtol)


def _nothing_computed(findings: list[Finding], said: str) -> Outcome:
    """An outcome that proves no logits: it failed where there is a finding, and was not run where there is none."""
    return Outcome(tuple(findings), said, ran=bool(findings))


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Nothing is shown, no gradients are kept, and the random state of who calls is as it was."""
    import torch

    with quiet_transformers(), torch.random.fork_rng(devices=[]), torch.inference_mode():
        yield


@contextmanager
def _rest_not_collected() -> Iterator[None]:
    """Garbage is looked for in what the block makes alone: among all that a session has imported it takes seconds."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _not_loaded(error: Exception) -> Outcome:
    if isinstance(error, (ImportError, MemoryError)) or is_out_of_memory(error):
        return Outcome(said=f"it could not be loaded here: {first_line(error)}", ran=False)
    if isinstance(error, NbmergeError):
        problem = error.problem
        return Outcome((Finding("cannot be loaded", "the model", problem.what, problem.why, problem.fix),))
    finding = Finding(
        "cannot be loaded by transformers", "the model", first_line(error),
        why="the files are damaged, or config.json is not this model's",
        fix="see the findings on files and structure, and merge again",
    )  # fmt: skip
    return Outcome((finding,), "it does not load")


def _difference(ours: Any, theirs: Any, atol: float, rtol: float) -> Outcome:
    """The logits of two models for the same tokens."""
    import torch

    if ours.shape != theirs.shape:
        detail = f"{list(ours.shape)} here, {list(theirs.shape)} there"
        finding = Finding(
            "has logits of another shape than the reference", "the model", detail, fix="pass its reference"
        )
        return Outcome((finding,))
    if torch.equal(ours, theirs):
        return Outcome(said="the same logits as the reference, bit for bit")
    by = (ours - theirs).abs().nan_to_num(nan=float("inf"))
    close = torch.isclose(ours, theirs, atol=atol, rtol=rtol, equal_nan=True)
    largest = f"{by.max().item():.3g}"
    if close.all():
        return Outcome(said=f"logits differ from the reference's by at most {largest}, within the tolerance")
    finding = Finding(
        f"computes other logits than the reference (atol {atol:g}, rtol {rtol:g})", "the model",
        f"{int((~close).sum()):,} of {close.numel():,} differ, by at most {largest}",
        why="the weights or the configs differ, or the two are stored in different dtypes",
        fix="compare the weights: nbmerge.diff(DIR, REFERENCE); for another dtype pass atol and rtol",
    )  # fmt: skip
    return Outcome((finding,), f"logits differ by at most {largest}")


def _joined(first: Outcome, second: Outcome) -> Outcome:
    said = "; ".join(filter(None, (first.said, second.said)))
    return Outcome((*first.findings, *second.findings), said)
