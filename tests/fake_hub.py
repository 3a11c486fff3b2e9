"""A hub on loopback that speaks enough of the real one's protocol for its unpatched client.

It can misbehave on demand. `FakeHub` is what a test holds; `Handler` answers the requests:

    /api/models/ORG/NAME/revision/REVISION   what a revision is      Handler.answer_info
    /api/models/ORG/NAME/tree/REVISION       which files it has      Handler.answer_tree
    /ORG/NAME/resolve/REVISION/FILE          a file, or where it is  Handler.answer_resolve
    /cdn/models/ORG/NAME/REVISION/FILE       a large file's content  Handler.answer_content

(/api/datasets/…, /datasets/ORG/NAME/… and /cdn/datasets/… for data sets).
"""

import hashlib
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

LARGE = 1000  # bytes from which a file is stored apart (LFS), named by its SHA-256


class FakeHub:
    """What is on the hub, and what went wrong there.

    repos   {(models or datasets, id): {file name: bytes}}, the newest commit
    old     the same, an earlier commit of some
    closed  {id: gated or private}
    faults  {file name: "cut" (the connection breaks half-way, once), "damage" (one byte is wrong)
            or "stall" (nothing more comes after half)}
    log     [(method, path, Range header)] of all requests
    url     what HF_ENDPOINT is to be; cdn: where large files lie, another host as in reality
    """

    def __init__(self):
        self.repos, self.old = {}, {}
        self.closed, self.faults = {}, {}
        self.log = []
        self.url = self.serve()
        self.cdn = self.serve()

    def serve(self):
        """Start a server in a thread; -> its address."""
        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        server.hub = self
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}"

    def at(self, kind, name, revision):
        """The files of a revision, or None."""
        for repos in (self.repos, self.old):
            files = repos.get((kind, name))
            if files and revision in ("main", self.commit(files)):
                return files
        return None

    @staticmethod
    def commit(files):
        """A commit's hash, made of its content."""
        content = [file.encode() + content for file, content in sorted(files.items())]
        return hashlib.sha1(b"".join(content)).hexdigest()

    def fetched(self, file):
        """How often the content of a file was asked for."""
        asked = [path for method, path, _ in self.log if method == "GET"]
        content = [path for path in asked if "/cdn/" in path or "/resolve/" in path]
        return sum(path.endswith("/" + file) for path in content)


class Refusal(Exception):
    """An answer that is an error: HTTP status, the hub's code for it, and its message."""

    def __init__(self, status, code, message):
        self.status = status
        self.headers = {"X-Error-Message": message}
        if code:
            self.headers["X-Error-Code"] = code


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self):
        return self.server.hub

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def answer(self):
        path = unquote(urlsplit(self.path).path)
        self.hub.log.append((self.command, path, self.headers.get("Range")))
        kinds, repo, rest = "(models|datasets)", "([^/]+/[^/]+)", "(.+)"
        routes = [
            (rf"/api/{kinds}/{repo}(?:/revision/([^/]+))?", self.answer_info),
            (rf"/api/{kinds}/{repo}/tree/([^/]+)(?:/(.*))?", self.answer_tree),
            (rf"/(datasets/)?{repo}/resolve/([^/]+)/{rest}", self.answer_resolve),
            (rf"/cdn/{kinds}/{repo}/([^/]+)/{rest}", self.answer_content),
        ]
        for pattern, method in routes:
            match = re.fullmatch(pattern, path)
            if match:
                try:
                    method(*match.groups())
                except Refusal as refusal:
                    self.reply(refusal.status, headers=refusal.headers)
                return
        self.reply(404, b"no such path")

    def reply(self, status, body=b"", headers=None, announced=None):
        """Send an answer. announced: its length, where more is promised than comes."""
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if announced is None else announced))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def reply_json(self, content, files):
        headers = {"Content-Type": "application/json", "X-Repo-Commit": self.hub.commit(files)}
        self.reply(200, json.dumps(content).encode(), headers)

    def files_of(self, kind, name, revision):
        """The files of a revision, if the request may see it."""
        token = self.headers.get("Authorization")
        if token == "Bearer hf_wrong":
            raise Refusal(401, None, "Invalid credentials in Authorization header")
        if self.hub.closed.get(name) == "private" and token != "Bearer hf_right":
            raise Refusal(401, "RepoNotFound", "Invalid username or password.")
        if (kind, name) not in self.hub.repos:
            raise Refusal(404, "RepoNotFound", "Repository not found")
        files = self.hub.at(kind, name, revision)
        if files is None:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return files

    def answer_info(self, kind, name, revision):
        files = self.files_of(kind, name, revision or "main")
        info = {
            "_id": "0",
            "id": name,
            "modelId": name,
            "sha": self.hub.commit(files),
            "private": False,
            "gated": False,
            "tags": [],
            "downloads": 0,
            "likes": 0,
            "siblings": [{"rfilename": file} for file in files],
        }
        self.reply_json(info, files)

    def answer_tree(self, kind, name, revision, folder):
        files = self.files_of(kind, name, revision)
        names = [file for file in files if file.startswith(folder or "")]
        self.reply_json([tree_entry(file, files[file]) for file in names], files)

    def answer_resolve(self, datasets, name, revision, file):
        kind = "datasets" if datasets else "models"
        files = self.files_of(kind, name, revision)
        headers = {"X-Repo-Commit": self.hub.commit(files)}
        if self.hub.closed.get(name) == "gated":  # listed for all, refused where it is fetched
            status = 403 if self.headers.get("Authorization") else 401
            raise Refusal(status, "GatedRepo", "Access to it is restricted.")
        if file not in files:
            raise Refusal(404, "EntryNotFound", "Entry not found")
        content = files[file]
        if len(content) < LARGE:
            headers["ETag"] = f'"{hashlib.sha1(content).hexdigest()}"'
            headers["Accept-Ranges"] = "bytes"
            self.reply(200, content, headers)
            return
        headers["X-Linked-Etag"] = f'"{hashlib.sha256(content).hexdigest()}"'
        headers["X-Linked-Size"] = str(len(content))
        commit = self.hub.commit(files)
        headers["Location"] = f"{self.hub.cdn}/cdn/{kind}/{name}/{commit}/{file}"
        self.reply(302, b"", headers)

    def answer_content(self, kind, name, revision, file):
        # A signed address: no token is asked for.
        content = self.hub.at(kind, name, revision)[file]
        status, start = 200, 0
        headers = {"Accept-Ranges": "bytes"}
        if self.headers.get("Range"):
            status = 206
            start = int(re.fullmatch(r"bytes=(\d+)-", self.headers["Range"])[1])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        part = content[start:]
        fault = self.hub.faults.get(file) if self.command == "GET" else None
        if fault in ("cut", "stall"):
            self.send_half(status, part, headers, file, fault)
            return
        if fault == "damage":
            part = part[:-1] + bytes([part[-1] ^ 1])
        self.reply(status, part, headers)

    def send_half(self, status, part, headers, file, fault):
        """Promise all of a part and send half of it; then break off, or say nothing for a while."""
        if fault == "cut":
            del self.hub.faults[file]
        self.reply(status, part[: len(part) // 2], headers, announced=len(part))
        self.wfile.flush()
        if fault == "stall":
            time.sleep(4)
        self.close_connection = True


def tree_entry(file, content):
    """A file as the hub lists it."""
    entry = {
        "type": "file",
        "path": file,
        "size": len(content),
        "oid": hashlib.sha1(content).hexdigest(),
    }
    if len(content) >= LARGE:
        digest = hashlib.sha256(content).hexdigest()
        entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 134}
    return entry
