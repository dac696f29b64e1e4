"""`queue` against servers that lie, and servers at every kind of address: one message, nothing left in their queues."""

import argparse
import contextlib
import fcntl
import json
import os
import pty
import re
import shutil
import socket
import ssl
import struct
import subprocess
import sys
import termios
from functools import partial
from pathlib import Path

import pytest
from ascend_runtime.commands.queue import (
    QueueError,
    address,
    websocket as channel,
    http as connection,
    command as queue,
    server,
)
from scripts.lib.comfy_server import free_port
from lying_comfyui import STATUS, LyingComfyUI, answer, drip, entry, flood, raw

ROOT = Path(__file__).resolve().parents[2]
WORKFLOW = ROOT / "workflows" / "api" / "tiny_wan_text_to_video.json"
CONTROLS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\ud800-\udfff]")  # line ends are the bar's
HEAD = b"HTTP/1.1 200 OK\r\n"
DEEP = b'{"other": ' + b"[" * 200_000
SAVED = {"type": "output", "subfolder": ""}

pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """`run(*options)`: exit status, table and messages of the command in this process. It waits less than usual.
    Prompts and further files are in `tmp_path`."""
    monkeypatch.setattr(server, "TICK_S", 0.05)
    monkeypatch.setattr(server, "LARGEST_QUEUE", 4 << 20)
    monkeypatch.setattr(connection, "LARGEST_ANSWER", 1 << 20)
    monkeypatch.setattr(channel, "AGAIN_S", 0.05)
    monkeypatch.delenv(address.TOKEN_VARIABLE, raising=False)
    monkeypatch.delenv(connection.CA_VARIABLE, raising=False)
    (tmp_path / "prompts.txt").write_text("a cat\n")
    parser = argparse.ArgumentParser()
    queue.add_queue_command(parser.add_subparsers(), "")

    def run(*options, graph=WORKFLOW):
        arguments = parser.parse_args(["queue", str(graph), "--prompts", str(tmp_path / "prompts.txt"), *options])
        status = arguments.run(arguments)
        table, log = capsys.readouterr()
        assert not CONTROLS.search(table + log)
        return status, table, log

    return run


def messages(log):
    """What the command said, without its bar and the line about what it does."""
    lines = [line.rpartition("\r")[2] for line in log.split("\n")]
    return [line for line in lines if line.startswith(("error:", "warning:", "interrupted"))]


