"""Who a hub is: its private key, and a certificate of it. What others remember is the pin, the SHA-256 of the
public key: so a certificate may be replaced, and the address may change.

The key is the one of the files of a cluster's CA; or it follows from the cluster's token, so that who has the
token knows the pin; or the agent makes one at its first start and keeps it, for its user alone. Then it makes
the certificate too, and a new one at a start where that is near its end.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import logging
import os
import stat
import time
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes, PublicKeyTypes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import NameOID

from trackagent.agent.errors import AgentError
from trackagent.agent.quarantine import set_aside, sync
from trackagent.client.trust import check_file, check_way, private_folder

logger = logging.getLogger(__name__)

# In every certificate that an agent makes for itself; nobody looks it up.
NAME = "trackagent-hub"
KEY_NAME = "key.pem"
CERTIFICATE_NAME = "certificate.pem"
MIN_TOKEN_LENGTH, MAX_TOKEN_LENGTH = 32, 1024
MAX_PEM_BYTES = 1024 * 1024
# The order of the curve P-256 (SEC 2, 2.4.2).
_LABEL = b"trackagent hub key, version 1"
_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
_DAY = datetime.timedelta(days=1)
_VALID = 730 * _DAY
# Less is near the end: an agent that runs on for a year still has a good one.
_RENEWED = 365 * _DAY


class BadKey(AgentError):
    """A key, a certificate or a token cannot be used; the message names the file, and what to do."""


@dataclass(frozen=True)
class HubKey:
    """A key and its certificate, PEM. Not printed, whatever happens."""

    certificate: bytes = field(repr=False)
    key: bytes = field(repr=False)

    @property
    def pin(self) -> str:
        """64 lower-case hexadecimal digits."""
        return pin_of(x509.load_pem_x509_certificate(self.certificate))


def pin_of(certificate: x509.Certificate) -> str:
    """SHA-256 of a certificate's public key (SubjectPublicKeyInfo, DER)."""
    return _pin(certificate.public_key())


def pin_of_token(token: str) -> str:
    """The pin of the hub whose cluster has this token."""
    return _pin(_derived(token).public_key())


def read_token(path: Path) -> str:
    """The cluster's token. BadKey where the file is missing, too short, or not for its user alone."""
    text = _private_text(path, "the cluster's token", MAX_TOKEN_LENGTH + 64).strip()
    if not MIN_TOKEN_LENGTH <= len(text) <= MAX_TOKEN_LENGTH or not text.isascii():
        raise BadKey(
            f"cannot use the cluster's token in {path}: it has {len(text)} characters, and needs "
            f"{MIN_TOKEN_LENGTH} to {MAX_TOKEN_LENGTH} of ASCII: make one with openssl rand -hex 32"
        )
    if not text.isprintable() or " " in text:
        raise BadKey(f"cannot use the cluster's token in {path}: write one word into one line")
    return text


def of_files(certificate: Path, key: Path) -> HubKey:
    """What a cluster's CA has issued to this agent. BadKey where the files cannot be used."""
    pem = _private_text(key, "the key", MAX_PEM_BYTES).encode()
    chain = _text(certificate, "the certificate", MAX_PEM_BYTES).encode()
    try:
        first = x509.load_pem_x509_certificate(chain)
    except ValueError as error:
        raise BadKey(
            f"cannot use the certificate in {certificate}: {error}; give a PEM file"
        ) from None
    try:
        private = load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        # Without what the library says, which has looked at the key.
        raise BadKey(
            f"cannot use the key in {key}: give a PEM file with one key and without a password"
        ) from None
    if _pin(private.public_key()) != pin_of(first):
        raise BadKey(f"the key in {key} is not that of the certificate in {certificate}")
    _check_dates(first, certificate)
    return HubKey(chain, pem)


def own(folder: Path, quarantine: Path, token: str = "") -> HubKey:
    """This agent's own, in `folder`, which is made where it is missing: of the token, or else of a key that
    it made at its first start. A damaged file is set aside in `quarantine`. BadKey where this cannot be."""
    try:
        private_folder(folder)
        key = _derived(token) if token else _kept_key(folder / KEY_NAME, quarantine)
        certificate = _kept_certificate(folder / CERTIFICATE_NAME, key, quarantine)
    except OSError as error:
        what = error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
        raise BadKey(f"cannot keep the hub's key in {folder}: {what}") from error
    return HubKey(certificate.public_bytes(Encoding.PEM), _pem(key))


def check_authority(path: Path) -> bytes:
    """The certificates of a cluster's CA, PEM. BadKey where there are none, or all have expired."""
    text = _text(path, "the CA's certificates", MAX_PEM_BYTES).encode()
    try:
        found = x509.load_pem_x509_certificates(text)
    except ValueError as error:
        raise BadKey(
            f"cannot use the CA's certificates in {path}: {error}; give a PEM file"
        ) from None
    now = _now()
    if all(one.not_valid_after_utc < now for one in found):
        last = max(one.not_valid_after_utc for one in found)
        raise BadKey(f"the CA's certificate in {path} expired on {last:%Y-%m-%d}: renew it")
    return text


