"""A small Hub in memory: enough of its HTTP protocol for the real client; and processes that talk to it."""

import base64
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml
from fork_server import ForkServers


USER, TOKEN = "me", "hf_test"


class Refused(Exception):
    """An answer other than 200: status, the Hub's code for it, a message, and the commit that was looked at."""

    def __init__(self, status: int, code: str = "", message: str = "", commit: str = "") -> None:
        super().__init__(message)
        self.status = status
        said = {"X-Error-Message": message, "X-Error-Code": code, "X-Repo-Commit": commit}
        self.headers = {key: value for key, value in said.items() if value}


@dataclass
class Repo:
    """Commits, oldest first: id and all files by path."""

    name: str
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)
    pulls: dict[str, tuple[str, dict[str, bytes]]] = field(default_factory=dict)  # pull requests, by reference

    def commit(self, files: dict[str, bytes]) -> str:
        parts = [f"{len(self.commits)} {self.name}", *(f"{path} {_oid(data)}" for path, data in sorted(files.items()))]
        self.commits.append((hashlib.sha1("\n".join(parts).encode()).hexdigest(), files))
        return self.commits[-1][0]

    def at(self, revision: str) -> tuple[str, dict[str, bytes]]:
        if revision == "main":
            return self.commits[-1]
        if revision in self.pulls:
            return self.pulls[revision]
        for sha, files in (*self.commits, *self.pulls.values()):
            if sha == revision:
                return sha, files
        raise Refused(404, "RevisionNotFound", f"no revision {revision}")


