"""Where the service listens, by which names it may be called, and the token that it wants: all of it before it starts.

A name is resolved once. What is asked whether it is loopback are the very addresses that `open_sockets` binds, so no
answer of a name server in between can open to a network what was held to be private.
"""

from __future__ import annotations

import ipaddress
import os
import re
import socket
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import UsageError, shorten

TOKEN_VARIABLE = "ASYNC_RECOVERY_TOKEN"
LEAST_TOKEN_CHARACTERS = 16
MOST_TOKEN_CHARACTERS = 1024
BACKLOG = 1024  # connections that wait to be accepted

LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "[::1]")
EVERY_ADDRESS = ("0.0.0.0", "[::]")

_PORT_ALONE = re.compile(r"[0-9]{1,5}")
_ADDRESS = re.compile(r"(?:\[(?P<six>[0-9A-Fa-f:.]+)\]|(?P<name>[A-Za-z0-9._-]+)):(?P<port>[0-9]{1,5})")
_NAME = re.compile(r"[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)*")
_TOKEN = re.compile(r"[!-~]*")  # visible ASCII: what a header can carry without doubt


@dataclass(frozen=True)
class Address:
    """Where the service listens.

    :ivar host: as it was given, an IPv6 address without its brackets.
    :ivar port: 0 for a free one.
    :ivar addresses: what `host` stands for: IP addresses, at least one.
    """

    host: str
    port: int
    addresses: tuple[str, ...]

    def __str__(self) -> str:
        return f"{_bracketed(self.host)}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """Whether no other machine can reach it: all of its addresses are this machine's own."""
        return all(ipaddress.ip_address(address).is_loopback for address in self.addresses)

    @property
    def is_every(self) -> bool:
        """Whether it is every address of the machine."""
        return any(ipaddress.ip_address(address).is_unspecified for address in self.addresses)


def parse_listen(text: str) -> Address:
    """The address that `text` names: ``HOST:PORT``, ``[IPv6]:PORT``, or a port alone, which is one of 127.0.0.1.

    :raises UsageError: if it is none of these, or its name can not be resolved.
    """
    if _PORT_ALONE.fullmatch(text):
        text = f"127.0.0.1:{text}"
    found = _ADDRESS.fullmatch(text)
    if found is None:
        raise UsageError(
            f"--listen {shorten(text)} is no address: give HOST:PORT, as 127.0.0.1:8080 or [::1]:8080, or a port alone"
        )
    port = int(found["port"])
    if port > 65535:
        raise UsageError(f"--listen {shorten(text)}: there is no port {port}; give one from 0 (any free one) to 65535")
    host = (found["six"] or found["name"]).lower()
    try:
        if found["six"]:
            ipaddress.IPv6Address(host)
        resolved = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, ValueError) as error:  # a name that can not be encoded is a ValueError
        raise UsageError(
            f"--listen {shorten(text)}: {shorten(host)} can not be resolved ({error}); give an address of this machine"
        ) from None
    return Address(host, port, tuple(dict.fromkeys(str(address[0]) for *_, address in resolved)))


def open_sockets(address: Address) -> list[socket.socket]:
    """Listen: one socket for each of its addresses, all with the same port.

    :raises UsageError: if that can not be done, because another process listens there, for one.
    """
    opened: list[socket.socket] = []
    port = address.port
    try:
        for host in address.addresses:
            opened.append(_listening(host, port))
            port = opened[0].getsockname()[1]
    except OSError as error:
        for one in opened:
            one.close()
        raise UsageError(
            f"--listen {address}: can not listen there ({os.strerror(error.errno or 0)}); give another port or address"
        ) from None
    return opened


def _listening(host: str, port: int) -> socket.socket:
    # With the protocol named: only then asyncio sets TCP_NODELAY, without which many an answer takes 40 ms more.
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    one = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # not one that listens: what is left of closed ones
        if family == socket.AF_INET6:
            one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        one.bind((host, port))
        one.listen(BACKLOG)
    except OSError:
        one.close()
        raise
    return one