LOGIN = answer(b"<html>login</html>", Content_Type="text/html")
LIES = {  # by name: what it answers, and a part of the message
    "html instead of a job": ({"POST /prompt": LOGIN}, "to POST /prompt is not ComfyUI's"),
    "html with status 400": ({"POST /prompt": answer(b"<html>bad</html>", 400)}, "with status 400 and '<html>bad"),
    "a list instead of a job": ({"POST /prompt": answer([1])}, "Expected `object`, got `array` in '[1]'"),
    "a job without an id": ({"POST /prompt": answer({})}, "missing required field `prompt_id`"),
    "an id that is a path": ({"POST /prompt": answer({"prompt_id": "../../queue"})}, "prompt_id"),
    "an empty answer": ({"POST /prompt": answer()}, "in an empty answer"),
    "a redirect elsewhere": ({"POST /prompt": answer(status=302, Location="http://127.0.0.1:1/?key=x")},
                             "it redirects to http://127.0.0.1:1/. If"),
    "a redirect to itself": ({"POST /prompt": answer(status=307, Location="/prompt")}, "it redirects to /prompt"),
    "a redirect with an endless body": ({"POST /prompt": flood(b"HTTP/1.1 302 Found\r\nLocation: /\r\n\r\n")},
                                        "it redirects to /."),
    "an error that is a text": ({"POST /prompt": answer({"error": "so \x1b[2J", "node_errors": []}, 400)},
                                "ComfyUI rejects the workflow: so \\x1b[2J"),
    "reasons that are a text": ({"POST /prompt": answer({"node_errors": {"9": {"errors": "x"}}}, 400)},
                                "instead of reasons"),
    "reasons without a class": ({"POST /prompt": answer({"error": {"message": "no"}, "node_errors": {
        "9": {"errors": [{"message": "big", "details": None}]}}}, 400)}, "ComfyUI rejects the workflow: no"),
    "an html queue": ({"GET /queue": LOGIN}, "to GET /queue is not ComfyUI's"),
    "a queue that is a number": ({"GET /queue": answer({"queue_running": 5, "queue_pending": []})}, "queue_running"),
    "a queue without a field": ({"GET /queue": answer({})}, "missing required field `queue_running`"),
    "a nested queue": ({"GET /queue": answer(DEEP)}, "nested too deeply"),
    "a queue in gzip": ({"GET /queue": answer(b"\x1f\x8b", Content_Encoding="gzip")}, "it has the encoding gzip"),
    "a queue without an end": ({"GET /queue": flood(HEAD + b"\r\n")}, "it has more than 4 MiB"),
    "a queue without an end in chunks": ({"GET /queue": flood(
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"100000\r\n" + bytes(1 << 20) + b"\r\n")}, "more than 4 MiB"),
    "a length of a chunk without an end": ({"GET /queue": flood(
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"0" * (1 << 20))}, "No ComfyUI answers"),
    "a header without an end": ({"GET /queue": flood(HEAD + b"X: ", b"x" * (1 << 20))}, "No ComfyUI answers"),
    "a body that drips": (
        {"GET /queue": drip(HEAD + b"Content-Length: 9999\r\n\r\n")}, "no answer to GET /queue within 0.3 s"),
    "headers that drip": ({"GET /queue": drip(HEAD)}, "no answer to GET /queue within 0.3 s"),
    "silence": ({"GET /queue": lambda request: request.comfyui.ended.wait(5)}, "does not answer|no answer to"),
    "a body that ends early": ({"GET /queue": raw(HEAD + b"Content-Length: 99\r\n\r\n{")}, "No ComfyUI answers"),
    "no http": ({"GET /queue": raw(b"SSH-2.0-OpenSSH\r\n")}, "its answer is not HTTP"),
    "nothing": ({"GET /queue": raw(b"")}, "its answer is not HTTP"),
    "status 401": ({"GET /queue": answer(status=401)}, "status 401 (Unauthorized): it requires a token"),
    "status 403": ({"GET /queue": answer(status=403)}, "status 403 (Forbidden)"),
    "status 404": ({"GET /queue": answer(status=404)}, "there is no ComfyUI. If it has a path prefix"),
    "status 400": ({"GET /queue": answer({"queue_running": [], "queue_pending": []}, 400)}, "status 400 (Bad"),
    "status 418": ({"GET /queue": answer(status=418)}, "which ComfyUI does not"),
    "status 502": ({"POST /prompt": answer(status=502)}, "status 502 (Bad Gateway): ComfyUI or its proxy"),
    "an html history": ({"GET /history": LOGIN}, "is not ComfyUI's"),
    "a history that is a list": ({"GET /history": answer([1])}, "Expected `object`, got `array`"),
    "an endless history": ({"GET /history": flood(HEAD + b"\r\n", b"[" * 4096)}, "more than 1 MiB"),
}

SLOW = ("a body that drips", "headers that drip", "silence")


@pytest.mark.parametrize("name", LIES)
def test_a_lie_is_one_message_and_leaves_no_job(run, name, monkeypatch):
    lies, said = LIES[name]
    if name in SLOW:
        monkeypatch.setattr(connection, "REQUEST_S", 0.3)
    with LyingComfyUI(lies) as lying:
        status, table, log = run("--port", str(lying.port))
        assert status == 2 and table == ""
        assert len(messages(log)) == 1 and messages(log)[0].startswith("error: "), log
        assert any(part in log for part in said.split("|")), log
        assert not lying.jobs, "what was queued is taken back"
        queued = [body for body in lying.asked("POST", "/prompt")]
        assert len(lying.asked("POST", "/queue")) == len(queued) <= 1


