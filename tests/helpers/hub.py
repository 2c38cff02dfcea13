"""A stand-in for the Hugging Face hub: what its client asks over HTTP, of one repository in memory.

The paths are those of `huggingface_hub.hf_api`, `_commit_api` and `lfs` (2.4).
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import unquote

TOKEN, OWNER, NAME = "hf_good", "somebody", "somebody/small"
LARGE = (".safetensors", ".onnx", ".bin", ".gguf")
COMMIT = "c" * 40


class Hub(ThreadingHTTPServer):
    """Of one owner, for whom one token may write."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.name: str | None = None
        """The repository, once it is made."""
        self.strangers: set[str] = set()
        """Repositories that others have, which everybody may read."""
        self.visibility: str | None = None
        self.files: dict[str, bytes] = {}
        self.commits = 0
        self.large: dict[str, bytes] = {}
        """By digest, what was uploaded and is in no commit yet."""
        self.unknown: list[str] = []
        """What it was asked and has no answer to."""
        self.fails_at = self.refuses = "nothing"
        """It breaks off, or answers 400 to, what is asked of a path with this in it."""

    def answer(self, method: str, path: str, body: bytes, token: str | None) -> tuple[int, Any]:
        """A status, and JSON or the content of a file."""
        path, api = unquote(path.partition("?")[0]), "/api/models/"
        if self.refuses in path:
            return 400, {"error": "no"}
        if method == "PUT":  # to a signed address, without a token
            self.large[path.removeprefix("/large/")] = body
            return 200, b""
        if token != TOKEN:
            return 401, {"error": "Invalid username or password."}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        name = "/".join(path.removeprefix(api).lstrip("/").split("/")[:2]).removesuffix(".git")
        if name != self.name and name not in self.strangers:
            return 404, {"error": "Repository not found"}
        if path == f"{api}{name}/auth-check/write":
            return (200 if name == self.name else 403), {}
        if path in (f"{api}{name}", f"{api}{name}/revision/main"):
            return 200, {
                "id": name,
                "sha": COMMIT,
                "siblings": [{"rfilename": f} for f in self.files],
            }
        if re.fullmatch(rf"{api}{name}/tree/\w+(/.*)?", path):
            return 200, [self._described(file) for file in self.files]
        if path == f"{api}{name}/preupload/main":
            return 200, {"files": [
                {"path": file["path"], "shouldIgnore": False,
                 "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular"}
                for file in json.loads(body)["files"]
            ]}  # fmt: skip
        if path == f"/{name}.git/info/lfs/objects/batch":
            return 200, {"objects": [
                {**one, "actions": {"upload": {"href": f"{self.url}/large/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]}  # fmt: skip
        if path == f"{api}{name}/commit/main":
            return self._commit([json.loads(line) for line in body.splitlines()])
        found = re.fullmatch(rf"/{name}/resolve/\w+/(.+)", path)
        if found and found[1] in self.files:
            return 200, self.files[found[1]]
        self.unknown += [] if found else [f"{method} {path}"]
        return 404, {"error": "Entry not found"}

    def _create(self, asked: dict[str, Any]) -> tuple[int, Any]:
        name = f"{asked['organization']}/{asked['name']}"
        if asked["organization"] != OWNER:
            return 403, {"error": "You don't have the rights to create a model there"}
        if name == self.name:
            return 409, {
                "error": "You already created this model repo",
                "url": f"{self.url}/{name}",
            }
        self.name, self.visibility = name, asked.get("visibility")
        return 200, {"url": f"{self.url}/{name}"}

    def _commit(self, lines: list[dict[str, Any]]) -> tuple[int, Any]:
        for value in (line["value"] for line in lines if line["key"] == "deletedFile"):
            del self.files[value["path"]]
        for value in (line["value"] for line in lines if line["key"] == "file"):
            self.files[value["path"]] = base64.b64decode(value["content"])
        for value in (line["value"] for line in lines if line["key"] == "lfsFile"):
            content = self.large.pop(value["oid"])
            assert hashlib.sha256(content).hexdigest() == value["oid"]
            self.files[value["path"]] = content
        self.commits += 1
        return 200, {"commitUrl": f"{self.url}/{self.name}/commit/{COMMIT}", "commitOid": COMMIT}

    def _described(self, file: str) -> dict[str, Any]:
        content = self.files[file]
        return {"type": "file", "path": file, "size": len(content), "oid": _tag(content)}


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def _any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.server.fails_at in self.path:
            return  # without a word
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        status, found = self.server.answer(self.command, self.path, body, token)
        content = found if isinstance(found, bytes) else json.dumps(found).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{_tag(content)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        if status == 404:
            missing = "RepoNotFound" if b"Repository" in content else "EntryNotFound"
            self.send_header("X-Error-Code", missing)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = _any

    def log_message(self, *_: object) -> None:
        """Not into the output of tests."""


def _tag(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@contextmanager
def served() -> Iterator[Hub]:
    """A hub that answers while the block lasts."""
    with Hub() as hub:
        thread = Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()
