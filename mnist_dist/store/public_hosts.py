"""Connections to public addresses only: a URL in somebody's list must not reach what lies behind the firewall (SSRF).

Owns: which addresses are public, and connections to nothing else. Does not own: requests (`web_requests`).

A name is resolved once for each connection, and the connection goes to the very address that was checked, so that a
name cannot change its address in between (DNS rebinding). Redirects open connections, and so are checked as well. The
resolver turns odd spellings, such as `http://2130706433/` or `http://0x7f.1/`, into addresses before they are checked.
"""

import ipaddress
import socket

from urllib3 import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import ConnectTimeoutError, NameResolutionError, NewConnectionError
from urllib3.util.connection import create_connection

_MAX_ADDRESSES = 4  # Of a name, so many are tried; each may take the whole timeout.
_TRANSLATED = ipaddress.IPv6Network("64:ff9b::/96")  # NAT64 (RFC 6052): ends in the IPv4 address that is reached.


class PrivateAddress(Exception):
    """A host has an address that is not public.

    Args:
        address: the address.
    """

    def __init__(self, address: str) -> None:
        super().__init__(address)
        self.address = address


def is_public(address: str) -> bool:
    """Whether an IPv4 or IPv6 address is one of the public internet: neither private nor loopback, link-local,
    multicast, reserved or unspecified, and neither is an IPv4 address inside of it."""
    found = ipaddress.ip_address(address)
    if isinstance(found, ipaddress.IPv6Address):
        inner = found.ipv4_mapped or found.sixtofour
        if found in _TRANSLATED:
            inner = ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
    return found.is_global and not (found.is_multicast or found.is_reserved)


def public_addresses(host: str, port: int) -> list[str]:
    """The addresses of a host name, or of an address in any spelling.

    Raises:
        PrivateAddress: one of them is not public.
        socket.gaierror: the name cannot be resolved.
    """
    found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
    addresses = list(dict.fromkeys(str(address[0]) for *_, address in found))
    for address in addresses:
        if not is_public(address):
            raise PrivateAddress(address)
    return addresses


def _connect(connection: HTTPConnection) -> socket.socket:
    try:
        addresses = public_addresses(connection.host, connection.port)
    except socket.gaierror as err:
        raise NameResolutionError(connection.host, connection, err) from err
    failure = OSError("the name has no address")
    for address in addresses[:_MAX_ADDRESSES]:
        try:
            return create_connection(
                (address, connection.port),
                connection.timeout,
                source_address=connection.source_address,
                socket_options=connection.socket_options,
            )
        except OSError as err:
            failure = err
    kind = ConnectTimeoutError if isinstance(failure, TimeoutError) else NewConnectionError
    raise kind(connection, str(failure)) from failure


class _PublicHTTPConnection(HTTPConnection):
    def _new_conn(self) -> socket.socket:
        return _connect(self)


class _PublicHTTPSConnection(HTTPSConnection):
    def _new_conn(self) -> socket.socket:
        return _connect(self)


class _PublicHTTPPool(HTTPConnectionPool):
    ConnectionCls = _PublicHTTPConnection


class _PublicHTTPSPool(HTTPSConnectionPool):
    ConnectionCls = _PublicHTTPSConnection


POOLS: dict[str, type[HTTPConnectionPool]] = {"http": _PublicHTTPPool, "https": _PublicHTTPSPool}
"""For `PoolManager.pool_classes_by_scheme`."""
