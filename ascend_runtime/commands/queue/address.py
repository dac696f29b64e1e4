"""Parses the address of a ComfyUI server, and reads its token."""

from __future__ import annotations

import ipaddress
import os
import re
from dataclasses import dataclass
from urllib.parse import quote, urlsplit

from . import QueueError
from .screen import one_line

COMFYUI_PORT = 8188
DEFAULT_PORTS = {"http": 80, "https": 443}  # default ports of URLs
TOKEN_VARIABLE = "ASCEND_QUEUE_TOKEN"
FORMS = "Give it as host, host:port, [::1]:8188, http://host:8188 or https://host/prefix/."
CREDENTIALS = ("other users of this machine can read credentials in an address. Put a token into the environment "
               f'variable {TOKEN_VARIABLE}, or "Basic " and the base64 of user:password.')


@dataclass(frozen=True)
class Address:
    """scheme: http or https. host: a name or an IP address, without brackets. prefix: "", or a path such as "/comfy".
    """

    scheme: str
    host: str
    port: int
    prefix: str = ""

    @property
    def netloc(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"

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
        """Whether the address is only http://host:port."""
        return self.scheme == "http" and not self.prefix


def parse_address(text: str) -> Address:
    """Parses an address. Without a scheme, it is http with ComfyUI's port as default. A fragment, as in the address of
    ComfyUI's page, is ignored. Raises QueueError."""
    if not text or not text.isprintable() or " " in text or "\\" in text:
        raise QueueError(f"'{one_line(text, 200)}' is not a valid server address. {FORMS}")
    whole = text if "://" in text else f"http://[{text}]" if _is_ipv6(text) else f"http://{text}"
    try:
        parts = urlsplit(whole)
        port = parts.port
        host = _host(parts.hostname or "")
    except ValueError as error:  # its message may quote the text, so it is not shown with credentials
        shown = "An address with credentials" if "@" in text else f"'{one_line(text, 200)}'"
        reason = CREDENTIALS if "@" in text else f"{one_line(error, 200)}. {FORMS}"
        raise QueueError(f"{shown} is not a valid server address: {reason}") from None
    _refuse_extras(parts)
    port = port if port is not None else DEFAULT_PORTS[parts.scheme] if "://" in text else COMFYUI_PORT
    return Address(parts.scheme, host, port, quote(parts.path.rstrip("/"), safe="/%~!$&'()*+,;=:@"))


def _refuse_extras(parts) -> None:
    """Raises QueueError for parts that are not supported, without showing those that may be secret."""
    if parts.username is not None or parts.password is not None:
        raise QueueError(f"The server's address has a user or a password: {CREDENTIALS}")
    if parts.query:
        raise QueueError(f"The server's address has a query (?...), which ComfyUI's API does not support. Remove it; "
                         f"put a token into the environment variable {TOKEN_VARIABLE}.")
    if parts.scheme not in DEFAULT_PORTS:
        raise QueueError(f"The server's address begins with {one_line(parts.scheme, 40)}://; use http or https.")
    if parts.port == 0:
        raise QueueError("A server's port is a number from 1 to 65535.")


def _host(text: str) -> str:
    if _is_ipv6(text):
        if "%" in text:
            raise ValueError("an address with an interface (%...) is not supported; use one without, or a name")
        return text
    name = text.encode("idna").decode() if text and not text.isascii() else text
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", name):
        raise ValueError("it has no host" if not text else f"{text} is not a valid host name")
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
        raise QueueError("--host must be only a name or an IP address. Give a full address by --server.")
    if not 0 < port < 65536:
        raise QueueError(f"--port is {port}; give 1 to 65535.")
    return parse_address(f"http://[{bare}]:{port}" if ":" in bare else f"http://{bare}:{port}")


def authorization(variable: str | None) -> str | None:
    """The Authorization header from an environment variable: a token, or a scheme with its value, such as
    "Basic dXNlcjpw". None if the default variable is unset or empty. Raises QueueError, which never shows the value."""
    value = os.environ.get(variable or TOKEN_VARIABLE, "").strip()
    if not value:
        if variable:
            raise QueueError(f"--token-env {one_line(variable, 100)}: this environment variable is unset or empty. "
                             "Put the server's token into it.")
        return None
    if not (value.isascii() and value.isprintable()):
        raise QueueError(f"The environment variable {one_line(variable or TOKEN_VARIABLE, 100)} has line breaks, "
                         "control characters or characters beyond ASCII, which a token cannot have. Correct it.")
    return value if " " in value else f"Bearer {value}"