ENTRIES = {  # by name: a job's history entry, the exit status, and a part of the table or the message
    "what ComfyUI writes": (entry(), 0, "42    2.5      a.mp4   a cat"),
    "a path out of the folder": (entry([{**SAVED, "filename": "../../../../etc/passwd"}]), 0, "no file saved"),
    "an absolute folder": (entry([{**SAVED, "filename": "passwd", "subfolder": "/etc"}]), 0, "no file saved"),
    "escape sequences": (entry([{**SAVED, "filename": "\x1b]0;pwn\x07\x1b[2J\u202ex.mp4\nfake  1.0  ok"}]), 0,
                         "42    2.5      \\x1b]0;pwn\\x07\\x1b[2J\\u202ex.mp4 fake 1.0 ok"),
    "no name": (entry([SAVED]), 0, "no file saved"),
    "a name that is a number": (entry([{**SAVED, "filename": 5}]), 0, "no file saved"),
    "half a character": (entry([{**SAVED, "filename": "\ud83dx.mp4"}]), 0, "?x.mp4"),
    "no folder": (entry([{"type": "output", "filename": "a", "subfolder": None}]), 0, "42    2.5      a       a cat"),
    "no messages": (entry(messages=[]), 0, "42    -        a.mp4   a cat"),
    "no time": (entry(messages=[["execution_start", {}]]), 0, "42    -        a.mp4"),
    "a time that is no number": (entry(messages=[["a", {"timestamp": float("nan")}]]), 0, "42    -        a.mp4"),
    "a time without an end": (entry(messages=[["a", {"timestamp": 1e300}]]), 2, "is not ComfyUI's"),
    "a time that is a text": (entry(messages=[["a", {"timestamp": "x"}]]), 2, "is not ComfyUI's"),
    "an error without a reason": (entry(status="error", messages=[["execution_error", {"timestamp": 3}]]), 1,
                                  "FAILED: ComfyUI reports a failure without a reason"),
    "an error with a reason": (entry(status="error", messages=[["execution_error", {
        "timestamp": 3, "node_id": "8", "node_type": "A\x1b[31m", "exception_message": "no\nroom "}]]), 1,
        "FAILED: node 8 (A\\x1b[31m): no room"),
    "an interrupt": (entry(status="error", messages=[["execution_interrupted", {}]]), 1, "interrupted in ComfyUI"),
    "another status": (entry(status="splendid"), 2, "is not ComfyUI's"),
    "no status": ({"outputs": {}}, 2, "missing required field `status`"),
    "a list": ([1], 2, "Expected `object`, got `array`"),
    "outputs that are texts": ({**entry(), "outputs": "x"}, 2, "is not ComfyUI's"),
    "outputs of all kinds": ({**entry(), "outputs": {"1": None, "2": {"x": 5, "y": [[{}], None], "z": {}}}}, 0,
                             "no file saved"),
}


@pytest.mark.parametrize("name", ENTRIES)
def test_a_history_entry_is_understood_or_refused(run, name):
    written, expected, said = ENTRIES[name]
    with LyingComfyUI(entry=written) as lying:
        status, table, log = run("--port", str(lying.port))
        assert status == expected and said in table + log, table + log
        assert len(messages(log)) == (expected == 2 or "no file saved" in said and name != "outputs of all kinds")
        assert (table == "") == (expected == 2)


FRAMES = {  # by name: what the websocket says, and how often the command warns
    "no JSON": (["not json"] * 3, 1),
    "a list": (["[1,2]"], 1),
    "no type": (['{"a":1}'], 1),
    "a number": (["5"], 1),
    "nested JSON": (["[" * 60_000], 1),
    "text that is no text": ([b"\x81\x02\xff\xff"], 1),
    "a frame of 2^62 bytes": ([b"\x81\x7f" + (1 << 62).to_bytes(8, "big") + b"x"], 0),
    "bits that are reserved": ([b"\xf1\x00"], 1),
    "an end": ([b"\x88\x00"], 1),
    "kinds of custom nodes": (['{"type":"monitor","data":[NaN]}'], 0),
    "progress of another shape": (['{"type":"progress","data":{"value":null,"max":"x"}}'], 0),
    "progress without an end": (['{"type":"progress","data":{"value":1e999,"max":1}}'] * 2, 0),
    "progress that is infinite": (['{"type":"progress","data":{"value":Infinity,"max":1}}'], 0),
}


@pytest.mark.parametrize("name", FRAMES)
def test_no_job_depends_on_what_the_websocket_says(run, name):
    frames, warnings = FRAMES[name]
    with LyingComfyUI(frames=[*frames, STATUS]) as lying:
        status, table, log = run("--port", str(lying.port))
        assert status == 0 and "a.mp4" in table
        assert len(messages(log)) == warnings, log
        assert all("reports no progress" in message for message in messages(log))


@pytest.mark.parametrize("lie, said", [
    (answer(status=404), "its websocket answers with status 404"),
    (answer(status=302, Location="http://127.0.0.1:1/"), "Redirect limit exhausted"),
    (answer(b"<html>"), "its websocket answers with status 200"),
    (raw(b"HTTP/1.1 abc\r\n\r\n"), "reports no progress"),
    (flood(b"HTTP/1.1 101 OK\r\nX: "), "reports no progress: a message is too large"),
    (raw(b""), "reports no progress"),
])
def test_a_proxy_without_websockets_costs_the_progress_only(run, lie, said):
    with LyingComfyUI({"GET /ws": lie}) as lying:
        status, table, log = run("--port", str(lying.port))
        assert status == 0 and "a.mp4" in table and len(messages(log)) == 1 and said in log


