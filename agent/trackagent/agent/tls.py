"""Between agents everything goes over TLS 1.3: what a hub offers, and how another agent makes sure whom it
speaks to.

`channel` first makes one connection of its own, since gRPC would only say that a handshake failed. It looks
at the certificate, waits for the hub's first word, which comes when the hub has taken ours, and then hands
gRPC this very certificate as the only one to trust. Where a pin is known, it alone decides; else the
cluster's CA and the host's name do.
"""

from __future__ import annotations

import datetime
import os
import socket
import ssl
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from trackagent.agent import hubkey
from trackagent.agent.addresses import hub_address, joined
from trackagent.agent.config import AgentConfig
from trackagent.agent.errors import AgentError

CONNECT_TIMEOUT_S = 10.0
# Of a hub's hello, with its certificates and its first word.
MAX_HELLO_BYTES = 256 * 1024
KEEPALIVE_S = 20
PROTOCOL = "h2"
# RFC 9113: the client's preface, and an empty SETTINGS frame, which is the first word of both sides.
GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\x04\0\0\0\0\0"
_FRAME_BYTES, _SETTINGS = 9, 4
_EXPIRED = 10  # X509_V_ERR_CERT_HAS_EXPIRED


class PeerError(AgentError):
    """The hub cannot be used; the message says why, and what to do."""


class Unreachable(PeerError):
    """Nobody answers there, or not in time: it may come back."""


class Untrusted(PeerError):
    """Somebody answers who is not known to be the hub, or who does not take this agent's certificate: nothing
    was sent."""


@dataclass(frozen=True)
class Files:
    """Of a cluster's CA: its certificates, and this agent's own certificate with its key."""

    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None

    @classmethod
    def of(cls, config: AgentConfig) -> Files:
        """Those that the agent was told of."""
        return cls(config.tls_ca, config.tls_cert, config.tls_key)


def server_context(key: hubkey.HubKey, ca: Path | None) -> ssl.SSLContext:
    """What a hub offers. With a CA, who connects may show a certificate by it. BadKey where the files cannot
    be used."""
    context = _context(ssl.PROTOCOL_TLS_SERVER)
    context.num_tickets = 0
    _load(context, key)
    if ca is not None:
        context.load_verify_locations(cadata=hubkey.check_authority(ca).decode())
        context.verify_mode = ssl.CERT_OPTIONAL
    return context


def channel(
    address: str,
    *,
    pin: str = "",
    files: Files = Files(),
    timeout_s: float = CONNECT_TIMEOUT_S,
    options: Sequence[tuple[str, object]] = (),
) -> grpc.Channel:
    """A channel to the hub at HOST:PORT, after making sure that it is the one that `pin` names; without a
    pin, the host that a certificate by the CA names. Takes at most about timeout_s.

    It goes on over breaks of the connection, and refuses a hub with another certificate, even one with the
    same pin: where calls fail as UNAVAILABLE, close it and ask for another. PeerError says why there is none;
    BadKey where this agent's own files cannot be used."""
    own = _own(files)
    certificate = hello(address, pin=pin, files=files, timeout_s=timeout_s)
    pem = certificate.public_bytes(Encoding.PEM)
    credentials = grpc.ssl_channel_credentials(
        pem, None if own is None else own.key, None if own is None else own.certificate
    )
    host, port = hub_address(address)
    return grpc.secure_channel(
        joined(host, port),
        credentials,
        options=[
            # The certificate itself is trusted, whatever it is called.
            ("grpc.ssl_target_name_override", _name_in(certificate)),
            # A hub is in the cluster, and what goes through a proxy is none of this.
            ("grpc.enable_http_proxy", 0),
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.keepalive_time_ms", KEEPALIVE_S * 1000),
            ("grpc.keepalive_timeout_ms", KEEPALIVE_S * 500),
            ("grpc.max_reconnect_backoff_ms", 5_000),
            ("grpc.http2.bdp_probe", 0),  # answers are small: a ping with each would be most of it
            *options,
        ],
    )


def store_channel(config: AgentConfig) -> grpc.Channel:
    """As `channel`, to the hub that everything is delivered to: known by the CA, or else by the token."""
    pin = ""
    if config.tls_ca is None and config.token_file is not None:
        pin = hubkey.pin_of_token(hubkey.read_token(config.token_file))
    return channel(config.store, pin=pin, files=Files.of(config))


