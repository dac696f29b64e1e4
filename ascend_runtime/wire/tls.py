"""TLS between the client and the machines of a cluster, which all have the same key file. Does not import torch.

The key file holds a private key and the certificate that it signed itself. Either side presents this certificate, and
accepts no other. Only TLS 1.3 is spoken, and no session is resumed, so that recorded bytes are of no use to anyone.
"""

from __future__ import annotations

import os
import re
import select
import socket
import ssl
import stat
import subprocess
from pathlib import Path

from ..errors import coded_error

_MAX_FILE = 1 << 16  # bytes
_PEM = re.compile(rb"-----BEGIN ([A-Z0-9 ]+)-----.*?-----END \1-----", re.DOTALL)
_PRIVATE = (b"PRIVATE KEY", b"EC PRIVATE KEY", b"RSA PRIVATE KEY")
# X509_V_FLAG_NO_CHECK_TIME, which Python does not name. A machine's clock may be wrong; what counts is the key.
_NO_CHECK_TIME = 0x200000
_YEARS = 100
_CONFIG = """[req]
distinguished_name = subject
x509_extensions = extensions
[subject]
[extensions]
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature
"""


class Key:
    """What a key file holds, ready to be used by both sides. certificate: as DER."""

    def __init__(self, certificate: bytes, server: ssl.SSLContext, client: ssl.SSLContext):
        self.certificate = certificate
        self._server = server
        self._client = client

    def context(self, server: bool) -> ssl.SSLContext:
        """Of the side that listens, or of the side that connects."""
        return self._server if server else self._client


def read_key(path: str | Path) -> Key:
    """The key of a file that only this user can read. Raises ValueError with the fix."""
    content = _content(Path(path))
    found = {}
    for block in _PEM.finditer(content):
        kind = "key" if block[1] in _PRIVATE else block[1].decode().lower()
        if kind in found:
            raise _unusable(path, f"it holds more than one {kind}")
        found[kind] = block[0].decode("ascii", "replace")
    if set(found) != {"key", "certificate"}:
        raise _unusable(path, "it must hold one private key and one certificate, as PEM without a passphrase")
    try:
        certificate = ssl.PEM_cert_to_DER_cert(found["certificate"] + "\n")
        contexts = [_context(protocol, certificate, content)
                    for protocol in (ssl.PROTOCOL_TLS_SERVER, ssl.PROTOCOL_TLS_CLIENT)]  # fmt: skip
    except (OSError, ValueError) as error:  # without its traceback, whose frames hold the key
        raise _unusable(path, f"its key and certificate cannot be used ({error})") from None
    return Key(certificate, *contexts)


def require_pinned(sock: ssl.SSLSocket, key: Key) -> None:
    """Raises ValueError unless TLS 1.3 is established with a side that has this key."""
    if sock.version() != "TLSv1.3" or sock.getpeercert(binary_form=True) != key.certificate:
        raise _refused("its certificate is another one")


class Handshake:
    """The TLS handshake of one side of a connection, without blocking. It takes over `sock`, which is connected.

    Nothing but TLS records of a bounded size is read from the other side. Raises OSError if the connection is lost.
    """

    def __init__(self, sock: socket.socket, key: Key, server: bool):
        sock.setblocking(False)
        self._key = key
        self.events = select.POLLIN if server else select.POLLOUT  # to wait for, before `step`
        self._socket = key.context(server).wrap_socket(sock, server_side=server, do_handshake_on_connect=False)

    def fileno(self) -> int:
        return self._socket.fileno()

    def step(self) -> ssl.SSLSocket | None:
        """Continues as far as possible. Returns the socket when the handshake is done, None if it must wait for
        `events`.

        Raises OSError if the connection is lost, and ValueError (AV-1909) if the other side has another key, no key, or
        does not speak TLS 1.3; both close the socket. The side that connects finds out first that keys differ.
        """
        try:
            self._socket.do_handshake()
            require_pinned(self._socket, self._key)
            return self._socket
        except ssl.SSLWantReadError:
            self.events = select.POLLIN
        except ssl.SSLWantWriteError:
            self.events = select.POLLOUT
        except (ssl.SSLEOFError, ssl.SSLZeroReturnError, ssl.SSLSyscallError) as error:
            self.close()
            raise ConnectionResetError("the connection ended before TLS was established") from error
        except ssl.SSLError as error:
            self.close()
            raise _refused(error.reason or "no reason") from error
        except (OSError, ValueError):
            self.close()
            raise
        return None

    def close(self) -> None:
        self._socket.close()


