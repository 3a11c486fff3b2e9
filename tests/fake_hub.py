"""A hub on loopback that speaks enough of the real one's protocol for its unpatched client, and misbehaves on demand."""

import hashlib
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

LARGE = 1000  # bytes from which a file is stored apart (LFS), named by its SHA-256


class FakeHub:
    """`repos[kind, id]` is {file name: bytes}, the newest commit, `old[kind, id]` an earlier one. `faults[file name]`: "cut" (the connection breaks half-way, once), "damage" (one byte wrong),
    "stall" (nothing more comes after half). `closed[id]`: "gated" or "private". `log` has (method, path, Range header) of all requests."""

    def __init__(self):
        self.repos, self.old, self.faults, self.closed, self.log = {}, {}, {}, {}, []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def do_HEAD(self):
                self.answer(False)

            def do_GET(self):
                self.answer(True)

            def reply(self, status, body=b"", headers=(), wanted=True, announced=None):
                self.send_response(status)
                for name, value in dict(headers).items():
                    self.send_header(name, value)
                self.send_header(
                    "Content-Length", str(len(body) if announced is None else announced)
                )
                self.end_headers()
                if wanted:
                    self.wfile.write(body)

            def answer(self, wanted):
                path = unquote(urlsplit(self.path).path)
                hub.log.append((self.command, path, self.headers.get("Range")))
                if m := re.fullmatch(
                    r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+)(?:/(.*))?)?",
                    path,
                ):
                    return self.api(*m.groups())
                if m := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                    return self.resolve(m[1] and "datasets" or "models", m[2], m[3], m[4], wanted)
                if m := re.fullmatch(r"/cdn/(models|datasets)/([^/]+/[^/]+)/([^/]+)/(.+)", path):
                    return self.content(
                        hub.at(m[1], m[2], m[3])[m[4]], m[4], wanted
                    )  # a signed address: no token is asked for
                self.reply(404, b"no such path")

            def at(self, kind, name, revision):
                """The files of a revision, or None after an error has been sent, as the real hub words it."""
                token = self.headers.get("Authorization")
                if token == "Bearer hf_wrong":
                    return self.reply(
                        401,
                        headers={"X-Error-Message": "Invalid credentials in Authorization header"},
                    )
                if hub.closed.get(name) == "private" and token != "Bearer hf_right":
                    return self.reply(
                        401,
                        headers={
                            "X-Error-Code": "RepoNotFound",
                            "X-Error-Message": "Invalid username or password.",
                        },
                    )
                if (kind, name) not in hub.repos:
                    return self.reply(
                        404,
                        headers={
                            "X-Error-Code": "RepoNotFound",
                            "X-Error-Message": "Repository not found",
                        },
                    )
                return hub.at(kind, name, revision) or self.reply(
                    404,
                    headers={
                        "X-Error-Code": "RevisionNotFound",
                        "X-Error-Message": f"Invalid rev id: {revision}",
                    },
                )

            def api(self, kind, name, what, revision, folder):
                if (files := self.at(kind, name, revision or "main")) is None:
                    return
                if what == "tree":
                    found = [
                        {
                            "type": "file",
                            "path": file,
                            "size": len(content),
                            "oid": hashlib.sha1(content).hexdigest(),
                        }
                        | (
                            {
                                "lfs": {
                                    "oid": hashlib.sha256(content).hexdigest(),
                                    "size": len(content),
                                    "pointerSize": 134,
                                }
                            }
                            if len(content) >= LARGE
                            else {}
                        )
                        for file, content in files.items()
                        if file.startswith(folder or "")
                    ]
                else:
                    found = {
                        "_id": "0",
                        "id": name,
                        "modelId": name,
                        "sha": hub.commit(files),
                        "private": False,
                        "gated": False,
                        "tags": [],
                        "downloads": 0,
                        "likes": 0,
                        "siblings": [{"rfilename": file} for file in files],
                    }
                self.reply(
                    200,
                    json.dumps(found).encode(),
                    {"Content-Type": "application/json", "X-Repo-Commit": hub.commit(files)},
                )

            def resolve(self, kind, name, revision, file, wanted):
                if (files := self.at(kind, name, revision)) is None:
                    return
                commit = {"X-Repo-Commit": hub.commit(files)}
                if hub.closed.get(name) == "gated":  # listed for all, refused where it is fetched
                    return self.reply(
                        403 if self.headers.get("Authorization") else 401,
                        headers=commit
                        | {
                            "X-Error-Code": "GatedRepo",
                            "X-Error-Message": "Access to it is restricted.",
                        },
                    )
                if file not in files:
                    return self.reply(
                        404,
                        headers=commit
                        | {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"},
                    )
                content = files[file]
                if len(content) < LARGE:
                    return self.reply(
                        200,
                        content,
                        commit
                        | {
                            "ETag": f'"{hashlib.sha1(content).hexdigest()}"',
                            "Accept-Ranges": "bytes",
                        },
                        wanted,
                    )
                linked = {
                    "X-Linked-Etag": f'"{hashlib.sha256(content).hexdigest()}"',
                    "X-Linked-Size": str(len(content)),
                    "Location": f"{hub.cdn}/cdn/{kind}/{name}/{hub.commit(files)}/{file}",
                }
                self.reply(302, b"", commit | linked)

            def content(self, content, file, wanted):
                start = (
                    int(re.fullmatch(r"bytes=(\d+)-", self.headers["Range"])[1])
                    if self.headers.get("Range")
                    else 0
                )
                part, total = content[start:], len(content)
                headers = {"Accept-Ranges": "bytes"} | (
                    {"Content-Range": f"bytes {start}-{total - 1}/{total}"} if start else {}
                )
                fault = hub.faults.get(file) if wanted else None
                if fault == "damage":
                    part = part[:-1] + bytes([part[-1] ^ 1])
                if fault in ("cut", "stall"):
                    if fault == "cut":
                        del hub.faults[file]
                    self.reply(
                        206 if start else 200, part[: len(part) // 2], headers, announced=len(part)
                    )
                    self.wfile.flush()
                    if fault == "stall":
                        time.sleep(4)
                    self.close_connection = True
                    return
                self.reply(206 if start else 200, part, headers, wanted)

        def serve():
            server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, daemon=True).start()
            return f"http://127.0.0.1:{server.server_port}"

        self.url, self.cdn = serve(), serve()  # large files lie on another host, as in reality

    def at(self, kind, name, revision):
        """The files of a revision, or None."""
        return next(
            (
                files
                for files in (self.repos[kind, name], self.old.get((kind, name)))
                if files and revision in ("main", self.commit(files))
            ),
            None,
        )

    @staticmethod
    def commit(files):
        return hashlib.sha1(
            b"".join(file.encode() + content for file, content in sorted(files.items()))
        ).hexdigest()

    def fetched(self, file):
        """How often the content of a file was asked for."""
        return sum(
            method == "GET"
            and path.endswith("/" + file)
            and ("/cdn/" in path or "/resolve/" in path)
            for method, path, _ in self.log
        )
