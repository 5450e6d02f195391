"""The doctor's checks, shown machines that are not this one."""

from __future__ import annotations

import dataclasses
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.fakes_amdsmi import DRIVER_NOT_LOADED, FakeAmdSmi, instinct, radeon
from trackagent.agent import doctor
from trackagent.agent.config import AgentConfig
from trackagent.agent.errors import AgentError
from trackagent.client.config import ClientConfig

MOUNTS = {
    Path("/"): "ext4",
    Path("/dev/shm"): "tmpfs",
    Path("/home"): "nfs4",
    Path("/scratch"): "lustre",
    Path("/mnt/s3"): "fuse.s3fs",
}


@dataclass
class Agent:
    agent_version: str = "1.2.3"
    pid: int = 7


@dataclass
class Space:
    f_bavail: int
    f_frsize: int = 4096


@pytest.fixture
def config(tmp_path: Path) -> AgentConfig:
    return AgentConfig(directory=tmp_path / "dir", state_directory=tmp_path / "state")


def outcome(check: doctor.Check) -> tuple[str, str]:
    return check.status, check.found


def test_everything_is_looked_at_and_nothing_changed(config: AgentConfig) -> None:
    checks = doctor.examine(config, own_version="1.2.3", ask=lambda _: None)
    assert [check.name for check in checks if not check.found] == []
    assert list(config.directory.parent.iterdir()) == []


def test_advice_is_given_exactly_where_something_is_wrong(config: AgentConfig) -> None:
    checks = doctor.examine(config, own_version="1.2.3", ask=lambda _: None)
    assert [c.name for c in checks if bool(c.advice) == (c.status == "ok")] == []


# --- socket and agent


def test_an_agent_of_the_same_version_is_fine(config: AgentConfig) -> None:
    check = doctor.check_agent(config, "1.2.3", lambda _: Agent())
    assert outcome(check) == ("ok", "pid 7, version 1.2.3")


def test_an_agent_of_another_version_is_a_warning(config: AgentConfig) -> None:
    check = doctor.check_agent(config, "1.3.0", lambda _: Agent())
    assert outcome(check) == ("warn", "pid 7, version 1.2.3; this command has version 1.3.0")


def test_no_agent_is_a_warning(config: AgentConfig) -> None:
    assert doctor.check_agent(config, "1.2.3", lambda _: None).status == "warn"


def test_an_agent_that_does_not_answer_is_a_failure(config: AgentConfig) -> None:
    def ask(_: AgentConfig) -> Agent:
        raise AgentError("did not answer within 3 s")

    assert outcome(doctor.check_agent(config, "1.2.3", ask)) == (
        "fail",
        "did not answer within 3 s",
    )


@pytest.fixture
def listening(config: AgentConfig) -> Iterator[Path]:
    config.directory.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(config.socket_path))
        yield config.socket_path


def test_a_private_socket_is_fine(config: AgentConfig, listening: Path) -> None:
    listening.chmod(0o600)
    assert doctor.check_socket(config).status == "ok"


def test_a_socket_open_to_everyone_is_a_warning(config: AgentConfig, listening: Path) -> None:
    listening.chmod(0o666)
    assert doctor.check_socket(config).status == "warn"


def test_a_file_in_the_place_of_the_socket_is_a_failure(config: AgentConfig) -> None:
    config.directory.mkdir()
    config.socket_path.touch()
    assert doctor.check_socket(config).status == "fail"


def test_training_processes_that_use_another_folder_are_a_warning(config: AgentConfig) -> None:
    theirs = {"TRACKAGENT_DIR": "/elsewhere", "XDG_CONFIG_HOME": "/nonexistent"}
    check = doctor.check_training_processes(config, lambda: ClientConfig.load(environ=theirs))
    assert outcome(check) == (
        "warn",
        f"started from here they use /elsewhere, the agent {config.directory}",
    )


def test_training_processes_that_would_refuse_to_start_are_a_failure(config: AgentConfig) -> None:
    theirs = {"TRACKAGENT_SEGMENT_BYTES": "many", "XDG_CONFIG_HOME": "/nonexistent"}
    check = doctor.check_training_processes(config, lambda: ClientConfig.load(environ=theirs))
    assert check.status == "fail"


def sending_to(config: AgentConfig, path: Path) -> doctor.Check:
    theirs = {"TRACKAGENT_DIR": str(config.directory), "TRACKAGENT_AGENT": f"unix:{path}"}
    theirs["XDG_CONFIG_HOME"] = "/nonexistent"
    return doctor.check_training_processes(config, lambda: ClientConfig.load(environ=theirs))


def test_training_processes_that_send_to_another_agent_are_fine(
    config: AgentConfig, tmp_path: Path
) -> None:
    assert sending_to(config, tmp_path / "later.sock").status == "ok"


