"""The commit of a model's files: one, of all of them, whatever road the client takes for the large ones."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nbmerge.errors import HubError, listing
from nbmerge.export.access import Access, is_there
from nbmerge.export.contents import CARD, Contents
from nbmerge.export.repository import confirm, stale_weights

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_MAIN = "main"


@dataclass(frozen=True)
class Wanted:
    """What the user wants of the repository. The fields are keywords of `push_to_hub`."""

    revision: str
    message: str
    private: bool
    overwrite_card: bool
    replace: bool


@dataclass(frozen=True)
class Uploaded:
    """commit: its name; files, nbytes: what it holds of this model; card: as `PushReport` has it; stale: weights beside
    them that are not of this model; removed: those that it deleted.
    """

    commit: str
    files: tuple[str, ...]
    nbytes: int
    card: str
    stale: tuple[str, ...]
    removed: tuple[str, ...]
    seconds: float


def upload(
    api: HfApi, access: Access, wanted: Wanted, contents: Contents, written_card: Callable[[], str]
) -> Uploaded:  # fmt: skip
    """Makes the repository and the branch if need be, commits, and asks for what arrived. Raises HubError."""
    start, repo_id = time.perf_counter(), access.repo_id
    _make(api, access, wanted)
    there = set(api.list_repo_files(repo_id, revision=wanted.revision))
    stale = stale_weights(there, contents, repo_id, replace=wanted.replace)
    card = _whose_card(contents, there, overwrite=wanted.overwrite_card)
    if card != "taken":
        contents = contents.without(CARD)
    text = written_card() if card == "written" else ""
    removed = stale if wanted.replace else ()
    commit = _commit(api, repo_id, wanted, contents, text, removed)
    beside = confirm(api, repo_id, commit, contents, text)
    files = tuple(sorted({*contents.files, *([CARD] if text else [])}))
    nbytes = sum(contents.sizes().values()) + len(text.encode())
    return Uploaded(commit, files, nbytes, card, beside, removed, time.perf_counter() - start)


def _make(api: HfApi, access: Access, wanted: Wanted) -> None:
    repo_id = access.repo_id
    if not access.exists:
        api.create_repo(repo_id, private=wanted.private or None, exist_ok=True)
        if wanted.private:  # somebody may have made it meanwhile
            is_there(api, repo_id, private=True)
    # An existing one may be what no branch can be made of: refs/pr/1.
    if wanted.revision != _MAIN and not api.revision_exists(repo_id, wanted.revision):
        api.create_branch(repo_id, branch=wanted.revision, exist_ok=True)


def _whose_card(contents: Contents, there: set[str], *, overwrite: bool) -> str:
    """Whose README.md it is. The repository's own is never replaced unasked."""
    if CARD in there and not overwrite:
        return "kept"
    return "taken" if CARD in contents.files else "written"


def _commit(
    api: HfApi, repo_id: str, wanted: Wanted, contents: Contents, text: str, removed: tuple[str, ...]
) -> str:  # fmt: skip
    """One commit. The client's `upload_folder` makes one every few minutes over xet: half a model, meanwhile."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    if changed := contents.changed():
        raise HubError(
            f"files changed since they were checked: {listing(changed)}", where=repo_id,
            why="something still writes to the directory", fix="wait until nothing does, and push again",
        )  # fmt: skip
    added = [
        CommitOperationAdd(name, contents.rewritten.get(name) or path.resolve())
        for name, path in contents.files.items()
    ]
    if text:
        added.append(CommitOperationAdd(CARD, text.encode()))
    deleted = [CommitOperationDelete(name, is_folder=False) for name in removed]
    made = api.create_commit(
        repo_id, [*deleted, *added], commit_message=wanted.message, revision=wanted.revision
    )  # fmt: skip
    return str(made.oid)


@contextmanager
def bars(progress: bool | None) -> Iterator[None]:
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
