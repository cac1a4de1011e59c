"""A small Hugging Face Hub on this machine, to rehearse an upload without network, account or token of one's own.

    with start_hub() as hub:
        nbmerge.push_to_hub("merged", "me/my-model", endpoint=hub.url, token=hub.token)
        hub.files("me/my-model")                # path → bytes

It answers what huggingface_hub asks while it uploads and downloads small models: files go up inside the commit and
none goes apart from it, as large ones do on the real Hub. Nothing is written to disk, and all is gone with the process.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

_USER = "me"
_TOKENS = {"hf_demo_write": "write", "hf_demo_read": "read"}


@dataclass
class _Repository:
    """files: path → bytes of the branch main, the only one; commits: their messages, oldest first."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)

    @property
    def sha(self) -> str:
        return hashlib.sha1(repr(self.commits).encode(), usedforsecurity=False).hexdigest()


class DemoHub:
    """A Hub that runs until `close()`, or to the end of a `with` block.

    url: what HF_ENDPOINT is to be; user: whose the tokens are; token: may write; read_token: may only read.
    """

    user = _USER
    token, read_token = _TOKENS

    def __init__(self) -> None:
        self._repositories: dict[str, _Repository] = {}
        handler = type("_HandlerOfHub", (_Handler,), {"repositories": self._repositories})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def files(self, repo_id: str) -> dict[str, bytes]:
        """What a repository holds, by path; nothing where there is none."""
        found = self._repositories.get(repo_id)
        return dict(found.files) if found else {}

    def commits(self, repo_id: str) -> list[str]:
        """Messages of the commits in a repository, oldest first."""
        found = self._repositories.get(repo_id)
        return list(found.commits) if found else []

    def close(self) -> None:
        """Ends the server and forgets the repositories."""
        self._server.shutdown()
        self._server.server_close()

    def __enter__(self) -> DemoHub:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def start_hub() -> DemoHub:
    """A Hub with nothing in it, on a free port of the loopback device."""
    return DemoHub()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    repositories: dict[str, _Repository]

    def log_message(self, *_: Any) -> None:
        """Nothing is printed."""

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        words = unquote(urlsplit(self.path).path).strip("/").split("/")
        if token not in _TOKENS:
            self._answer(401, {"error": "Invalid username or password."})
        elif words == ["api", "whoami-v2"]:
            access = {"role": _TOKENS[token], "displayName": "demo"}
            self._answer(200, {"type": "user", "name": _USER, "orgs": [], "auth": {"accessToken": access}})
        elif words == ["api", "repos", "create"]:
            self._create(json.loads(body))
        elif words == ["api", "validate-yaml"]:
            self._answer(200, {"errors": [], "warnings": []})
        elif words[:2] == ["api", "models"] and len(words) >= 4:
            self._of_repository("/".join(words[2:4]), words[4] if len(words) > 4 else "revision", body)
        elif len(words) > 4 and words[2] == "resolve":
            self._download("/".join(words[:2]), "/".join(words[4:]))
        else:
            self._answer(404, {"error": "no such place"})

    do_GET = do_POST = do_HEAD = _serve

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked.get('organization') or _USER}/{asked['name']}"
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        known = name in self.repositories
        self.repositories.setdefault(name, _Repository(private))
        self._answer(409 if known else 200, {"url": f"/{name}", "name": name, "id": name})

    def _of_repository(self, name: str, what: str, body: bytes) -> None:
        repository = self.repositories.get(name)
        if repository is None:
            self._answer(404, {"error": "Repository not found"}, **{"X-Error-Code": "RepoNotFound"})
        elif what == "preupload":
            asked = json.loads(body)["files"]
            files = [{"path": one["path"], "uploadMode": "regular", "shouldIgnore": False} for one in asked]
            self._answer(200, {"files": files})
        elif what == "commit":
            _commit(repository, [json.loads(line) for line in body.splitlines()])
            content = {"commitUrl": f"/{name}/commit/{repository.sha}", "commitOid": repository.sha, "success": True}
            self._answer(200, content)
        elif what == "tree":
            entries = [{"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                       for path, data in repository.files.items()]  # fmt: skip
            self._answer(200, entries)
        else:
            siblings = [{"rfilename": path} for path in repository.files]
            content = {"_id": name, "id": name, "sha": repository.sha, "private": repository.private,
                       "siblings": siblings, "tags": [], "downloads": 0, "likes": 0}  # fmt: skip
            self._answer(200, content)

    def _download(self, name: str, path: str) -> None:
        repository = self.repositories.get(name)
        if repository is None or path not in repository.files:
            self._answer(404, {"error": "Entry not found"}, **{"X-Error-Code": "EntryNotFound"})
            return
        data = repository.files[path]
        self._send(200, data, {"X-Repo-Commit": repository.sha, "ETag": f'"{hashlib.sha256(data).hexdigest()}"'})

    def _answer(self, code: int, content: Any, **headers: str) -> None:
        self._send(code, json.dumps(content).encode(), {"Content-Type": "application/json", **headers})

    def _send(self, code: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _commit(repository: _Repository, entries: list[dict[str, Any]]) -> None:
    """Applies the lines of a commit: its header, files that are written, files that are deleted."""
    for entry in entries:
        value = entry["value"]
        if entry["key"] == "header":
            repository.commits.append(value["summary"])
        elif entry["key"] == "file":
            repository.files[value["path"]] = base64.b64decode(value["content"])
        elif entry["key"] == "deletedFile":
            repository.files.pop(value["path"], None)
