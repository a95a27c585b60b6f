"""Addresses of web servers that may be connected to.

A manifest may come from somebody else, and so may a redirect. What they name must not reach services that only this
machine or its network reaches, such as the metadata service of a cloud. An address is judged when it is connected to,
so that names which resolve to it, and redirects, count too. Without :func:`restrict_addresses` all are allowed.
"""

from __future__ import annotations

import ipaddress
import json
import os
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from vidshard.pipeline.storage.errors import StorageError
from vidshard.schemas.text import readable

HOSTS_VARIABLE = "VIDSHARD_PRIVATE_HOSTS"
"""Environment variable that holds the restriction, so that child processes inherit it."""


def restrict_addresses(private_hosts: Sequence[str] | None) -> None:
    """Refuse private addresses from now on, in this process and those that it starts.

    Args:
        private_hosts: names or addresses of hosts that may have private addresses; None lifts the restriction.
    """
    if private_hosts is None:
        os.environ.pop(HOSTS_VARIABLE, None)
    else:
        os.environ[HOSTS_VARIABLE] = json.dumps(sorted({host.lower() for host in private_hosts}))


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public internet: not loopback, private, link-local, shared or reserved."""
    try:
        ip = ipaddress.ip_address(address.split("%", 1)[0])
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        inner = [ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ())]
        if ip in _NAT64:
            inner.append(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF))
        embedded = [one for one in inner if one is not None]
        if embedded:
            return all(is_public(str(one)) for one in embedded)
    return ip.is_global and not ip.is_multicast and not any(ip in network for network in _NOT_PUBLIC)


_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_NOT_PUBLIC = tuple(
    ipaddress.ip_network(network)
    for network in (
        "fec0::/10", "::/96", "::ffff:0:0:0/96", "64:ff9b:1::/48", "100::/64", "3fff::/20", "5f00::/16",
        "192.0.0.0/24", "192.88.99.0/24",
    )
)  # fmt: skip
"""Networks that versions of Python take for global: site-local ones, those in which addresses of IPv4 are translated or
embedded, and reserved ones (IANA's registries of special-purpose addresses)."""


@lru_cache(maxsize=16)
def _private_hosts(text: str) -> frozenset[str]:
    return frozenset(json.loads(text))


def check_address(host: str, addresses: Sequence[str]) -> None:
    """Refuse a host whose addresses are private, unless it was allowed by name.

    Raises:
        StorageError: it is refused.
    """
    text = os.environ.get(HOSTS_VARIABLE)
    if text is None or host.lower().strip("[]") in _private_hosts(text):
        return
    private = [address for address in addresses if not is_public(address)]
    if private:
        raise StorageError(
            f"{readable(host, 200)} is refused: its address {private[0]} is not public, and only a manifest or a "
            "redirect names it; --allow-private allows such addresses"
        )


_MOST_INFORMATIONAL = 100
"""Informational answers (status 1xx) in front of an answer. Without end, they would hold the loop of all requests."""


async def guarded_client(**options: Any) -> Any:
    """Make an aiohttp session that checks each address before it connects, those of redirects included.

    It also ends informational answers without end.
    """
    import aiohttp

    class Response(aiohttp.ClientResponse):
        async def start(self, connection: Any) -> Any:
            protocol, num_read = connection.protocol, 0

            async def limited() -> Any:
                nonlocal num_read
                num_read += 1
                if num_read > _MOST_INFORMATIONAL:
                    raise OSError(f"the server sends more than {_MOST_INFORMATIONAL} informational answers")
                return await type(protocol).read(protocol)

            protocol.read = limited
            try:
                return await super().start(connection)
            finally:
                if vars(protocol).get("read") is limited:  # it may serve another request by now
                    del protocol.read

    class Connector(aiohttp.TCPConnector):
        async def _resolve_host(self, host: str, port: int, traces: Any = None) -> Any:
            found = await super()._resolve_host(host, port, traces)
            check_address(host, [entry["host"] for entry in found])
            return found

    return aiohttp.ClientSession(**{"connector": Connector(), "response_class": Response, **options})
