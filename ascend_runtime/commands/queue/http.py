"""HTTP to one server that may lie: each answer has an end in time and in bytes, and each failure its words."""

from __future__ import annotations

import http.client
import os
import queue
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

import requests
import urllib3

from . import QueueError
from .address import TOKEN_VARIABLE, Address
from .screen import line

REQUEST_S = 60.0  # for a whole answer; a library's timeouts bound each read of it only
UPLOAD_S = 600.0
LAST_S = 2.0  # for what is under way when the user interrupts, so that taking it back comes after it
LARGEST_ANSWER = 16 << 20  # bytes
CA_VARIABLE = "REQUESTS_CA_BUNDLE"

Result = TypeVar("Result")


class Connection:
    """Requests to the server at an address. authorization: the header of that name, sent there and nowhere else."""

    def __init__(self, address: Address, authorization: str | None = None):
        self.address = address
        self.headers = {"Authorization": authorization} if authorization else {}
        self.tls = _tls() if address.scheme == "https" else None
        self._session = _Session()
        self._session.trust_env = False  # the address is meant literally: no proxy between
        self._session.verify = _certificates()
        self._session.headers.update({"Accept-Encoding": "identity", **self.headers})  # nothing inflates

    def close(self) -> None:
        self._session.close()

    def request(self, method: str, path: str, seconds: float | None = None, largest: int | None = None,
                **arguments) -> tuple[int, bytes]:
        """Status and body of the answer. seconds, largest: bounds of the answer, if not the usual ones. arguments: of
        requests. Raises QueueError if there is no such answer, and for any status but 200, and but 400 where a graph
        or a file is sent: what is wrong with that is for the caller to say."""
        seconds, largest = seconds or REQUEST_S, largest or LARGEST_ANSWER
        try:
            return within(seconds, lambda: self._request(method, path, seconds, largest, arguments))
        except TimeoutError:
            raise self.unreachable(f"{method} {path} was not answered within {seconds:g} s") from None
        except (requests.RequestException, urllib3.exceptions.HTTPError, http.client.HTTPException, OSError) as error:
            raise self.unreachable(reason(error)) from None

    def _request(self, method: str, path: str, seconds: float, largest: int, arguments: dict) -> tuple[int, bytes]:
        with self._session.request(method, self.address.url + path, timeout=seconds, stream=True,
                                   allow_redirects=False, **arguments) as answer:
            if answer.status_code != 200 and not (answer.status_code == 400 and {"data", "files"} & set(arguments)):
                raise QueueError(self._of_status(answer, f"{method} {path}"))
            if (encoding := answer.headers.get("Content-Encoding", "identity")) != "identity":
                raise self.odd(f"{method} {path}", f"it is in the encoding {line(encoding, 40)}, not asked for")
            return answer.status_code, self._read(answer, f"{method} {path}", largest)

    def _read(self, answer: requests.Response, asked: str, largest: int) -> bytes:
        body = bytearray()
        while part := answer.raw.read(1 << 16, decode_content=False):
            body += part
            if len(body) > largest:
                raise self.odd(asked, f"it has more than {largest >> 20} MiB")
        return bytes(body)

    def _of_status(self, answer: requests.Response, asked: str) -> str:
        """What a status that is neither good nor about the request's content means, and what to do."""
        status, url = answer.status_code, self.address.url
        given = f"{url} answers {asked} with status {status} ({line(answer.reason or 'no reason', 60)})"
        if 300 <= status < 400:
            to = line(answer.headers.get("Location", "nowhere").partition("?")[0], 200)
            return f"{given}: it redirects to {to}. If that is your ComfyUI, give its address by --server."
        if status in (401, 403):
            token = "refuses the token given" if self.headers else "wants to know who asks"
            return f"{given}: it {token}. Put the right one into {TOKEN_VARIABLE}, or the variable of --token-env."
        if status == 404:
            return f"{given}: there is no ComfyUI. If it is behind a prefix, give it by --server {url}/prefix/."
        if status == 413:
            return f"{given}: too large. Start ComfyUI with a larger --max-upload-size, or let its proxy take more."
        if status >= 500:
            return f"{given}: ComfyUI, or a proxy before it, has failed. Look into its log; then run the command again."
        return f"{given}, which ComfyUI does not. Is it a ComfyUI? Give its address by --server."

    def odd(self, asked: str, why: str) -> QueueError:
        """An error: what was answered is not what ComfyUI answers."""
        return QueueError(f"What {self.address.url} answers to {asked} is not understood: {why}. "
                          "Is it a ComfyUI, and no login page or proxy? Give its address by --server.")

    def unreachable(self, why: str) -> QueueError:
        """An error: there is no answer."""
        return QueueError(f"No ComfyUI answers at {self.address.url}: {why}. "
                          "Start it, or give its address by --server.")


