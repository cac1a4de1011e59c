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
    stale = _others(there, contents)
    hiding = [name for name in stale if name == WEIGHTS_NAME]
    if hiding and not replace:
        raise HubError(
            f"the repository holds weights of another merge: {listing(stale)}", where=repo_id,
            why=f"transformers would load its {WEIGHTS_NAME} and none of the files that are to be uploaded",
            fix="replace=True (--replace) deletes them in the same commit; or push to another repository or revision",
        )  # fmt: skip
    return stale


def confirm(api: HfApi, repo_id: str, commit: str, contents: Contents, card: str) -> tuple[str, ...]:
    """Asks the Hub for what the commit holds, and returns the weights in it that are none of this model's.

    Raises HubError where a file is not there, is of another size, or changed here meanwhile.
    """
    listed = api.list_repo_tree(repo_id, recursive=True, revision=commit)
    there = {each.path: getattr(each, "size", None) for each in listed}
    sizes = contents.sizes()
    if card:
        sizes[CARD] = len(card.encode())
    wrong = sorted({*(name for name, size in sizes.items() if there.get(name) != size), *contents.changed()})
    if wrong:
        raise HubError(
            f"the commit does not hold what was uploaded: {listing(wrong)}", where=f"{repo_id}, commit {commit}",
            why="the repository's .gitignore names them, or they changed while they were uploaded",
            fix="look at both, and push again",
        )  # fmt: skip
    return _others(set(there), contents)


def _others(there: set[str], contents: Contents) -> tuple[str, ...]:
    return tuple(sorted(name for name in there if name.endswith(_WEIGHTS) and name not in contents.files))
