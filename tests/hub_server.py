"""A small Hugging Face hub on loopback: the requests that huggingface_hub 0.36 and 2.4 make for models, and faults.

with Hub() as hub:                      # hub.url is HF_ENDPOINT
    hub.add("org/model", {"config.json": b"{}"})
    hub.fail("PUT", r"/lfs/", "cut", times=1)
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = ("*.safetensors", "*.bin", "*.png")
WRITER, READER = "hf_writerwriterwriterwriter", "hf_readerreaderreaderreader"
USERS = {WRITER: ("ada", "write"), READER: ("bob", "read")}


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@dataclass
class Repo:
    """A model repository. commits: id -> files; refs: name -> commit; stored: large files that it may commit."""

    name: str
    owner: str
    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    messages: list[tuple[str, str, str]] = field(default_factory=list)  # ref, summary, description
    pulls: list[dict] = field(default_factory=list)
    stored: dict[str, bytes] = field(default_factory=dict)

    def commit(self, ref: str, files: dict[str, bytes], summary: str = "", description: str = "") -> str:
        state = f"{self.name}{len(self.commits)}" + "".join(f"{k}{git_oid(v)}" for k, v in sorted(files.items()))
        oid = hashlib.sha1(state.encode()).hexdigest()
        self.commits[oid] = files
        self.refs[ref] = oid
        self.messages.append((ref, summary, description))
        self.stored.update({sha256(data): data for name, data in files.items() if is_large(name, len(data))})
        return oid

    def files(self, ref: str = "main") -> dict[str, bytes]:
        return self.commits[self.refs[ref]]


@dataclass
class Fault:
    """What happens to the next `times` requests that match: a status, "cut" in mid-body, or a call that may block."""

    method: str
    pattern: str
    action: int | str | Callable[[], None]
    times: int


def is_large(name: str, size: int) -> bool:
    return size > 0 and (size > 10_000_000 or any(fnmatch(name, pattern) for pattern in LARGE))


class Answer(Exception):
    """Ends a request. code: X-Error-Code."""

    def __init__(self, status: int, body: object = b"", *, code: str = "", message: str = "", **headers: str):
        self.status = status
        self.body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.headers = {key.replace("_", "-"): value for key, value in headers.items()}
        if code:
            self.headers["X-Error-Code"] = code
        if message:
            self.headers["X-Error-Message"] = message


class Hub:
    """The server, in a thread. requests: "METHOD path" as they came; repos: by name."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.requests: list[str] = []
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        handler = type("BoundHandler", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        # Another host by name: the client takes a redirect within one host for a renamed repository
        self.cdn = f"http://localhost:{self.server.server_port}/cdn"

    def __enter__(self) -> Hub:
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def add(self, name: str, files: dict[str, bytes] | None = None, **settings: bool) -> Repo:
        repo = Repo(name, name.split("/")[0], **settings)
        repo.commit("main", {".gitattributes": b"", **(files or {})}, "initial commit")
        self.repos[name] = repo
        return repo

    def fail(self, method: str, pattern: str, action: int | str | Callable[[], None], times: int = 1) -> None:
        self.faults.append(Fault(method, pattern, action, times))

    def asked(self, pattern: str) -> list[str]:
        """The requests that match."""
        return [request for request in self.requests if re.search(pattern, request)]


class Handler(BaseHTTPRequestHandler):
    """One connection. A route is a method, a pattern of the path and a function of this class."""

    hub: Hub
    protocol_version = "HTTP/1.1"
    REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
    REV = r"(?P<rev>[^/]+)"

    def log_message(self, *_: object) -> None:
        pass

    def _serve(self) -> None:
        url = urlsplit(self.path)
        self.query = {key: values[0] for key, values in parse_qs(url.query).items()}
        self._body: bytes | None = None
        with self.hub.lock:
            self.hub.requests.append(f"{self.command} {self.path}")
        try:
            self._fault()
            method = "GET" if self.command == "HEAD" else self.command
            for verb, pattern, action in ROUTES:
                found = re.fullmatch(pattern, url.path)
                if verb == method and found:
                    body = self.body()
                    with self.hub.lock:
                        self.user, self.role = self._who()
                        groups = {key: unquote(value or "") for key, value in found.groupdict().items()}
                        action(self, body=body, **groups)
            raise Answer(404, {"error": "no such route"}, message=f"no such route: {self.command} {url.path}")
        except Answer as answer:
            self._send(answer)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def body(self) -> bytes:
        if self._body is None:
            if self.headers.get("Transfer-Encoding") == "chunked":
                parts = []
                while size := int(self.rfile.readline(), 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                self._body = b"".join(parts)
            else:
                self._body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return self._body

    def _fault(self) -> None:
        with self.hub.lock:
            for fault in self.hub.faults:
                if fault.times and fault.method == self.command and re.search(fault.pattern, self.path):
                    fault.times -= 1
                    break
            else:
                return
        breaks = fault.action == "cut" or callable(fault.action)
        if breaks and self.command in ("POST", "PUT"):  # a body that never comes would be waited for
            self.rfile.read1(1000)
        if callable(fault.action):
            fault.action()
        if breaks:
            self.close_connection = True
            self.connection.close()
            raise ConnectionResetError
        self.body()
        raise Answer(int(fault.action), {"error": "broken"}, message="broken")

    def _send(self, answer: Answer) -> None:
        self.body()
        body, status = answer.body, answer.status
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted and status == 200:
            first, last = int(wanted[1]), int(wanted[2] or len(body) - 1)
            answer.headers["Content-Range"] = f"bytes {first}-{last}/{len(body)}"
            body, status = body[first : last + 1], 206
        self.send_response(status)
        for key, value in answer.headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _who(self) -> tuple[str | None, str | None]:
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if not given:
            return None, None
        if given not in USERS:
            message = "Invalid credentials in Authorization header"
            raise Answer(401, {"error": message}, message=message)
        return USERS[given]

    def _repo(self, name: str, *, write: bool = False, content: bool = False) -> Repo:
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and self.user != repo.owner):
            if self.user is None:
                raise Answer(401, {"error": "x"}, message="Invalid username or password.")
            raise Answer(404, {"error": "Repository not found"}, code="RepoNotFound", message="Repository not found")
        if content and repo.gated and self.user != repo.owner:
            raise Answer(403 if self.user else 401, b"gated", code="GatedRepo", message="Access is restricted.")
        if write and (self.user != repo.owner or self.role != "write"):
            message = "you must use a write token to write to this repository"
            raise Answer(403, {"error": message}, message=message)
        return repo

    def _commit_of(self, repo: Repo, rev: str) -> str:
        oid = repo.refs.get(rev, rev)
        if oid not in repo.commits:
            raise Answer(404, {"error": rev}, code="RevisionNotFound", message=f"Invalid rev id: {rev}")
        return oid

    def _may_commit(self, repo: Repo, rev: str) -> None:
        """Whoever may read may open a pull request and push to it; anything else is for those who may write."""
        own_pull = any(pull["author"]["name"] == self.user and rev == f"refs/pr/{pull['num']}" for pull in repo.pulls)
        if self.user is None or not ("create_pr" in self.query or own_pull):
            self._repo(repo.name, write=True)

    def whoami(self, **_: object) -> None:
        if self.user is None:
            raise Answer(401, {"error": "no token"}, message="Invalid username or password.")
        token = {"displayName": "test", "role": self.role}
        raise Answer(200, {"type": "user", "name": self.user, "orgs": [], "auth": {"accessToken": token}})

    def validate(self, **_: object) -> None:
        raise Answer(200, {"warnings": [], "errors": []})

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        owner = asked.get("organization") or self.user
        name = f"{owner}/{asked['name']}"
        if self.user is None or owner != self.user or self.role != "write":
            message = f"You don't have the rights to create a model under the namespace {owner!r}."
            raise Answer(403 if self.user else 401, {"error": message}, message=message)
        if name in self.hub.repos:
            raise Answer(409, {"error": "exists", "url": f"{self.hub.url}/{name}"}, message="exists")
        private = bool(asked.get("private") or asked.get("visibility") == "private")
        self.hub.add(name, private=private)
        raise Answer(200, {"url": f"{self.hub.url}/{name}", "name": name, "id": name})

    def entry(self, name: str, data: bytes) -> dict:
        entry = {"type": "file", "path": name, "size": len(data), "oid": git_oid(data)}
        if is_large(name, len(data)):
            entry["lfs"] = {"oid": sha256(data), "size": len(data), "pointerSize": 130}
        return entry

    def info(self, repo: str, rev: str = "", **_: object) -> None:
        found = self._repo(repo)
        oid = self._commit_of(found, rev or "main")
        siblings: list[dict] = []
        for name, data in found.commits[oid].items():
            entry = self.entry(name, data)
            siblings.append({"rfilename": name})
            if "blobs" in self.query:
                siblings[-1].update(size=entry["size"], blobId=entry["oid"])
                if "lfs" in entry:
                    siblings[-1]["lfs"] = {"sha256": entry["lfs"]["oid"], "size": len(data), "pointerSize": 130}
        answer = {"id": repo, "modelId": repo, "sha": oid, "private": found.private, "tags": [], "siblings": siblings}
        raise Answer(200, {**answer, "gated": "manual" if found.gated else False, "downloads": 0, "likes": 0})

    def tree(self, repo: str, rev: str, **_: object) -> None:
        found = self._repo(repo)
        files = found.commits[self._commit_of(found, rev)]
        raise Answer(200, [self.entry(name, data) for name, data in sorted(files.items())])

    def resolve(self, repo: str, rev: str, path: str, **_: object) -> None:
        found = self._repo(repo, content=True)
        oid = self._commit_of(found, rev)
        data = found.commits[oid].get(path)
        if data is None:
            raise Answer(404, b"", code="EntryNotFound", message="Entry not found", X_Repo_Commit=oid)
        if not is_large(path, len(data)):
            raise Answer(200, data, X_Repo_Commit=oid, ETag=f'"{git_oid(data)}"')
        linked = {"X-Linked-Etag": f'"{sha256(data)}"', "X-Linked-Size": str(len(data)), "X-Repo-Commit": oid}
        raise Answer(302, b"", Location=f"{self.hub.cdn}/{repo}/{sha256(data)}", **linked)

    def cdn(self, repo: str, oid: str, **_: object) -> None:
        raise Answer(200, self.hub.repos[repo].stored[oid], ETag=f'"{oid}"', Accept_Ranges="bytes")

    def preupload(self, repo: str, rev: str, body: bytes) -> None:
        found = self._repo(repo)
        self._may_commit(found, rev)
        files = found.commits[self._commit_of(found, rev)]
        answers = []
        for file in json.loads(body)["files"]:
            large, there = is_large(file["path"], file["size"]), files.get(file["path"])
            answer = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            if there is not None:
                answer["oid"] = sha256(there) if large else git_oid(there)
            answers.append(answer)
        raise Answer(200, {"files": answers})

    def batch(self, repo: str, body: bytes) -> None:
        found = self._repo(repo, write=True)
        objects = []
        for asked in json.loads(body)["objects"]:
            if asked["oid"] not in found.stored:
                upload = {"href": f"{self.hub.url}/lfs/{repo}/{asked['oid']}"}
                verify = {"href": f"{self.hub.url}/lfs-verify/{repo}"}
                asked["actions"] = {"upload": upload, "verify": verify}
            objects.append(asked)
        raise Answer(200, {"transfer": "basic", "objects": objects})

    def put(self, repo: str, oid: str, body: bytes) -> None:
        if sha256(body) != oid:
            raise Answer(400, {"error": "hash"}, message="the body's hash is another")
        self.hub.repos[repo].stored[oid] = body
        raise Answer(200)

    def verify(self, repo: str, body: bytes) -> None:
        asked = json.loads(body)
        data = self.hub.repos[repo].stored.get(asked["oid"])
        raise Answer(200 if data is not None and len(data) == asked["size"] else 404)

    def commit(self, repo: str, rev: str, body: bytes) -> None:
        pull = "create_pr" in self.query
        found = self._repo(repo)
        self._may_commit(found, rev)
        base = self._commit_of(found, rev)
        files = dict(found.commits[base])
        lines = [json.loads(line) for line in body.splitlines()]
        header = lines[0]["value"]
        if header.get("parentCommit", base) != base:
            raise Answer(412, {"error": "A commit has happened since."}, message="A commit has happened since.")
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in found.stored:
                    raise Answer(400, {"error": "LFS pointer to nothing"}, message="LFS pointer to nothing")
                files[value["path"]] = found.stored[value["oid"]]
            else:
                del files[value["path"]]
        url = None
        if pull:
            number = len(found.pulls) + 1
            rev, url = f"refs/pr/{number}", f"{self.hub.url}/{repo}/discussions/{number}"
            number_of = {"title": header["summary"], "num": number, "author": {"name": self.user}, "status": "open"}
            about = {"createdAt": "2026-11-23T00:00:00.000Z", "repo": {"name": repo, "type": "model"}}
            found.pulls.append({**number_of, **about, "isPullRequest": True})
        oid = found.commit(rev, files, header["summary"], header["description"])
        link = f"{self.hub.url}/{repo}/commit/{oid}"
        raise Answer(200, {"success": True, "commitOid": oid, "commitUrl": link, "pullRequestUrl": url})

    def discussions(self, repo: str, **_: object) -> None:
        pulls = self._repo(repo).pulls
        if "author" in self.query:
            pulls = [pull for pull in pulls if pull["author"]["name"] == self.query["author"]]
        if "status" in self.query:
            pulls = [pull for pull in pulls if pull["status"] == self.query["status"]]
        raise Answer(200, {"count": len(pulls), "start": 0, "discussions": pulls})


REPO, REV = Handler.REPO, Handler.REV
ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("GET", r"/api/whoami-v2", Handler.whoami),
    ("POST", r"/api/validate-yaml", Handler.validate),
    ("POST", r"/api/repos/create", Handler.create),
    ("GET", rf"/api/models/{REPO}", Handler.info),
    ("GET", rf"/api/models/{REPO}/revision/{REV}", Handler.info),
    ("GET", rf"/api/models/{REPO}/tree/{REV}", Handler.tree),
    ("GET", rf"/api/models/{REPO}/discussions", Handler.discussions),
    ("POST", rf"/api/models/{REPO}/preupload/{REV}", Handler.preupload),
    ("POST", rf"/api/models/{REPO}/commit/{REV}", Handler.commit),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", Handler.batch),
    ("PUT", rf"/lfs/{REPO}/(?P<oid>\w+)", Handler.put),
    ("POST", rf"/lfs-verify/{REPO}", Handler.verify),
    ("GET", rf"/{REPO}/resolve/{REV}/(?P<path>.+)", Handler.resolve),
    ("GET", rf"/cdn/{REPO}/(?P<oid>\w+)", Handler.cdn),
]