def test_training_processes_that_would_send_nothing_are_a_failure(
    config: AgentConfig, tmp_path: Path
) -> None:
    (tmp_path / "agent.sock").touch()
    check = sending_to(config, tmp_path / "agent.sock")
    assert (check.status, "is not a socket" in check.found) == ("fail", True)


# --- folders


def folder_status(folder: Path, *, uid: int | None = None, shared: bool = False) -> str:
    uid = os.getuid() if uid is None else uid
    return doctor.check_folder("directory", folder, uid, shared=shared).status


def test_a_folder_that_can_be_made_is_fine(tmp_path: Path) -> None:
    assert folder_status(tmp_path / "a" / "b") == "ok"


def test_a_private_folder_is_fine(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    assert folder_status(tmp_path) == "ok"


def test_a_folder_open_to_others_is_a_warning(tmp_path: Path) -> None:
    tmp_path.chmod(0o750)
    assert folder_status(tmp_path) == "warn"


def test_a_folder_open_to_its_group_is_fine_where_it_is_shared(tmp_path: Path) -> None:
    tmp_path.chmod(0o710)
    assert folder_status(tmp_path, shared=True) == "ok"


def test_a_folder_in_which_others_may_write_is_a_failure(tmp_path: Path) -> None:
    tmp_path.chmod(0o770)
    assert folder_status(tmp_path, shared=True) == "fail"


def test_a_folder_of_another_user_is_a_failure(tmp_path: Path) -> None:
    assert folder_status(tmp_path, uid=os.getuid() + 1) == "fail"


def test_a_file_in_the_place_of_a_folder_is_a_failure(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert folder_status(tmp_path / "file") == "fail"


def test_a_folder_below_a_file_is_a_failure(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert folder_status(tmp_path / "file" / "folder") == "fail"


@pytest.mark.parametrize(("blocks", "status"), [(0, "fail"), (2_000, "warn"), (50_000, "ok")])
def test_space_is_judged_by_what_is_free(tmp_path: Path, blocks: int, status: str) -> None:
    check = doctor.check_space("space", tmp_path, 64 << 20, lambda _: Space(blocks))
    assert check.status == status


def test_space_is_that_of_the_nearest_folder_that_exists(tmp_path: Path) -> None:
    asked: list[Path] = []

    def statvfs(path: Path) -> Space:
        asked.append(path)
        return Space(1)

    doctor.check_space("space", tmp_path / "a" / "b", 1, statvfs)
    assert asked == [tmp_path]


@pytest.mark.parametrize(
    ("folder", "wanted", "status"),
    [
        ("/dev/shm/x", "memory", "ok"),
        ("/var/x", "memory", "warn"),
        ("/home/me", "memory", "warn"),
        ("/var/x", "local", "ok"),
        ("/dev/shm/x", "local", "warn"),
        ("/home/me", "local", "warn"),
        ("/scratch/x", "local", "warn"),
        ("/mnt/s3/x", "local", "warn"),
    ],
)
def test_a_folder_belongs_on_a_file_system_of_its_kind(
    monkeypatch: pytest.MonkeyPatch, folder: str, wanted: str, status: str
) -> None:
    # The folders are another machine's.
    monkeypatch.setattr(doctor, "_existing", lambda path: path)
    check = doctor.check_file_system(
        "file system of directory", Path(folder), MOUNTS, wanted=wanted
    )  # type: ignore[arg-type]
    assert check.status == status


def test_the_mount_table_is_read_with_its_escapes(tmp_path: Path) -> None:
    (tmp_path / "self").mkdir()
    (tmp_path / "self" / "mountinfo").write_text(
        "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n"
        "36 22 0:30 /vol /my\\040data rw,noatime master:2 shared:3 - nfs4 host:/vol rw\n"
    )
    assert doctor.read_mounts(tmp_path) == {Path("/"): "ext4", Path("/my data"): "nfs4"}


def test_the_last_of_two_mounts_on_one_place_counts(tmp_path: Path) -> None:
    (tmp_path / "self").mkdir()
    (tmp_path / "self" / "mountinfo").write_text(
        "22 1 8:1 / /x rw - ext4 /dev/sda1 rw\n23 1 0:3 / /x rw - tmpfs tmpfs rw\n"
    )
    assert doctor.read_mounts(tmp_path) == {Path("/x"): "tmpfs"}


def test_a_machine_without_a_mount_table_is_unknown(tmp_path: Path) -> None:
    assert doctor.file_system(tmp_path, doctor.read_mounts(tmp_path)) == "unknown"


def test_journals_without_an_agent_are_a_warning(config: AgentConfig) -> None:
    for base, name in (
        (config.directory, "a"),
        (config.state_directory, "a"),
        (config.directory, "b"),
    ):
        (base / "journals" / name).mkdir(parents=True)
    check = doctor.check_journals(config, agent_runs=False)
    assert outcome(check) == ("warn", "2 journals may hold undelivered records")


def test_journals_beside_an_agent_are_fine(config: AgentConfig) -> None:
    (config.directory / "journals" / "a").mkdir(parents=True)
    assert doctor.check_journals(config, agent_runs=True).status == "ok"


# --- the machine


@pytest.mark.parametrize(
    ("now", "synchronised", "status"),
    [
        (1_800_000_000, True, "ok"),
        (1_800_000_000, None, "ok"),
        (1_800_000_000, False, "warn"),
        (86_400, True, "fail"),
    ],
)
def test_the_clock_is_set_and_synchronised(
    now: float, synchronised: bool | None, status: str
) -> None:
    assert doctor.check_clock(now, synchronised).status == status


def test_the_kernel_says_whether_the_clock_is_synchronised() -> None:
    assert doctor.clock_synchronised() in (True, False, None)


def test_versions_are_listed_without_torch_where_it_is_missing() -> None:
    check = doctor.check_versions({"grpcio": "1.66", "numpy": "2.0"}.get, lambda: None)
    assert check.found.endswith("grpcio 1.66, protobuf missing, numpy 2.0")


def test_libraries_that_the_generated_code_refuses_are_a_failure() -> None:
    def load() -> None:
        raise RuntimeError("grpcio is too old\nand more")

    check = doctor.check_versions(lambda _: "1", load)
    assert (check.status, check.found.rpartition("; ")[2]) == ("fail", "grpcio is too old")


def test_gpus_are_counted_by_kind() -> None:
    check = doctor.check_gpus(lambda: ["H100", "H100", "T4"])
    assert outcome(check) == ("ok", "2 × H100, 1 × T4")


def test_no_gpus_are_fine() -> None:
    assert outcome(doctor.check_gpus(list)) == ("ok", "none found")


def test_a_driver_that_fails_is_a_warning() -> None:
    def names() -> list[str]:
        raise RuntimeError("Driver/library version mismatch")

    check = doctor.check_gpus(lambda: ["H100"], names)
    assert outcome(check) == ("warn", "1 × H100; Driver/library version mismatch")


@pytest.fixture
def amdgpu(tmp_path: Path) -> Path:
    """/sys of a node with AMD's driver."""
    (tmp_path / "module" / "amdgpu").mkdir(parents=True)
    return tmp_path


def test_amds_gpus_are_named(amdgpu: Path) -> None:
    library = FakeAmdSmi([instinct(), radeon()])
    names = ["AMD Instinct MI300X", "Radeon Pro W7900"]
    assert doctor.amd_names(amdgpu, lambda _: library) == names
    assert library.initialized == 0  # given back to the driver


def test_amds_gpus_without_their_library_are_a_warning_that_names_it(amdgpu: Path) -> None:
    def load(name: str) -> object:
        raise ModuleNotFoundError(f"No module named {name!r}")

    check = doctor.check_gpus(lambda: doctor.amd_names(amdgpu, load))
    assert check.status == "warn"
    assert "no amdsmi in this Python" in check.found


def test_amds_driver_that_does_not_answer_is_a_warning(amdgpu: Path) -> None:
    library = FakeAmdSmi([instinct()], init=DRIVER_NOT_LOADED)
    check = doctor.check_gpus(lambda: doctor.amd_names(amdgpu, lambda _: library))
    assert check.status == "warn"
    assert check.found.startswith("no readings of AMD GPUs: ")


def test_without_amds_driver_nothing_is_loaded(tmp_path: Path) -> None:
    assert doctor.amd_names(tmp_path, pytest.fail) == []


@pytest.mark.parametrize(
    ("limits", "status"), [((256, 4096), "warn"), ((1024, 4096), "ok"), ((-1, -1), "ok")]
)
def test_a_low_limit_of_open_files_is_a_warning(limits: tuple[int, int], status: str) -> None:
    assert doctor.check_open_files(limits).status == status


# --- prometheus


def test_prometheus_is_off_unless_asked_for(config: AgentConfig) -> None:
    assert outcome(doctor.check_prometheus(config, agent_runs=True)) == ("ok", "off")


@pytest.mark.parametrize(
    ("listening", "agent_runs", "status", "says"),
    [
        (True, True, "ok", "answers"),
        (True, False, "fail", "is another program's"),
        (False, True, "warn", "nothing answers"),
        (False, False, "ok", "not there yet"),
    ],
)
def test_whether_prometheus_is_answered(
    config: AgentConfig, listening: bool, agent_runs: bool, status: str, says: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        where = f"127.0.0.1:{listener.getsockname()[1]}"
        if not listening:
            listener.close()
        asked = dataclasses.replace(config, prometheus=where)
        check = doctor.check_prometheus(asked, agent_runs=agent_runs)
    assert (check.status, where in check.found, says in check.found) == (status, True, True)
