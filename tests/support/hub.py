"""A hub on this machine: data sets in a directory, over as much of the hub's HTTP as reading them takes."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "c0ffee" + 34 * "0"
FILE = re.compile(r"/datasets/([^/]+/[^/]+)/resolve/[^/]+/(.+)")
API = re.compile(r"/api/datasets/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/[^/]+/?(.*))?")


@contextmanager
def hub_of(directory: Path, *, gated: str = "", unwell: bool = False) -> Iterator[str]:
    """Serves `directory/org/name` as data set `org/name`; the hub's address.

    One of them may be gated. An unwell hub answers 503 to everything.
    """

    class Handler(_Handler):
        root = directory
        gated_id = gated
        is_unwell = unwell

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join(10)
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    root: Path
    gated_id: str
    is_unwell: bool

    def do_GET(self) -> None:
        if self.is_unwell:
            return self._answer(503)
        path = unquote(urlsplit(self.path).path)
        file, api = FILE.fullmatch(path), API.fullmatch(path)
        asked = file or api
        if asked is None:
            return self._answer(200 if path == "/" else 404)
        repository = self.root / asked[1]
        if asked[1] == self.gated_id:
            return self._answer(401, error="GatedRepo")
        if not repository.is_dir():
            return self._answer(404, error="RepoNotFound")
        if file:
            found = repository / file[2]
            return (
                self._answer(200, found.read_bytes()) if found.is_file() else self._answer(404, error="EntryNotFound")
            )
        return self._answer(200, json.dumps(self._listing(asked[1], repository, asked[2], asked[3])).encode())

    do_HEAD = do_POST = do_GET  # noqa: N815

    def _listing(self, name: str, repository: Path, kind: str | None, place: str) -> Any:
        if kind in (None, "revision"):
            return {"id": name, "sha": COMMIT, "private": False, "gated": False, "disabled": False, "siblings": []}
        if kind == "tree":
            wanted = list((repository / place).iterdir())
        else:
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            wanted = [repository / path for path in parse_qs(body)["paths"]]
        return [self._entry(repository, path) for path in wanted if path.exists()]

    def _entry(self, repository: Path, path: Path) -> dict[str, Any]:
        name = str(path.relative_to(repository))
        entry = {"path": name, "oid": hashlib.sha1(name.encode()).hexdigest()}
        if path.is_dir():
            return {"type": "directory", **entry}
        return {"type": "file", "size": path.stat().st_size, **entry}

    def _answer(self, status: int, content: bytes = b"", *, error: str | None = None) -> None:
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        whole = len(content)
        if status == 200 and part:
            status, start, stop = 206, int(part[1]), min(int(part[2] or whole - 1), whole - 1) + 1
            content = content[start:stop]
        self.send_response(status)
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{whole}")
        if error:
            self.send_header("X-Error-Code", error)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        """Nothing."""
