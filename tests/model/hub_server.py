"""A server on this machine that speaks the hub's protocol for small repositories."""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SHA = "0123456789abcdef0123456789abcdef01234567"


def sibling(name, content):
    """A file as the hub describes it: large ones have a sha256, others the hash of a git blob."""
    size = len(content)
    described = {"rfilename": name, "size": size, "blobId": "0" * 40}
    if name.endswith((".safetensors", ".gguf")):
        sha256 = hashlib.sha256(content).hexdigest()
        return described | {"lfs": {"sha256": sha256, "size": size, "pointerSize": 134}}
    blob = hashlib.sha1(b"blob %d\0" % size + content).hexdigest()
    return described | {"blobId": blob}


class HubServer:
    """Serves folders as repositories; use as a context manager.

    Attributes:
        repositories: hub id -> folder.
        gated: hub ids that need a token with access.
        breaks: file name -> at how many bytes the connection breaks, once.
        lies: hub id -> fields of the answer about it that replace the right ones.
        requests: (method, path, Range header) of every request so far.
    """

    def __init__(self, repositories, *, gated=(), breaks=None, lies=None):
        self.repositories, self.gated = repositories, set(gated)
        self.breaks, self.requests = dict(breaks or {}), []
        self.lies = lies or {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    def fetched(self):
        """Names of the files that were read, each once."""
        paths = [path for method, path, _ in self.requests if method == "GET"]
        return sorted({path.rsplit("/", 1)[-1] for path in paths if "/resolve/" in path})

    def _handler(self):
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_HEAD(self):
                self.answer(with_body=False)

            def do_GET(self):
                self.answer(with_body=True)

            def answer(self, with_body):
                path = self.path.split("?")[0]
                hub.requests.append((self.command, path, self.headers.get("Range")))
                api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/\w+|/tree/\w+)?", path)
                file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/\w+/(.+)", path)
                if not (api or file):
                    return self.refuse(404, "EntryNotFound", "Entry not found")
                name = (api or file)[1]
                folder = hub.repositories.get(name)
                if folder is None:
                    return self.refuse(401, "RepoNotFound", "Invalid username or password.")
                if name in hub.gated and (file or "/tree/" in path):
                    return self.refuse(403, "GatedRepo", f"Access to model {name} is restricted.")
                if file:
                    return self.send_part(folder / file[2], with_body)
                files = sorted(f for f in folder.rglob("*") if f.is_file())
                siblings = [sibling(str(f.relative_to(folder)), f.read_bytes()) for f in files]
                info = {"id": name, "sha": SHA, "siblings": siblings} | hub.lies.get(name, {})
                body = json.dumps(info).encode()
                return self.send(200, body, {"Content-Type": "application/json"})

            def refuse(self, status, code, message):
                self.send(status, b"", {"X-Error-Code": code, "X-Error-Message": message})

            def send_part(self, path, with_body):
                if not path.is_file():
                    return self.refuse(404, "EntryNotFound", "Entry not found")
                content, start, status = path.read_bytes(), 0, 200
                headers = {"X-Repo-Commit": SHA, "Accept-Ranges": "bytes"}
                headers["ETag"] = f'"{hashlib.sha1(content).hexdigest()}"'
                if wanted := re.fullmatch(r"bytes=(\d+)-.*", self.headers.get("Range") or ""):
                    start, status = int(wanted[1]), 206
                    end = len(content)
                    headers["Content-Range"] = f"bytes {start}-{end - 1}/{end}"
                stop = hub.breaks.pop(path.name, None) if with_body else None
                return self.send(status, content[start:], headers, with_body, stop)

            def send(self, status, body, headers, with_body=True, stop=None):
                self.send_response(status)
                for key, value in headers.items():
                    self.send_header(key, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if with_body and self.command == "GET":
                    self.wfile.write(body[:stop])
                if stop is not None:
                    self.close_connection = True

        return Handler
