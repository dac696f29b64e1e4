"""HTTP to one untrusted server: bounds the time and size of every answer, and explains every failure."""

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
from .screen import one_line

REQUEST_S = 60.0  # for a complete answer; a library's timeout only bounds each read
UPLOAD_S = 600.0
LAST_S = 2.0  # for a request in progress when the user interrupts, so that a removal of its job comes after it
LARGEST_ANSWER = 16 << 20  # bytes
CA_VARIABLE = "REQUESTS_CA_BUNDLE"

Outcome = TypeVar("Result")


class Connection:
    """Sends requests to the server at an address. authorization: a header that is sent only there."""

    def __init__(self, address: Address, authorization: str | None = None):
        self.address = address
        self.headers = {"Authorization": authorization} if authorization else {}
        self.tls = _tls() if address.scheme == "https" else None
        self._session = _Session()
        self._session.trust_env = False  # do not use a proxy from the environment
        self._session.verify = _certificates()
        self._session.headers.update({"Accept-Encoding": "identity", **self.headers})  # no compressed answers

    def close(self) -> None:
        self._session.close()

    def request(self, method: str, path: str, seconds: float | None = None, largest: int | None = None,
                **arguments) -> tuple[int, bytes]:
        """Returns the status and body of the answer. seconds, largest: bounds of the answer other than the defaults.
        arguments: for requests. Raises QueueError without an answer, and for a status other than 200; the caller
        handles status 400 if a graph or a file is sent."""
        seconds, largest = seconds or REQUEST_S, largest or LARGEST_ANSWER
        try:
            return within(seconds, lambda: self._request(method, path, seconds, largest, arguments))
        except TimeoutError:
            raise self.unreachable(f"no answer to {method} {path} within {seconds:g} s") from None
        except (requests.RequestException, urllib3.exceptions.HTTPError, http.client.HTTPException, OSError) as error:
            raise self.unreachable(reason(error)) from None

    def _request(self, method: str, path: str, seconds: float, largest: int, arguments: dict) -> tuple[int, bytes]:
        with self._session.request(method, self.address.url + path, timeout=seconds, stream=True,
                                   allow_redirects=False, **arguments) as answer:
            if answer.status_code != 200 and not (answer.status_code == 400 and {"data", "files"} & set(arguments)):
                raise QueueError(self._explain_status(answer, f"{method} {path}"))
            if (encoding := answer.headers.get("Content-Encoding", "identity")) != "identity":
                raise self.unexpected(f"{method} {path}", f"it has the encoding {one_line(encoding, 40)}")
            return answer.status_code, self._read(answer, f"{method} {path}", largest)

    def _read(self, answer: requests.Response, request: str, largest: int) -> bytes:
        body = bytearray()
        while part := answer.raw.read(1 << 16, decode_content=False):
            body += part
            if len(body) > largest:
                raise self.unexpected(request, f"it has more than {largest >> 20} MiB")
        return bytes(body)

    def _explain_status(self, answer: requests.Response, request: str) -> str:
        """The error text for an unexpected status: what it means, and what to do."""
        status, url = answer.status_code, self.address.url
        given = f"{url} answers {request} with status {status} ({one_line(answer.reason or 'no reason', 60)})"
        if 300 <= status < 400:
            to = one_line(answer.headers.get("Location", "nowhere").partition("?")[0], 200)
            return f"{given}: it redirects to {to}. If that is your ComfyUI, give its address by --server."
        if status in (401, 403):
            token = "rejects the token" if self.headers else "requires a token"
            return f"{given}: it {token}. Put a valid one into {TOKEN_VARIABLE}, or the variable of --token-env."
        if status == 404:
            return f"{given}: there is no ComfyUI. If it has a path prefix, use --server {url}/prefix/."
        if status == 413:
            return f"{given}: too large. Start ComfyUI with a larger --max-upload-size, or raise its proxy's limit."
        if status >= 500:
            return f"{given}: ComfyUI or its proxy has failed. Check its log; then run the command again."
        return f"{given}, which ComfyUI does not. Is it a ComfyUI? Give its address by --server."

    def unexpected(self, request: str, why: str) -> QueueError:
        """The error for an answer that is not ComfyUI's."""
        return QueueError(f"The answer of {self.address.url} to {request} is not ComfyUI's: {why}. "
                          "Is it a login page or a proxy? Give ComfyUI's address by --server.")

    def unreachable(self, why: str) -> QueueError:
        """The error for a server that does not answer."""
        return QueueError(f"No ComfyUI answers at {self.address.url}: {why}. "
                          "Start it, or give its address by --server.")


class _Session(requests.Session):
    def get_redirect_target(self, resp):
        """None, as requests would read the entire body of a redirect, even if it does not follow it."""
        return None


def within(seconds: float, work: Callable[[], Outcome]) -> Outcome:
    """Returns or raises what `work` does. Raises TimeoutError if it takes longer; then its thread is abandoned."""
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
    """The file or folder with the CA certificates that HTTPS trusts."""
    return os.environ.get(CA_VARIABLE) or requests.certs.where()


def _tls() -> ssl.SSLContext:
    """A TLS context for websockets that trusts the same certificates. Raises QueueError."""
    path = _certificates()
    try:
        folder = os.path.isdir(path)
        return ssl.create_default_context(cafile=None if folder else path, capath=path if folder else None)
    except OSError as error:  # includes SSLError
        raise QueueError(f"The environment variable {CA_VARIABLE} is {one_line(path, 300)}, which has no certificates "
                         f"in PEM format ({one_line(error.strerror or error, 100)}). Give a file that has.") from None


def reason(error: BaseException) -> str:
    """Explains why there is no answer."""
    causes = list(_causes(error))
    for kind, words in REASONS:
        if found := next((cause for cause in causes if isinstance(cause, kind)), None):
            return words(found)
    return one_line(f"{type(causes[-1]).__name__}: {causes[-1]}", 200)


REASONS = (  # the first type that is among an error's causes counts
    (ssl.SSLCertVerificationError, lambda error: "its certificate is not trusted "
     f"({one_line(error.verify_message, 100)}). If it is your own, set the environment variable "
     f"{CA_VARIABLE} to the file of its CA"),
    (ssl.SSLError, lambda error: f"the TLS handshake fails ({one_line(error.reason or 'closed', 60)}). "
     "Is it http:// instead of https://?"),
    (socket.gaierror, lambda error: f"no such host ({one_line(error.strerror, 60)})"),
    (ConnectionRefusedError, lambda _: "the connection is refused"),
    ((TimeoutError, socket.timeout, requests.Timeout), lambda _: "it does not answer"),
    ((http.client.BadStatusLine, http.client.LineTooLong), lambda _: "its answer is not HTTP. Is it https:// "
     "instead of http://?"),
    (OSError, lambda error: one_line(error.strerror or error, 100)),
)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The causes of an error of urllib3 or requests, innermost first."""
    inner = [error.__cause__ or error.__context__, getattr(error, "reason", None), *error.args]
    for cause in inner:
        if isinstance(cause, BaseException) and cause is not error:
            yield from _causes(cause)
    yield error
