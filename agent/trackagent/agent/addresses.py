"""HOST:PORT as people write it, for agents that listen beyond their node and for those that look for one."""

from __future__ import annotations

import ipaddress
import re

HUB_PORT = 7717
_NAME = re.compile(r"(?=.{1,253}\Z)[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?\.?")


def hub_address(
    text: str, *, anywhere: bool = False, default_port: int = HUB_PORT
) -> tuple[str, int]:
    """Host and port of HOST, HOST:PORT or [IPv6]:PORT. anywhere: the host may be left out, ":7717", and is ""
    then. ValueError says what is wrong."""
    example = "such as 10.0.0.1:7717" + (", or :7717 for all addresses of this node" * anywhere)
    host, colon, port = text.rpartition(":")
    if text.endswith("]") or not colon:
        host, port = text, str(default_port)
    if not (port.isascii() and port.isdigit() and int(port) < 1 << 16):
        raise ValueError(f"give HOST:PORT, {example}")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
        try:
            return str(ipaddress.IPv6Address(host)), int(port)
        except ValueError:
            raise ValueError(f"give an IPv6 address in the brackets, {example}") from None
    if ":" in host:
        raise ValueError("put an IPv6 address into brackets, such as [fd00::1]:7717")
    if host.isdigit() or (not host and not anywhere) or (host and not _NAME.fullmatch(host)):
        raise ValueError(f"give a host name or IP address before the port, {example}")
    return host, int(port)


def joined(host: str, port: int) -> str:
    """HOST:PORT, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_wildcard(host: str) -> bool:
    """Whether it stands for all addresses of this node, so that nobody else can use it."""
    return host in ("", "0.0.0.0", "::")
