"""A stand-in for the Hub on the loopback interface: enough of it for uploads, downloads and header reads."""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "c" * 40
REFUSED = "somebody/else"  # nobody may write here
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


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: HubState

    def log_message(self, *args: Any) -> None:
        """Be quiet."""

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def _send(self, content: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, content: object, status: int = 200) -> None:
        self._send(json.dumps(content).encode(), status, {"Content-Type": "application/json"})

    def _fails(self) -> bool:
        """Whether the test wants this request to fail; answers it then."""
        for part, status in self.state.fails.items():
            if part in self.path:
                self._json({"error": f"{part} fails", "errors": [{"message": f"{part} fails"}]}, status)
                return True
        return False

    def do_GET(self) -> None:
        self._body()
        path = self.path.split("?")[0]
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/refs", path):
            return self._refs(match[1])
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/.*", path):
            return self._tree(match[1])
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/.*)?", path):
            return self._info(match[1])
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            return self._file(match[1], match[2])
        return self._json({})

    do_HEAD = do_GET

    def _refs(self, name: str) -> None:
        tags = self.state.tags.get(name, {}).items()
        refs = [{"name": tag, "ref": f"refs/tags/{tag}", "targetCommit": commit} for tag, commit in tags]
        self._json({"branches": [], "converts": [], "tags": refs})

    def do_DELETE(self) -> None:
        request = json.loads(self._body())
        self.state.requests.append(f"DELETE {self.path}")
        if not self._fails():
            name = f"{request['organization']}/{request['name']}"
            del self.state.repositories[name], self.state.private[name]
            self._json({})

    def _missing(self, code: str) -> None:
        self._send(b"{}", 404, {"X-Error-Code": code, "X-Error-Message": "not found"})

    def _tree(self, name: str) -> None:
        if name not in self.state.repositories:
            return self._missing("RepoNotFound")
        files = self.state.repositories[name].items()
        return self._json([{"type": "file", "path": p, "size": len(c), "oid": _etag(c)} for p, c in files])

    def _info(self, name: str) -> None:
        if name not in self.state.repositories:
            return self._missing("RepoNotFound")
        siblings = [{"rfilename": path} for path in self.state.repositories[name]]
        info = {"_id": "1", "id": name, "modelId": name, "sha": COMMIT, "siblings": siblings, "tags": []}
        return self._json(info | {"private": self.state.private.get(name, False)})

    def _file(self, name: str, path: str) -> None:
        content = self.state.repositories.get(name, {}).get(path)
        if content is None:
            return self._missing("EntryNotFound" if name in self.state.repositories else "RepoNotFound")
        headers = {"ETag": f'"{_etag(content)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        wanted = RANGE.fullmatch(self.headers.get("Range", ""))
        status, part = 200, content
        if wanted:
            begin, end = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
            status, part = 206, content[begin : end + 1]
            headers["Content-Range"] = f"bytes {begin}-{end}/{len(content)}"
        if self.command == "GET":
            self.state.downloads[path] = self.state.downloads.get(path, 0) + len(part)
        return self._send(part, status, headers)

    def do_PUT(self) -> None:
        body = self._body()
        self.state.requests.append(f"PUT {self.path}")
        if not self._fails():
            self.state.blobs[self.path.removeprefix("/put/")] = body
            self._send(b"")

    def do_POST(self) -> None:
        body = self._body()
        host = f"http://{self.headers['Host']}"
        self.state.requests.append(f"POST {self.path}")
        if self._fails():
            return None
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tag/(.+)", self.path):
            self.state.tags.setdefault(match[1], {})[json.loads(body)["tag"]] = match[2]
            return self._json({})
        if self.path == "/api/repos/create":
            request = json.loads(body)
            name = f"{request['organization']}/{request['name']}"
            if name == REFUSED:
                return self._json({"error": "forbidden"}, 403)
            self.state.private[name] = request.get("visibility") == "private" or bool(request.get("private"))
            self.state.repositories.setdefault(name, {})
            return self._json({"url": f"{host}/{name}", "name": name})
        if self.path.endswith("/preupload/main"):
            files = [{"path": file["path"]} for file in json.loads(body)["files"]]
            for file in files:
                mode = "lfs" if file["path"].endswith(".safetensors") else "regular"
                file |= {"uploadMode": mode, "shouldIgnore": False}
            return self._json({"files": files})
        if self.path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            for item in objects:
                item["actions"] = {"upload": {"href": f"{host}/put/{item['oid']}"}}
            return self._json({"transfer": "basic", "objects": objects})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", self.path):
            return self._commit(match[1], body, host)
        return self._json({"errors": [], "warnings": []})

    def _commit(self, name: str, body: bytes, host: str) -> None:
        commit: dict[str, Any] = {"repository": name, "files": []}
        for line in body.decode().splitlines():
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
        address = f"{host}/{name}/commit/{COMMIT}"
        self._json({"success": True, "commitOid": COMMIT, "commitUrl": address, "hookOutput": ""})


def _etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


class HubServer:
    """Serves a `HubState` until the `with` block ends."""

    def __init__(self) -> None:
        self.state = HubState()
        handler = type("Handler", (_Handler,), {"state": self.state})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *args: object) -> None:
        self._server.shutdown()
        self._server.server_close()
