"""A hub on this machine: what the real client asks of one, over HTTP, with commits and tokens.

It speaks the part of the hub's interface that pushing and pulling need: repositories, a tree of
files per commit, small files inside the commit and large ones by the LFS protocol beside it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_of_the_owner"  # noqa: S105  (of nobody)
LARGE = (".onnx", ".safetensors")
"""Files that travel beside the commit."""


@dataclass
class Repository:
    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    head: str = ""

    def commit(self, files: dict[str, bytes]) -> str:
        listed = sorted((name, hashlib.sha256(data).hexdigest()) for name, data in files.items())
        text = json.dumps([self.head, listed])
        self.head = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
        self.commits[self.head] = files
        return self.head

    def files(self, revision: str) -> tuple[str, dict[str, bytes]]:
        sha = self.head if revision == "main" else revision
        return sha, self.commits[sha]


class Hub(ThreadingHTTPServer):
    """The server; tests look into `repositories` and may put an answer into `refusals`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.refusals: dict[str, int] = {}
        self.asked: list[str] = []

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def running_hub():
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def _answer(self, document=None, *, code=200, body=b"", headers=()):
        if document is not None:
            body = json.dumps(document).encode()
        self.send_response(code)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _dispatch(self):
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(f"{self.command} {path}")
        length = int(self.headers.get("Content-Length", 0))
        self.body = self.rfile.read(length)
        for pattern, code in self.server.refusals.items():
            if re.search(pattern, f"{self.command} {path}"):
                return self._answer({"error": "refused"}, code=code)
        for method, pattern, act in ROUTES:
            found = re.fullmatch(pattern, path)
            if method == self.command.replace("HEAD", "GET") and found:
                return act(self, *found.groups())
        return self._answer({"error": f"no route {path}"}, code=404)

    do_GET = do_HEAD = do_POST = do_PUT = _dispatch  # noqa: N815  (the library's names)

    @property
    def _is_owner(self):
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _repository(self, name):
        """The repository, or `None` once a refusal was sent."""
        found = self.server.repositories.get(name)
        if found is None or (found.private and not self._is_owner):
            self._answer(
                {"error": "not found"}, code=404, headers=[("X-Error-Code", "RepoNotFound")]
            )
            return None
        return found

    def create(self):
        if not self._is_owner:
            return self._answer({"error": "who are you"}, code=401)
        asked = json.loads(self.body)
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.server.repositories:
            return self._answer({"url": f"{self.server.endpoint}/{name}"}, code=409)
        made = Repository(private=asked.get("visibility") == "private")
        made.commit({".gitattributes": b"* text"})
        self.server.repositories[name] = made
        return self._answer({"url": f"{self.server.endpoint}/{name}"})

    def validate_card(self):
        content = json.loads(self.body)["content"]
        if not content.startswith("---\n"):
            return self._answer({"warnings": [{"message": "empty metadata"}]})
        return self._answer({"errors": [], "warnings": []})

    def info(self, name, _, revision=None):
        found = self._repository(name)
        if found is None:
            return None
        if (revision or "main") not in ("main", *found.commits):
            headers = [("X-Error-Code", "RevisionNotFound")]
            return self._answer({"error": "no revision"}, code=404, headers=headers)
        sha, files = found.files(revision or "main")
        siblings = [{"rfilename": file} for file in files]
        return self._answer(
            {"id": name, "sha": sha, "private": found.private, "siblings": siblings, "tags": []}
        )

    def tree(self, name, revision):
        found = self._repository(name)
        if found is None:
            return None
        _, files = found.files(revision)
        return self._answer(
            [
                {"type": "file", "path": file, "size": len(data), "oid": _blob_id(data)}
                for file, data in files.items()
            ]
        )

    def modes(self, name, _):
        files = json.loads(self.body)["files"]
        return self._answer(
            {
                "files": [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                        "shouldIgnore": False,
                    }
                    for file in files
                ]
            }
        )

    def batch(self, _):
        if not self._is_owner:
            return self._answer({"error": "who are you"}, code=401)
        objects = json.loads(self.body)["objects"]
        href = f"{self.server.endpoint}/objects/"
        return self._answer(
            {
                "transfer": "basic",
                "objects": [
                    one
                    if one["oid"] in self.server.objects
                    else {**one, "actions": {"upload": {"href": href + one["oid"]}}}
                    for one in objects
                ],
            }
        )

    def store(self, oid):
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.server.objects[oid] = self.body
        return self._answer()

    def commit(self, name, revision):
        found = self._repository(name)
        if found is None:
            return None
        if not self._is_owner:
            return self._answer({"error": "who are you"}, code=403)
        head, *operations = [json.loads(line) for line in self.body.splitlines()]
        if head["value"].get("parentCommit", found.head) != found.head:
            return self._answer({"error": "the branch has moved"}, code=412)
        files = dict(found.files(revision)[1])
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            else:
                assert operation["key"] == "deletedFile"
                del files[value["path"]]
        sha = found.commit(files)
        url = f"{self.server.endpoint}/{name}/commit/{sha}"
        return self._answer({"commitUrl": url, "commitOid": sha})

    def resolve(self, name, revision, file):
        found = self._repository(name)
        if found is None:
            return None
        sha, files = found.files(revision)
        if file not in files:
            headers = [("X-Error-Code", "EntryNotFound")]
            return self._answer({"error": "no file"}, code=404, headers=headers)
        data = files[file]
        headers = [("X-Repo-Commit", sha), ("ETag", f'"{hashlib.sha256(data).hexdigest()}"')]
        return self._answer(body=data, headers=headers)


_NAME = r"([^/]+/[^/]+)"
ROUTES = (
    ("POST", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", Handler.validate_card),
    ("GET", rf"/api/models/{_NAME}(/revision/([^/]+))?", Handler.info),
    ("GET", rf"/api/models/{_NAME}/tree/([^/]+)", Handler.tree),
    ("POST", rf"/api/models/{_NAME}/preupload/([^/]+)", Handler.modes),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", Handler.batch),
    ("PUT", "/objects/([0-9a-f]{64})", Handler.store),
    ("POST", rf"/api/models/{_NAME}/commit/([^/]+)", Handler.commit),
    ("GET", rf"/{_NAME}/resolve/([^/]+)/(.+)", Handler.resolve),
)


def _blob_id(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
