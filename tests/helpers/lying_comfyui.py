"""A server on loopback that speaks ComfyUI's API as far as `queue` uses it, and lies where a test says."""

import base64
import contextlib
import hashlib
import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY_SUFFIX = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455
STATUS = json.dumps({"type": "status", "data": {}})


def answer(body=b"", status=200, **headers):
    """A lie: this answer, whatever was asked. body: bytes, or what is sent as JSON; NaN as Python writes it."""
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    return lambda request: request.answer(body, status, headers)


def entry(files=({"filename": "a.mp4", "type": "output"},), status="success", messages=None, **fields):
    """A job's history entry as ComfyUI has it."""
    if messages is None:
        messages = [["execution_start", {"timestamp": 1000}], ["execution_success", {"timestamp": 3500}]]
    return {"status": {"status_str": status, "completed": True, "messages": messages},
            "outputs": {"9": {"images": list(files), "animated": [True], "text": ["seen"]}}, **fields}


class LyingComfyUI:
    """A context manager. A job is in the queue until the server is asked for it by GET /queue `polls` times, then in
    the history; `stays`: it runs until it is taken back.

    lies: "METHOD /path" -> a function of the request, which answers. A path ends before its first argument.
    entry: what the history has of each job.
    frames: what the websocket sends, text or bytes of whole frames.
    tls: the context of an HTTPS server. prefix: what all paths begin with. host: where it listens.
    Attributes: port, jobs (ids in the queue), seen (of each request: method, path, headers, body), refused (paths that
    it does not have).
    """

    def __init__(self, lies=None, *, entry=entry(), frames=(STATUS,), stays=False, tls=None, prefix="",
                 host="127.0.0.1"):
        self.lies, self.entry, self.frames, self.stays, self.prefix = lies or {}, entry, frames, stays, prefix
        self.jobs, self.seen, self.ended = [], [], threading.Event()
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        handler = type("Request", (Request,), {"comfyui": self})
        self._server = type("Server", (Server,), {"address_family": family})((host, 0), handler)
        self.port = self._server.server_port
        if tls:  # the handshake is the handler's, so that a client that breaks it off stops nobody
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True, do_handshake_on_connect=False)

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.ended.set()
        self._server.shutdown()
        self._server.server_close()

    def asked(self, method, path):
        """The bodies of such requests."""
        return [body for one, name, _, body in self.seen if (one, name) == (method, path)]


class Server(ThreadingHTTPServer):
    daemon_threads, block_on_close = True, False

    def handle_error(self, request, client_address):
        """Clients leave whenever they like."""


class Request(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    comfyui: LyingComfyUI

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self.path.partition("?")[0]
        comfyui = self.comfyui
        comfyui.seen.append((self.command, path, dict(self.headers), self.body))
        name = path.removeprefix(comfyui.prefix)
        honest = path.startswith(comfyui.prefix) and self.honest(name)
        lie = comfyui.lies.get(f"{self.command} {'/history' if name.startswith('/history/') else name}")
        if name == "/prompt":  # it gets its job, whatever it answers
            self.job = json.loads(self.body)["prompt_id"]
            comfyui.jobs.append(self.job)
        (lie or honest or answer({}, 404))(*([self] if lie or not honest else []))

    do_POST = do_GET

    def honest(self, path):
        found = {"/ws": self.websocket, "/queue": self.queue, "/prompt": self.prompt, "/interrupt": self.take_back,
                 "/upload/image": self.upload}
        return self.history if path.startswith("/history/") else found.get(path)

    def queue(self):
        if self.command == "POST":
            return self.take_back()
        waiting = [[number, job, {}, {}, []] for number, job in enumerate(self.comfyui.jobs)]
        if not self.comfyui.stays:
            self.comfyui.jobs.clear()
            waiting = []
        self.send({"queue_running": waiting, "queue_pending": []})

    def take_back(self):
        asked = json.loads(self.body)
        gone = asked.get("delete", []) if self.path.endswith("/queue") else [asked.get("prompt_id")]
        if self.path.endswith("/interrupt") or not self.comfyui.stays:  # what runs is not deleted, as in ComfyUI
            self.comfyui.jobs[:] = [job for job in self.comfyui.jobs if job not in gone]
        self.answer(b"", 200, {})

    def prompt(self):
        self.send({"prompt_id": self.job, "number": 1, "node_errors": {}})

    def history(self):
        self.send({self.path.rpartition("/")[2]: self.comfyui.entry})

    def upload(self):
        name = self.body.partition(b'filename="')[2].partition(b'"')[0].decode()
        self.send({"name": name, "subfolder": "", "type": "input"})

    def send(self, content):
        self.answer(json.dumps(content).encode(), 200, {})

    def answer(self, body, status, headers):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def websocket(self):
        accept = hashlib.sha1((self.headers["Sec-WebSocket-Key"] + KEY_SUFFIX).encode()).digest()
        self.send_response(101)
        for name, value in (("Upgrade", "websocket"), ("Connection", "Upgrade"),
                            ("Sec-WebSocket-Accept", base64.b64encode(accept).decode())):
            self.send_header(name, value)
        self.end_headers()
        for frame in self.comfyui.frames:
            self.wfile.write(frame if isinstance(frame, bytes) else text_frame(frame))
        self.comfyui.ended.wait(10)
        self.close_connection = True


def text_frame(text):
    content = text.encode(errors="surrogatepass")
    size = len(content)
    return b"\x81" + (bytes([size]) if size < 126 else b"\x7e" + size.to_bytes(2, "big")) + content


def drip(head):
    """A lie: `head`, and then a byte every now and then, which no timeout of a single read ends."""

    def send(request):
        request.wfile.write(head)
        with contextlib.suppress(OSError):
            while not request.comfyui.ended.wait(0.1):
                request.wfile.write(b"x")
        request.close_connection = True

    return send


def flood(head, part=bytes(1 << 20)):
    """A lie: `head`, and then as much as is read."""

    def send(request):
        request.wfile.write(head)
        with contextlib.suppress(OSError):
            while not request.comfyui.ended.is_set():
                request.wfile.write(part)
        request.close_connection = True

    return send


def raw(content):
    """A lie: these bytes and no more."""

    def send(request):
        request.wfile.write(content)
        request.close_connection = True

    return send