def test_progress_of_the_job_is_shown_with_no_escape_sequence(run, monkeypatch):
    shown = []
    monkeypatch.setattr(queue.ProgressDisplay, "note", lambda self, text, now=False: shown.append((text, now)))
    job = "0" * 8
    progress = '{"type":"progress","data":{"value":%s,"max":4,"node":"%s","prompt_id":"%s"}}'
    frames = [progress % (1, "8", "another"), progress % (2.0, "8", job), progress % (3, r"\u001b[2J", job), STATUS]
    lies = {"POST /prompt": answer({"prompt_id": job})}
    with LyingComfyUI(lies, frames=frames) as lying:
        assert run("--port", str(lying.port))[0] == 0
    assert shown[1:3] == [("AscendSampler 2/4", True), ("\\x1b[2J 3/4", True)]


def test_without_a_terminal_progress_is_a_line_now_and_then(run, monkeypatch):
    job = "0" * 8
    progress = '{"type":"progress","data":{"value":%d,"max":30,"node":"8","prompt_id":"%s"}}'
    frames = [progress % (step, job) for step in range(1, 30)] + [STATUS]
    with LyingComfyUI({"POST /prompt": answer({"prompt_id": job})}, frames=frames) as lying:
        log = run("--port", str(lying.port))[2]
        assert re.findall(r"\w+ \d+/30\]", log)[0] == "AscendSampler 1/30]" and "\r" not in log
        assert len(log.splitlines()) == 3 and "100% 1/1 [" in log.splitlines()[-1]


def test_a_server_that_says_nothing_leaves_progress_as_it_was(run, monkeypatch):
    monkeypatch.setattr(queue, "ProgressDisplay", partial(queue.ProgressDisplay, every=0.1))
    monkeypatch.setattr("ascend_runtime.commands.progress.REFRESH", 0.05)
    with LyingComfyUI(stays=True) as lying:
        log = run("--port", str(lying.port), "--timeout", "2")[2]
    assert len(re.findall(r"0/1 \[.*a cat", log)) > 8, log


def test_on_a_terminal_progress_is_a_bar(tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\n")
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))
    with LyingComfyUI() as lying:
        done = subprocess.run(
            [sys.executable, "-m", "ascend_runtime", "queue", str(WORKFLOW), "--port", str(lying.port), "--prompts",
             str(tmp_path / "prompts.txt")], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=theirs, timeout=60)
    os.close(theirs)
    text = b""
    with contextlib.suppress(OSError), open(ours, "rb", buffering=0) as terminal:  # its end is an error
        while part := terminal.read(1 << 16):
            text += part
    text = text.decode()
    assert done.returncode == 0 and "\r" in text and "| 0/1 [" in text and "100% 1/1 [" in text


def test_a_job_whose_server_stops_making_sense_is_interrupted_by_its_own_id(run):
    with LyingComfyUI(stays=True) as lying:
        lying.lies["POST /prompt"] = break_queue
        status, _, log = run("--port", str(lying.port))
        assert status == 2 and "GET /queue is not ComfyUI's" in log and not lying.jobs
        assert len(lying.asked("POST", "/interrupt")) == 1


def break_queue(request):
    """From now on its queue is a login page."""
    request.comfyui.lies["GET /queue"] = LOGIN
    request.prompt()


def test_a_job_that_cannot_be_taken_back_is_named(run):
    for code in (400, 500):
        with LyingComfyUI({"POST /prompt": LOGIN, "POST /queue": answer(status=code)}) as lying:
            status, _, log = run("--port", str(lying.port))
            assert status == 2
            assert f"warning: job {lying.jobs[0]} may still be in ComfyUI's queue" in messages(log)[0]


@pytest.mark.parametrize("lie, said", [
    (answer({"name": "../b.png"}), "renamed the image"), (LOGIN, "POST /upload/image is not ComfyUI's"),
    (answer(b"no", 400), "rejects the image"), (answer(status=413), "--max-upload-size"),
])
def test_an_image_that_the_server_does_not_take_is_one_message(run, tmp_path, lie, said):
    (tmp_path / "a.png").write_bytes(b"content")
    (tmp_path / "images.txt").write_text("a.png\n")
    graph = json.loads(WORKFLOW.read_text()) | {"load": {"class_type": "LoadImage", "inputs": {"image": "x.png"}}}
    (tmp_path / "graph.json").write_text(json.dumps(graph))
    with LyingComfyUI({"POST /upload/image": lie}) as lying:
        options = "--port", str(lying.port), "--images", str(tmp_path / "images.txt")
        status, table, log = run(*options, graph=tmp_path / "graph.json")
        assert (status, table) == (2, "") and len(messages(log)) == 1 and said in log
        assert not lying.asked("POST", "/prompt")


