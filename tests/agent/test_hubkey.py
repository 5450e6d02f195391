"""A hub's key: the same hub after every start, known by its pin, and for its user alone."""

from __future__ import annotations

import datetime
import os
import re
import stat
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key

from tests.agent.certificates import DAY, Authority, now
from tests.fakes import Folders
from tests.strangers import ALICE, being, give
from trackagent.agent import hubkey
from trackagent.agent.hubkey import BadKey

TOKEN = "0123456789abcdef" * 4


def own(folder: Path, token: str = "") -> hubkey.HubKey:
    return hubkey.own(folder / "hub", folder / "quarantine", token)


def written(folder: Path, text: str = TOKEN, mode: int = 0o600) -> Path:
    path = folder / "token"
    path.write_text(text)
    path.chmod(mode)
    return path


def test_a_hub_is_the_same_after_every_start(tmp_path: Path) -> None:
    assert own(tmp_path) == own(tmp_path)


def test_two_hubs_are_not_the_same(tmp_path: Path) -> None:
    assert own(tmp_path / "a").pin != own(tmp_path / "b").pin


def test_everything_is_for_its_user_alone(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        own(tmp_path)
    finally:
        os.umask(old)
    modes = {
        path.name: stat.S_IMODE(path.stat().st_mode)
        for path in (tmp_path / "hub", *(tmp_path / "hub").iterdir())
    }
    assert modes == {"hub": 0o700, "key.pem": 0o600, "certificate.pem": 0o600}


def test_nothing_secret_is_printed(tmp_path: Path) -> None:
    assert repr(own(tmp_path)) == "HubKey()"


@pytest.mark.parametrize("age", [400 * DAY, 800 * DAY, -3 * DAY])
def test_a_certificate_near_its_end_is_renewed_under_the_same_pin(
    tmp_path: Path, age: datetime.timedelta
) -> None:
    before = own(tmp_path)
    key = load_pem_private_key(before.key, None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    old = hubkey.certificate_of(key, now() - age)
    (tmp_path / "hub" / "certificate.pem").write_bytes(old.public_bytes(Encoding.PEM))
    after = own(tmp_path)
    assert after.pin == before.pin
    certificate = x509.load_pem_x509_certificate(after.certificate)
    assert certificate.not_valid_before_utc < now() < certificate.not_valid_after_utc - 365 * DAY


@pytest.mark.parametrize("name", ["key.pem", "certificate.pem"])
def test_a_damaged_file_is_set_aside(tmp_path: Path, name: str) -> None:
    before = own(tmp_path)
    (tmp_path / "hub" / name).write_bytes(b"\xff no PEM")
    after = own(tmp_path)
    assert (after.pin == before.pin) is (name == "certificate.pem")
    assert len(list((tmp_path / "quarantine").glob(f"*-{name}"))) == 1
    assert own(tmp_path) == after


def test_a_folder_that_others_could_change_is_refused(tmp_path: Path) -> None:
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub").chmod(0o777)
    with pytest.raises(BadKey, match=r"cannot keep the hub's key in .*chmod go-w"):
        own(tmp_path)


# --- the token of a cluster


def test_who_has_the_token_knows_the_pin(tmp_path: Path) -> None:
    assert own(tmp_path / "a", TOKEN).pin == hubkey.pin_of_token(TOKEN)
    assert own(tmp_path / "b", TOKEN).pin == hubkey.pin_of_token(TOKEN)
    # It is written into what agents of other versions derive too: this must not change.
    assert hubkey.pin_of_token(TOKEN) == (
        "a4780baaa87e5d7fc5bb53dd4af7bac87421f6abe5e499b7e7a02cb8664cd8c1"
    )


def test_neither_the_token_nor_its_key_is_kept(tmp_path: Path) -> None:
    own(tmp_path, TOKEN)
    assert [path.name for path in (tmp_path / "hub").iterdir()] == ["certificate.pem"]


def test_a_token_is_read_from_its_file(tmp_path: Path) -> None:
    assert hubkey.read_token(written(tmp_path, f" {TOKEN}\n")) == TOKEN


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o644])
def test_a_token_that_others_may_read_is_refused(tmp_path: Path, mode: int) -> None:
    path = written(tmp_path, mode=mode)
    with pytest.raises(BadKey, match=re.escape(f"(mode {mode:04o}): chmod 600 {path}")):
        hubkey.read_token(path)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("x" * 31, "it has 31 characters"),
        ("", "it has 0 characters"),
        ("x" * 1025, "it has 1025 characters"),
        ("x" * 5000, "larger than"),
        ("é" * 40, "of ASCII"),
        ("two words of a token, one too many", "one word"),
    ],
)
def test_a_token_that_is_none_is_refused_without_showing_it(
    tmp_path: Path, text: str, why: str
) -> None:
    with pytest.raises(BadKey, match=why) as refused:
        hubkey.read_token(written(tmp_path, text))
    assert not text or text not in str(refused.value)