class _Session(requests.Session):
    def get_redirect_target(self, resp):
        """None: requests would read the whole body of a redirect, however long, even where it does not follow it."""
        return None


def within(seconds: float, work: Callable[[], Result]) -> Result:
    """What `work` returns or raises. Raises TimeoutError if it takes longer; its thread is then left to itself."""
    outcome: queue.SimpleQueue = queue.SimpleQueue()

    def do():
        try:
            outcome.put((work(), None))
        except Exception as error:
            outcome.put((None, error))

    thread = threading.Thread(target=do, daemon=True)
    thread.start()
    try:
        result, error = outcome.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError from None
    except KeyboardInterrupt:
        thread.join(LAST_S)
        raise
    if error:
        raise error
    return result


def _certificates() -> str:
    """The file or folder of CAs' certificates that HTTPS trusts."""
    return os.environ.get(CA_VARIABLE) or requests.certs.where()


def _tls() -> ssl.SSLContext:
    """What a websocket trusts: the same. Raises QueueError."""
    path = _certificates()
    try:
        folder = os.path.isdir(path)
        return ssl.create_default_context(cafile=None if folder else path, capath=path if folder else None)
    except OSError as error:  # SSLError too
        raise QueueError(f"The environment variable {CA_VARIABLE} names {line(path, 300)}, which has no certificates "
                         f"in PEM format ({line(error.strerror or error, 100)}).") from None


def reason(error: BaseException) -> str:
    """Why there is no answer, in words."""
    causes = list(_causes(error))
    for kind, words in REASONS:
        if found := next((cause for cause in causes if isinstance(cause, kind)), None):
            return words(found)
    return line(f"{type(causes[-1]).__name__}: {causes[-1]}", 200)


REASONS = (  # the first that is among an error's causes
    (ssl.SSLCertVerificationError, lambda error: f"its certificate is not trusted ({line(error.verify_message, 100)}). "
     f"If it is your own, name the file of its CA by the environment variable {CA_VARIABLE}"),
    (ssl.SSLError, lambda error: f"no TLS can be spoken with it ({line(error.reason or 'closed', 60)}). "
     "Is it http:// and not https://?"),
    (socket.gaierror, lambda error: f"no such host ({line(error.strerror, 60)})"),
    (ConnectionRefusedError, lambda _: "nothing listens there"),
    ((TimeoutError, socket.timeout, requests.Timeout), lambda _: "it does not answer"),
    ((http.client.BadStatusLine, http.client.LineTooLong), lambda _: "it speaks no HTTP. Is it https:// and not "
     "http://?"),
    (OSError, lambda error: line(error.strerror or error, 100)),
)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """What the errors of urllib3, and of requests around these, were raised for: the innermost first."""
    inner = [error.__cause__ or error.__context__, getattr(error, "reason", None), *error.args]
    for cause in inner:
        if isinstance(cause, BaseException) and cause is not error:
            yield from _causes(cause)
    yield error