def _oid(data: bytes) -> str:
    """As git names a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _card(files: dict[str, bytes]) -> dict[str, Any]:
    """What the Hub reads from a card; nothing where it is no YAML."""
    found = re.match(rb"---\r?\n(.*?)\r?\n---", files.get("README.md", b""), re.S)
    try:
        card = yaml.safe_load(found[1]) if found else {}
    except (yaml.YAMLError, ValueError):
        return {}
    return card if isinstance(card, dict) else {}


def _many(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _tags(card: dict[str, Any]) -> list[str]:
    """The tags that the Hub makes of a card."""
    tags = [str(tag) for tag in _many(card.get("tags"))]
    tags += [card[key] for key in ("library_name", "pipeline_tag") if key in card]
    tags += [f"license:{name}" for name in _many(card.get("license"))]
    tags += [f"dataset:{name}" for name in _many(card.get("datasets"))]
    relation = card.get("base_model_relation", "finetune")
    for name in _many(card.get("base_model")):
        tags += [f"base_model:{name}", f"base_model:{relation}:{name}"]
    return tags


@dataclass
class Hub:
    """All repositories, and what was asked: method, path and bytes of the answer.

    The bodies of files whose path ends in ``cut_short`` break off half way, and those that end in a key of ``refused``
    are not given. Repositories in ``read_only`` take pull requests alone. ``raw_cards`` are sent instead of what is in
    a repository's card. After ``last`` was answered, the Hub answers no more.
    """

    cut_short: str | None = None
    refused: dict[str, Refused] = field(default_factory=dict)
    raw_cards: dict[str, str] = field(default_factory=dict)
    read_only: set[str] = field(default_factory=set)
    last: str | None = None
    gone: bool = False
    repos: dict[str, Repo] = field(default_factory=dict)
    log: list[tuple[str, str, int]] = field(default_factory=list)
    lock: threading.RLock = field(default_factory=threading.RLock)
    url: str = ""

    def repo(self, name: str) -> Repo:
        if name not in self.repos:
            raise Refused(404, "RepoNotFound", f"no repository {name}")
        return self.repos[name]

    def put(self, name: str, files: dict[str, bytes]) -> str:
        """Commit files without the protocol."""
        return self.repos.setdefault(name, Repo(name)).commit(files)

    def info(self, name: str, revision: str) -> dict[str, Any]:
        sha, files = self.repo(name).at(revision)
        card = _card(files)
        config = json.loads(files.get("config.json", b"{}"))
        return {
            "_id": hashlib.md5(name.encode()).hexdigest()[:24],
            "id": name,
            "modelId": name,
            "author": name.split("/")[0],
            "sha": sha,
            "lastModified": "2026-01-01T00:00:00.000Z",
            "createdAt": "2026-01-01T00:00:00.000Z",
            "private": False,
            "gated": False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [*_tags(card), *(config[key] for key in ("model_type",) if key in config)],
            "cardData": f"raw card of {name}" if name in self.raw_cards else card,
            "library_name": card.get("library_name"),
            "pipeline_tag": card.get("pipeline_tag"),
            "siblings": [{"rfilename": path} for path in sorted(files)],
        }


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args: Any) -> None:
        """Say nothing."""

    def _answer(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.sent = self._read()
        if self.hub.gone:
            self.close_connection = True
            return None
        self.hub.gone = self.hub.last is not None and url.path.endswith(self.hub.last)
        try:
            for methods, pattern, route in ROUTES:
                match = re.fullmatch(pattern, url.path)
                if match and self.command in methods.split():
                    if self.command in ("POST", "PUT") and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                        raise Refused(401, "", "who are you?")
                    with self.hub.lock:
                        return route(self, *(unquote(part) for part in match.groups()))
            raise Refused(404, "", f"no route for {self.command} {url.path}")
        except Refused as refused:
            self._send(json.dumps({"error": str(refused)}).encode(), refused.status, refused.headers)

    do_GET = do_HEAD = do_POST = do_PUT = _answer

    def _read(self) -> bytes:
        if "chunked" not in (self.headers.get("Transfer-Encoding") or ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def _send(self, data: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.hub.log.append((self.command, self.path, 0 if self.command == "HEAD" else len(data)))
        self.send_response(status)
        for key, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD" and self.hub.cut_short and self.path.endswith(self.hub.cut_short):
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
        elif self.command != "HEAD":
            self.wfile.write(data)

    def _json(self, value: Any) -> None:
        text = json.dumps(value)
        for name, raw in self.hub.raw_cards.items():
            text = text.replace(f'"raw card of {name}"', raw)
        self._send(text.encode())

    def whoami(self) -> None:
        token = {"displayName": "test", "role": "write", "createdAt": "2026-01-01T00:00:00.000Z"}
        about = {"type": "user", "id": "0", "name": USER, "fullname": USER, "orgs": [], "isPro": False}
        self._json({**about, "auth": {"type": "access_token", "accessToken": token}})

    def create(self) -> None:
        wanted = json.loads(self.sent)
        name = f"{wanted.get('organization') or USER}/{wanted['name']}"
        url = f"{self.hub.url}/{name}"
        if name in self.hub.repos:
            return self._send(json.dumps({"error": "it exists", "url": url, "name": name}).encode(), 409)
        self.hub.put(name, {".gitattributes": b""})
        self._json({"url": url, "name": name, "id": name})

    def validate(self) -> None:
        self._json({"errors": [], "warnings": []})

    def _check_writer(self, name: str) -> bool:
        """Whether a pull request is asked for; nobody else may write to a repository that is read only."""
        pull = "create_pr" in self.query
        if name in self.hub.read_only and not pull:
            raise Refused(403, "", "pass `create_pr=1` as a query parameter to create a Pull Request")
        return pull

    def preupload(self, name: str, revision: str) -> None:
        self._check_writer(name)
        files = self.hub.repo(name).at(revision)[1]
        wanted = [file["path"] for file in json.loads(self.sent)["files"]]
        known = {path: _oid(files[path]) if path in files else None for path in wanted}
        answers = [{"path": p, "uploadMode": "regular", "shouldIgnore": False, "oid": oid} for p, oid in known.items()]
        self._json({"files": answers, "commitOid": None})

    def commit(self, name: str, revision: str) -> None:
        pull = self._check_writer(name)
        repo = self.hub.repo(name)
        files = dict(repo.at(revision)[1])
        for line in filter(None, self.sent.splitlines()):
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
        sha, answer = repo.commit(files), {"success": True}
        if pull:
            number = len(repo.pulls) + 1
            repo.pulls[f"refs/pr/{number}"] = repo.commits.pop()
            answer |= {"pullRequestUrl": f"{self.hub.url}/{name}/discussions/{number}"}
        self._json({**answer, "commitOid": sha, "commitUrl": f"{self.hub.url}/{name}/commit/{sha}"})

    def info(self, name: str, revision: str = "main") -> None:
        self._json(self.hub.info(name, revision))

    def tree(self, name: str, revision: str) -> None:
        files = self.hub.repo(name).at(revision)[1]
        self._json([{"type": "file", "path": p, "oid": _oid(d), "size": len(d)} for p, d in sorted(files.items())])

    def listing(self) -> None:
        wanted = {tag for value in self.query.get("filter", []) for tag in value.split(",")}
        found = [self.hub.info(name, "main") for name in sorted(self.hub.repos)]
        found = [info for info in found if wanted <= set(info["tags"])]
        hidden = () if "cardData" in self.query else ("cardData",)
        self._json([{key: value for key, value in info.items() if key not in hidden} for info in found])

    def file(self, name: str, revision: str, path: str) -> None:
        sha, files = self.hub.repo(name).at(revision)
        for end, refused in self.hub.refused.items():
            if self.path.endswith(end):
                raise refused
        if path not in files:
            raise Refused(404, "EntryNotFound", f"no file {path}", sha)
        data = files[path]
        headers = {"ETag": f'"{_oid(data)}"', "X-Repo-Commit": sha, "Content-Type": "application/octet-stream"}
        self._send(data, headers=headers)


NAME = r"([^/]+/[^/]+)"
ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("GET", "/api/whoami-v2", _Handler.whoami),
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.validate),
    ("POST", rf"/api/models/{NAME}/preupload/([^/]+)", _Handler.preupload),
    ("POST", rf"/api/models/{NAME}/commit/([^/]+)", _Handler.commit),
    ("GET", "/api/models", _Handler.listing),
    ("GET", rf"/api/models/{NAME}/tree/([^/]+)", _Handler.tree),
    ("GET", rf"/api/models/{NAME}/revision/([^/]+)", _Handler.info),
    ("GET", rf"/api/models/{NAME}", _Handler.info),
    ("GET HEAD", rf"/{NAME}/resolve/([^/]+)/(.+)", _Handler.file),
]


@contextmanager
def running() -> Iterator[Hub]:
    """A Hub on a free port of this machine."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


