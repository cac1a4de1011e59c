"""What the repository holds beside an upload, and whether it holds what was uploaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nbmerge.errors import HubError, listing
from nbmerge.export.contents import CARD, Contents
from nbmerge.validation.subject import WEIGHTS_NAME

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")


def stale_weights(there: set[str], contents: Contents, repo_id: str, *, replace: bool) -> tuple[str, ...]:
    """Weights, and their index, in the repository that are none of this model's.

    Raises HubError for those that transformers would load in place of these: it looks for model.safetensors first.
    """
    stale = tuple(sorted(name for name in there if name.endswith(_WEIGHTS) and name not in contents.files))
    hiding = [name for name in stale if name == WEIGHTS_NAME]
    if hiding and not replace:
        raise HubError(
            f"the repository holds weights of another merge: {listing(stale)}", where=repo_id,
            why=f"transformers would load its {WEIGHTS_NAME} and none of the files that are to be uploaded",
            fix="replace=True (--replace) deletes them in the same commit; or push to another repository or revision",
        )  # fmt: skip
    return stale


def confirm(api: HfApi, repo_id: str, commit: str, contents: Contents, card: str) -> None:
    """Asks the Hub for what the commit holds. Raises HubError where a file is not there, or of another size."""
    listed = api.list_repo_tree(repo_id, recursive=True, revision=commit)
    there = {each.path: getattr(each, "size", None) for each in listed}
    sizes = {name: path.stat().st_size for name, path in contents.files.items()}
    if card:
        sizes[CARD] = len(card.encode())
    wrong = sorted(name for name, size in sizes.items() if there.get(name) != size)
    if wrong:
        raise HubError(
            f"the commit does not hold what was uploaded: {listing(wrong)}", where=f"{repo_id}, commit {commit}",
            why="the repository's .gitignore names them, or they changed while they were uploaded",
            fix="look at both, and push again",
        )  # fmt: skip
