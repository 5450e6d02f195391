"""The hub's pod and jobs' pods on this machine, with the cluster token between them."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest

from tests.agent.certificates import Authority
from tests.deploy.manifests import KUBERNETES, copied, rendered
from tests.deploy.pods import Pod, need_namespaces, pod, template, template_of
from tests.deploy.test_pod import EVERY_POINT, JOB, RUN_ID, kill_a_training_container, stored
from tests.fakes import wait_until

pytestmark = pytest.mark.usefixtures("_namespaces")

HUB = "hub/hub.yaml"
# Pods of this machine share its network: the hub takes any port that is free.
LISTEN = {"TRACKAGENT_LISTEN": "127.0.0.1:0", "TRACKAGENT_ADVERTISE": "127.0.0.1"}
QUIET = {"TRACKAGENT_COLLECT": "none", "TRACKAGENT_LINGER_S": "0"}
# Nothing listens on the port of tcpmux.
NOWHERE = "127.0.0.1:1"


@pytest.fixture(scope="module")
def _namespaces() -> None:
    need_namespaces()


def delivering_to(address: str) -> dict[str, str]:
    return QUIET | {"TRACKAGENT_STORE": address}


def address_of(hub: Pod) -> str:
    said = hub.volume("trackagent-memory") / "agent" / "hub.json"
    wait_until(said.exists, "the hub says where it listens")
    address = json.loads(said.read_text())["address"]
    return f"127.0.0.1:{address.rpartition(':')[2]}"


def test_what_a_killed_trainer_logged_is_in_the_hubs_store(tmp_path: Path) -> None:
    (tmp_path / "hub").mkdir()
    (tmp_path / "job").mkdir()
    with pod(template(HUB), tmp_path / "hub", **LISTEN, **QUIET) as hub:
        store = hub.start("hub")
        with pod(template(JOB), tmp_path / "job", **delivering_to(address_of(hub))) as job:
            sidecar = job.start()
            kill_a_training_container(job)
            assert sidecar.end_with(signal.SIGTERM) == 0
        assert store.end_with(signal.SIGTERM) == 0
    run = stored(tmp_path / "hub").run(RUN_ID)
    assert run is not None
    assert (run.status, stored(tmp_path / "hub").exported(RUN_ID)) == ("killed", EVERY_POINT)
    assert stored(tmp_path / "job").run(RUN_ID) is None


def test_what_no_hub_took_waits_on_the_volume_until_one_does(tmp_path: Path) -> None:
    (tmp_path / "hub").mkdir()
    (tmp_path / "job").mkdir()
    brief = delivering_to(NOWHERE) | {"TRACKAGENT_DRAIN_TIMEOUT_S": "0.2"}
    with pod(template(JOB), tmp_path / "job", **brief) as job:
        sidecar = job.start()
        kill_a_training_container(job)
        assert sidecar.end_with(signal.SIGTERM) == 0
        assert "the next agent here delivers what is left" in sidecar.output()

    with pod(template(HUB), tmp_path / "hub", **LISTEN, **QUIET) as hub:
        store = hub.start("hub")
        with pod(template(JOB), tmp_path / "job", **delivering_to(address_of(hub))) as job:
            assert job.start().end_with(signal.SIGTERM) == 0
        assert store.end_with(signal.SIGTERM) == 0
    assert stored(tmp_path / "hub").exported(RUN_ID) == EVERY_POINT


def test_a_cluster_ca_stands_in_for_the_token(tmp_path: Path) -> None:
    made = rendered(KUBERNETES / "overlays" / "cluster-ca", copied(tmp_path))
    manifests = {
        one["kind"]: template_of(one) for one in made if one["kind"] in ("Job", "StatefulSet")
    }
    authority = Authority(tmp_path / "ca")
    for base, name in (("hub", "trackagent-hub"), ("job", "trackagent-agent")):
        issued = authority.issue(name, "127.0.0.1")
        secret = tmp_path / base / "secrets" / f"{name}-tls"
        secret.mkdir(parents=True)
        files = {"tls.crt": issued.certificate, "tls.key": issued.key, "ca.crt": authority.path}
        for file, content in files.items():
            shutil.copy(content, secret / file)
    without = {"TRACKAGENT_TOKEN_FILE": ""}
    with pod(manifests["StatefulSet"], tmp_path / "hub", **LISTEN, **QUIET, **without) as hub:
        store = hub.start("hub")
        variables = delivering_to(address_of(hub)) | without
        with pod(manifests["Job"], tmp_path / "job", **variables) as job:
            sidecar = job.start()
            kill_a_training_container(job)
            assert sidecar.end_with(signal.SIGTERM) == 0
        assert store.end_with(signal.SIGTERM) == 0
    assert stored(tmp_path / "hub").exported(RUN_ID) == EVERY_POINT
