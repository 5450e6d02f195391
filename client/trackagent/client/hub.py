"""The hub of a run, as rank 0 names it: where it is, who it is, and the word that lets a run in.

Its text, "host:port pin token", travels in rank 0's word, stands in the header of every segment, and goes to
the rank's agent. It holds the token, so it belongs in no log, message or environment.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from trackagent.client.errors import ConfigError

MAX_HOST_CHARACTERS = 253  # a DNS name's limit
# A name or an IPv4 address, or an IPv6 address in brackets; the port without leading zeros.
_ADDRESS = re.compile(
    rf"(?:[A-Za-z0-9_](?:[A-Za-z0-9._-]{{0,{MAX_HOST_CHARACTERS - 1}}})|\[[0-9A-Fa-f:.]{{2,45}}\])"
    r":([1-9][0-9]{0,4})"
)
_PIN = re.compile(r"[0-9a-f]{64}")
_TOKEN = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class Hub:
    """The agent that takes a run from all of its nodes. ConfigError, naming the part, where it is none."""

    address: str
    """host:port."""

    pin: str
    """SHA-256 of its public key (SubjectPublicKeyInfo, DER), 64 lower-case hexadecimal digits."""

    token: str = field(repr=False)
    """32 lower-case hexadecimal digits: who knows them may deliver to this run."""

    def __post_init__(self) -> None:
        # What is refused is shown only where it can be no secret that stands in the wrong place.
        found = _ADDRESS.fullmatch(self.address)
        if not found or int(found[1]) > 65535:
            raise ConfigError(
                "the hub's address is not host:port (an IPv6 address in brackets, a port to 65535)"
            )
        if not _PIN.fullmatch(self.pin):
            raise ConfigError("the hub's pin is not 64 lower-case hexadecimal digits")
        if not _TOKEN.fullmatch(self.token):
            raise ConfigError("the hub's token is not 32 lower-case hexadecimal digits")

    @classmethod
    def parse(cls, text: object) -> Hub:
        """What `text()` gave. ConfigError for anything else."""
        parts = text.split(" ") if isinstance(text, str) else []
        if len(parts) != 3:
            raise ConfigError("what names the hub is not `host:port pin token`")
        return cls(*parts)

    def text(self) -> str:
        """Holds the token."""
        return f"{self.address} {self.pin} {self.token}"


def new_token() -> str:
    """Nobody can guess it."""
    import secrets  # which brings hashlib and more, for rank 0 alone

    return secrets.token_hex(16)
