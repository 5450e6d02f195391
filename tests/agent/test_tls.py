"""Making sure of a hub: each way in which it cannot be trusted has words of its own, and nothing was said."""

from __future__ import annotations

import contextlib
import datetime
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from tests.agent.certificates import DAY, Authority, Issued, now
from tests.fakes import DEADLINE_S
from trackagent.agent import hubkey, tls
from trackagent.agent.hubkey import HubKey
from trackagent.agent.tls import Files, Unreachable, Untrusted

Answer = Callable[[socket.socket], None]
SETTINGS = b"\0\0\0\x04\0\0\0\0\0"


@contextlib.contextmanager
def answering(answer: Answer) -> Iterator[str]:
    """The address of a server that does this with each connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection, contextlib.suppress(OSError):
                    connection.settimeout(DEADLINE_S)
                    answer(connection)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(DEADLINE_S)


class Offering:
    """A server with this key, and its CA's clients; remembers what it was told."""

    def __init__(self, key: HubKey, *, ca: Path | None = None, word: bytes = SETTINGS) -> None:
        self._context = tls.server_context(key, ca)
        self._word = word
        self.heard: list[bytes] = []

    def __call__(self, connection: socket.socket) -> None:
        with self._context.wrap_socket(connection, server_side=True) as secured:
            secured.sendall(self._word)
            while data := secured.recv(1000):
                self.heard.append(data)


def why_not(address: str, **trust: object) -> str:
    """Why the one at this address is not trusted."""
    with pytest.raises((Untrusted, Unreachable)) as found:
        tls.hello(address, timeout_s=DEADLINE_S, **trust)  # type: ignore[arg-type]
    return str(found.value)


def own(folder: Path) -> HubKey:
    return hubkey.own(folder / "hub", folder / "quarantine")


def of(issued: Issued) -> HubKey:
    """What an agent would refuse to start with, too."""
    return HubKey(issued.certificate.read_bytes(), issued.key.read_bytes())


def aged(begin: datetime.timedelta) -> HubKey:
    """With a certificate of its own that is so old."""
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = hubkey.certificate_of(key, now() - begin)
    return HubKey(certificate.public_bytes(Encoding.PEM), hubkey._pem(key))


# --- by its pin


def test_a_hub_is_known_by_its_pin(tmp_path: Path) -> None:
    key = own(tmp_path)
    with answering(Offering(key)) as address:
        assert hubkey.pin_of(tls.hello(address, pin=key.pin)) == key.pin


def test_a_hub_with_another_key_is_refused_and_hears_nothing(tmp_path: Path) -> None:
    key, other = own(tmp_path / "a"), own(tmp_path / "b")
    offering = Offering(key)
    with answering(offering) as address:
        assert why_not(address, pin=other.pin) == (
            f"{address} is not the hub that was named: its key is {key.pin[:16]}…, expected "
            f"{other.pin[:16]}…; another agent has its address now, it has lost its key, or the tokens of "
            "both sides differ"
        )
    assert offering.heard == []


def test_a_certificate_that_has_expired_is_refused() -> None:
    key = aged(1000 * DAY)
    offering = Offering(key)
    with answering(offering) as address:
        said = why_not(address, pin=key.pin)
    assert said.startswith(f"the certificate of the hub at {address} expired on 20")
    assert "restart the agent there" in said
    assert offering.heard == []


def test_a_certificate_of_the_future_is_refused() -> None:
    key = aged(-3 * DAY)
    with answering(Offering(key)) as address:
        assert "set the clocks of both nodes" in why_not(address, pin=key.pin)


def test_what_names_no_hub_is_refused_before_it_connects() -> None:
    assert why_not("127.0.0.1:1") == (
        "cannot tell whether 127.0.0.1:1 is the hub: give --token-file, or --tls-ca with the cluster's CA"
    )


# --- by the cluster's CA


@pytest.fixture
def ca(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "ca")


def test_a_hub_is_known_by_the_clusters_ca(ca: Authority) -> None:
    with answering(Offering(of(ca.issue("hub", "127.0.0.1")))) as address:
        tls.hello(address, files=Files(ca.path))


def test_a_certificate_of_another_ca_is_refused(ca: Authority, tmp_path: Path) -> None:
    other = Authority(tmp_path / "other", "another cluster")
    with answering(Offering(of(other.issue("hub", "127.0.0.1")))) as address:
        said = why_not(address, files=Files(ca.path))
    assert said.startswith(
        f"the certificate at {address} is not the hub's: unable to get local issuer"
    )
    assert "check the CA in --tls-ca" in said