def test_a_token_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadKey, match=r"token in .*/gone: no such file"):
        hubkey.read_token(tmp_path / "gone")


def test_a_pipe_is_no_token(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)
    with pytest.raises(BadKey, match="it is not a file"):
        hubkey.read_token(tmp_path / "pipe")


def test_a_token_in_a_place_that_others_could_replace_is_refused(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(BadKey, match="has no sticky bit"):
        hubkey.read_token(written(tmp_path / "open"))


def test_a_token_of_another_user_is_refused(tmp_path: Path) -> None:
    path = give(written(tmp_path), ALICE, 0o600)
    with pytest.raises(BadKey, match=f"belongs to user {ALICE}"):
        hubkey.read_token(path)


def test_a_token_that_root_gave_to_ones_group_is_read(folders: Folders) -> None:
    base = folders.directory.parent
    base.chmod(0o711)
    path = give(written(base), 0, 0o440)
    os.chown(path, 0, ALICE)
    with being(ALICE):
        assert hubkey.read_token(path) == TOKEN
    path.chmod(0o460)
    with being(ALICE), pytest.raises(BadKey, match="chmod 600"):
        hubkey.read_token(path)


# --- the files of a cluster's CA


def test_a_certificate_and_its_key_are_taken(tmp_path: Path) -> None:
    issued = Authority(tmp_path).issue("hub")
    found = hubkey.of_files(issued.certificate, issued.key)
    assert found.pin == hubkey.pin_of(
        x509.load_pem_x509_certificate(issued.certificate.read_bytes())
    )


def test_a_key_of_another_certificate_is_refused(tmp_path: Path) -> None:
    ca = Authority(tmp_path)
    one, other = ca.issue("one"), ca.issue("other")
    with pytest.raises(BadKey, match=r"other\.key is not that of the certificate in .*one\.crt"):
        hubkey.of_files(one.certificate, other.key)


def test_a_certificate_that_has_expired_is_refused(tmp_path: Path) -> None:
    issued = Authority(tmp_path).issue("hub", end=now() - DAY / 2)
    with pytest.raises(BadKey, match=r"hub\.crt expired on \d{4}-\d\d-\d\d: renew it"):
        hubkey.of_files(issued.certificate, issued.key)


def test_a_certificate_of_the_future_is_refused(tmp_path: Path) -> None:
    issued = Authority(tmp_path).issue("hub", begin=now() + DAY)
    with pytest.raises(BadKey, match=r"hub\.crt is valid from .*set this node's clock"):
        hubkey.of_files(issued.certificate, issued.key)


def test_a_key_that_others_may_read_is_refused(tmp_path: Path) -> None:
    issued = Authority(tmp_path).issue("hub")
    issued.key.chmod(0o644)
    with pytest.raises(BadKey, match=r"the key in .*hub\.key: others than its user may read it"):
        hubkey.of_files(issued.certificate, issued.key)


@pytest.mark.parametrize("which", ["certificate", "key"])
def test_files_that_are_no_pem_are_named(tmp_path: Path, which: str) -> None:
    issued = Authority(tmp_path).issue("hub")
    path = getattr(issued, which)
    path.write_text("nothing")
    with pytest.raises(BadKey, match=re.escape(f" in {path}: ")):
        hubkey.of_files(issued.certificate, issued.key)


def test_an_authority_is_checked(tmp_path: Path) -> None:
    ca = Authority(tmp_path)
    assert hubkey.check_authority(ca.path) == ca.path.read_bytes()
    ca.path.write_text("nothing")
    with pytest.raises(BadKey, match=re.escape(f"the CA's certificates in {ca.path}: ")):
        hubkey.check_authority(ca.path)
