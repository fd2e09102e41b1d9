"""A hub of models for the tests: a folder laid out as its cache, and a server that answers as it does."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator, Mapping
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

COMMIT = "c0ffee" + "0" * 34


def fill_cache(cache: Path, name: str, folder: Path, *, revision: str = "main") -> Path:
    """Put a model folder into a hub cache, as huggingface-hub does: names that link to blobs."""
    room = cache / f"models--{name.replace('/', '--')}"
    snapshot = room / "snapshots" / COMMIT
    for part in (room / "blobs", room / "refs", snapshot):
        part.mkdir(parents=True, exist_ok=True)
    (room / "refs" / revision).write_text(COMMIT, encoding="utf-8")
    for file in folder.iterdir():
        content = file.read_bytes()
        blob = room / "blobs" / sha256(content).hexdigest()
        blob.write_bytes(content)
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
    return snapshot


@contextlib.contextmanager
def serve(
    repositories: Mapping[str, Mapping[str, bytes]], *, gated: str = ""
) -> Iterator[tuple[str, list[str]]]:
    """Serve repositories, given as the contents of their files, as the hub's two kinds of addresses do.

    Yields the address, and the list of what was fetched, as `owner/name/file`, which grows.
    """
    fetched: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(with_body=False)

        def do_GET(self) -> None:
            self.answer(with_body=True)

        def answer(self, *, with_body: bool) -> None:
            parts = unquote(self.path.partition("?")[0]).strip("/").split("/")
            if parts[0] == "down":
                server.server_close()  # from now on a connection is refused
                return self.send(200, b"", {})
            api = parts[:2] == ["api", "models"]
            parts = parts[2:] if api else parts
            name, rest = "/".join(parts[:2]), parts[2:]
            if name not in repositories:
                return self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            if len(rest) > 1 and rest[1] not in ("main", COMMIT):
                return self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            files = repositories[name]
            if api:
                listing = files_of_tree(files) if rest[:1] == ["tree"] else about(name, files)
                return self.send(200, json.dumps(listing).encode(), {"Content-Type": "application/json"})
            if name == gated:
                return self.send(403, b"{}", {"X-Error-Code": "GatedRepo"})
            content = files["/".join(rest[2:])]
            if with_body:
                fetched.append(f"{name}/{rest[2]}")
            headers = {"ETag": f'"{sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
            return self.send(200, content, headers, with_body=with_body)

        def send(self, status: int, body: bytes, headers: dict[str, str], *, with_body: bool = True) -> None:
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            if with_body:
                self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", fetched
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def about(name: str, files: Mapping[str, bytes]) -> dict[str, Any]:
    return {"id": name, "sha": COMMIT, "siblings": [{"rfilename": file} for file in files], "private": False}


def files_of_tree(files: Mapping[str, bytes]) -> list[dict[str, Any]]:
    return [
        {"type": "file", "path": file, "size": len(content), "oid": sha256(content).hexdigest()[:40]}
        for file, content in files.items()
    ]
