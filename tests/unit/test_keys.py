"""A cluster's key file: what is taken for one, who gets in with it, and that it appears nowhere else."""

import base64
import logging
import os
import re
import select
import socket
import ssl
import stat
import subprocess
import time

import pytest
from ascend_runtime.wire import tls
from ascend_runtime.wire.link import Link
from tls_links import CURVE, DEADLINE, certificate, connected, established, ready, written


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("keys")


@pytest.fixture(scope="module")
def own(folder):
    """Path of a key file."""
    path = folder / "own.key"
    tls.make_key(path, "atlas")
    return path


@pytest.fixture(scope="module")
def other(folder):
    return certificate(folder, "other")


def parts(path) -> tuple[bytes, bytes]:
    """(private key, certificate) of a key file, as PEM."""
    key, found = re.findall(rb"-----BEGIN.*?-----END [A-Z ]+-----\n", open(path, "rb").read(), re.DOTALL)
    return key, found


def test_a_new_key_is_for_this_user_only(own):
    assert stat.S_IMODE(own.stat().st_mode) == 0o600
    key, found = parts(own)
    assert b"PRIVATE KEY" in key and b"CERTIFICATE" in found
    shown = subprocess.run(["openssl", "x509", "-noout", "-text"], input=found, capture_output=True, check=True).stdout
    assert b"prime256v1" in shown and b"CA:FALSE" in shown and b"CN = atlas" in shown.replace(b"CN=", b"CN = ")
    years = int(re.search(rb"Not After : .* (\d{4}) GMT", shown)[1]) - time.gmtime().tm_year
    assert years >= 99


def test_a_new_key_takes_no_file_s_place(own, tmp_path, monkeypatch):
    before = own.read_bytes()
    with pytest.raises(ValueError, match="AV-1902: .*exists already"):
        tls.make_key(own, "atlas")
    assert own.read_bytes() == before
    with pytest.raises(ValueError, match="AV-1902: .*cannot be written"):
        tls.make_key(tmp_path / "nowhere" / "a.key", "atlas")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="AV-1902: .*openssl.*Install it"):
        tls.make_key(tmp_path / "a.key", "atlas")
    assert not (tmp_path / "a.key").exists()


def test_a_program_openssl_that_fails_leaves_no_file(tmp_path, monkeypatch):
    program = tmp_path / "openssl"
    program.write_text("#!/bin/sh\necho no such curve >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(ValueError, match="AV-1902: .*no such curve"):
        tls.make_key(tmp_path / "a.key", "atlas")
    assert not (tmp_path / "a.key").exists()


def test_a_key_is_in_no_command_line(tmp_path, monkeypatch):
    commands = []
    run = subprocess.run

    def watched(command, **options):
        commands.append(command)
        return run(command, **options)

    monkeypatch.setattr(tls.subprocess, "run", watched)
    tls.make_key(tmp_path / "a.key", "atlas")
    secrets = secrets_of(tmp_path / "a.key")
    assert len(commands) == 1 and not any(secret in word for word in commands[0] for secret in secrets)


def secrets_of(path) -> list[str]:
    """What of a private key must not appear anywhere."""
    lines = parts(path)[0].decode().splitlines()[1:-1]
    raw = base64.b64decode("".join(lines))
    return [*lines, raw[20:60].hex(), repr(raw[20:60])[2:-1]]


def test_a_key_is_in_no_log_repr_or_error(own, other, folder, caplog):
    caplog.set_level(logging.DEBUG)
    broken = own.read_bytes().replace(b"END PRIVATE", b"END PRIVATE ")
    mixed = parts(other)[0] + parts(own)[1]
    texts = []
    whole = own.read_bytes()
    for content in (broken, mixed, whole * 2, parts(own)[0], whole[:-100], b"\0" + whole[1:]):
        with pytest.raises(ValueError, match="AV-1902") as caught:
            tls.read_key(written(folder / "broken.key", content))
        texts += [str(caught.value), repr(caught.value), *map(str, caught.value.args)]
    key = tls.read_key(own)
    texts += [repr(key), str(key), repr(vars(key)), caplog.text]
    ours, theirs = established(*connected(), key)
    texts += [repr(ours), repr(theirs), repr(ours.getpeercert())]
    ours.close()
    theirs.close()
    secrets = [*secrets_of(own), *secrets_of(other)]
    assert not [secret for secret in secrets if any(secret in text for text in texts)]


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o660, 0o604, 0o602, 0o620, 0o611])
def test_a_key_that_others_can_read_is_refused(own, folder, mode):
    path = written(folder / "open.key", own.read_bytes())
    os.chmod(path, mode)
    with pytest.raises(ValueError, match=f"AV-1902: .*chmod 600 {path}"):
        tls.read_key(path)


def test_a_key_of_another_user_is_refused(own, monkeypatch):
    user = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    with pytest.raises(ValueError, match=f"AV-1902: .*belongs to user {user}"):
        tls.read_key(own)


