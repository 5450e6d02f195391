"""deploy/kubernetes against the schemas of the kinds, and against what the agent needs of a pod."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest

from tests.deploy.manifests import (
    APPLIED,
    FOLDERS,
    KUBERNETES,
    Container,
    containers,
    copied,
    documents,
    every_object,
    kustomization,
    name,
    rendered,
    templates,
)
from trackagent.agent.config import load

# Native sidecars came with the oldest; the newest is the newest that the schemas know.
VERSIONS = ["1.29", kubernetes_validate.latest_version()]
OBJECTS = every_object()
CUSTOM = json.loads((Path(__file__).parent / "kubeflow.json").read_text())
CONTAINERS = containers(OBJECTS)
OURS = [one for one in CONTAINERS if one.runs_trackagent]
AGENTS = [one for one in OURS if one.body["name"] != "trackagent-folders"]
JOBS = [one for one in OBJECTS if one["kind"] in ("Job", "PyTorchJob", "TrainingRuntime")]


NEEDED_BY_BOTH = ["TRACKAGENT_DIR", "TRACKAGENT_STATE", "NODE_NAME"]


def at(one: Container) -> str:
    return one.where


def relative(folder: Path) -> str:
    return str(folder.relative_to(KUBERNETES))


def check(one: dict[str, Any], version: str) -> None:
    """An error when an object, or a pod template in a custom one, is not as its schema says."""
    if one["kind"] not in CUSTOM:
        kubernetes_validate.validate(one, version, strict=True)
        return
    jsonschema.validate(one, CUSTOM[one["kind"]])
    for template in templates(one):
        pod = {"apiVersion": "v1", "kind": "PodTemplate", "template": template}
        kubernetes_validate.validate(pod, version, strict=True)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("one", OBJECTS, ids=name)
def test_an_object_is_as_its_schema_says(one: dict[str, Any], version: str) -> None:
    check(one, version)


@pytest.mark.parametrize("one", OBJECTS, ids=name)
def test_a_field_that_no_schema_knows_would_be_seen(one: dict[str, Any]) -> None:
    wrong = copy.deepcopy(one)
    for template in templates(wrong):
        template["spec"]["containers"][0]["resource"] = {}
    wrong["spec"]["unknown"] = True
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        check(wrong, VERSIONS[-1])


def test_a_pod_template_in_a_custom_object_is_checked_to_its_depth() -> None:
    wrong = copy.deepcopy(next(one for one in JOBS if one["kind"] == "PyTorchJob"))
    template = next(templates(wrong))
    template["spec"]["initContainers"][1]["startupProbe"]["exec"]["comand"] = []
    with pytest.raises(kubernetes_validate.ValidationError):
        check(wrong, VERSIONS[-1])


# --- kustomizations


@pytest.mark.parametrize("folder", FOLDERS, ids=relative)
def test_what_a_kustomization_names_is_there(folder: Path) -> None:
    content = kustomization(folder)
    resources = [folder / path for path in content.get("resources", [])]
    assert [path for path in resources if not (path.is_file() or in_folders(path))] == []
    components = [folder / path for path in content.get("components", [])]
    assert [path for path in components if not in_folders(path)] == []
    maps = [path for made in content.get("configMapGenerator", []) for path in made["files"]]
    assert [path for path in maps if not (folder / path).is_file()] == []


def in_folders(path: Path) -> bool:
    return path.resolve() in FOLDERS


def below(folder: Path) -> Iterator[dict[str, Any]]:
    """All objects that a kustomization reaches."""
    for path in kustomization(folder).get("resources", []):
        if (folder / path).is_file():
            yield from documents(folder / path)
        else:
            yield from below((folder / path).resolve())


PATCHES = [
    (folder, patch["path"])
    for folder in APPLIED
    for patch in kustomization(folder).get("patches", [])
]


@pytest.mark.parametrize(
    ("folder", "patch"), PATCHES, ids=[f"{relative(f)}/{p}" for f, p in PATCHES]
)
def test_a_patch_names_what_is_there(folder: Path, patch: str) -> None:
    there = {name(one): one for one in below(folder)}
    for one in documents(folder / patch):
        patched = {body["name"] for body in parts(one)}
        assert patched <= {body["name"] for body in parts(there[name(one)])}
        assert patched != set()


def parts(one: dict[str, Any]) -> list[dict[str, Any]]:
    spec = one["spec"]["template"]["spec"]
    return [*spec.get("initContainers", []), *spec.get("containers", [])]


@pytest.fixture(scope="module")
def copy_with_token(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copied(tmp_path_factory.mktemp("deploy"))


@pytest.mark.parametrize("folder", APPLIED, ids=relative)
def test_what_kustomize_makes_is_as_its_schemas_say(folder: Path, copy_with_token: Path) -> None:
    made = rendered(folder, copy_with_token)
    assert made != []
    for one in made:
        check(one, VERSIONS[-1])


@pytest.mark.parametrize("folder", APPLIED, ids=relative)
def test_every_image_has_a_version(folder: Path, copy_with_token: Path) -> None:
    images = {one.body["image"] for one in containers(rendered(folder, copy_with_token))}
    assert images <= {"trackagent:0.1.0", "registry.example.com/trainer:1"}
    assert "trackagent:0.1.0" in images


def test_there_is_no_token_until_somebody_makes_one(tmp_path: Path) -> None:
    tree = tmp_path / "kubernetes"
    shutil.copytree(KUBERNETES, tree, ignore=shutil.ignore_patterns("token"))
    with pytest.raises(AssertionError, match="token"):
        rendered(KUBERNETES / "hub", tree)


def test_a_job_for_the_nodes_agents_has_none_of_its_own(copy_with_token: Path) -> None:
    made = rendered(KUBERNETES / "overlays" / "daemonset", copy_with_token)
    job = next(one for one in made if one["kind"] == "Job")
    daemon = next(one for one in made if one["kind"] == "DaemonSet")
    assert [one.body["name"] for one in containers([job])] == ["trainer"]
    assert host_folders(job) == host_folders(daemon)


def host_folders(one: dict[str, Any]) -> dict[str, str]:
    """Where on its node the agent's folders lie, by where they are in the container."""
    (container,) = [
        one for one in containers([one]) if one.body["name"] in ("trainer", "trackagent")
    ]
    hosts = {volume["name"]: volume.get("hostPath") for volume in container.pod["volumes"]}
    return {
        mount["mountPath"]: str(Path(hosts[mount["name"]]["path"]) / mount.get("subPath", ""))
        for mount in container.body["volumeMounts"]
        if hosts[mount["name"]]
    }


