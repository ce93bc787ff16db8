"""A hub on this machine: answers as huggingface.co does, for the folders `organisation/name` below a root."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest

COMMIT = "1" * 40
REVISIONS = ("main", "v1", COMMIT)


@dataclass
class Hub:
    """A running server."""

    root: Path
    url: str = ""
    requests: list[str] = field(default_factory=list)  # method and path of each request
    extra_names: list[str] = field(default_factory=list)  # listed in every repository
    gated: set[str] = field(default_factory=set)

    def downloads(self) -> list[str]:
        """Names of the files that were downloaded, in alphabetical order."""
        return sorted(path.split("/resolve/")[1].split("/", 1)[1] for path in self._got() if "/resolve/" in path)

    def _got(self) -> list[str]:
        return [path for method, path in map(str.split, self.requests) if method == "GET"]

    def use(self, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
        """Let huggingface_hub and transformers in this process ask this server, with a cache of its own."""
        monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)  # it remembers a server
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", self.url)
        template = self.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@contextmanager
def serving(root: Path) -> Iterator[Hub]:
    hub = Hub(root)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path).strip("/")
            hub.requests.append(f"{self.command} {path}")
            api, path = path.startswith("api/models/"), path.removeprefix("api/models/")
            organisation, name, *rest = path.split("/", 4)
            folder, repository = root / organisation / name, f"{organisation}/{name}"
            if not folder.is_dir():
                return self.refuse(404, "RepoNotFound")
            revision = rest[1] if len(rest) > 1 else "main"
            if revision not in REVISIONS:
                return self.refuse(404, "RevisionNotFound")
            files = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
            if api and (not rest or rest[0] == "revision"):
                siblings = [{"rfilename": file} for file in files + hub.extra_names]
                return self.answer(json.dumps({"id": repository, "sha": COMMIT, "siblings": siblings}).encode())
            if api and rest[0] == "tree" and len(rest) > 2:
                return self.refuse(404, "EntryNotFound")  # no repository here has chat templates in a folder
            if api and rest[0] == "tree":
                tree = [
                    {"type": "file", "path": file, "oid": etag((folder / file).read_bytes()), "size": 1}
                    for file in files
                ] + [{"type": "file", "path": name, "oid": etag(b""), "size": 1} for name in hub.extra_names]
                return self.answer(json.dumps(tree).encode())
            if repository in hub.gated:
                return self.refuse(403, "GatedRepo")
            file = "/".join(rest[2:])
            if api or file not in files:
                return self.refuse(404, "EntryNotFound")
            return self.answer((folder / file).read_bytes())

        do_HEAD = do_GET

        def answer(self, body: bytes) -> None:
            self.send_response(200)
            self.send_header("ETag", f'"{etag(body)}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def refuse(self, status: int, code: str) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def etag(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()
