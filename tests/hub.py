"""A Hugging Face hub of one model on 127.0.0.1, over real sockets, with switches for what can go wrong.

It answers what `huggingface_hub` asks: the model's listing at a revision, its tree, and `resolve` by HEAD and GET.
As on the real hub a large file is a redirect to another host (here `localhost`), which may not see the token, and has
its sha256 in X-Linked-Etag; a small file's etag is git's blob id.
"""

import hashlib
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


class Hub(ThreadingHTTPServer):
    """Serves a folder for each commit, under one model's name; the switches may be turned at any time."""

    def __init__(self, model: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.model = model
        self.commits: dict[str, Path] = {}
        self.branches: dict[str, str] = {}
        self.requests: list[tuple[str, str, str | None]] = []  # method, path, Authorization
        # The switches.
        self.exists = True
        self.gated = False  # the listing is open, the files are not: so it is on the real hub
        self.says_checksums = True  # some mirrors don't
        self.status: int | None = None  # of every answer, such as 503
        self.delay_s = 0.0
        self.damaged: set[str] = set()  # files whose last byte comes wrong
        self.cut: dict[str, int] = {}  # file -> how many more times its download stops halfway, orderly
        self.reset: set[str] = set()  # files whose download always stops halfway, by a reset of the connection

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def publish(self, folder: Path, branch: str = "main") -> str:
        """Make a folder's present content the head of a branch; its commit."""
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        commit = hashlib.sha1(" ".join(f"{name} {sha256(folder / name)}" for name in names).encode()).hexdigest()
        self.commits[commit] = folder
        self.branches[branch] = commit
        return commit

    def asked(self, part: str) -> list[str]:
        """The paths asked for so far that contain `part`."""
        return [path for _, path, _ in self.requests if part in path]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Quiet: a client that hangs up is often the very case that is tested."""


class Handler(BaseHTTPRequestHandler):
    """HTTP/1.0, one request a connection, so that a hub that stopped has no open connection left."""

    server: Hub

    def do_GET(self) -> None:
        self.answer()

    def do_HEAD(self) -> None:
        self.answer()

    def log_message(self, format: str, *args: object) -> None:
        pass

    def answer(self) -> None:
        hub = self.server
        path = unquote(urlsplit(self.path).path)
        hub.requests.append((self.command, path, self.headers.get("Authorization")))
        time.sleep(hub.delay_s)
        if hub.status:
            return self.error(hub.status, "")
        if found := re.fullmatch(r"/cdn/([0-9a-f]+)/(.+)", path):
            return self.send_file(hub.commits[found[1]] / found[2], found[2])
        found = re.fullmatch(rf"(/api/models)?/{hub.model}(?:/(revision|tree|resolve)/([^/]+)/?(.*))?", path)
        if found is None or not hub.exists:
            return self.error(404 if self.headers.get("Authorization") else 401, "RepoNotFound")
        kind, revision, name = found[2], found[3] or "main", found[4]
        commit = hub.branches.get(revision, revision)
        if commit not in hub.commits:
            return self.error(404, "RevisionNotFound")
        if kind != "resolve":
            return self.send_json(self.tree(commit) if kind == "tree" else self.listing(commit))
        if hub.gated:
            return self.error(401, "GatedRepo")
        file = hub.commits[commit] / name
        if not file.is_file():
            return self.error(404, "EntryNotFound")
        if not is_large(file):
            return self.send_file(file, name, {"ETag": f'"{blob_id(file)}"', "X-Repo-Commit": commit})
        self.send_head(
            302,
            {
                "Location": f"http://localhost:{hub.server_port}/cdn/{commit}/{name}",
                "X-Repo-Commit": commit,
                "X-Linked-Etag": f'"{sha256(file)}"',
                "X-Linked-Size": str(file.stat().st_size),
            },
        )

    def listing(self, commit: str) -> dict[str, Any]:
        siblings: list[dict[str, Any]] = []
        for name, file in self.files(commit):
            siblings.append({"rfilename": name})
            if self.server.says_checksums:
                siblings[-1] |= {"size": file.stat().st_size, "blobId": blob_id(file)}
                if is_large(file):
                    siblings[-1]["lfs"] = {"sha256": sha256(file), "size": file.stat().st_size, "pointerSize": 134}
        return {"id": self.server.model, "modelId": self.server.model, "sha": commit, "siblings": siblings}

    def tree(self, commit: str) -> list[dict[str, Any]]:
        entries: list[dict[str, Any]] = []
        for name, file in self.files(commit):
            entries.append({"type": "file", "path": name, "size": file.stat().st_size, "oid": blob_id(file)})
            if is_large(file):
                entries[-1]["lfs"] = {"oid": sha256(file), "size": file.stat().st_size, "pointerSize": 134}
        return entries

    def files(self, commit: str) -> Iterator[tuple[str, Path]]:
        folder = self.server.commits[commit]
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                yield file.relative_to(folder).as_posix(), file

    def send_file(self, file: Path, name: str, headers: dict[str, str] | None = None) -> None:
        content = bytearray(file.read_bytes())
        if name in self.server.damaged:
            content[-1] ^= 1
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(asked[1]) if asked else 0
        part = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if asked else {}
        self.send_head(206 if asked else 200, {"Content-Length": str(len(content) - start), **part, **(headers or {})})
        if self.command == "HEAD":
            return
        stop = len(content)
        if name in self.server.reset or self.server.cut.get(name, 0) > 0:
            self.server.cut[name] = self.server.cut.get(name, 0) - 1
            stop //= 2
        self.wfile.write(content[start:stop])
        if name in self.server.reset:
            # With a linger time of 0 a close is a reset.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

    def send_json(self, content: object) -> None:
        body = json.dumps(content).encode()
        self.send_head(200, {"Content-Type": "application/json", "Content-Length": str(len(body))})
        self.wfile.write(body)

    def error(self, status: int, code: str) -> None:
        self.send_head(status, {"X-Error-Code": code} if code else {})

    def send_head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()


def is_large(file: Path) -> bool:
    """Whether the hub keeps it outside git; so it does with every safetensors file, and with what is over 10 MB."""
    return file.suffix == ".safetensors"


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def blob_id(file: Path) -> str:
    content = file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def serving(model: str) -> Iterator[Hub]:
    """A running hub; `shutdown` and `server_close` make it unreachable, and are done at the end in any case."""
    with Hub(model) as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


def stop(hub: Hub) -> None:
    """Take the hub off the network."""
    hub.shutdown()
    hub.server_close()
