"""Whether a push can work, found out before anything is merged or uploaded: name, network, token, namespace."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nbmerge.errors import HubError, OptionError, listing
from nbmerge.export.hub_errors import no_token_error, offline_error, status_of, told

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_TOKENS = "https://huggingface.co/settings/tokens"
_WRITING = {"repo.write", "repo.content.write"}
_SCOPES = {"user", "org", "model", "dataset", "space"}


@dataclass(frozen=True)
class Access:
    """A repository that the token can most likely write to. user: whose token it is; exists: whether it is there."""

    repo_id: str
    user: str
    exists: bool


def is_left_to_rank_0() -> bool:
    """Whether torchrun started this process as another rank than 0: one process uploads, the others do not ask."""
    return (os.environ.get("RANK") or "0") != "0"


def check_access(
    repo_id: str, *, private: bool = False, token: str | None = None, endpoint: str | None = None
) -> Access:
    """Asks the Hub whose the token is, and of the repository. Uploads nothing and makes no repository.

    repo_id: `user/name`, or `name` for the token's own user. Raises HubError for a name that cannot be one, where
    there is no token, an invalid one or one that may only read, for a namespace that is not the user's, and for a
    public repository where a private one is asked for; OptionError for what is no text.
    """
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.utils import validate_repo_id

    if not isinstance(repo_id, str):
        raise OptionError(f"a {type(repo_id).__name__} is no repository", fix="name it user/name")
    with told(repo_id, token or get_token()):
        validate_repo_id(repo_id)
        if constants.HF_HUB_OFFLINE:
            raise offline_error(repo_id)
        if not (token or get_token()):
            raise no_token_error(repo_id)
        api = HfApi(endpoint=endpoint, token=token)
        found: dict[str, Any] = api.whoami(token=token)
        user = str(found.get("name", ""))
        namespace, _, name = repo_id.rpartition("/")
        access_token = _mapping(_mapping(found, "auth"), "accessToken")
        _refuse_reader(access_token, repo_id)
        _refuse_stranger(found, user, namespace, name, repo_id)
        full = f"{namespace or user}/{name}"
        _refuse_narrow(access_token, full)
        exists = is_there(api, full, private=private)
    return Access(full, user, exists)


def _refuse_stranger(found: dict[str, Any], user: str, namespace: str, name: str, repo_id: str) -> None:
    orgs = {str(each.get("name", "")): each for each in _mappings(found.get("orgs"))}
    if namespace and namespace not in (user, *orgs):
        raise HubError(
            f"the token is {user}'s, who does not belong to {namespace}", where=repo_id,
            why=f"its namespaces are {listing([user, *orgs], shown=8)}",
            fix=f"push to {user}/{name}, or take a token of somebody in {namespace}",
        )  # fmt: skip
    org = orgs.get(namespace, {})
    groups = (each.get("role") for each in _mappings(org.get("resourceGroups")))
    if org.get("roleInOrg") == "read" and not any(role not in (None, "read") for role in groups):
        raise HubError(
            f"{user} may only read in {namespace}", where=repo_id, why="that is the role there",
            fix=f"push to {user}/{name}, or ask {namespace} for the role write",
        )  # fmt: skip


def _refuse_reader(token: Mapping[str, Any], repo_id: str) -> None:
    if token.get("role") == "read":
        raise HubError(
            "the token may only read", where=repo_id,
            why=f"it was made with the role read ({token.get('displayName')})",
            fix=f"make one with the role write: {_TOKENS}",
        )  # fmt: skip


def _refuse_narrow(token: Mapping[str, Any], repo_id: str) -> None:
    """A fine-grained token whose scopes are known, and of which none may write to the repository."""
    scopes = list(_mappings(_mapping(token, "fineGrained").get("scoped")))
    if token.get("role") != "fineGrained" or not scopes:
        return
    entities = (repo_id, repo_id.partition("/")[0])
    for scope in scopes:
        allowed = scope.get("permissions")
        writes = isinstance(allowed, list) and bool(_WRITING.intersection(map(str, allowed)))
        entity = _mapping(scope, "entity")
        # What else a scope may be of, such as a group of repositories, cannot be told to leave this one out.
        if writes and (entity.get("name") in entities or entity.get("type") not in _SCOPES):
            return
    raise HubError(
        "the token may not write there", where=repo_id,
        why=f"none of its {len(scopes)} scopes has the permission repo.write for {entities[1]}",
        fix=f"give it that permission: {_TOKENS}",
    )  # fmt: skip


def is_there(api: HfApi, repo_id: str, *, private: bool) -> bool:
    """Whether the repository is there. Raises HubError where it is public and a private one is asked for."""
    try:
        found = api.model_info(repo_id)
    except OSError as error:
        if status_of(error) == 404:
            return False
        raise
    if private and found.private is False:
        raise HubError(
            "the repository is there, and it is public", where=repo_id,
            why="private was asked for, and holds only for a repository that is made",
            fix="make it private in its settings, choose another name, or leave private out",
        )  # fmt: skip
    return True


def _mapping(content: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = content.get(key)
    return found if isinstance(found, dict) else {}


def _mappings(content: object) -> Iterator[Mapping[str, Any]]:
    yield from (each for each in content if isinstance(each, dict)) if isinstance(content, list) else ()
