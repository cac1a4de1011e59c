"""Uploads a model's directory to the Hugging Face Hub: checked first, one commit, taken up again where it broke off."""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbmerge.errors import HubError, NotACheckpointError, OptionError, VerificationError
from nbmerge.export.access import Access, check_access, is_left_to_rank_0
from nbmerge.export.contents import CARD, Contents, contents_of
from nbmerge.export.hub_errors import told
from nbmerge.export.model_card import base_model_of, model_card
from nbmerge.export.proof import is_proved
from nbmerge.export.repository import confirm, stale_weights
from nbmerge.json_files import json_object
from nbmerge.opening import PathLike
from nbmerge.options import expanded_path
from nbmerge.receipt import RECEIPT_NAME
from nbmerge.report import MergeReport
from nbmerge.shown import Displayed
from nbmerge.validation.report import ValidationReport

if TYPE_CHECKING:
    from huggingface_hub import HfApi

# What can be known of a directory without loading the model.
_CHECKS = ("headers", "index", "paths", "config", "structure", "tied", "health")
_WITH_RECEIPT = (*_CHECKS, "receipt")


@dataclass(frozen=True, repr=False)
class PushReport(Displayed):
    """What was uploaded, and where to.

    url: of the repository; commit: its new commit, empty where this process left the work to rank 0; files, nbytes:
    what the commit holds; left_out: files of the directory that stayed here; card: whether README.md was `written`,
    was in the directory (`taken`), or in the repository and was left (`kept`); stale: weights in the repository that
    are not of this model, left alone; removed: those that `replace` deleted; validation: what was checked before;
    seconds: of the upload.
    """

    repo_id: str
    revision: str
    url: str
    commit: str = ""
    files: tuple[str, ...] = ()
    nbytes: int = 0
    left_out: tuple[str, ...] = ()
    card: str = ""
    stale: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    validation: ValidationReport | None = None
    seconds: float = 0.0


def push_to_hub(
    source: MergeReport | PathLike,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    commit_message: str | None = None,
    force: bool = False,
    overwrite_card: bool = False,
    replace: bool = False,
    validation: ValidationReport | None = None,
    base_model: str | None = None,
    token: str | None = None,
    endpoint: str | None = None,
    progress: bool | None = None,
) -> PushReport:
    """Uploads a merged directory to `user/name` on the Hub, in one commit. The repository is made if need be.

        nbmerge.push_to_hub(report, "me/my-model", private=True)

    source: a merge's report, or a directory. private: of a repository that is made. revision: a branch, made if need
    be; `main` by default. validation: what `validate` found of this directory; by default its files, structure and
    health are checked now. Nothing is uploaded that does not pass, unless force is given. A model card is written from
    the receipt where neither the directory nor the repository has one; overwrite_card replaces the repository's.
    replace: delete, in the same commit, weights in the repository that are none of this model's; without it those
    that transformers would load in place of these are an error, and others are left and told. base_model: for the
    card; by default what config.json names, where the Hub has it.
    token: of huggingface_hub's login by default. An upload that broke off goes on where it stopped when called again.
    Under torchrun only rank 0 uploads; the report of the others has no commit.

    Raises HubError, each in a sentence with its remedy; VerificationError where the directory does not pass;
    NotACheckpointError, OptionError.
    """
    directory = _directory_of(source)
    where = revision or "main"
    if is_left_to_rank_0():
        return PushReport(repo_id, where, f"{endpoint or _endpoint()}/{repo_id}")
    access = check_access(repo_id, private=private, token=token, endpoint=endpoint)
    receipt = json_object(directory / RECEIPT_NAME)
    contents = contents_of(directory, receipt)
    from huggingface_hub import HfApi

    with _alone(directory):
        found = validation if validation is not None else _validated(directory, bool(receipt), progress)
        if not force:
            _refuse_unproved(found, directory)
        asked = _Asked(where, commit_message or _message(receipt), private, overwrite_card, replace, base_model)
        api = HfApi(endpoint=endpoint, token=token)
        return _push(api, access, asked, directory, contents, receipt, found, progress)


def push_merged(report: MergeReport, repo_id: str, *, private: bool, progress: bool | None) -> PushReport:
    """The upload that ends a merge. Raises as `push_to_hub` does, and says that the merge itself is complete."""
    try:
        return push_to_hub(report, repo_id, private=private, progress=progress)
    except (HubError, VerificationError) as error:
        problem = error.problem
        again = f"then: python -m nbmerge push {report.target} {repo_id}" + (" --private" if private else "")
        raise type(error)(
            f"the merge is complete, and not uploaded: {problem.what}",
            where=f"{report.target} → {repo_id}", why=problem.why, fix="; ".join(filter(None, (problem.fix, again))),
            problems=error.problems if error.problems != (problem,) else (),
        ) from None  # fmt: skip