# --- keys


def _derived(token: str) -> ec.EllipticCurvePrivateKey:
    # 16 bytes more than the order has: the remainder is then as good as evenly spread (FIPS 186-5, A.2.1).
    made = HKDF(algorithm=hashes.SHA256(), length=48, salt=None, info=_LABEL).derive(token.encode())
    return ec.derive_private_key(1 + int.from_bytes(made, "big") % (_ORDER - 1), ec.SECP256R1())


def _pin(key: PublicKeyTypes) -> str:
    der = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(der).hexdigest()


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _kept_key(path: Path, quarantine: Path) -> ec.EllipticCurvePrivateKey:
    with contextlib.suppress(FileNotFoundError):
        check_file(path)
        found: PrivateKeyTypes | None = None
        with contextlib.suppress(ValueError, TypeError, UnsupportedAlgorithm):
            found = load_pem_private_key(path.read_bytes(), password=None)
        if isinstance(found, ec.EllipticCurvePrivateKey):
            path.chmod(0o600)
            return found
        set_aside(path, quarantine, f"{time.time_ns()}-{path.name}", "it holds no key")
        logger.error(
            "this agent makes itself a new key: other nodes cannot deliver the runs that began before"
        )
    made = ec.generate_private_key(ec.SECP256R1())
    _write(path, _pem(made))
    return made


def _kept_certificate(
    path: Path, key: ec.EllipticCurvePrivateKey, quarantine: Path
) -> x509.Certificate:
    with contextlib.suppress(FileNotFoundError):
        check_file(path)
        try:
            found = x509.load_pem_x509_certificate(path.read_bytes())
        except ValueError as error:
            set_aside(path, quarantine, f"{time.time_ns()}-{path.name}", str(error))
        else:
            now = _now()
            begun, left = found.not_valid_before_utc <= now, found.not_valid_after_utc - now
            if pin_of(found) == _pin(key.public_key()) and begun and left > _RENEWED:
                return found
    made = certificate_of(key, _now())
    _write(path, made.public_bytes(Encoding.PEM))
    return made


def certificate_of(key: ec.EllipticCurvePrivateKey, now: datetime.datetime) -> x509.Certificate:
    """One that the key itself has signed."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, NAME)])
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        # Clocks of other nodes may be behind.
        .not_valid_before(now - _DAY)
        .not_valid_after(now + _VALID)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(NAME)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.timezone.utc)


def _check_dates(certificate: x509.Certificate, path: Path) -> None:
    now = _now()
    if certificate.not_valid_after_utc < now:
        raise BadKey(
            f"the certificate in {path} expired on {certificate.not_valid_after_utc:%Y-%m-%d}: renew it"
        )
    if certificate.not_valid_before_utc > now:
        raise BadKey(
            f"the certificate in {path} is valid from {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} "
            "UTC on: wait, or set this node's clock"
        )


# --- files


def _write(path: Path, content: bytes) -> None:
    """The whole file or none of it, on the disk, for this user alone."""
    new = path.with_suffix(".new")
    new.unlink(missing_ok=True)
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with open(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(descriptor)
    new.rename(path)
    sync(path.parent)


def _private_text(path: Path, what: str, most: int) -> str:
    """The content of a file that nobody else may read or replace."""
    try:
        check_way(path)
        check_way(path.resolve())  # Kubernetes mounts secrets as links
    except OSError as error:
        raise BadKey(f"cannot use {what} in {path}: {error.strerror}") from None
    return _text(path, what, most, private=True)


def _text(path: Path, what: str, most: int, *, private: bool = False) -> str:
    try:
        # Not waiting: it may be a pipe.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise BadKey(f"cannot use {what} in {path}: it is not a file")
            if private:
                _check_private(path, what, status)
            content = file.read(most + 1)
    except OSError as error:
        why = str(error.strerror).lower()
        raise BadKey(f"cannot read {what} in {path}: {why}") from None
    if len(content) > most:
        raise BadKey(f"cannot use {what} in {path}: it is larger than {most} bytes")
    return content.decode("utf-8", "replace")


def _check_private(path: Path, what: str, status: os.stat_result) -> None:
    if status.st_uid not in (os.geteuid(), 0):
        raise BadKey(
            f"cannot use {what} in {path}: it belongs to user {status.st_uid}, this is user "
            f"{os.geteuid()}: chown it"
        )
    # What root has given to a group that this process is in, it could read in no other way: so Kubernetes
    # mounts secrets for pods with an fsGroup.
    given = status.st_uid == 0 != os.geteuid() and status.st_gid in (os.getegid(), *os.getgroups())
    if status.st_mode & (0o037 if given else 0o077):
        raise BadKey(
            f"cannot use {what} in {path}: others than its user may read it (mode "
            f"{stat.S_IMODE(status.st_mode):04o}): chmod 600 {path}, and make a new one where somebody may "
            "have read it"
        )