ADDRESSES = {
    "host": "http://host:8188", "host:80": "http://host", "host:8000": "http://host:8000",
    "http://host": "http://host", "https://host": "https://host", "https://host:8188/": "https://host:8188",
    "https://host/comfy/": "https://host/comfy", "host/a/b": "http://host:8188/a/b", "HTTP://HOST:1": "http://host:1",
    "::1": "http://[::1]:8188", "[::1]": "http://[::1]:8188", "[::1]:8188": "http://[::1]:8188",
    "127.0.0.1:8188/#0-workflow": "http://127.0.0.1:8188",
    "https://bücher.example/ü": "https://xn--bcher-kva.example/%C3%BC", "my_box.local": "http://my_box.local:8188",
}


@pytest.mark.parametrize("text", ADDRESSES)
def test_an_address_is_taken_as_people_write_it(text):
    assert address.parse_address(text).url == ADDRESSES[text]


INVALID = "not a valid server address"


@pytest.mark.parametrize("text, said", [
    ("", INVALID), ("a b", INVALID), ("host\n", INVALID), ("host:\x1b", INVALID),
    ("ftp://host", "begins with ftp://"), ("ws://host", "begins with ws://"), ("host:99999", INVALID),
    ("host:0", "1 to 65535"), ("host:x", INVALID), ("http://", "it has no host"), ("http://:8188", "no host"),
    ("http://[::1", INVALID), ("fe80::1%eth0", "with an interface"), ("[fe80::1%25eth0]:1", "an interface"),
    ("http://a..b:1:2", INVALID), ("http://host\\@other", INVALID),
    ("http://host/?token=secret", "has a query"), ("http://user:secret@host", "can read credentials"),
    ("http://user:secret@host:x", "can read credentials"), ("http://user@ho st", INVALID),
])
def test_an_address_that_is_none_is_refused_and_shows_no_secret(text, said):
    with pytest.raises(QueueError, match=said) as refusal:
        address.parse_address(text)
    assert "secret" not in str(refusal.value)


@pytest.mark.parametrize("host, port, url", [
    ("127.0.0.1", 8188, "http://127.0.0.1:8188"), ("::1", 1, "http://[::1]:1"), ("[::1]", 1, "http://[::1]:1"),
    ("http://host", 1, None), ("host:1", 1, None), ("", 1, None), ("host", 0, None), ("host", 65536, None),
])
def test_host_and_port_stay_what_they_were(host, port, url):
    if url:
        assert address.of_host(host, port).url == url
    else:
        with pytest.raises(QueueError):
            address.of_host(host, port)


def test_a_server_and_a_host_are_one_too_many(run):
    assert "Remove --host and --port" in run("--server", "localhost", "--port", "1")[2]


def test_without_a_server_the_reason_is_in_words(run):
    assert "the connection is refused" in run("--port", str(free_port()))[2]
    assert "no such host" in run("--server", "no-such-host.invalid")[2]


def has_ipv6():
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as probe:
        probe.bind(("::1", 0))
        return True
    return False


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6 on loopback")
@pytest.mark.parametrize("form", [["--host", "::1", "--port", "{}"], ["--host", "[::1]", "--port", "{}"],
                                  ["--server", "[::1]:{}"], ["--server", "http://[::1]:{}/"]])
def test_ipv6_works(run, form):
    with LyingComfyUI(host="::1") as lying:
        status, table, log = run(*(part.format(lying.port) for part in form))
        assert status == 0 and "a.mp4" in table and not messages(log), log
        assert lying.asked("GET", "/ws")


def test_a_prefix_stands_before_every_path(run):
    with LyingComfyUI(prefix="/comfy") as lying:
        status, _, log = run("--server", f"http://127.0.0.1:{lying.port}/comfy/")
        assert status == 0 and not messages(log)
        paths = {path for _, path, _, _ in lying.seen}
        assert "/comfy/ws" in paths and all(path.startswith("/comfy/") for path in paths)
        assert "If it has a path prefix" in run("--port", str(lying.port))[2]


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """(certificate, its server's context): for localhost, signed by itself."""
    if not shutil.which("openssl"):
        pytest.skip("no openssl here to make a certificate with")
    folder = tmp_path_factory.mktemp("tls")
    files = [str(folder / "certificate.pem"), str(folder / "key.pem")]
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
                    "-out", files[0], "-keyout", files[1], "-subj", "/CN=localhost", "-days", "2",
                    "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*files)
    return files[0], context


