"""Where a ComfyUI is, as people write it, and what lets one in."""

from __future__ import annotations

import ipaddress
import os
import re
from dataclasses import dataclass
from urllib.parse import quote, urlsplit

from . import QueueError
from .screen import line

COMFYUI_PORT = 8188
PORTS = {"http": 80, "https": 443}  # what a URL means that names none
TOKEN_VARIABLE = "ASCEND_QUEUE_TOKEN"
FORMS = "Give it as host, host:port, [::1]:8188, http://host:8188 or https://host/prefix/."
CREDENTIALS = ("credentials do not belong into an address, which others on this machine can read. Put a token into "
               f'the environment variable {TOKEN_VARIABLE}, or "Basic " and the base64 of user:password.')


@dataclass(frozen=True)
class Address:
    """scheme: http or https. host: a name or an IP address, without brackets. prefix: "" or as "/comfy"."""

    scheme: str
    host: str
    port: int
    prefix: str = ""

    @property
    def netloc(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def url(self) -> str:
        return f"{self.scheme}://{self.netloc}{self.prefix}"

    @property
    def websocket(self) -> str:
        return self.url.replace("http", "ws", 1)

    @property
    def loopback(self) -> bool:
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost" or self.host.endswith(".localhost")

    @property
    def plain(self) -> bool:
        """Whether http://host:port is all of it."""
        return self.scheme == "http" and not self.prefix


def parse(text: str) -> Address:
    """The address in a text. Without a scheme it is http, and ComfyUI's port if it names none. A fragment, which
    ComfyUI's page puts into a browser's address, is ignored. Raises QueueError."""
    if not text or not text.isprintable() or " " in text or "\\" in text:
        raise QueueError(f"'{line(text, 200)}' is no address of a server. {FORMS}")
    whole = text if "://" in text else f"http://[{text}]" if _is_ipv6(text) else f"http://{text}"
    try:
        parts = urlsplit(whole)
        port = parts.port
        host = _host(parts.hostname or "")
    except ValueError as error:  # of urlsplit as well; may quote the text, so that it is not shown
        shown = "An address with credentials" if "@" in text else f"'{line(text, 200)}'"
        reason = CREDENTIALS if "@" in text else f"{line(error, 200)}. {FORMS}"
        raise QueueError(f"{shown} is no address of a server: {reason}") from None
    _refuse_extras(parts)
    port = port if port is not None else PORTS[parts.scheme] if "://" in text else COMFYUI_PORT
    return Address(parts.scheme, host, port, quote(parts.path.rstrip("/"), safe="/%~!$&'()*+,;=:@"))


def _refuse_extras(parts) -> None:
    """Nothing of what may be secret is shown."""
    if parts.username is not None or parts.password is not None:
        raise QueueError(f"The server's address has a user or a password: {CREDENTIALS}")
    if parts.query:
        raise QueueError(f"The server's address has a query (?...), which ComfyUI's API does not take. Leave it out; "
                         f"a token belongs into the environment variable {TOKEN_VARIABLE}.")
    if parts.scheme not in PORTS:
        raise QueueError(f"The server's address begins with {line(parts.scheme, 40)}://; possible are http and https.")
    if parts.port == 0:
        raise QueueError("A server's port is a number from 1 to 65535.")


def _host(text: str) -> str:
    if _is_ipv6(text):
        if "%" in text:
            raise ValueError("an address with an interface (%...) cannot be used; take one without, or a name")
        return text
    name = text.encode("idna").decode() if text and not text.isascii() else text
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", name):
        raise ValueError("it names no host" if not text else f"{text} is no name of a host")
    return name


def _is_ipv6(text: str) -> bool:
    try:
        return ipaddress.ip_address(text).version == 6
    except ValueError:
        return False


def of_host(host: str, port: int) -> Address:
    """http://host:port. Raises QueueError."""
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if "/" in host or "@" in host or (":" in bare and not _is_ipv6(bare)):
        raise QueueError("--host takes a name or an IP address and nothing else. Give a whole address by --server.")
    if not 0 < port < 65536:
        raise QueueError(f"--port {port} is no port; possible are 1 to 65535.")
    return parse(f"http://[{bare}]:{port}" if ":" in bare else f"http://{bare}:{port}")


def authorization(variable: str | None) -> str | None:
    """The Authorization header that an environment variable holds: a token, or a scheme and what belongs to it, as
    "Basic dXNlcjpw". None if the default variable is unset or empty. Raises QueueError; no text has the value."""
    value = os.environ.get(variable or TOKEN_VARIABLE, "").strip()
    if not value:
        if variable:
            raise QueueError(f"--token-env {line(variable, 100)}: this environment variable is unset or empty. "
                             "Put the server's token into it.")
        return None
    if not (value.isascii() and value.isprintable()):
        raise QueueError(f"The environment variable {line(variable or TOKEN_VARIABLE, 100)} holds what no token can: "
                         "line breaks, control characters or letters beyond ASCII.")
    return value if " " in value else f"Bearer {value}"
