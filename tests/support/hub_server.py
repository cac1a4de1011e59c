"""A Hugging Face Hub on the loopback device: as much of its interface as huggingface_hub's client calls.

Repositories, branches, commits, small files and large ones (in one part or several), and their download. It counts what
it is sent, and can be told to answer with errors or to break off.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_loopback_writer"
READER = "hf_loopback_reader"
NARROW = "hf_loopback_narrow"
_WHO = {
    TOKEN: {"type": "user", "name": "me", "orgs": [{"name": "team"}], "auth": {"accessToken": {"role": "write"}}},
    NARROW: {
        "type": "user", "name": "me", "orgs": [{"name": "team", "roleInOrg": "read"}],
        "auth": {"accessToken": {"role": "fineGrained", "fineGrained": {"scoped": [
            {"entity": {"type": "user", "name": "me"}, "permissions": ["repo.content.read"]},
            {"entity": {"type": "model", "name": "me/mine"}, "permissions": ["repo.content.read", "repo.write"]},
        ]}}},
    },
    READER: {
        "type": "user", "name": "me", "orgs": [],
        "auth": {"accessToken": {"role": "read", "displayName": "laptop"}},
    },
}  # fmt: skip


@dataclass
class Repository:
    """private; branches: path → content; commits: messages, oldest first; last: the branch of the newest commit.

    ignored: names that its .gitignore leaves out.
    """

    private: bool
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    commits: list[str] = field(default_factory=list)
    last: str = "main"
    ignored: set[str] = field(default_factory=set)


@dataclass
class Hub:
    """The state of a server. requests: `METHOD path` of each; sent: bytes of large files that came in.

    large: bytes from which a file is sent apart from the commit;
    answers: error codes by a part of `METHOD path`; part_bytes: of large files that are sent in parts, 0 for none;
    saying: the words of such an answer; refused: why no large file is taken;
    break_after: number of bytes of large files after which the connection breaks; hold_after: after which it stands
    still until `released`, and breaks then.
    """

    repositories: dict[str, Repository] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    parts: dict[str, dict[int, bytes]] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    answers: dict[str, int] = field(default_factory=dict)
    saying: str = "told to"
    refused: str = ""
    sent: int = 0
    large: int = 10_000
    part_bytes: int = 0
    break_after: int | None = None
    hold_after: int | None = None
    released: threading.Event = field(default_factory=threading.Event)
    url: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A server with nothing in it, until the end of the block."""
    hub = Hub()

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Broken(Exception):
    """The connection breaks."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: Hub

    def log_message(self, *_: Any) -> None:
        """Nothing is printed."""

    def _serve(self) -> None:
        path = unquote(urlsplit(self.path).path)
        asked = f"{self.command} {path}"
        try:
            body = self._body()
        except _Broken:
            self.close_connection = True
            return
        with self.state.lock:
            self.state.requests.append(asked)
            code = next((code for part, code in self.state.answers.items() if part in asked), None)
            if code is not None:
                self._answer(code, {"error": f"{self.state.saying} answer {code}"})
                return
            if "/lfs/" not in path and "resolve" not in path and self._who() is None:
                self._answer(401, {"error": "Invalid username or password."})
                return
            self._route(path, body)

    do_GET = do_POST = do_PUT = do_HEAD = _serve

    def _body(self) -> bytes:
        """What was sent. Of large files it is counted, and may be broken off."""
        length = int(self.headers.get("Content-Length") or 0)
        if self.command != "PUT":
            return self.rfile.read(length)
        content = b""
        while len(content) < length:
            block = self.rfile.read(min(2048, length - len(content)))
            if not block:
                raise _Broken
            content += block
            with self.state.lock:
                self.state.sent += len(block)
                if self.state.break_after is not None and self.state.sent > self.state.break_after:
                    raise _Broken
                held = self.state.hold_after is not None and self.state.sent > self.state.hold_after
            if held:
                self.state.released.wait(60)
                raise _Broken
        return content

    def _who(self) -> dict[str, Any] | None:
        return _WHO.get((self.headers.get("Authorization") or "").removeprefix("Bearer "))

    def _answer(self, code: int, content: Any = None, **headers: str) -> None:
        data = b"" if content is None else json.dumps(content).encode()
        self.send_response(code)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _route(self, path: str, body: bytes) -> None:
        words = path.strip("/").split("/")
        if path == "/api/whoami-v2":
            self._answer(200, self._who())
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif path == "/api/validate-yaml":
            self._answer(200, {"errors": [], "warnings": []})
        elif words[0] == "lfs":
            self._large(words, body)
        elif path.endswith("/info/lfs/objects/batch"):
            self._batch(json.loads(body))
        elif words[:2] == ["api", "models"] and len(words) >= 4:
            what = words[4] if len(words) > 4 else "revision"
            self._of_repository("/".join(words[2:4]), what, "/".join(words[5:]) or "main", body)
        elif "resolve" in words:
            at = words.index("resolve")
            self._download("/".join(words[:at]), words[at + 1], "/".join(words[at + 2 :]))
        else:
            self._answer(404, {"error": "no such place"})

    def _create(self, asked: dict[str, Any]) -> None:
        namespace = asked.get("organization") or self._who()["name"]  # type: ignore[index]
        name = f"{namespace}/{asked['name']}"
        known = name in self.state.repositories
        if not known:
            private = asked.get("visibility") == "private" or bool(asked.get("private"))
            self.state.repositories[name] = Repository(private)
        content = {"url": f"{self.state.url}/{name}", "name": name, "id": name}
        self._answer(409 if known else 200, {**content, **({"error": "You already created it"} if known else {})})

    def _of_repository(self, name: str, what: str, rest: str, body: bytes) -> None:
        repository = self.state.repositories.get(name)
        if repository is None:
            self._answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        elif what == "branch":
            known = rest in repository.branches
            repository.branches.setdefault(rest, dict(repository.branches["main"]))
            self._answer(409 if known else 200, {})
        elif (revision := _revision(repository, rest)) is None:
            self._answer(404, {"error": "Invalid rev id"}, X_Error_Code="RevisionNotFound")
        elif what == "preupload":
            modes = {
                f["path"]: "lfs" if f["size"] >= self.state.large else "regular" for f in json.loads(body)["files"]
            }
            files = [
                {"path": name, "uploadMode": mode, "shouldIgnore": name in repository.ignored}
                for name, mode in modes.items()
            ]
            self._answer(200, {"files": files})
        elif what == "commit":
            self._commit(name, repository, rest, body)
        elif what in ("tree", "revision"):
            self._listing(name, repository, what, revision)
        else:
            self._answer(404, {"error": "no such place"})

    def _listing(self, name: str, repository: Repository, what: str, branch: str) -> None:
        files = repository.branches[repository.last if branch == _sha(repository) else branch]
        if what == "tree":
            content: Any = [
                {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for path, data in files.items()
            ]
        else:
            siblings = [{"rfilename": path} for path in files]
            content = {"_id": name, "id": name, "sha": _sha(repository), "private": repository.private,
                       "siblings": siblings, "tags": [], "downloads": 0, "likes": 0}  # fmt: skip
        self._answer(200, content)

    def _batch(self, asked: dict[str, Any]) -> None:
        objects = []
        for each in asked["objects"]:
            oid, size = each["oid"], each["size"]
            entry: dict[str, Any] = {"oid": oid, "size": size}
            if self.state.refused:
                entry["error"] = {"code": 422, "message": self.state.refused}
            elif oid not in self.state.blobs:
                entry["actions"] = {
                    "upload": self._upload(oid, size),
                    "verify": {"href": f"{self.state.url}/lfs/verify"},
                }
            objects.append(entry)
        self._answer(200, {"transfer": "multipart" if self.state.part_bytes else "basic", "objects": objects})

    def _upload(self, oid: str, size: int) -> dict[str, Any]:
        step = self.state.part_bytes
        if not step:
            return {"href": f"{self.state.url}/lfs/blob/{oid}"}
        count = -(-size // step)
        urls = {str(part): f"{self.state.url}/lfs/part/{oid}/{part}" for part in range(1, count + 1)}
        return {"href": f"{self.state.url}/lfs/complete/{oid}", "header": {"chunk_size": str(step), **urls}}

    def _large(self, words: list[str], body: bytes) -> None:
        if words[1] == "blob":
            self._keep(words[2], body)
        elif words[1] == "part":
            self.state.parts.setdefault(words[2], {})[int(words[3])] = body
            self._answer(200, {}, ETag=hashlib.md5(body).hexdigest())
        elif words[1] == "complete":
            parts = self.state.parts.pop(words[2])
            self._keep(words[2], b"".join(parts[number] for number in sorted(parts)))
        else:
            self._answer(200 if json.loads(body)["oid"] in self.state.blobs else 404, {})

    def _keep(self, oid: str, content: bytes) -> None:
        whole = hashlib.sha256(content).hexdigest() == oid
        if whole:
            self.state.blobs[oid] = content
        self._answer(200 if whole else 422, {})

    def _commit(self, name: str, repository: Repository, branch: str, body: bytes) -> None:
        files = repository.branches[branch]
        repository.last = branch
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                repository.commits.append(value["summary"])
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.state.blobs[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        sha = _sha(repository)
        self._answer(200, {"commitUrl": f"{self.state.url}/{name}/commit/{sha}", "commitOid": sha, "success": True})

    def _download(self, name: str, branch: str, path: str) -> None:
        repository = self.state.repositories.get(name)
        files: dict[str, bytes] = {}
        if repository is not None:
            files = next(iter(repository.branches.values())) if branch == _sha(repository) else {}
            files = repository.branches.get(branch, files)
        if repository is None or path not in files:
            self._answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound")
            return
        data = files[path]
        self.send_response(200)
        self.send_header("X-Repo-Commit", _sha(repository))
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)


def _revision(repository: Repository, rest: str) -> str | None:
    """The branch (`refs/pr/1` has slashes) or commit that an address begins with."""
    known = (*repository.branches, _sha(repository))
    return next((each for each in known if f"{rest}/".startswith(f"{each}/")), None)


def _sha(repository: Repository) -> str:
    return hashlib.sha1(f"{repository.commits}".encode()).hexdigest()