def test_a_certificate_of_another_host_is_refused(ca: Authority) -> None:
    with answering(Offering(of(ca.issue("hub", "hub.example.org", "10.0.0.1")))) as address:
        assert "IP address mismatch" in why_not(address, files=Files(ca.path))


def test_a_certificate_by_the_ca_that_has_expired_is_refused(ca: Authority) -> None:
    key = of(ca.issue("hub", "127.0.0.1", end=now() - DAY / 2))
    with answering(Offering(key)) as address:
        assert why_not(address, files=Files(ca.path)) == (
            f"the certificate of the hub at {address} has expired: renew it there, and restart its agent"
        )
        assert "expired on" in why_not(address, pin=key.pin, files=Files(ca.path))


def test_an_agents_own_certificate_that_has_expired_is_named(ca: Authority) -> None:
    mine = ca.issue("agent", end=now() - DAY / 2)
    with pytest.raises(hubkey.BadKey, match=r"agent\.crt expired on .*: renew it"):
        tls.hello("127.0.0.1:1", files=Files(ca.path, mine.certificate, mine.key))


# --- what is no hub


def test_where_nobody_listens_is_told() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        assert why_not(address, pin="0" * 64) == (
            f"cannot reach the hub at {address}: nobody listens there; is its agent running with --listen?"
        )


def test_a_host_that_is_none_is_told() -> None:
    assert why_not("no-such-host.invalid:1", pin="0" * 64).startswith(
        "cannot reach the hub at no-such-host.invalid:1: "
    )


@pytest.mark.parametrize(
    "said",
    [b"HTTP/1.1 400 Bad Request\r\n\r\n", SETTINGS, b"SSH-2.0-OpenSSH_9.2\r\n", b"\xff" * 100],
)
def test_a_server_without_tls_is_told(said: bytes) -> None:
    def answer(connection: socket.socket) -> None:
        connection.sendall(said)
        while connection.recv(1000):
            pass

    with answering(answer) as address:
        assert why_not(address, pin="0" * 64) == (
            f"{address} is no hub: it speaks no TLS; check the port"
        )


def test_a_server_of_older_tls_is_told(tmp_path: Path) -> None:
    context = tls.server_context(own(tmp_path), None)
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_2

    def answer(connection: socket.socket) -> None:
        context.wrap_socket(connection, server_side=True).close()

    with answering(answer) as address:
        assert why_not(address, pin="0" * 64).startswith(f"no TLS 1.3 with {address} (")


def test_a_server_of_another_protocol_is_told(tmp_path: Path) -> None:
    key = own(tmp_path)
    with answering(Offering(key, word=b"220 mail.example.org ESMTP\r\n")) as address:
        assert why_not(address, pin=key.pin) == f"{address} is no hub: it does not answer as one"


def test_a_server_that_hangs_up_is_told(tmp_path: Path) -> None:
    key = own(tmp_path)
    with answering(lambda connection: None) as address:
        assert "closed the connection" in why_not(address, pin=key.pin)
    context = tls.server_context(key, None)

    def hang_up(connection: socket.socket) -> None:
        context.wrap_socket(connection, server_side=True).close()

    with answering(hang_up) as address:
        assert "closed the connection" in why_not(address, pin=key.pin)


def test_a_server_that_says_nothing_is_not_waited_for() -> None:
    done = threading.Event()

    def answer(connection: socket.socket) -> None:
        done.wait(DEADLINE_S)

    with answering(answer) as address:
        with pytest.raises(Unreachable, match="does not answer in time"):
            tls.hello(address, pin="0" * 64, timeout_s=0.05)
        done.set()


# --- what gRPC then does


def test_calls_go_to_the_one_that_was_trusted_alone(ca: Authority, tmp_path: Path) -> None:
    """Another server that takes the address afterwards, with a certificate of the same CA, hears nothing."""
    first, second = of(ca.issue("one", "127.0.0.1")), of(ca.issue("two", "127.0.0.1"))
    current = [Offering(first)]

    def answer(connection: socket.socket) -> None:
        current[0](connection)

    with answering(answer) as address:
        channel = tls.channel(address, files=Files(ca.path))
        current[0] = Offering(second)
        with pytest.raises(grpc.RpcError) as found:
            channel.unary_unary("/a/b")(b"secret", timeout=5.0)
        channel.close()
    assert found.value.code() == grpc.StatusCode.UNAVAILABLE
    assert current[0].heard == []