@dataclass(frozen=True)
class _Asked:
    """What the user wants of the repository."""

    revision: str
    message: str
    private: bool
    overwrite_card: bool
    replace: bool
    base_model: str | None


def _push(
    api: HfApi, access: Access, asked: _Asked, directory: Path, contents: Contents, receipt: dict[str, Any],
    found: ValidationReport, progress: bool | None,
) -> PushReport:  # fmt: skip
    from huggingface_hub import get_token

    repo_id, start = access.repo_id, time.perf_counter()
    with told(repo_id, api.token or get_token()), _bars(progress):
        if not access.exists:
            api.create_repo(repo_id, private=asked.private or None, exist_ok=True)
        if asked.revision != "main":
            api.create_branch(repo_id, branch=asked.revision, exist_ok=True)
        there = set(api.list_repo_files(repo_id, revision=asked.revision))
        stale = stale_weights(there, contents, repo_id, replace=asked.replace)
        card = _whose_card(contents, there, overwrite=asked.overwrite_card)
        base = asked.base_model or _known_base(api, directory)
        text = model_card(directory, repo_id, receipt, found, base) if card == "written" else ""
        removed = stale if asked.replace else ()
        commit = _upload(api, repo_id, asked, contents, text, removed)
        confirm(api, repo_id, commit, contents, text)
    names = tuple(sorted({*contents.files, *([CARD] if text else [])}))
    return PushReport(
        repo_id, asked.revision, f"{api.endpoint}/{repo_id}", commit, names,
        contents.nbytes + len(text.encode()), contents.left_out, card, () if removed else stale, removed, found,
        time.perf_counter() - start,
    )  # fmt: skip


def _directory_of(source: MergeReport | PathLike) -> Path:
    if isinstance(source, MergeReport):
        if source.target is None:
            raise OptionError("a dry run wrote nothing to upload", fix="merge without dry_run, and push that report")
        return Path(source.target)
    if not isinstance(source, (str, os.PathLike)):
        raise OptionError(f"a {type(source).__name__} is no directory", fix="pass a path, or a merge's report")
    directory = expanded_path(os.fspath(source))
    if not directory.is_dir():
        raise NotACheckpointError(
            "there is no such directory", where=str(directory), fix="pass the directory that a merge wrote"
        )
    return directory


def _validated(directory: Path, has_receipt: bool, progress: bool | None) -> ValidationReport:
    from nbmerge.validator import Validator

    checks = _WITH_RECEIPT if has_receipt else _CHECKS
    return Validator(directory, checks=checks, no_run=True).validate(progress=progress)


def _refuse_unproved(found: ValidationReport, directory: Path) -> None:
    if found.directory.resolve() != directory.resolve():
        raise OptionError(
            f"the validation is of {found.directory}, and {directory} is to be uploaded", fix="validate that directory"
        )
    if not is_proved(found):
        found.raise_if_failed()


def _whose_card(contents: Contents, there: set[str], *, overwrite: bool) -> str:
    """Whose README.md it is. The repository's own is never replaced unasked."""
    if CARD in there and not overwrite:
        contents.files.pop(CARD, None)
        return "kept"
    return "taken" if CARD in contents.files else "written"


def _known_base(api: HfApi, directory: Path) -> str | None:
    """The base model that the directory names, where the Hub has one: a relative path may look like a name."""
    named = base_model_of(directory)
    return named if named is not None and api.repo_exists(named) else None


def _upload(
    api: HfApi, repo_id: str, asked: _Asked, contents: Contents, card: str, removed: tuple[str, ...]
) -> str:  # fmt: skip
    """The commit of all files. They are linked into one directory, because a card must not change the user's own."""
    with tempfile.TemporaryDirectory(prefix="nbmerge-push-") as staged:
        for name, path in contents.files.items():
            link = Path(staged) / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path.resolve())
        if card:
            (Path(staged) / CARD).write_bytes(card.encode())
        made = api.upload_folder(
            repo_id=repo_id, folder_path=staged, revision=asked.revision, commit_message=asked.message,
            delete_patterns=list(removed) or None,
        )  # fmt: skip
    return str(made.oid)


def _message(receipt: dict[str, Any]) -> str:
    source = receipt.get("source")
    layout = source.get("layout") if isinstance(source, dict) else None
    return f"Upload the merge of a checkpoint ({layout})" if layout else "Upload the model"


def _endpoint() -> str:
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Keeps a second process from uploading the same directory at the same time."""
    opened = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise HubError(
                "another process uploads this directory already", where=str(directory), fix="wait until it is done"
            ) from error
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(opened)


@contextmanager
def _bars(progress: bool | None) -> Iterator[None]:
    """The client's own progress bars, unless they are not wanted."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if progress is not False or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