# --- pods


def test_these_are_all_the_containers() -> None:
    assert sorted({one.body["name"] for one in CONTAINERS}) == [
        "hub",
        "node",
        "pytorch",
        "trackagent",
        "trackagent-folders",
        "trainer",
    ]
    assert len(AGENTS) == 6


@pytest.mark.parametrize("one", CONTAINERS, ids=at)
def test_a_container_can_do_no_more_than_it_needs(one: Container) -> None:
    security = one.body["securityContext"]
    assert security["allowPrivilegeEscalation"] is False
    assert security["readOnlyRootFilesystem"] is True
    assert security["capabilities"]["drop"] == ["ALL"]
    assert one.pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert one.pod["securityContext"]["runAsNonRoot"] is True
    assert one.pod["automountServiceAccountToken"] is False


def test_only_the_step_that_makes_folders_on_nodes_runs_as_root() -> None:
    roots = [one for one in CONTAINERS if one.body["securityContext"].get("runAsUser") == 0]
    assert [at(one) for one in roots] == ["DaemonSet/trackagent/trackagent-folders"]
    assert roots[0].body["securityContext"]["capabilities"]["add"] == ["CHOWN"]


def test_a_sidecar_is_the_same_in_every_job() -> None:
    sidecars = [one.body for one in AGENTS if one.body["name"] == "trackagent" and is_in_a_job(one)]
    assert len(sidecars) == 4  # PyTorchJob has it twice
    assert [one for one in sidecars if one != sidecars[0]] == []
    assert sidecars[0]["restartPolicy"] == "Always"


def is_in_a_job(one: Container) -> bool:
    return one.where.split("/")[0] in {job["kind"] for job in JOBS}


@pytest.mark.parametrize("job", JOBS, ids=name)
def test_trainer_and_sidecar_share_folders_and_node_name(job: dict[str, Any]) -> None:
    for template in templates(job):
        (sidecar,) = [one for one in template["spec"]["initContainers"] if "restartPolicy" in one]
        (trainer,) = template["spec"]["containers"]
        shared = [mount for mount in sidecar["volumeMounts"] if mount.get("subPath") == "agent"]
        assert [mount for mount in shared if mount not in trainer["volumeMounts"]] == []
        common = [one for one in sidecar["env"] if one["name"] in NEEDED_BY_BOTH]
        assert [one["name"] for one in common] == NEEDED_BY_BOTH
        assert [one for one in common if one not in trainer["env"]] == []


