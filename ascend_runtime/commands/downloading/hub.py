"""What a hub says about a file: its size and its hash.

Both hubs are asked over HTTP by `requests`, which the pack requires: one way to resume, to check and to explain. The
clients of the hubs each have another way, and ModelScope's is not in ComfyUI's Python.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urljoin, urlsplit

import requests
import urllib3

from ...errors import coded_error
from ...models.hubs import ENDPOINTS, HUGGING_FACE, MODELSCOPE, REVISIONS, HubFile
from ..queue.http import reason

CONNECT_S, READ_S = 10.0, 60.0
MOST_ANSWER = 2**22  # bytes of a list of files
MOST_REDIRECTS = 5
VARIABLES = {HUGGING_FACE: "HF_ENDPOINT", MODELSCOPE: "MODELSCOPE_ENDPOINT"}
HUB_TITLES = {HUGGING_FACE: "Hugging Face", MODELSCOPE: "ModelScope"}
SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Remote:
    """A file as a hub describes it. sha256: in hexadecimal digits."""

    file: HubFile
    url: str
    size: int
    sha256: str


class Hub:
    """One hub, or a mirror of it. name: a key of ENDPOINTS."""

    def __init__(self, name: str):
        self.name = name
        self.title = HUB_TITLES[name]
        self.endpoint = (os.environ.get(VARIABLES[name]) or ENDPOINTS[name]).rstrip("/")
        if urlsplit(self.endpoint).scheme not in ("http", "https"):
            raise coded_error("AV-1103", f"{VARIABLES[name]} is {self.endpoint!r}, which is not an address. Give one "
                                         f"such as {ENDPOINTS[name]}, or unset it.")  # fmt: skip
        parts = urlsplit(self.endpoint)
        self.shown = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()  # without a password
        self.session = requests.Session()  # sends the token to this host only: redirects to others go without it
        self.session.headers["Accept-Encoding"] = "identity"
        token = os.environ.get("HF_TOKEN", "").strip() if name == HUGGING_FACE else ""
        if token:
            self.session.headers["Authorization"] = f"Bearer {token}"

    def describe(self, file: HubFile) -> Remote:
        """Raises ValueError without a valid answer."""
        size, sha256 = (self._headers if self.name == HUGGING_FACE else self._listed)(file)
        if type(size) is not int or size < 1 or not SHA256.fullmatch(str(sha256)):
            raise self._invalid(file, f"names size {str(size)[:40]!r} and hash {str(sha256)[:80]!r}")
        return Remote(file, file.address(self.name, self.endpoint), size, sha256)

    def _headers(self, file: HubFile) -> tuple[int | None, str]:
        """Size and hash in the headers of Hugging Face's answer, which redirects to where the bytes lie."""
        url = file.address(self.name, self.endpoint)
        for _ in range(MOST_REDIRECTS):
            with self.answer("HEAD", url, file, allow_redirects=False) as answer:
                headers, place = answer.headers, answer.headers.get("Location", "")
            if "X-Linked-Etag" in headers or not place or urlsplit(place).netloc:
                break
            url = urljoin(url, place)  # a repository that was renamed
        size = headers.get("X-Linked-Size") or headers.get("Content-Length", "")
        tag = headers.get("X-Linked-Etag") or headers.get("ETag", "")
        return int(size) if size.isdecimal() else None, tag.removeprefix("W/").strip('"').lower()

    def _listed(self, file: HubFile) -> tuple[Any, Any]:
        """Size and hash in ModelScope's list of a folder."""
        url = f"{self.endpoint}/api/v1/models/{file.repository}/repo/files"
        asked = {"Revision": REVISIONS[self.name], "Root": file.path.rpartition("/")[0], "Recursive": "false"}
        with self.answer("GET", url, file, params=asked) as answer:
            content = answer.raw.read(MOST_ANSWER, decode_content=False)
        try:
            entries = json.loads(content)["Data"]["Files"]
            found = [one for one in entries if one["Path"] == file.path]
            listed = [(one["Size"], str(one["Sha256"]).lower()) for one in found]
        except (ValueError, LookupError, TypeError, RecursionError):
            raise self._invalid(file, "is not a list of files") from None
        if not listed:
            raise self.lacks(file)
        return listed[0]

    @contextmanager
    def answer(self, method: str, url: str, file: HubFile, **arguments: Any) -> Iterator[requests.Response]:
        """A hub's answer, if its status is a success. Raises ValueError if not, and `ConnectionLost` if another attempt
        may succeed."""
        try:
            with self.session.request(method, url, stream=True, timeout=(CONNECT_S, READ_S), **arguments) as answer:
                self._require_good(answer, file)
                yield answer  # its body is read in here, and may end early
        except (requests.RequestException, urllib3.exceptions.HTTPError, ConnectionError, TimeoutError) as error:
            raise ConnectionLost(self.unreachable(file, reason(error))) from None

    def _require_good(self, answer: requests.Response, file: HubFile) -> None:
        status = answer.status_code
        if status in (401, 403):
            cure = ("Accept the terms on its page, and set HF_TOKEN to a token of your account"
                    if self.name == HUGGING_FACE else "Use --from huggingface")  # fmt: skip
            raise coded_error("AV-1803", f"{self.title} gives no access to {file.path} of {file.repository} (status "
                                         f"{status}). {cure}.")  # fmt: skip
        if status == 404:
            raise self.lacks(file)
        if status in (408, 429) or status >= 500:
            raise ConnectionLost(self.unreachable(file, f"status {status}"))
        if status >= 400:
            raise self._invalid(file, f"has status {status}")

    def lacks(self, file: HubFile) -> ValueError:
        other = next(name for name in HUB_TITLES if name != self.name)
        return coded_error("AV-1802", f"{self.title} ({self.shown}) does not have {file.path} in {file.repository}. "
                                      f"Use --from {other}.")  # fmt: skip

    def unreachable(self, file: HubFile, why: str) -> ValueError:
        other = next(name for name in HUB_TITLES if name != self.name)
        return coded_error(
            "AV-1801",
            f"{self.title} ({self.shown}) did not answer for {file.name} ({why}). Run the command "
            f"again, use --from {other}, or set {VARIABLES[self.name]} to a mirror.",
        )

    def _invalid(self, file: HubFile, what: str) -> ValueError:
        return coded_error("AV-1805", f"The answer of {self.title} ({self.shown}) for {file.name} {what}. Use another "
                                      f"mirror, or unset {VARIABLES[self.name]}.")  # fmt: skip


class ConnectionLost(Exception):
    """A failure that may pass. Its first argument is the error for the user."""
