"""A hub on the loopback interface, for huggingface_hub itself to talk to."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Repositories as folders.

    Attributes:
        address: of the server.
        asked: paths that were asked for.
        gated: repositories whose terms nobody here has accepted.
        new: folder for repositories that are made here; None refuses to make any.
        commits: how many more are taken before the hub refuses; a negative number for all.
        received: names of the files in the commits that were taken.
        headers: of the answers to HEAD, instead of the usual ones.
        listing: what is sent instead of a list of files.
    """

    def __init__(self, repositories: dict[str, Path]) -> None:
        self.repositories, self.asked, self.gated = repositories, [], set()
        self.new: Path | None = None
        self.commits = -1
        self.received: list[str] = []
        self.headers: dict[str, str] = {}
        self.listing: bytes | None = None
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                hub.answer(self, body=False)

            def do_GET(self) -> None:
                hub.answer(self, body=True)

            def do_POST(self) -> None:
                hub.accept(self)

            def log_message(self, *ignored) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, request: BaseHTTPRequestHandler, body: bool) -> None:
        path = unquote(request.path.split("?")[0])
        self.asked.append(path)
        words = path.strip("/").split("/")
        if words[0] == "datasets":
            words = words[1:]
        repository = "/".join(words[2:4] if words[0] == "api" else words[:2])
        revision = (words[5] if len(words) > 5 else "main") if words[0] == "api" else words[3]
        if repository not in self.repositories:
            return self.send(request, 404, b"", {"X-Error-Code": "RepoNotFound"}, body)
        if repository in self.gated and words[0] != "api":
            return self.send(request, 403, b"", {"X-Error-Code": "GatedRepo"}, body)
        if revision not in ("main", "v1", COMMIT):
            return self.send(request, 404, b"", {"X-Error-Code": "RevisionNotFound"}, body)
        folder = self.repositories[repository]
        if words[:2] == ["api", "datasets"] and len(words) == 4:
            about = json.dumps({"id": repository, "sha": COMMIT, "private": False, "downloads": 0, "likes": 0}).encode()
            return self.send(request, 200, about, {"Content-Type": "application/json"}, body)
        if words[0] == "api":
            if self.listing is not None:
                return self.send(request, 200, self.listing, {"Content-Type": "application/json"}, body)
            tree = self.tree(folder)
            if words[4:5] in ([], ["revision"]):
                siblings = [{"rfilename": entry["path"]} for entry in tree]
                content = json.dumps({"id": repository, "sha": COMMIT, "siblings": siblings}).encode()
                return self.send(request, 200, content, {"Content-Type": "application/json"}, body)
            return self.send(request, 200, json.dumps(tree).encode(), {"Content-Type": "application/json"}, body)
        file = folder.joinpath(*words[4:])
        if not file.is_file():
            return self.send(request, 404, b"", {"X-Error-Code": "EntryNotFound"}, body)
        content = file.read_bytes()
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
        if body and (part := re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("Range", ""))):
            content = content[int(part[1]) : int(part[2]) + 1]
            return self.send(request, 206, content, headers, body)
        return self.send(request, 200, content, {**headers, **({} if body else self.headers)}, body)

    @staticmethod
    def tree(folder: Path) -> list[dict]:
        files = [each for each in folder.rglob("*") if each.is_file()]
        return [
            {"type": "file", "oid": "0", "path": each.relative_to(folder).as_posix(), "size": each.stat().st_size}
            for each in files
        ]

    def accept(self, request: BaseHTTPRequestHandler) -> None:
        """Make a repository, add to one what is sent within the request, or describe files of one."""
        words = unquote(request.path.split("?")[0]).strip("/").split("/")
        content = request.rfile.read(int(request.headers["Content-Length"]))
        answer: dict = {}
        if words[4:5] == ["paths-info"]:
            asked = json.loads(content)["paths"] if content[:1] == b"{" else parse_qs(content.decode())["paths"]
            found = [entry for entry in self.tree(self.repositories["/".join(words[2:4])]) if entry["path"] in asked]
            return self.send(request, 200, json.dumps(found).encode(), {"Content-Type": "application/json"}, True)
        if self.new is None:
            return self.send(request, 401, b"", {}, True)
        if words[:3] == ["api", "repos", "create"]:
            wanted = json.loads(content)
            name = f"{wanted['organization']}/{wanted['name']}"
            self.repositories[name] = self.new / name
            self.repositories[name].mkdir(parents=True, exist_ok=True)
            answer = {"url": f"{self.address}/{name}"}
        elif words[4:5] == ["preupload"]:
            known = self.repositories["/".join(words[2:4])]
            about = {"uploadMode": "regular", "shouldIgnore": False}
            files = [f["path"] for f in json.loads(content)["files"]]
            oids = {path: git_oid(known / path) for path in files if (known / path).is_file()}
            answer = {"files": [{"path": path, **about, "oid": oids.get(path)} for path in files]}
        elif words[4:5] == ["commit"]:
            name = "/".join(words[2:4])
            if self.commits == 0:
                return self.send(request, 403, b"", {}, True)
            self.commits -= 1
            for line in map(json.loads, content.splitlines()):
                if line["key"] == "file":
                    file = self.repositories[name] / line["value"]["path"]
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_bytes(base64.b64decode(line["value"]["content"]))
                    self.received.append(line["value"]["path"])
            answer = {
                "commitUrl": f"{self.address}/{name}/commit/{COMMIT}",
                "commitOid": COMMIT,
                "pullRequestUrl": None,
            }
        return self.send(request, 200, json.dumps(answer).encode(), {"Content-Type": "application/json"}, True)

    def send(self, request: BaseHTTPRequestHandler, status: int, content: bytes, headers: dict, body: bool) -> None:
        request.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            request.send_header(key, value)
        request.end_headers()
        if body:
            request.wfile.write(content)


def git_oid(file: Path) -> str:
    """The name that git gives to the content of ``file``."""
    content = file.read_bytes()
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


@contextmanager
def hub_of(repositories: dict[str, Path], cache: Path) -> Iterator[Hub]:
    """A hub of these repositories, which huggingface_hub in this process talks to, and an empty cache."""
    hub = Hub(repositories)
    thread = threading.Thread(target=hub.server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    with pytest.MonkeyPatch.context() as patch:
        template = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr("huggingface_hub.constants.ENDPOINT", hub.address)
        patch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        yield hub
    hub.server.shutdown()
    hub.server.server_close()


@contextmanager
def offline() -> Iterator[None]:
    """No network, as HF_HUB_OFFLINE=1 says."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        yield
