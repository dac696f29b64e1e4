"""Starts, queries and stops a real ComfyUI server with a linked pack. Standard library only.

    with ComfyServer(pack=repository) as server:
        entry = server.wait(server.queue(prompt), timeout=60)

The server has its own base directory, output folder and loopback port, and only reads its ComfyUI folder, so it does
not interfere with other servers.
"""

import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

from .environment import REPOSITORY

COMFYUI = Path(os.environ.get("COMFYUI_DIR") or REPOSITORY / ".cache" / "comfyui").resolve()
PACK_NAME = "ascend-video"
LOG_NAME = "comfyui.log"
PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


class PromptRejected(ValueError):
    """ComfyUI's validation rejected a prompt; `body` is its whole answer (`error`, `node_errors`)."""

    def __init__(self, body):
        self.body = body
        super().__init__(json.dumps(body, indent=1))


class PromptFailed(RuntimeError):
    """A prompt ended with an error or an interruption; `entry` is its history entry, `kind` the last message's name."""

    def __init__(self, entry):
        self.entry = entry
        self.kind, self.details = entry["status"]["messages"][-1]
        super().__init__(f"{self.kind}: {self.details.get('exception_message', self.details)}")


def free_port(wanted=None):
    """The requested loopback TCP port, or an unused one. Raises OSError if another program listens on the requested
    port, because it would answer instead of the server."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", wanted or 0))
        except OSError as error:
            raise OSError(f"port {wanted} of 127.0.0.1 is not available ({error.strerror}); give another one, or none "
                          "to get an unused one") from None
        return listener.getsockname()[1]


class ComfyServer:
    """A ComfyUI process; use it as a context manager, or call `start` and `stop`.

    pack: folder linked into custom_nodes as "ascend-video", or None for none.
    extra_args: further arguments of main.py, after the default ones.
    env: environment variables added to this process's; a value of None removes one.
    comfyui: ComfyUI's folder, by default $COMFYUI_DIR, else .cache/comfyui of the repository.
    python: the interpreter that runs it.
    base: base directory (models, custom_nodes, input, output, user), kept on stop; by default a temporary one, removed.
    port: loopback port, by default an unused one.
    cpu: pass --cpu; False to let ComfyUI use the accelerator.
    Attributes: url, port, process (subprocess.Popen), base (Path), comfyui (Path), started_s (seconds until ready).
    """

    def __init__(self, pack=REPOSITORY, extra_args=(), env=None, comfyui=COMFYUI, python=sys.executable, base=None,
                 port=None, cpu=True, timeout=120):
        self.pack, self.comfyui, self.python = pack, Path(comfyui), str(python)
        self.extra_args, self.env, self.cpu, self.timeout = list(extra_args), dict(env or {}), cpu, timeout
        self._temporary = base is None
        self.base = Path(base) if base else None
        self.port = port
        self.process = self.started_s = None
        self._last_log = ""

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self):
        """The server's standard output and error; available after `stop` too."""
        file = self.base / LOG_NAME
        return file.read_text(errors="replace") if file.exists() else self._last_log

    @property
    def output(self):
        return self.base / "output"

    def __enter__(self):
        return self.start()

    def __exit__(self, *_):
        self.stop()

    def start(self):
        """Starts ComfyUI and waits until it answers. Raises RuntimeError with the end of its log if it does not."""
        if not (self.comfyui / "main.py").is_file():
            raise FileNotFoundError(f"no ComfyUI in {self.comfyui}: main.py is missing. Run `bash scripts/test.sh` "
                                    "once to fetch one, or name yours by COMFYUI_DIR")
        self.port = free_port(self.port)
        self._make_base()
        command = [self.python, "-u", str(self.comfyui / "main.py"), "--port", str(self.port),
                   "--base-directory", str(self.base), "--database-url", "sqlite:///:memory:",
                   "--disable-auto-launch", "--disable-api-nodes", *(["--cpu"] if self.cpu else []), *self.extra_args]
        began = time.monotonic()
        try:
            with open(self.base / LOG_NAME, "w") as log:
                self.process = subprocess.Popen(command, cwd=self.base, env=self._environment(), stdout=log,
                                                stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                                                start_new_session=True, preexec_fn=_die_with_parent)
            self._wait_ready(began + self.timeout)
        except BaseException:
            self.stop()
            raise
        self.started_s = time.monotonic() - began
        return self

    def stop(self):
        """Ends the process (INT, TERM, KILL, each with a deadline) and removes a temporary base directory."""
        for number, patience in ((signal.SIGINT, 10), (signal.SIGTERM, 5), (signal.SIGKILL, 5)):
            if self.process is None or self.process.poll() is not None:
                break
            self.process.send_signal(number)
            try:
                self.process.wait(patience)
            except subprocess.TimeoutExpired:
                continue
        if self._temporary and self.base:
            self._last_log = self.log
            shutil.rmtree(self.base, ignore_errors=True)

    def get(self, path):
        """The JSON that GET `path` answers."""
        return self._request(path)

    def post(self, path, body=None):
        """The JSON that POST `path` answers to the JSON `body`; None for an empty answer."""
        return self._request(path, {} if body is None else body)

    def queue(self, prompt, **extra):
        """Queues an API-format prompt with `extra` fields (client_id, extra_data). Returns its id.
        Raises PromptRejected if validation refuses it."""
        try:
            return self.post("/prompt", {"prompt": prompt, **extra})["prompt_id"]
        except urllib.error.HTTPError as error:
            if error.code != 400:
                raise
            raise PromptRejected(json.load(error)) from None

    def history(self, prompt_id):
        """The history entry of a prompt; None until it has finished."""
        return self.get(f"/history/{prompt_id}").get(prompt_id)

    def wait(self, prompt_id, timeout=120):
        """Polls until a prompt has finished; returns its history entry (`outputs`, `status`).
        Raises PromptFailed for an error or interruption, TimeoutError, RuntimeError if the server died."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            self._check_alive()
            entry = self.history(prompt_id)
            if entry and entry["status"]["status_str"] == "error":
                raise PromptFailed(entry)
            if entry and entry["status"]["completed"]:
                return entry
            time.sleep(0.05)
        raise TimeoutError(f"prompt {prompt_id} has not finished after {timeout} s; the log ends:\n{self._log_end()}")

    def _make_base(self):
        self.base = Path(tempfile.mkdtemp(prefix="comfyui-")) if self._temporary else self.base.resolve()
        for name in ("custom_nodes", "models", "input", "output", "user"):
            (self.base / name).mkdir(parents=True, exist_ok=True)
        if self.pack:
            link = self.base / "custom_nodes" / PACK_NAME
            link.unlink(missing_ok=True)
            link.symlink_to(Path(self.pack).resolve(), target_is_directory=True)

    def _environment(self):
        merged = {**os.environ, **self.env}
        return {key: str(value) for key, value in merged.items() if value is not None}

    def _wait_ready(self, deadline):
        while time.monotonic() < deadline:
            self._check_alive()
            try:
                return self.get("/system_stats")
            except OSError:
                time.sleep(0.1)
        raise RuntimeError(f"ComfyUI did not answer on {self.url} within {self.timeout} s; its log ends:\n"
                           f"{self._log_end()}")

    def _check_alive(self):
        if self.process.poll() is not None:
            raise RuntimeError(f"ComfyUI ended with exit status {self.process.returncode}; its log ends:\n"
                               f"{self._log_end()}")

    def _log_end(self, lines=30):
        return "\n".join(self.log.splitlines()[-lines:])

    def _request(self, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        with _without_proxy.open(request, timeout=30) as answer:
            text = answer.read()
        return json.loads(text) if text.strip() else None


_without_proxy = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def _die_with_parent():
    """In the child: end it with the thread that started it, even if the parent was killed without calling `stop`."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