def test_https_works_with_the_ca_that_the_environment_names(run, certificate, monkeypatch):
    monkeypatch.setenv(connection.CA_VARIABLE, certificate[0])
    with LyingComfyUI(tls=certificate[1], prefix="/comfy") as lying:
        for host in ("localhost", "127.0.0.1"):
            status, table, log = run("--server", f"https://{host}:{lying.port}/comfy")
            assert status == 0 and "a.mp4" in table and not messages(log), log
        assert len(lying.asked("GET", "/comfy/ws")) == 2


def test_a_certificate_that_is_not_trusted_is_one_message(run, certificate, monkeypatch, tmp_path):
    with LyingComfyUI(tls=certificate[1]) as lying:
        status, _, log = run("--server", f"https://localhost:{lying.port}")
        assert status == 2 and len(messages(log)) == 1
        assert "its certificate is not trusted (self" in log and connection.CA_VARIABLE in log
        assert not lying.seen
        assert "its answer is not HTTP" in run("--server", f"http://localhost:{lying.port}")[2]
    with LyingComfyUI() as lying:
        assert "Is it http:// instead of https://?" in run("--server", f"https://localhost:{lying.port}")[2]
        for wrong in (tmp_path / "none.pem", WORKFLOW):
            monkeypatch.setenv(connection.CA_VARIABLE, str(wrong))
            assert "has no certificates in PEM format" in run("--server", f"https://localhost:{lying.port}")[2]


def tokens(lying):
    return {headers.get("Authorization") for _, _, headers, _ in lying.seen}


def test_a_token_goes_to_its_server_and_nowhere_else(run, monkeypatch):
    monkeypatch.setenv(address.TOKEN_VARIABLE, "secret-token")
    with LyingComfyUI() as lying, LyingComfyUI() as other:
        status, table, log = run("--port", str(lying.port))
        assert status == 0 and tokens(lying) == {"Bearer secret-token"} and not messages(log)
        assert lying.asked("GET", "/ws")
        elsewhere = answer(status=307, Location=f"http://127.0.0.1:{other.port}/prompt")
        for path in ("POST /prompt", "GET /ws", "GET /queue"):
            lying.lies[path] = elsewhere
            _, table, again = run("--port", str(lying.port))
            assert "secret-token" not in table + again
        lying.lies = {"GET /queue": answer(status=401)}
        refused = run("--port", str(lying.port))[2]
        assert "it rejects the token" in refused and "secret-token" not in log + refused
        assert not other.seen


def test_a_token_comes_from_the_variable_that_is_named(run, monkeypatch):
    monkeypatch.setenv("MINE", "Basic dXNlcjpzZWNyZXQ=\n")
    with LyingComfyUI() as lying:
        assert run("--port", str(lying.port), "--token-env", "MINE")[0] == 0
        assert tokens(lying) == {"Basic dXNlcjpzZWNyZXQ="}
        assert "MINE2: this environment variable is unset" in run("--token-env", "MINE2")[2]
        for wrong in ("a\r\nHost: evil", "t\u00f6ken", "a\tb"):
            monkeypatch.setenv("MINE", wrong)
            log = run("--port", str(lying.port), "--token-env", "MINE")[2]
            assert "which a token cannot have" in log and wrong not in log
    monkeypatch.setenv(address.TOKEN_VARIABLE, "")
    with LyingComfyUI() as lying:
        assert run("--port", str(lying.port))[0] == 0 and tokens(lying) == {None}


@pytest.mark.parametrize("host, warned", [("127.0.0.1", False), ("localhost", False), ("192.0.2.1", True)])
def test_a_token_without_encryption_is_warned_of(run, monkeypatch, host, warned):
    monkeypatch.setenv(address.TOKEN_VARIABLE, "secret")
    log = run("--server", f"http://{host}:{free_port()}")[2]
    assert ("warning: the token is sent to" in log) is warned


def test_a_proxy_of_the_environment_is_not_used(run, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    with LyingComfyUI() as lying:
        status, _, log = run("--port", str(lying.port))
        assert status == 0 and not messages(log)
