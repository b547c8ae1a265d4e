"""A stand-in for the Hub on the loopback interface: enough of it for uploads, downloads and header reads."""

import base64
import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.helpers.http_server import HttpServer, Request, Response

ROOT = Path(__file__).parents[2]
COMMIT = "c" * 40
REFUSED = "somebody/else"  # nobody may write here
NAME = "([^/]+/[^/]+)"  # of a repository, in an address
RANGE = re.compile(r"bytes=(\d+)-(\d*)")


@dataclass
class HubState:
    """Repositories by name (path -> content), and what was asked for."""

    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    commits: list[dict[str, Any]] = field(default_factory=list)
    blobs: dict[str, bytes] = field(default_factory=dict)
    downloads: dict[str, int] = field(default_factory=dict)  # path -> bytes sent
    tags: dict[str, dict[str, str]] = field(default_factory=dict)  # repository -> tag -> commit
    fails: dict[str, int] = field(default_factory=dict)  # part of an address -> status of the answer
    requests: list[str] = field(default_factory=list)  # method and path, of what changes something


class HubServer(HttpServer):
    """Serves a `HubState` until the `with` block ends."""

    def __init__(self) -> None:
        super().__init__(self._answer)
        self.state = HubState()
        self._routes: list[tuple[str, str, Callable[..., Response]]] = [
            ("GET", rf"/api/models/{NAME}/refs", self._list_tags),
            ("GET", rf"/api/models/{NAME}/tree/.*", self._list_files),
            ("GET", rf"/api/models/{NAME}(?:/revision/.*)?", self._describe),
            ("GET", rf"/{NAME}/resolve/[^/]+/(.+)", self._send_file),
            ("DELETE", "/api/repos/delete", self._delete),
            ("PUT", "/put/(.+)", self._keep_blob),
            ("POST", rf"/api/models/{NAME}/tag/(.+)", self._tag),
            ("POST", "/api/repos/create", self._create),
            ("POST", ".*/preupload/main", self._choose_uploads),
            ("POST", ".*/info/lfs/objects/batch", self._name_uploads),
            ("POST", rf"/api/models/{NAME}/commit/main", self._commit),
        ]

    def _answer(self, request: Request) -> Response:
        method = request.method.replace("HEAD", "GET")
        if method != "GET":
            self.state.requests.append(f"{method} {request.path}")
            for part, status in self.state.fails.items():
                if part in request.path:
                    return Response.json({"error": f"{part} fails", "errors": [{"message": f"{part} fails"}]}, status)
        for known, address, route in self._routes:
            if method == known and (match := re.fullmatch(address, request.path.split("?")[0])):
                return route(request, *match.groups())
        return Response.json({"errors": [], "warnings": []})

    def _list_tags(self, request: Request, name: str) -> Response:
        tags = self.state.tags.get(name, {}).items()
        refs = [{"name": tag, "ref": f"refs/tags/{tag}", "targetCommit": commit} for tag, commit in tags]
        return Response.json({"branches": [], "converts": [], "tags": refs})

    def _list_files(self, request: Request, name: str) -> Response:
        if name not in self.state.repositories:
            return _missing("RepoNotFound")
        files = self.state.repositories[name].items()
        return Response.json([{"type": "file", "path": p, "size": len(c), "oid": _etag(c)} for p, c in files])

    def _describe(self, request: Request, name: str) -> Response:
        if name not in self.state.repositories:
            return _missing("RepoNotFound")
        siblings = [{"rfilename": path} for path in self.state.repositories[name]]
        info = {"_id": "1", "id": name, "modelId": name, "sha": COMMIT, "siblings": siblings, "tags": []}
        return Response.json(info | {"private": self.state.private.get(name, False)})

    def _send_file(self, request: Request, name: str, path: str) -> Response:
        content = self.state.repositories.get(name, {}).get(path)
        if content is None:
            return _missing("EntryNotFound" if name in self.state.repositories else "RepoNotFound")
        headers = {"ETag": f'"{_etag(content)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        wanted = RANGE.fullmatch(request.headers.get("Range", ""))
        status, part = 200, content
        if wanted:
            begin, end = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
            status, part = 206, content[begin : end + 1]
            headers["Content-Range"] = f"bytes {begin}-{end}/{len(content)}"
        if request.method == "GET":
            self.state.downloads[path] = self.state.downloads.get(path, 0) + len(part)
        return Response(part, status, headers)

    def _delete(self, request: Request) -> Response:
        name = _name_in(request)
        del self.state.repositories[name], self.state.private[name]
        return Response.json({})

    def _keep_blob(self, request: Request, oid: str) -> Response:
        self.state.blobs[oid] = request.body
        return Response()

    def _tag(self, request: Request, name: str, commit: str) -> Response:
        self.state.tags.setdefault(name, {})[request.json()["tag"]] = commit
        return Response.json({})

    def _create(self, request: Request) -> Response:
        name, settings = _name_in(request), request.json()
        if name == REFUSED:
            return Response.json({"error": "forbidden"}, 403)
        self.state.private[name] = settings.get("visibility") == "private" or bool(settings.get("private"))
        self.state.repositories.setdefault(name, {})
        return Response.json({"url": f"{self.url}/{name}", "name": name})

    def _choose_uploads(self, request: Request) -> Response:
        files = [{"path": file["path"], "shouldIgnore": False} for file in request.json()["files"]]
        for file in files:
            file["uploadMode"] = "lfs" if file["path"].endswith(".safetensors") else "regular"
        return Response.json({"files": files})

    def _name_uploads(self, request: Request) -> Response:
        objects = request.json()["objects"]
        for item in objects:
            item["actions"] = {"upload": {"href": f"{self.url}/put/{item['oid']}"}}
        return Response.json({"transfer": "basic", "objects": objects})

    def _commit(self, request: Request, name: str) -> Response:
        commit: dict[str, Any] = {"repository": name, "files": []}
        for line in request.body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                commit["summary"] = value["summary"]
                continue
            is_blob = entry["key"] == "lfsFile"
            content = self.state.blobs[value["oid"]] if is_blob else base64.b64decode(value["content"])
            self.state.repositories[name][value["path"]] = content
            commit["files"].append(value["path"])
        self.state.commits.append(commit)
        address = f"{self.url}/{name}/commit/{COMMIT}"
        return Response.json({"success": True, "commitOid": COMMIT, "commitUrl": address, "hookOutput": ""})


def own_environment(hub: HubServer, home: Path) -> dict[str, str]:
    """A user's environment variables, whose Hub is the stand-in."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "CUDA_"))}
    return kept | {
        "PYTHONPATH": str(ROOT / "src"),
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": "hf_test",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }


def _missing(code: str) -> Response:
    return Response(b"{}", 404, {"X-Error-Code": code, "X-Error-Message": "not found"})


def _name_in(request: Request) -> str:
    """The repository that a request's body names."""
    settings = request.json()
    return f"{settings['organization']}/{settings['name']}"


def _etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
