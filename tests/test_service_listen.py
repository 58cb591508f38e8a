"""Where the service listens, by which names it may be called, and the token: what is refused before it starts."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from async_recovery.errors import UsageError
from async_recovery.service.listen import (
    TOKEN_VARIABLE,
    Address,
    allowed_hosts,
    open_sockets,
    parse_listen,
    read_token,
    require_token,
)

TOKEN = "a-token-of-more-than-sixteen"
LOOPBACK = {"localhost", "127.0.0.1", "[::1]"}


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """Names and what they resolve to; any other name can not be resolved, and IP addresses are themselves."""
    known = {"localhost": ["::1", "127.0.0.1"]}

    def resolve(host: str, port: int, **_: object) -> list[object]:
        if host not in known and not host.replace(".", "").isdigit() and ":" not in host:
            raise socket.gaierror("Name or service not known")
        return [(0, 0, 0, "", (address, port)) for address in known.get(host, [host])]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    return known


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("127.0.0.1:8080", Address("127.0.0.1", 8080, ("127.0.0.1",))),
        ("[::1]:8080", Address("::1", 8080, ("::1",))),
        ("0.0.0.0:80", Address("0.0.0.0", 80, ("0.0.0.0",))),
        ("[::]:0", Address("::", 0, ("::",))),
        ("LocalHost:65535", Address("localhost", 65535, ("::1", "127.0.0.1"))),
        ("8080", Address("127.0.0.1", 8080, ("127.0.0.1",))),
    ],
)
def test_addresses(names: dict[str, list[str]], text: str, expected: Address) -> None:
    """Host and port, IPv6 in brackets, a name, or a port alone, which is one of loopback."""
    assert parse_listen(text) == expected
    assert parse_listen(str(expected)) == expected


@pytest.mark.parametrize(
    "text",
    [
        *("", ":", ":8080", "127.0.0.1", "127.0.0.1:", "127.0.0.1:x", "127.0.0.1:-1", "127.0.0.1:65536", "99999"),
        *("::1:8080", "[::1]", "[::1", "[x]:80", "[127.0.0.1]:80", "[::1%eth0]:80", "http://127.0.0.1:80", "a b:80"),
        *("127.0.0.1:80 ", "127.0.0.1:80\n", "127.0.0.1:٨٠", "٨٠", "nowhere:80", "a/b:80", "*:80", "." * 70 + ":80"),
        "x\0:80",
    ],
)
def test_what_is_no_address_is_refused(names: dict[str, list[str]], text: str) -> None:
    """One line that says what was found and what to give."""
    with pytest.raises(UsageError, match=r"^--listen .*give") as caught:
        parse_listen(text)
    assert str(caught.value).isprintable()


def test_a_real_name_that_can_not_be_resolved() -> None:
    """Neither an empty label nor one that is too long goes past as anything but the mistake that it is."""
    for name in ("a..b", "a" * 64, "-" * 300):
        with pytest.raises(UsageError, match="can not be resolved"):
            parse_listen(f"{name}:80")


@pytest.mark.parametrize(
    ("resolved", "expected"),
    [
        (["127.0.0.1"], True),
        (["127.8.9.10", "::1"], True),
        (["127.0.0.1", "10.0.0.1"], False),
        (["0.0.0.0"], False),
        (["::"], False),
        (["192.168.1.2"], False),
    ],
)
def test_loopback_is_what_every_address_of_a_name_is(
    names: dict[str, list[str]], resolved: list[str], expected: bool
) -> None:
    """One address that others can reach is enough to need a token."""
    names["here"] = resolved
    address = parse_listen("here:80")
    assert address.is_loopback == expected
    require_token(address, TOKEN)
    if expected:
        require_token(address, None)
    else:
        with pytest.raises(UsageError, match=r"--listen here:80: other machines can reach that.*--token-file"):
            require_token(address, None)


def test_what_was_judged_is_what_is_bound(names: dict[str, list[str]]) -> None:
    """A name that means something else a moment later changes nothing."""
    names["here"] = ["127.0.0.1"]
    address = parse_listen("here:0")
    names["here"] = ["0.0.0.0"]
    for one in open_sockets(address):
        with one:
            assert one.getsockname()[0] == "127.0.0.1"


def test_a_port_that_is_taken() -> None:
    """One line says so; nothing stays open."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=rf"--listen 127.0.0.1:{port}: can not listen there \(Address already in"):
            open_sockets(Address("127.0.0.1", port, ("127.0.0.2", "127.0.0.1")))
        with socket.create_server(("127.0.0.2", port)):
            pass


def test_hosts_follow_from_the_address(names: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Loopback has its names, every address also the machine's, any other just itself; and those that are added."""
    monkeypatch.setattr(socket, "gethostname", lambda: "Box")
    names["here.lan"] = ["10.0.0.1", "fd00::1"]
    assert allowed_hosts(parse_listen("127.0.0.1:1")) == LOOPBACK
    assert allowed_hosts(parse_listen("127.0.0.5:1")) == LOOPBACK | {"127.0.0.5"}
    assert allowed_hosts(parse_listen("0.0.0.0:1")) == LOOPBACK | {"0.0.0.0", "[::]", "box"}
    assert allowed_hosts(parse_listen("Here.lan:1")) == {"here.lan", "10.0.0.1", "[fd00::1]"}
    assert allowed_hosts(parse_listen("10.0.0.1:1"), ["My.Name.", "10.0.0.2", "FD00:0::2", "[fd00::3]"]) == {
        *("10.0.0.1", "my.name", "10.0.0.2", "[fd00::2]", "[fd00::3]")
    }


@pytest.mark.parametrize("name", ["", "http://a", "a:80", "a/b", "*", "a b", ".", "a..b", "[a]", "é"])
def test_what_is_no_host_is_refused(name: str) -> None:
    """A name or an IP address, and nothing else."""
    with pytest.raises(UsageError, match=r"--allow-host .*give a name"):
        allowed_hosts(Address("127.0.0.1", 1, ("127.0.0.1",)), [name])


@pytest.mark.parametrize("content", [TOKEN, f"{TOKEN}\n", f"{TOKEN}\r\n"])
def test_a_token_from_a_file(tmp_path: Path, content: str) -> None:
    """Without its line end; before the variable."""
    file = tmp_path / "token"
    file.write_bytes(content.encode())
    file.chmod(0o640)
    assert read_token(file, {TOKEN_VARIABLE: "another-token-of-sixteen"}) == TOKEN


def test_a_token_from_the_variable() -> None:
    """The same rules, but for the line end."""
    assert read_token(None, {}) is None
    assert read_token(None, {TOKEN_VARIABLE: TOKEN}) == TOKEN
    assert read_token(None, {TOKEN_VARIABLE: "x" * 16}) == "x" * 16
    for bad in ("", "x" * 15, "x" * 1025, f"{TOKEN}\n", f"{TOKEN} x", "é" * 16):
        with pytest.raises(UsageError, match=f"^the variable {TOKEN_VARIABLE}"):
            read_token(None, {TOKEN_VARIABLE: bad})


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "is empty"),
        (b"\n", "is empty"),
        (b"secret", "16 to 1024 characters, and this one has fewer"),
        (b"secret" * 1000, "16 to 1024 characters, and this one has more"),
        (b"secret-secret-secret\n\n", "one line of visible ASCII"),
        (b"secret-secret secret", "one line of visible ASCII"),
        (b"secret-secret-secret\r", "one line of visible ASCII"),
        (b"secret-secret-\0-secret", "one line of visible ASCII"),
        ("secret-secret-sécret".encode(), "one line of visible ASCII"),
    ],
)
def test_what_is_no_token_is_refused(tmp_path: Path, content: bytes, why: str) -> None:
    """The message says why, and nothing of the content."""
    file = tmp_path / "token"
    file.write_bytes(content)
    file.chmod(0o600)
    with pytest.raises(UsageError, match=why) as caught:
        read_token(file, {})
    assert "secret-" not in str(caught.value)
    assert "secretsecret" not in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("mode", [0o604, 0o602, 0o644])
def test_a_token_that_others_may_read_or_write_is_refused(tmp_path: Path, mode: int) -> None:
    """It is no secret any more, or not its owner's choice."""
    file = tmp_path / "token"
    file.write_text(TOKEN)
    file.chmod(mode)
    with pytest.raises(UsageError, match="others may read or write it; chmod 600"):
        read_token(file, {})


def test_a_file_that_can_not_be_read(tmp_path: Path) -> None:
    """Missing, a folder, or no path at all."""
    for path in (tmp_path / "missing", tmp_path, "a\0b", ""):
        with pytest.raises(UsageError, match=r"--token-file .*can not be read"):
            read_token(path, {TOKEN_VARIABLE: TOKEN})
