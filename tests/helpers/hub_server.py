"""A Hub in this process, of what huggingface_hub and datasets ask when they push and load, by the standard library."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN, READ_TOKEN = "hf_LetMeWriteToTheHub", "hf_LetMeReadOnly"


def card_errors(card: str) -> list[dict]:
    """What the Hub refuses of a card: a data set by a name that it could not have there."""
    models = yaml.safe_load(card.split("---")[1]).get("model-index") or []
    found = [result["dataset"]["type"] for model in models for result in model["results"]]
    wrong = [name for name in found if not re.fullmatch(r"(?:[\w-]+/)?[\w.-]+", name, re.ASCII)]
    return [{"message": f'"model-index[0].results[0].dataset.type" with value "{name}" is refused'} for name in wrong]


class Hub(ThreadingHTTPServer):
    """``address`` is an HF_ENDPOINT of user ``me``.

    Attributes:
        commits: by ``models/me/name``, the newest last: (sha, message, {path: bytes}).
        private: which of them are.
        created: what their creation asked for.
        tags: names of commits, by repository.
        break_uploads: answer 400 to file uploads, as if a connection was lost for good.
        requests: method and path of all.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.commits = {}
        self.private = {}
        self.created = {}
        self.tags = {}
        self.objects = {}
        self.requests = []
        self.break_uploads = False
        self.address = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        return self.find(repo, revision)[2]

    def find(self, repo: str, revision: str):
        commits = self.commits[repo]
        revision = self.tags.get(repo, {}).get(revision, revision)
        return commits[-1] if revision == "main" else next(c for c in commits if c[0] == revision)

    def add(self, repo: str, message: str, files: dict[str, bytes]) -> str:
        sha = hashlib.sha1(f"{repo}{len(self.commits.get(repo, []))}".encode()).hexdigest()
        self.commits.setdefault(repo, []).append((sha, message, files))
        return sha


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status: int, content=b"", **headers) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        headers = {"Content-Length": len(data), "Content-Type": "application/json"} | headers
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def handle_any(self) -> None:
        body = self.body()
        url = urlsplit(self.path)
        path = unquote(url.path).strip("/")
        self.server.requests.append(f"{self.command} {path}")
        if path.startswith("upload/"):
            return self.upload(path.removeprefix("upload/"), body)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in (TOKEN, READ_TOKEN):
            return self.answer(
                401, {"error": "Invalid credentials"}, X_Error_Message="Invalid credentials in Authorization header"
            )
        if path.endswith("whoami-v2"):
            role = "read" if token == READ_TOKEN else "write"
            return self.answer(200, {"name": "me", "orgs": [], "auth": {"accessToken": {"role": role}}})
        if path == "api/repos/create":
            return self.create(json.loads(body))
        if path == "api/validate-yaml":
            return self.answer(200, {"errors": card_errors(json.loads(body)["content"]), "warnings": []})
        if path.endswith("/info/lfs/objects/batch"):
            return self.large_files(json.loads(body)["objects"])
        return self.find_repo(path.split("/"), token, body, parse_qs(url.query))

    def upload(self, oid: str, body: bytes) -> None:
        if self.server.break_uploads:
            return self.answer(400, {"error": "broken"})
        self.server.objects[oid] = body
        return self.answer(200, ETag='"x"')

    def large_files(self, objects: list[dict]) -> None:
        for item in objects:
            if item["oid"] not in self.server.objects:
                item["actions"] = {"upload": {"href": f"{self.server.address}/upload/{item['oid']}"}}
        return self.answer(200, {"transfer": "basic", "objects": objects})

    def find_repo(self, words: list[str], token: str, body: bytes, query: dict) -> None:
        api = words[0] == "api"
        if api:
            kind = words[1]
            rest = words[2:]
        elif words[0] == "datasets":
            kind = "datasets"
            rest = words[1:]
        else:
            kind = "models"
            rest = words
        repo = f"{kind}/{'/'.join(rest[:2])}"
        if repo not in self.server.commits or (self.server.private[repo] and not token):
            return self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        try:
            return self.on_repo(api, repo, rest[2:], body, query)
        except StopIteration:
            return self.answer(404, {"error": "no such revision"}, X_Error_Code="RevisionNotFound")

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def create(self, given: dict) -> None:
        kind = f"{given.get('type') or 'model'}s"
        owner = given.get("organization") or "me"
        name = f"{owner}/{given['name']}"
        url = f"{self.server.address}/{'datasets/' if kind == 'datasets' else ''}{name}"
        if owner != "me":
            return self.answer(403, {"error": "not yours"}, X_Error_Message="not yours")
        if f"{kind}/{name}" in self.server.commits:
            return self.answer(409, {"url": url, "error": "exists"})
        self.server.created[f"{kind}/{name}"] = given
        self.server.private[f"{kind}/{name}"] = given.get("visibility") == "private" or bool(given.get("private"))
        self.server.add(f"{kind}/{name}", "initial commit", {".gitattributes": b""})
        return self.answer(200, {"url": url, "name": name})

    def resolve(self, repo: str, revision: str, file: str) -> None:
        sha, _, files = self.server.find(repo, revision)
        if file not in files:
            return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
        data = files[file]
        status = 200
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X_Repo_Commit": sha, "Accept_Ranges": "bytes"}
        if wanted := self.headers.get("Range"):
            status = 206
            first, last = wanted.removeprefix("bytes=").split("-")
            part = data[int(first) : int(last or len(data) - 1) + 1]
            headers["Content_Range"] = f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}"
            data = part
        return self.answer(status, data, **headers)

    def on_repo(self, api: bool, repo: str, rest: list[str], body: bytes, query: dict) -> None:
        hub = self.server
        if not api:  # resolve/REVISION/FILE
            return self.resolve(repo, rest[1], "/".join(rest[2:]))
        if rest[:1] == ["preupload"]:
            asked = json.loads(body)["files"]
            large = (".safetensors", ".parquet", ".png")
            modes = [(file["path"], "lfs" if file["path"].endswith(large) else "regular") for file in asked]
            found = [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes]
            return self.answer(200, {"files": found})
        if rest[:1] == ["commit"]:
            return self.commit(repo, [json.loads(line) for line in body.splitlines() if line])
        revision = rest[1] if len(rest) > 1 else "main"
        sha, _, files = hub.find(repo, revision)
        if rest[:1] == ["tree"]:
            folder = "/".join(rest[2:])
            entries = [self.entry(path, data) for path, data in files.items() if path.startswith(folder)]
            folders = {path.rsplit("/", 1)[0] for path in files if "/" in path and path.startswith(folder)}
            entries += [{"type": "directory", "oid": "0" * 40, "size": 0, "path": f} for f in folders if f != folder]
            if folder and not entries:
                return self.answer(404, X_Error_Code="EntryNotFound")
            return self.answer(200, entries)
        if rest[:1] == ["paths-info"]:
            paths = parse_qs(body.decode()).get("paths") or json.loads(body or b"{}").get("paths", [])
            return self.answer(200, [self.entry(path, files[path]) for path in paths if path in files])
        name = repo.split("/", 1)[1]
        siblings = [{"rfilename": path} for path in files]
        card = files.get("README.md", b"").decode().split("---")
        content = {"id": name, "modelId": name, "sha": sha, "siblings": siblings, "private": hub.private[repo]}
        content |= {"tags": [], "downloads": 0, "likes": 0, "gated": False}
        content |= {"cardData": yaml.safe_load(card[1])} if len(card) > 1 else {}
        return self.answer(200, content)

    def entry(self, path: str, data: bytes) -> dict:
        return {"type": "file", "oid": hashlib.sha1(data).hexdigest(), "size": len(data), "path": path}

    def commit(self, repo: str, lines: list[dict]) -> None:
        files, message = dict(self.server.files(repo)), ""
        for line in lines:
            key, value = line["key"], line["value"]
            if key == "header":
                message = value["summary"]
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            elif key == "deletedFile":
                files.pop(value["path"], None)
        sha = self.server.add(repo, message, files)
        kind, name = repo.split("/", 1)
        url = f"{self.server.address}/{'datasets/' if kind == 'datasets' else ''}{name}/commit/{sha}"
        self.answer(200, {"success": True, "commitUrl": url, "commitOid": sha})