START = """
import json, sys
import torch
from pathlib import Path
from safetensors.torch import load_file, save_file
from restnet_hf import StitchedModelForImageClassification as Model
torch.set_grad_enabled(False)
"""
WORLD = """
folder = Path(sys.argv[1])
images = load_file(folder / "images.safetensors")["images"]
"""


class World:
    """A Hub, a folder, and processes that talk to it, each with a cache of its own unless told."""

    def __init__(self, hub, folder: Path) -> None:
        self.hub, self.folder, self.processes = hub, folder, ForkServers(START)

    def run(
        self, code: str, home: str = "home", arguments: Sequence[str] = (), whole: bool = False, **env: str
    ) -> Any:
        """The JSON in the last line that the code prints, or the whole text."""
        keep = {key: value for key, value in os.environ.items() if key not in ("HF_HUB_OFFLINE", "HF_ASSETS_CACHE")}
        keep |= {"HF_ENDPOINT": self.hub.url, "HF_TOKEN": TOKEN, "HF_HOME": "cache", **env}
        keep |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        here = self.folder / home  # a cache at the same relative path, so that one process serves all
        here.mkdir(exist_ok=True)
        result = self.processes.run(WORLD + code, [str(self.folder), *arguments], here, keep)
        assert result.returncode == 0, result.stderr[-3000:]
        return result.stdout if whole else json.loads(result.stdout.strip().splitlines()[-1])

    def asked(self) -> list[tuple[str, str, int]]:
        """What the Hub was asked for since the last time, without the client's own housekeeping."""
        log = [entry for entry in self.hub.log if entry[1].startswith(("/api/models", "/me/"))]
        self.hub.log.clear()
        return log