def test_a_link_to_a_key_is_as_good_as_the_file_that_it_leads_to(own, folder):
    """Kubernetes shows secrets as links."""
    good, bad = folder / "good.link", folder / "bad.link"
    good.symlink_to(own)
    assert tls.read_key(good).certificate == tls.read_key(own).certificate
    path = written(folder / "target.key", own.read_bytes())
    os.chmod(path, 0o644)
    bad.symlink_to(path)
    with pytest.raises(ValueError, match="AV-1902: .*chmod 600"):
        tls.read_key(bad)


def test_what_is_no_key_file_is_refused(own, other, folder):
    key, found = parts(own)
    encrypted = certificate(folder, "secret", "-passout", "pass:word", *CURVE)
    os.mkfifo(folder / "pipe", 0o600)
    cases = {
        "there": folder / "nowhere", "a directory": folder, "a pipe": folder / "pipe", "device": "/dev/null",
        "empty": written(folder / "empty", b""), "half": written(folder / "half", found), "key": written(
            folder / "key", key), "two": written(folder / "two", key + found + found), "others": written(
            folder / "mixed", parts(other)[0] + found), "bytes": written(folder / "bytes", os.urandom(5000)),
        "large": written(folder / "large", own.read_bytes() + b"\n" * (1 << 16)), "encrypted": encrypted,
        "lies": written(folder / "lies", key + found.replace(b"MII", b"AII")),
        "nothing": written(folder / "no", key + b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"),
    }  # fmt: skip
    for name, path in cases.items():
        with pytest.raises(ValueError, match="AV-1902"):
            tls.read_key(path)
            pytest.fail(name)


def test_files_of_other_forms_are_taken(own, folder):
    """The key and the certificate in any order, with text around; RSA; and the form that other programs write."""
    key, found = parts(own)
    old = subprocess.run(["openssl", "ec"], input=key, capture_output=True, check=True).stdout
    rsa = certificate(folder, "rsa", "-newkey", "rsa:2048", "-nodes")
    for path in (written(folder / "order", b"# the cluster atlas\n" + found + b"\n\n" + key), rsa,
                 written(folder / "old", old + found)):  # fmt: skip
        ours, theirs = established(*connected(), tls.read_key(path))
        assert ours.version() == theirs.version() == "TLSv1.3"
        ours.close()
        theirs.close()


def test_a_key_can_be_used_whatever_a_machine_s_clock_says(own, folder):
    config = "[ca]\ndefault_ca=ca\n[ca]\ndatabase=index\nrand_serial=yes\npolicy=any\nnew_certs_dir=.\n[any]\n"
    for name, content in (("ca", config + "commonName=supplied\n"), ("index", ""), ("old.pem", parts(own)[0].decode())):
        (folder / name).write_text(content)
    for command in (
        "req -new -key old.pem -subj /CN=atlas -out request",
        "ca -batch -selfsign -keyfile old.pem -in request -config ca -md sha256 -startdate 20200101000000Z "
        "-enddate 20210101000000Z -notext -out old.crt",
    ):
        subprocess.run(["openssl", *command.split()], cwd=folder, capture_output=True, check=True)
    path = written(folder / "old.key", parts(own)[0] + (folder / "old.crt").read_bytes())
    ours, theirs = established(*connected(), tls.read_key(path))
    ours.close()
    theirs.close()


# Strangers


def context(kind, certificate_file=None, version=None) -> ssl.SSLContext:
    """TLS as others may speak it: they believe everybody."""
    made = ssl.SSLContext(kind)
    made.check_hostname, made.verify_mode = False, ssl.CERT_NONE
    if version is not None:
        made.minimum_version = made.maximum_version = version
    if certificate_file is not None:
        made.load_cert_chain(certificate_file)
    return made


def answer(key, server: bool, stranger) -> Exception:
    """The error of our side of a handshake. stranger: acts with the socket of the other side, without blocking."""
    ours, theirs = connected()
    theirs.setblocking(False)
    handshake = tls.Handshake(ours, key, server)
    act = stranger(theirs)
    until = time.monotonic() + DEADLINE
    try:
        while time.monotonic() < until:
            next(act, None)
            ready(handshake, handshake.events, 0.01)
            if handshake.step() is not None:
                pytest.fail("a stranger got in")
        pytest.fail("there is no answer")
    except (OSError, ValueError) as error:
        assert handshake.fileno() == -1
        return error
    finally:
        act.close()
        theirs.close()


def speaks(made: ssl.SSLContext, server_side: bool):
    def act(sock):
        with made.wrap_socket(sock, server_side=server_side, do_handshake_on_connect=False) as wrapped:
            while True:
                try:
                    wrapped.do_handshake()
                except (ssl.SSLWantReadError, ssl.SSLWantWriteError, OSError):
                    pass
                yield

    return act


def sends(data: bytes, close: bool = False):
    def act(sock):
        sock.send(data)
        if close:
            sock.shutdown(socket.SHUT_RDWR)
        yield

    return act


@pytest.fixture(scope="module")
def authority(folder):
    """(path of a key file whose certificate may sign others, path of one that it has signed, for the same key)."""
    root = certificate(folder, "root", extensions="basicConstraints=critical,CA:TRUE")
    key, found = parts(root)
    written(folder / "root.crt", found)
    request = ["openssl", "req", "-new", "-key", root, "-subj", "/CN=leaf"]
    sign = ["openssl", "x509", "-req", "-CA", str(folder / "root.crt"), "-CAkey", root, "-set_serial", "7"]
    wanted = subprocess.run(request, capture_output=True, check=True).stdout
    leaf = subprocess.run(sign, input=wanted, capture_output=True, check=True).stdout
    return root, written(folder / "leaf.key", key + leaf)


CLIENT, SERVER = ssl.PROTOCOL_TLS_CLIENT, ssl.PROTOCOL_TLS_SERVER


def test_a_stranger_does_not_get_in(own, other):
    key = tls.read_key(own)
    for stranger in (
        speaks(context(CLIENT), False),
        speaks(context(CLIENT, other), False),
        speaks(context(CLIENT, own, ssl.TLSVersion.TLSv1_2), False),
        sends(b"GET / HTTP/1.1\r\nHost: atlas\r\n\r\n"),
        sends(b"\x05\x01\x00" * 10),
        sends(b"\x16\x03\x01\xff\xff" + bytes(70_000)),
    ):
        assert str(answer(key, True, stranger)).startswith("AV-1909")


def test_a_machine_talks_to_no_stranger(own, other):
    key = tls.read_key(own)
    for stranger in (
        speaks(context(SERVER, other), True),
        speaks(context(SERVER, own, ssl.TLSVersion.TLSv1_2), True),
        sends(b"HTTP/1.1 400 Bad Request\r\n\r\n"),
    ):
        assert str(answer(key, False, stranger)).startswith("AV-1909")


def test_both_sides_notice_that_their_keys_differ(own, other):
    ours, theirs = connected()
    sides = [tls.Handshake(ours, tls.read_key(own), True), tls.Handshake(theirs, tls.read_key(other), False)]
    errors = []
    while sides:
        for side in [*sides]:
            ready(side, side.events, 0.05)
            try:
                assert side.step() is None
            except ValueError as error:
                errors.append(str(error))
                sides.remove(side)
    assert len(errors) == 2 and all(text.startswith("AV-1909") for text in errors)


def test_a_certificate_that_ours_has_signed_is_another_one(authority, own):
    """Of those that verify by TLS's own rules, only the very same certificate is taken."""
    root, leaf = authority
    key = tls.read_key(root)
    refused = answer(key, True, speaks(context(CLIENT, leaf), False))
    assert "its certificate is another one" in str(refused)
    assert "its certificate is another one" in str(answer(key, False, speaks(context(SERVER, leaf), True)))
    for end in established(*connected(), key):
        end.close()


def test_a_new_certificate_of_the_same_key_is_another_one(own, folder):
    key, _ = parts(own)
    written(folder / "same.pem", key)
    renewed = subprocess.run(["openssl", "req", "-x509", "-key", str(folder / "same.pem"), "-subj", "/CN=atlas"],
                             capture_output=True, check=True).stdout  # fmt: skip
    stranger = context(CLIENT, written(folder / "renewed.key", key + renewed))
    assert str(answer(tls.read_key(own), True, speaks(stranger, False))).startswith("AV-1909")


def test_an_end_before_tls_is_established_is_the_network_s(own):
    key = tls.read_key(own)
    for stranger in (sends(b"", close=True), sends(b"\x16\x03\x01", close=True)):
        for server in (True, False):
            error = answer(key, server, stranger)
            assert isinstance(error, OSError) and not isinstance(error, ssl.SSLError)


def test_a_silent_stranger_costs_no_more_than_a_socket(own):
    ours, theirs = connected()
    handshake = tls.Handshake(ours, tls.read_key(own), server=True)
    for _ in range(3):
        assert handshake.events == select.POLLIN and not ready(handshake, timeout=0) and handshake.step() is None
    handshake.close()
    assert theirs.recv(1) == b""
    theirs.close()


def test_no_session_can_be_resumed(own):
    key = tls.read_key(own)
    assert key.context(server=True).num_tickets == 0
    ours, theirs = established(*connected(), key)
    ours.send(b"x")
    assert ready(theirs) and theirs.recv(1) == b"x"
    assert theirs.session is None or not theirs.session.has_ticket
    ours.close()
    theirs.close()


def test_a_socket_before_its_handshake_is_no_link(own):
    ours, theirs = connected()
    plain = tls.read_key(own).context(server=True).wrap_socket(ours, server_side=True, do_handshake_on_connect=False)
    with pytest.raises(ValueError, match="handshake"):
        Link(plain, lambda envelope: None)
    plain.close()
    theirs.close()
