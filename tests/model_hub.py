"""A model hub on loopback: what the real client asks for, from folders on disk, and a record of what was fetched."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "a" * 40
_INFO = re.compile(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?")
_TREE = re.compile(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)")
_RESOLVE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
_BLOB = re.compile(r"/blobs/([0-9a-f]{64})")


@dataclass
class Hub:
    """Repositories by name, each a folder; revisions by name, each a commit; what was asked for, in order."""

    url: str = ""
    repositories: dict[str, Path] = field(default_factory=dict)
    revisions: dict[str, str] = field(default_factory=lambda: {"main": COMMIT})
    gated: set[str] = field(default_factory=set)
    fail_with: int | None = None
    cut_after: int | None = None
    """Bytes of a weights file after which the next transfer breaks off, once."""
    asked: list[tuple[str, str]] = field(default_factory=list)
    ranges: list[str] = field(default_factory=list)

    def fetched(self) -> list[str]:
        """The names of the files whose content was asked for."""
        return sorted(path for method, path in self.asked if method == "GET" and not path.startswith("/api"))

    def commit(self, revision: str | None) -> str | None:
        """The commit of a branch, tag or commit."""
        revision = revision or "main"
        return revision if revision in self.revisions.values() else self.revisions.get(revision)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        hub.asked.append((self.command, path))
        if hub.fail_with is not None:
            self._error(hub.fail_with, "", "the hub is unwell")
        elif match := _TREE.fullmatch(path):
            self._api(match[1], match[2], lambda folder, _: [_entry(folder, file) for file in _files(folder)])
        elif match := _INFO.fullmatch(path):
            self._api(match[1], match[2], lambda folder, commit: _info(match[1], folder, commit))
        elif match := _RESOLVE.fullmatch(path):
            self._resolve(match[1], match[2], match[3])
        elif match := _BLOB.fullmatch(path):
            self._content(next(f for r in hub.repositories.values() for f in _files(r) if _sha(f) == match[1]))
        else:
            self._error(404, "", path)

    def _api(self, name: str, revision: str | None, reply: object) -> None:
        if name not in self.hub.repositories:
            self._error(401, "RepoNotFound", "Invalid username or password.")
        elif (commit := self.hub.commit(revision)) is None:
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        else:
            self._send(200, json.dumps(reply(self.hub.repositories[name], commit)).encode())

    def _resolve(self, name: str, revision: str, filename: str) -> None:
        hub = self.hub
        if name not in hub.repositories:
            return self._error(401, "RepoNotFound", "Invalid username or password.")
        if name in hub.gated:
            return self._error(403, "GatedRepo", f"Access to model {name} is restricted")
        commit, file = hub.commit(revision), hub.repositories[name] / filename
        if commit is None:
            return self._error(404, "RevisionNotFound", revision)
        if not file.is_file():
            return self._error(404, "EntryNotFound", filename)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{_sha(file)[:40]}"'}
        if file.suffix == ".safetensors":  # large files lie elsewhere, as on the real hub
            headers |= {"X-Linked-Etag": f'"{_sha(file)}"', "X-Linked-Size": str(file.stat().st_size)}
            return self._send(
                302, b"", headers | {"Location": f"{hub.url.replace('127.0.0.1', 'localhost')}/blobs/{_sha(file)}"}
            )
        return self._send(200, file.read_bytes(), headers)

    def _content(self, file: Path) -> None:
        data, headers, status = file.read_bytes(), {"ETag": f'"{_sha(file)}"', "Accept-Ranges": "bytes"}, 200
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            self.hub.ranges.append(match[0])
            start, end = int(match[1]), min(int(match[2] or len(data) - 1), len(data) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
            data, status = data[start : end + 1], 206
        if self.hub.cut_after is not None and self.command == "GET":
            keep, self.hub.cut_after = self.hub.cut_after, None
            self._send(status, data, headers, keep)
        else:
            self._send(status, data, headers)

    def _error(self, status: int, code: str, message: str) -> None:
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self._send(status, json.dumps({"error": message}).encode(), headers)

    def _send(self, status: int, data: bytes, headers: dict[str, str] | None = None, keep: int | None = None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data[:keep])
        if keep is not None:
            self.close_connection = True


def _sha(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


def _entry(folder: Path, file: Path) -> dict[str, object]:
    entry: dict[str, object] = {"type": "file", "path": str(file.relative_to(folder)), "size": file.stat().st_size}
    entry["oid"] = _sha(file)[:40]
    if file.suffix == ".safetensors":
        entry["lfs"] = {"oid": _sha(file), "size": file.stat().st_size, "pointerSize": 130}
    return entry


def _info(name: str, folder: Path, commit: str) -> dict[str, object]:
    siblings = [{"rfilename": str(file.relative_to(folder))} for file in _files(folder)]
    return {"id": name, "modelId": name, "sha": commit, "private": False, "siblings": siblings, "tags": []}


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """The hub behind HTTP on loopback while the block runs."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