def make_key(path: str | Path, name: str) -> None:
    """Writes a new key file, which only this user can read, by the program `openssl`. name: for the certificate.

    Raises ValueError if the file exists already or cannot be written.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise _unusable(path, "it exists already; remove it to make a new one") from None
    except OSError as error:
        raise _unusable(path, f"it cannot be written ({error.strerror})") from None
    try:
        with open(descriptor, "wb") as file:
            file.write(_made(name))
    except BaseException:
        os.unlink(path)
        raise


def _made(name: str) -> bytes:
    """A private key and a certificate, as PEM. They come through a pipe: neither a list of processes nor another file
    shows them."""
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-sha256",
               "-days", str(365 * _YEARS), "-subj", f"/CN={name}", "-config", "/dev/stdin"]  # fmt: skip
    try:
        ran = subprocess.run(command, input=_CONFIG.encode(), capture_output=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = getattr(error, "strerror", None) or "it took longer than 60 s"
        raise coded_error("AV-1902", f"The program openssl cannot make a key ({reason}). Install it.") from None
    if ran.returncode:
        said = ran.stderr.decode(errors="replace").strip()
        raise coded_error("AV-1902", f"The program openssl could not make a key: {said[-500:]}")
    return ran.stdout


def _content(path: Path) -> bytes:
    """Of a small regular file of this user, which nobody else can read."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe must not block
    except OSError as error:
        raise _unusable(path, f"it cannot be opened ({error.strerror})") from None
    try:
        _check(path, os.fstat(descriptor))  # of the file that is open, whatever the path leads to by now
        return os.read(descriptor, _MAX_FILE)
    except OSError as error:
        raise _unusable(path, f"it cannot be read ({error.strerror})") from None
    finally:
        os.close(descriptor)


def _check(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise _unusable(path, "it is not a file")
    if status.st_uid != os.geteuid():
        raise _unusable(path, f"it belongs to user {status.st_uid}, and this process to user {os.geteuid()}")
    if status.st_mode & 0o077:
        raise _unusable(path, f"others can read or write it; run: chmod 600 {path}")
    if status.st_size > _MAX_FILE:
        raise _unusable(path, f"it is larger than {_MAX_FILE} bytes")


def _context(protocol: int, certificate: bytes, content: bytes) -> ssl.SSLContext:
    """TLS that presents this certificate, and takes it for the only authority there is."""
    context = ssl.SSLContext(protocol)
    context.check_hostname = False  # addresses change; the certificate is compared instead
    context.verify_mode = ssl.CERT_REQUIRED
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_3
    context.options |= ssl.OP_NO_TICKET | ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
    if protocol == ssl.PROTOCOL_TLS_SERVER:
        context.num_tickets = 0
    context.verify_flags |= _NO_CHECK_TIME
    context.load_verify_locations(cadata=certificate)
    memory = os.memfd_create("ascend-key", os.MFD_CLOEXEC)  # ssl reads files only, and the path's may have changed
    try:
        os.write(memory, content)
        context.load_cert_chain(f"/proc/self/fd/{memory}", password=lambda: "")  # an empty one instead of a question
    finally:
        os.close(memory)
    return context


def _unusable(path: str | Path, reason: str) -> ValueError:
    return coded_error("AV-1902", f"The key file {path} cannot be used: {reason}.")


def _refused(reason: str) -> ValueError:
    return coded_error(
        "AV-1909",
        f"The other side of the connection is not of this cluster, or has another key ({reason}). Copy the client's "
        "key file to all machines.",
    )