@pytest.mark.parametrize("job", JOBS, ids=name)
def test_a_trainer_does_not_see_the_cluster_token(job: dict[str, Any]) -> None:
    for template in templates(job):
        (trainer,) = template["spec"]["containers"]
        assert "trackagent-token" not in {mount["name"] for mount in trainer["volumeMounts"]}


@pytest.mark.parametrize("one", AGENTS, ids=at)
def test_an_agent_is_configured_and_has_time_to_deliver(one: Container) -> None:
    environ = {each["name"]: each.get("value", "node-a") for each in one.body["env"]}
    config, _ = load({}, environ)
    waits = config.drain_timeout_s + getattr(config, "linger_s", 0.0)
    assert one.pod["terminationGracePeriodSeconds"] >= waits + 15
    assert config.node == "node-a"


@pytest.mark.parametrize("one", AGENTS, ids=at)
def test_an_agents_volumes_are_there(one: Container) -> None:
    volumes = {volume["name"] for volume in one.pod["volumes"]}
    if one.body["name"] == "hub":
        volumes.add("trackagent-state")  # made from its volumeClaimTemplates
    assert {mount["name"] for mount in one.body["volumeMounts"]} <= volumes


@pytest.mark.parametrize("one", AGENTS, ids=at)
def test_an_agent_asks_for_what_it_was_measured_to_need(one: Container) -> None:
    """docs/benchmarks.md: at the reference load 5.1 % of a core and 76 MiB."""
    resources = one.body["resources"]
    assert resources["requests"]["cpu"] in ("100m", "1")
    assert resources["requests"]["memory"] in ("128Mi", "512Mi")
    assert "cpu" not in resources["limits"]  # who may not use an idle core is late
    assert "nvidia.com/gpu" not in json.dumps(resources)


def test_the_sidecar_sees_gpus() -> None:
    for one in AGENTS:
        environ = {each["name"]: each.get("value") for each in one.body["env"]}
        wanted = one.body["name"] == "trackagent"
        assert (environ.get("NVIDIA_VISIBLE_DEVICES") == "all") is wanted
        assert (environ.get("NVIDIA_DRIVER_CAPABILITIES") == "utility") is wanted


def test_pods_reach_the_hub_where_it_is() -> None:
    (hub,) = [one for one in OBJECTS if name(one) == "StatefulSet/trackagent-hub"]
    (service,) = [one for one in OBJECTS if name(one) == "Service/trackagent-hub"]
    (policy,) = [one for one in OBJECTS if name(one) == "NetworkPolicy/trackagent-hub"]
    labels = hub["spec"]["template"]["metadata"]["labels"]
    assert hub["spec"]["selector"]["matchLabels"] == labels
    assert service["spec"]["selector"] == labels
    assert policy["spec"]["podSelector"]["matchLabels"] == labels
    (ports,) = [one.body["ports"] for one in AGENTS if one.body["name"] == "hub"]
    assert {port["name"]: port["containerPort"] for port in ports} == {"hub": 7717}
    assert [port["targetPort"] for port in service["spec"]["ports"]] == ["hub"]
    stores = {
        each["value"]
        for one in AGENTS
        for each in one.body["env"]
        if each["name"] == "TRACKAGENT_STORE"
    }
    assert stores == {f"{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"}


@pytest.mark.parametrize(
    "one",
    [one for one in OBJECTS if one["kind"] in ("DaemonSet", *(j["kind"] for j in JOBS))],
    ids=name,
)
def test_pods_with_an_agent_say_so_to_the_hubs_policy(one: dict[str, Any]) -> None:
    for template in templates(one):
        assert template["metadata"]["labels"]["trackagent-agent"] == "true"


def test_the_jobs_pods_find_rank_0_by_its_name() -> None:
    (job,) = [one for one in OBJECTS if one["kind"] == "Job"]
    (service,) = [one for one in OBJECTS if name(one) == "Service/train"]
    pod = job["spec"]["template"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    master = f"--master-addr={name(job).partition('/')[2]}-0.{pod['spec']['subdomain']}"
    assert master in pod["spec"]["containers"][0]["args"]
    assert pod["spec"]["subdomain"] == service["metadata"]["name"]