def allowed_hosts(address: Address, more: Iterable[str] = ()) -> frozenset[str]:
    """The hosts by which requests may call a service that listens there: what a `Guard` is given.

    Names of loopback for a loopback address; for one that is every address of the machine also each of those and the
    machine's name. No name that only a name server knows: that is what DNS rebinding would use.

    :param more: names or IP addresses besides, without a port (``--allow-host``).
    :raises UsageError: if one of `more` is neither.
    """
    hosts = {address.host if ":" not in address.host else f"[{address.host}]", *map(_bracketed, address.addresses)}
    if address.is_loopback or address.is_every:
        hosts.update(LOOPBACK_HOSTS)
    if address.is_every:
        hosts.update((*EVERY_ADDRESS, socket.gethostname().lower()))
    return frozenset(hosts.union(map(_allowed_host, more)))


def read_token(path: str | os.PathLike[str] | None, environ: Mapping[str, str]) -> str | None:
    """The token that requests must carry; None if there is none.

    :param path: the file that holds it, with or without one line end; None: the variable ASYNC_RECOVERY_TOKEN, if set.
    :raises UsageError: if the file can not be read, others may read or write it, or the token is none: 16 to 1024
        visible ASCII characters.
    """
    if path is None:
        given = environ.get(TOKEN_VARIABLE)
        return None if given is None else _checked(given, f"the variable {TOKEN_VARIABLE}")
    where = f"--token-file {shorten(os.fspath(path))}"
    try:
        with Path(path).open("rb") as file:
            mode, content = os.fstat(file.fileno()).st_mode, file.read(MOST_TOKEN_CHARACTERS + 3)
    except (OSError, ValueError) as error:  # a null byte in the path is a ValueError
        raise UsageError(f"{where}: can not be read ({error}); give a file that holds the token alone") from None
    if mode & (stat.S_IROTH | stat.S_IWOTH):
        raise UsageError(f"{where}: others may read or write it; chmod 600 it, and take a new token")
    line = content.removesuffix(b"\n").removesuffix(b"\r") if content.endswith(b"\n") else content
    return _checked(line.decode("latin-1"), where)


def require_token(address: Address, token: str | None) -> None:
    """:raises UsageError: if other machines can reach `address`, and there is no token: the service must not start."""
    if token is None and not address.is_loopback:
        raise UsageError(
            f"--listen {address}: other machines can reach that, and there is no token; give --token-file FILE or set "
            f"{TOKEN_VARIABLE}, or listen on 127.0.0.1"
        )


def _checked(token: str, where: str) -> str:
    """:raises UsageError: if that is no token. The message does not show it."""
    cure = "make one: python3 -c 'import secrets; print(secrets.token_urlsafe())'"
    if not token:
        raise UsageError(f"{where} is empty: it must hold a token; {cure}")
    if not _TOKEN.fullmatch(token):
        raise UsageError(f"{where}: a token is one line of visible ASCII characters without blanks; {cure}")
    if not LEAST_TOKEN_CHARACTERS <= len(token) <= MOST_TOKEN_CHARACTERS:
        found = "fewer" if len(token) < LEAST_TOKEN_CHARACTERS else "more"
        wanted = f"{LEAST_TOKEN_CHARACTERS} to {MOST_TOKEN_CHARACTERS} characters"
        raise UsageError(f"{where}: a token has {wanted}, and this one has {found}; {cure}")
    return token


def _allowed_host(given: str) -> str:
    host = given.lower().removesuffix(".")
    if _NAME.fullmatch(host):
        return host
    try:
        return _bracketed(str(ipaddress.IPv6Address(host.removeprefix("[").removesuffix("]"))))
    except ValueError:
        raise UsageError(
            f"--allow-host {shorten(given)} is no host: give a name or an IP address, without http:// and port"
        ) from None


def _bracketed(host: str) -> str:
    """As it stands in a URL."""
    return f"[{host}]" if ":" in host else host