def bearer(config: AgentConfig) -> tuple[tuple[str, str], ...]:
    """What tells a hub that this agent has the cluster's token; nothing where it has none. BadKey."""
    if config.token_file is None:
        return ()
    return (("authorization", f"Bearer {hubkey.read_token(config.token_file)}"),)


def hello(
    address: str, *, pin: str = "", files: Files = Files(), timeout_s: float = CONNECT_TIMEOUT_S
) -> x509.Certificate:
    """The certificate of the hub at an address, as for `channel`, once it has taken ours."""
    if not pin and files.ca is None:
        raise Untrusted(
            f"cannot tell whether {address} is the hub: give --token-file, or --tls-ca with the cluster's CA"
        )
    deadline = time.monotonic() + timeout_s
    host, port = hub_address(address)
    context = _context(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = not pin
    # A pin says more than an authority could.
    context.verify_mode = ssl.CERT_NONE if pin else ssl.CERT_REQUIRED
    if not pin and files.ca is not None:
        context.load_verify_locations(cadata=hubkey.check_authority(files.ca).decode())
    if (own := _own(files)) is not None:
        _load(context, own)
    with _connected(host, port, address, deadline) as connection:
        talk = _Talk(connection, context, host, address, deadline)
        der = talk.handshake()
        certificate = x509.load_der_x509_certificate(der)
        if pin:
            _check_pin(certificate, pin, address)
        talk.greet()
    return certificate


def _own(files: Files) -> hubkey.HubKey | None:
    if files.certificate is None or files.key is None:
        return None
    return hubkey.of_files(files.certificate, files.key)


def _context(protocol: int) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols([PROTOCOL])
    return context


def _load(context: ssl.SSLContext, key: hubkey.HubKey) -> None:
    """Python takes keys from files only: from one in memory, which nobody else can open."""
    descriptor = os.memfd_create("key", os.MFD_CLOEXEC)
    with open(descriptor, "wb") as file:
        file.write(key.key + b"\n" + key.certificate)
        file.flush()
        try:
            context.load_cert_chain(f"/proc/self/fd/{descriptor}")
        except (ssl.SSLError, OSError) as error:
            raise hubkey.BadKey(
                f"cannot use the key and its certificate for TLS: {error}"
            ) from None


def _connected(host: str, port: int, address: str, deadline: float) -> socket.socket:
    try:
        return socket.create_connection((host, port), max(0.001, deadline - time.monotonic()))
    except ConnectionRefusedError:
        raise Unreachable(
            f"cannot reach the hub at {address}: nobody listens there; is its agent running with --listen?"
        ) from None
    except TimeoutError:
        raise Unreachable(
            f"cannot reach the hub at {address}: no answer; is a firewall between the nodes?"
        ) from None
    except OSError as error:
        raise Unreachable(f"cannot reach the hub at {address}: {error.strerror or error}") from None


def _check_pin(certificate: x509.Certificate, pin: str, address: str) -> None:
    found = hubkey.pin_of(certificate)
    if found != pin:
        raise Untrusted(
            f"{address} is not the hub that was named: its key is {found[:16]}…, expected {pin[:16]}…; "
            "another agent has its address now, it has lost its key, or the tokens of both sides differ"
        )
    now = datetime.datetime.now(datetime.timezone.utc)
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now > end:
        raise Untrusted(
            f"the certificate of the hub at {address} expired on {end:%Y-%m-%d %H:%M} UTC: renew it, or "
            "restart the agent there where it made it for itself"
        )
    if now < begin:
        raise Untrusted(
            f"the certificate of the hub at {address} is valid from {begin:%Y-%m-%d %H:%M} UTC on: set the "
            "clocks of both nodes"
        )


class _Talk:
    """A handshake with a deadline and a bound on what is read, which a socket of ssl would not give."""

    def __init__(
        self,
        connection: socket.socket,
        context: ssl.SSLContext,
        host: str,
        address: str,
        deadline: float,
    ) -> None:
        self._socket, self._address, self._deadline = connection, address, deadline
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._in, self._out, server_hostname=host)
        self._received = 0

    def handshake(self) -> bytes:
        """The other side's certificate, DER."""
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                self._exchange()
            except ssl.SSLError as error:
                self._flush(quietly=True)  # the alert, which says why
                raise self._distrust(error) from None
            else:
                break
        self._flush()
        if self._tls.selected_alpn_protocol() != PROTOCOL:
            raise Untrusted(f"{self._address} is no hub: it speaks another protocol over TLS")
        return self._tls.getpeercert(binary_form=True) or b""

    def greet(self) -> None:
        """Waits for the server's first word, which in TLS 1.3 is the first to tell that it has taken our
        certificate, and then says its own, which tells it that it is trusted."""
        word = b""
        while len(word) < _FRAME_BYTES:
            try:
                more = self._tls.read(_FRAME_BYTES - len(word))
            except ssl.SSLWantReadError:
                self._exchange()
            except ssl.SSLError as error:
                raise self._distrust(error) from None
            else:
                if not more:
                    raise Unreachable(f"the hub at {self._address} closed the connection")
                word += more
        if word[3] != _SETTINGS:
            raise Untrusted(f"{self._address} is no hub: it does not answer as one")
        self._tls.write(GREETING)
        self._flush()

    def _exchange(self) -> None:
        """Sends what is to be sent, and receives more."""
        self._flush()
        try:
            self._socket.settimeout(self._left())
            data = self._socket.recv(16 * 1024)
        except TimeoutError:
            raise self._silent() from None
        except OSError as error:
            raise self._broken(error) from None
        self._received += len(data)
        if self._received > MAX_HELLO_BYTES:
            raise Untrusted(f"{self._address} is no hub: it sends without end")
        if data:
            self._in.write(data)
        elif self._in.eof:
            raise Unreachable(f"the hub at {self._address} closed the connection")
        else:
            self._in.write_eof()

    def _flush(self, *, quietly: bool = False) -> None:
        try:
            self._socket.settimeout(self._left())
            self._socket.sendall(self._out.read())
        except TimeoutError:
            raise self._silent() from None
        except OSError as error:
            if not quietly:
                raise self._broken(error) from None

    def _left(self) -> float:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise self._silent()
        return left

    def _silent(self) -> PeerError:
        return Unreachable(
            f"the hub at {self._address} does not answer in time; it may be overloaded"
        )

    def _broken(self, error: OSError) -> PeerError:
        return Unreachable(f"the hub at {self._address} closed the connection: {error.strerror}")

    def _distrust(self, error: ssl.SSLError) -> PeerError:
        if isinstance(error, ssl.SSLEOFError):
            return Unreachable(f"the hub at {self._address} closed the connection")
        if isinstance(error, ssl.SSLCertVerificationError):
            if error.verify_code == _EXPIRED:
                return Untrusted(
                    f"the certificate of the hub at {self._address} has expired: renew it there, and restart "
                    "its agent"
                )
            what = error.verify_message or "it cannot be verified"
            return Untrusted(
                f"the certificate at {self._address} is not the hub's: {what}; check the CA in --tls-ca, and "
                "that the certificate there names this host"
            )
        reason = error.reason or str(error)
        if reason in PLAINTEXT:
            return Untrusted(f"{self._address} is no hub: it speaks no TLS; check the port")
        if "PROTOCOL" in reason:
            return Untrusted(f"no TLS 1.3 with {self._address} ({alert(reason)}): is a hub there?")
        if "ALERT" in reason:
            return Untrusted(
                f"the hub at {self._address} refuses this agent's certificate "
                f"({alert(reason)}): check --tls-cert against the CA there"
            )
        return Untrusted(f"no TLS with {self._address}: {alert(reason)}")


# What OpenSSL makes of bytes that are no TLS.
PLAINTEXT = frozenset(
    {
        "WRONG_VERSION_NUMBER",
        "HTTP_REQUEST",
        "HTTPS_PROXY_REQUEST",
        "PACKET_LENGTH_TOO_LONG",
        "UNEXPECTED_MESSAGE",
        "BAD_RECORD_TYPE",
        "RECORD_LAYER_FAILURE",
        "INVALID_CCS_MESSAGE",
    }
)


def alert(reason: str) -> str:
    """A reason of OpenSSL's in small letters: "unknown ca"."""
    for prefix in ("TLSV13_ALERT_", "TLSV1_ALERT_", "SSLV3_ALERT_"):
        reason = reason.removeprefix(prefix)
    return reason.replace("_", " ").lower()


def _name_in(certificate: x509.Certificate) -> str:
    """A name that the certificate is for."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        common = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        return str(common[0].value) if common else hubkey.NAME
    if found := names.get_values_for_type(x509.DNSName):
        return found[0].replace("*", "any", 1)
    addresses = names.get_values_for_type(x509.IPAddress)
    return str(addresses[0]) if addresses else hubkey.NAME
