"""Uploads a model's directory to the Hugging Face Hub: checked first, one commit, taken up again where it broke off."""

from __future__ import annotations

import fcntl
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbmerge.errors import HubError, NbmergeError, NotACheckpointError, OptionError
from nbmerge.export.access import check_access, is_left_to_rank_0
from nbmerge.export.contents import contents_of
from nbmerge.export.hub_errors import told
from nbmerge.export.model_card import architecture_of, base_model_of, check_base_model, model_card
from nbmerge.export.proof import is_proved
from nbmerge.export.upload import Wanted, bars, upload
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
# What a validation that the user brings must still be true of.
_SINCE = ("headers", "index")


@dataclass(frozen=True, repr=False)
class PushReport(Displayed):
    """What was uploaded, and where to.

    url: of the repository; commit: its new commit, empty where this process left the work to rank 0; files, nbytes:
    what the commit holds; left_out: files of the directory that stayed here; card: whether README.md was `written`,
    was in the directory (`taken`), or in the repository and was left (`kept`); stale: weights in the repository that
    are not of this model, left alone; removed: those that `replace` deleted; validation: what was checked before;
    architecture: the class that config.json names; seconds: of the upload; local_paths: where configs in the commit
    name a directory of this machine.
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
    architecture: str = ""
    seconds: float = 0.0
    local_paths: tuple[str, ...] = ()


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
    be; `main` by default. validation: what `validate` found of this directory, whose files are then only looked over;
    by default files, structure and health are checked now. Nothing is uploaded that does not pass, unless force is
    given. A model card is written from the receipt where neither the directory nor the repository has one;
    overwrite_card replaces the repository's. base_model: for that card; by default what config.json names, where the
    Hub has it. replace: delete, in the same commit, weights in the repository that are none of this model's; without
    it those that transformers would load in place of these are an error, and others are left and told. token: of
    huggingface_hub's login by default. An upload that broke off goes on where it stopped when called again. Under
    torchrun only rank 0 uploads; the report of the others has no commit. The receipt goes up with this machine's paths
    cut to their last three components; the one in the directory stays as it is.

    Raises HubError, each in a sentence with its remedy; VerificationError where the directory does not pass;
    NotACheckpointError, OptionError.
    """
    directory = _directory_of(source)
    check_base_model(base_model)
    where = revision or "main"
    if is_left_to_rank_0():
        return PushReport(repo_id, where, f"{endpoint or _endpoint()}/{repo_id}")
    access = check_access(repo_id, private=private, token=token, endpoint=endpoint)
    receipt = json_object(directory / RECEIPT_NAME)
    contents = contents_of(directory, receipt)
    from huggingface_hub import HfApi, get_token

    api = HfApi(endpoint=endpoint, token=token)
    with _alone(directory):
        found = _proof(directory, validation, force=force, has_receipt=bool(receipt), progress=progress)
        wanted = Wanted(where, commit_message or _message(receipt), private, overwrite_card, replace)

        def card() -> str:
            base = base_model or _known_base(api, directory, access.repo_id)
            return model_card(directory, access.repo_id, receipt, found, base)

        with told(repo_id, token or get_token()), bars(progress):
            done = upload(api, access, wanted, contents, card)
    return PushReport(
        access.repo_id, where, f"{api.endpoint}/{access.repo_id}", done.commit, done.files, done.nbytes,
        contents.left_out, done.card, done.stale, done.removed, found, architecture_of(directory), done.seconds,
        contents.local_paths,
    )  # fmt: skip


def push_merged(report: MergeReport, repo_id: str, *, private: bool, progress: bool | None) -> PushReport:
    """The upload that ends a merge. Raises as `push_to_hub` does, and says that the merge itself is complete."""
    again = f"python -m nbmerge push {shlex.quote(str(report.target))} {shlex.quote(repo_id)}"
    again += " --private" if private else ""
    try:
        return push_to_hub(report, repo_id, private=private, progress=progress)
    except NbmergeError as error:
        problem = error.problem
        raise type(error)(
            f"the merge is complete, and not uploaded: {problem.what}", where=f"{report.target} → {repo_id}",
            why=problem.why, fix="; ".join(filter(None, (problem.fix, f"then: {again}"))),
            problems=error.problems if error.problems != (problem,) else (),
        ) from None  # fmt: skip
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"the merge is complete; to upload it: {again}") from None


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
            "this is a file; a model is a directory" if directory.exists() else "there is no such directory",
            where=str(directory),
            fix="pass the directory that a merge wrote",
        )
    return directory


def _proof(
    directory: Path, brought: ValidationReport | None, *, force: bool, has_receipt: bool, progress: bool | None
) -> ValidationReport:  # fmt: skip
    """What is known of the directory. Raises VerificationError where it is not enough, unless that is forced."""
    from nbmerge.validator import Validator

    if brought is not None and brought.directory.resolve() != directory.resolve():
        raise OptionError(
            f"the validation is of {brought.directory}, and {directory} is to be uploaded",
            fix="validate that directory",
        )
    checks = (*(_CHECKS if brought is None else _SINCE), *(["receipt"] if has_receipt else []))
    now = Validator(directory, checks=checks, no_run=True).validate(progress=progress)
    for found in (now,) if brought is None else (brought, now):
        if not force and not is_proved(found):
            found.raise_if_failed()
    return now if brought is None else brought


def _known_base(api: HfApi, directory: Path, repo_id: str) -> str | None:
    """The base model that the directory names, where the Hub has one: a relative path may look like a name."""
    named = base_model_of(directory)
    return named if named is not None and named != repo_id and api.repo_exists(named) else None


def _message(receipt: dict[str, Any]) -> str:
    source = receipt.get("source")
    layout = source.get("layout") if isinstance(source, dict) else None
    if isinstance(source, dict) and source.get("averaged"):
        return f"Upload {layout}"
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
