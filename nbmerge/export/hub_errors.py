"""The Hub's errors in a sentence each, with what to do about it. No token is ever in one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from nbmerge.errors import HubError, NbmergeError, one_line

_TOKEN_FIX = "hf auth login, or set HF_TOKEN; make a token that may write at https://huggingface.co/settings/tokens"
_AGAIN = "push again: files that were uploaded are not sent twice"
_SECRET = re.compile(r"hf_\w+|(?<=Bearer )[^'\"]*")
_STORAGE = re.compile(r"storage|quota|billing|payment|exceed", re.IGNORECASE)
_NO_ROOM = (
    "the account has no room left for it",
    "free some, or upgrade the account: https://huggingface.co/settings/billing",
)


@contextmanager
def told(repo_id: str, token: str | None = None) -> Iterator[None]:
    """Raises HubError for whatever the client raises inside. token: what must not be in its text.

    The client's own error is not chained: a header that it refuses holds the token, and a traceback would show it.
    """
    try:
        yield
    except NbmergeError:
        raise
    except Exception as error:  # noqa: BLE001 - the client raises some dozens of classes, of three libraries
        made = _told(error, repo_id, token)
        raise made from None


def offline_error(repo_id: str) -> HubError:
    """The client was told not to use the network."""
    return HubError(
        "the Hub is switched off", where=repo_id,
        why="HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set in the environment",
        fix="unset both and start Python again: the client reads them when it is imported",
    )  # fmt: skip


def no_token_error(repo_id: str) -> HubError:
    """There is no token at all."""
    return HubError("there is no token for the Hub", where=repo_id, why="nobody has logged in here", fix=_TOKEN_FIX)


def status_of(error: BaseException) -> int | None:
    """The HTTP status that the Hub answered with, if it did."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _told(error: Exception, repo_id: str, token: str | None) -> HubError:
    from huggingface_hub import errors as hub

    error = _cause(error)
    if isinstance(error, hub.OfflineModeIsEnabled):
        return offline_error(repo_id)
    if isinstance(error, hub.LocalTokenNotFoundError):
        return no_token_error(repo_id)
    if isinstance(error, hub.HFValidationError):
        return HubError(
            f"{one_line(repo_id, limit=120)!r} cannot be the name of a repository", why=_said(error, token),
            fix="user/name, of letters, digits, - _ and ., at most 96",
        )  # fmt: skip
    if isinstance(error, hub.RevisionNotFoundError):
        return HubError("there is no such revision", where=repo_id, fix="name a branch, or leave revision out")
    if (status := status_of(error)) is not None:
        what, fix = _answer(status, str(error))
        server = getattr(error, "server_message", None)
        why = one_line(_hidden(str(server), token), limit=300) if server else ""
        return HubError(what, where=repo_id, why=why, fix=fix)
    if isinstance(error, ValueError) and "LFS batch" in str(error) and _STORAGE.search(str(error)):
        what, fix = _NO_ROOM
    elif isinstance(error, (ValueError, TypeError, LookupError, AttributeError)):
        # An answer that makes no sense, a README.md whose metadata it refuses.
        what, fix = "the Hub, or its client, refuses the upload", "put right what it names, and push again"
    elif isinstance(error, OSError) and error.filename is not None:
        what, fix = "a file could not be read", f"look at the file, and {_AGAIN}"
    else:
        what = "the Hub cannot be reached, or the connection broke"
        fix = f"look at the network, HF_ENDPOINT and the proxy settings, and {_AGAIN}"
    return HubError(what, where=repo_id, why=f"{type(error).__name__}: {_said(error, token)}", fix=fix)


def _cause(error: Exception) -> Exception:
    """What an error is about: the Hub's answer, where the client wrapped one in an error of its own."""
    link: BaseException | None = error
    while link is not None:
        if status_of(link) is not None and isinstance(link, Exception):
            return link
        link = link.__cause__
    return error


def _said(error: Exception, token: str | None) -> str:
    return one_line(_hidden(str(error), token), limit=300)


def _hidden(text: str, token: str | None) -> str:
    """The text without tokens."""
    for spelled in (token, repr(token)[1:-1]) if token else ():
        text = text.replace(spelled, "…") if spelled else text
    return _SECRET.sub("…", text)


def _answer(status: int, said: str) -> tuple[str, str]:
    """What an HTTP status means, and what to do. The Hub says 403 for a full storage too."""
    if status == 403 and _STORAGE.search(said):
        return _NO_ROOM
    return _ANSWERS.get(status, (f"the Hub answered with the error {status}", _AGAIN))


_ANSWERS = {
    400: ("the Hub refuses what was sent", "put right what it names, and push again"),
    401: ("the token is not valid, or may not see the repository", _TOKEN_FIX),
    402: _NO_ROOM,
    403: (
        "the token may not write there",
        "take a token with the role write, and a namespace that you belong to; private storage may also be full",
    ),
    404: (
        "the repository is not there, or the token may not see it",
        "look at the name, whose token it is, and HF_ENDPOINT",
    ),
    409: ("somebody else changed the repository meanwhile", _AGAIN),
    412: ("somebody else changed the repository meanwhile", _AGAIN),
    413: ("a file, or the repository, is larger than the Hub accepts", "merge again with a smaller max_shard_size"),
    429: ("the Hub was asked too often", f"wait some minutes, and {_AGAIN}"),
    500: ("the Hub has a fault of its own", _AGAIN),
    502: ("the Hub has a fault of its own", _AGAIN),
    503: ("the Hub is not available at the moment", _AGAIN),
    504: ("the Hub did not answer in time", _AGAIN),
    507: ("the account has no room left for it", "free some, or make the repository public"),
}
