"""A hub on this machine, with the endpoints of Hugging Face and ModelScope, which sends what a test wants it to.

Hugging Face answers for a file with a redirect to another host, and describes it in headers; ModelScope has a list.
"""

import hashlib
import json
import re
import threading
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

SIZE = 2_500_000  # bytes: several blocks


def content(path: str, size: int = SIZE) -> bytes:
    """The bytes of a file, by its path in its repository."""
    block = hashlib.sha256(path.encode()).digest()
    return (block * (size // len(block) + 1))[:size]


class LocalHub:
    """paths: of the files in every repository. Attributes that change answers: `status` (instead of 200), `cut` (bytes
    after which the next transfers end, a list), `ranges` (whether parts are sent), `content_of`, `listed` (changes a
    file's description, a dict), `range_sent` (the header). asked: (method, path, Range, Authorization) of requests."""

    def __init__(self, paths):
        self.paths, self.asked = set(paths), []
        self.status, self.cut, self.ranges = None, [], True
        self.content_of, self.range_sent, self.page = content, None, None
        self.listed = lambda described: described

    @contextmanager
    def serving(self):
        servers = [ThreadingHTTPServer(("127.0.0.1", 0), self._handler(stores)) for stores in (False, True)]
        self.url, self.store = (f"http://127.0.0.1:{server.server_port}" for server in servers)
        for server in servers:
            server.handle_error = lambda *_: None  # clients leave in the middle of an answer
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        try:
            yield self
        finally:
            for server in servers:
                server.shutdown()
                server.server_close()

    def described(self, path):
        whole = content(path)
        return self.listed({"Path": path, "Size": len(whole), "Sha256": hashlib.sha256(whole).hexdigest()})

    def transfers(self):
        return [(path, wanted) for method, path, wanted, _ in self.asked
                if method == "GET" and "/repo/files" not in path]  # fmt: skip

    def _handler(hub, stores):
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_HEAD(self):
                self.answer()

            def do_GET(self):
                self.answer()

            def answer(self):
                place = urlsplit(self.path)
                asked = (self.headers.get(name) for name in ("Range", "Authorization"))
                hub.asked.append((self.command, place.path, *asked))
                if hub.status or hub.page:
                    return self.send(hub.status or 200, hub.page or b"no")
                if place.path.endswith("/repo/files"):
                    folder = parse_qs(place.query)["Root"][0]
                    found = [hub.described(path) for path in sorted(hub.paths) if path.rpartition("/")[0] == folder]
                    return self.send(200, json.dumps({"Code": 200, "Data": {"Files": found}}).encode())
                path = re.sub("^.*/(?:main|master)/", "", place.path)
                if path not in hub.paths:
                    return self.send(404, b"no such file")
                if stores or "/models/" in place.path:
                    return self.send_file(hub.content_of(path))
                known = hub.described(path)
                return self.send(302, b"", Location=f"{hub.store}/store/main/{path}", ETag='"of the redirect"',
                                 X_Linked_Size=str(known["Size"]), X_Linked_ETag=f'"{known["Sha256"]}"',
                                 X_Repo_Commit="0" * 40)

            def send_file(self, whole):
                wanted = self.headers.get("Range")
                begin = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) if wanted and hub.ranges else 0
                sent = hub.range_sent or f"bytes {begin}-{len(whole) - 1}/{len(whole)}"
                more = {"Content_Range": sent} if begin else {}
                cut = hub.cut.pop(0) if hub.cut else None
                self.send(206 if begin else 200, whole[begin:], cut, **more)

            def send(self, status, body, cut=None, **headers):
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name.replace("_", "-"), value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command == "GET":
                    with suppress(ConnectionError):  # the client has seen enough
                        self.wfile.write(body[:cut])
                if cut is not None:
                    self.close_connection = True

        return Handler
