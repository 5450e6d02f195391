"""What would keep trackagent from working on this node, found out without changing anything.

`examine` runs every check; each takes what it looks at as arguments (the /proc folder, statvfs, the caller of
the agent), so that a test can show it another machine.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import platform
import re
import resource
import socket
import sqlite3
import stat
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, Protocol

from trackagent.agent.collect.amd import Amd
from trackagent.agent.collect.contract import Unavailable
from trackagent.agent.config import AgentConfig, loopback_address
from trackagent.agent.errors import AgentError
from trackagent.client import trust
from trackagent.client.config import MAX_SOCKET_PATH_BYTES, ClientConfig, socket_address
from trackagent.client.errors import TrackagentError

Status = Literal["ok", "warn", "fail"]

LEAST_DIRECTORY_BYTES = 64 * 1024 * 1024
LEAST_STATE_BYTES = 1024 * 1024 * 1024
# A journal and a connection for each rank, and what the agent needs itself.
LEAST_OPEN_FILES = 1024
# Before this code was written and long after it: such a clock is not set.
CLOCK_FROM, CLOCK_TO = 1_735_689_600, 4_102_444_800
MIN_SQLITE = (3, 24, 0)

# Names as /proc/self/mountinfo gives them; fuse.* stands for file systems in user space.
NETWORK_FILE_SYSTEMS = frozenset(
    {
        *(
            "nfs",
            "nfs4",
            "lustre",
            "ceph",
            "gpfs",
            "mmfs",
            "beegfs",
            "glusterfs",
            "pvfs2",
            "orangefs",
        ),
        *("wekafs", "panfs", "afs", "cifs", "smb3", "smbfs", "9p"),
    }
)
MEMORY_FILE_SYSTEMS = frozenset(("tmpfs", "ramfs"))


@dataclass(frozen=True, slots=True)
class Check:
    """status: ok; warn: works, but less well or perhaps not for long; fail: does not work. advice: what
    to do, empty when ok."""

    name: str
    status: Status
    found: str
    advice: str = ""


class Answer(Protocol):
    """What is read of trackagent.v1.StatusResponse."""

    @property
    def agent_version(self) -> str: ...
    @property
    def pid(self) -> int: ...


class Space(Protocol):
    """What is read of os.statvfs_result."""

    @property
    def f_bavail(self) -> int: ...
    @property
    def f_frsize(self) -> int: ...


def examine(
    config: AgentConfig, *, own_version: str, ask: Callable[[AgentConfig], Answer | None]
) -> list[Check]:
    """Every check, on this machine. ask: what the agent of a folder says, None when none runs."""
    mounts = read_mounts(Path("/proc"))
    directory, state_directory = config.directory, config.state_directory
    agent = check_agent(config, own_version, ask)
    return [
        check_socket(config),
        agent,
        check_prometheus(config, agent_runs=agent.found.startswith("pid ")),
        check_training_processes(config, lambda: ClientConfig.load(environ=os.environ)),
        check_folder("directory", directory, os.getuid(), shared=config.group is not None),
        check_folder("state_directory", state_directory, os.getuid(), shared=False),
        check_file_system("file system of directory", directory, mounts, wanted="memory"),
        check_file_system(
            "file system of state_directory", state_directory, mounts, wanted="local"
        ),
        check_space("space in directory", directory, LEAST_DIRECTORY_BYTES, os.statvfs),
        check_space("space in state_directory", state_directory, LEAST_STATE_BYTES, os.statvfs),
        check_journals(config, agent_runs=agent.found.startswith("pid ")),
        check_clock(time.time(), clock_synchronised()),
        check_versions(installed_version, load_generated),
        check_gpus(nvidia_names, amd_names),
        check_open_files(resource.getrlimit(resource.RLIMIT_NOFILE)),
    ]


# --- socket and agent -------------------------------------------------------------------------------


def check_socket(config: AgentConfig) -> Check:
    length = len(os.fsencode(config.socket_path))
    found = f"{config.socket_path} ({length} of {MAX_SOCKET_PATH_BYTES} bytes)"
    try:
        mode = os.lstat(config.socket_path).st_mode
    except FileNotFoundError:
        return Check("socket", "ok", f"{found}, not there yet")
    except OSError as error:
        return Check(
            "socket", "fail", f"{found}: {error.strerror}", "look as the user who runs the agent"
        )
    if not stat.S_ISSOCK(mode):
        return Check(
            "socket", "fail", f"{found} is not a socket", "remove it, the agent makes its own"
        )
    if mode & stat.S_IRWXO:
        return Check(
            "socket",
            "warn",
            f"{found}, open to every user (mode {stat.S_IMODE(mode):04o})",
            "restart the agent: it makes the socket private",
        )
    return Check("socket", "ok", found)


def check_agent(
    config: AgentConfig, own_version: str, ask: Callable[[AgentConfig], Answer | None]
) -> Check:
    try:
        answer = ask(config)
    except AgentError as error:
        return Check("agent", "fail", str(error), "see its log; stop and start it")
    if answer is None:
        return Check("agent", "warn", "none runs", "start one: trackagent start, or trackagent run")
    found = f"pid {answer.pid}, version {answer.agent_version}"
    if answer.agent_version != own_version:
        return Check(
            "agent",
            "warn",
            f"{found}; this command has version {own_version}",
            "restart the agent after an update: trackagent stop, trackagent start",
        )
    return Check("agent", "ok", found)


def check_prometheus(config: AgentConfig, *, agent_runs: bool) -> Check:
    name, where = "prometheus", config.prometheus
    if not where:
        return Check(name, "ok", "off")
    host, port = loopback_address(where)
    if not port:
        return Check(name, "ok", f"{where}: any free port, the agent's log names it")
    try:
        socket.create_connection((host, port), timeout=1.0).close()
    except OSError:
        if agent_runs:
            advice = f"the agent runs without it: start it again, with --prometheus {where}"
            return Check(name, "warn", f"nothing answers at {where}", advice)
        return Check(name, "ok", f"{where}, not there yet")
    if agent_runs:
        return Check(name, "ok", f"{where}, answers")
    advice = "end what listens there, or give another --prometheus"
    return Check(name, "fail", f"{where} is another program's", advice)


# --- folders ----------------------------------------------------------------------------------------


def check_training_processes(config: AgentConfig, load: Callable[[], ClientConfig]) -> Check:
    """load: the configuration that a training process started from here would have."""
    name = "training processes"
    try:
        theirs = load()
    except TrackagentError as error:
        return Check(name, "fail", str(error), "client.init() would refuse it too")
    if theirs.directory != config.directory:
        return Check(
            name,
            "warn",
            f"started from here they use {theirs.directory}, the agent {config.directory}",
            f"set TRACKAGENT_DIR={config.directory} for them, or use trackagent run",
        )
    if theirs.agent != socket_address(config.directory):
        try:
            trust.check_socket(Path(theirs.agent.removeprefix("unix:")), theirs.agent_owners())
        except FileNotFoundError:
            pass  # it may start later
        except (OSError, TrackagentError) as error:
            why = error.strerror if isinstance(error, OSError) else str(error)
            advice = "if you trust the user who runs that agent: set TRACKAGENT_AGENT_USER to them"
            return Check(name, "fail", f"send nothing to {theirs.agent}: {why}", advice)
        return Check(name, "ok", f"send to {theirs.agent}")
    return Check(name, "ok", f"use the same folder, {theirs.directory}")


def check_folder(name: str, folder: Path, uid: int, *, shared: bool) -> Check:
    """shared: the folder may be open to a group."""
    try:
        found = os.lstat(folder)
    except FileNotFoundError:
        above = _existing(folder)
        if not os.access(above, os.W_OK | os.X_OK):
            advice = f"make it for this user, or choose another ({_setting(name)})"
            return Check(name, "fail", f"{folder} is missing, and {above} is not writable", advice)
        return Check(name, "ok", f"{folder}, made when it is needed")
    except OSError as error:
        return Check(
            name, "fail", f"{folder}: {error.strerror}", f"choose another ({_setting(name)})"
        )
    if stat.S_ISLNK(found.st_mode):
        advice = f"name the folder that it leads to ({_setting(name)})"
        return Check(name, "fail", f"{folder} is a link, which an agent refuses", advice)
    if not stat.S_ISDIR(found.st_mode):
        return Check(
            name, "fail", f"{folder} is not a folder", f"choose another ({_setting(name)})"
        )
    mode = stat.S_IMODE(found.st_mode)
    if found.st_uid != uid:
        return Check(
            name,
            "fail",
            f"{folder} belongs to user {found.st_uid}, this is user {uid}",
            f"run as that user, or choose another folder ({_setting(name)})",
        )
    if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        return Check(name, "fail", f"{folder} is not writable", f"chmod u+rwx {folder}")
    if why := trust.why_refused(folder):
        return Check(name, "fail", why, f"make it private, or choose another ({_setting(name)})")
    if mode & (0o007 if shared else 0o077):
        advice = f"chmod {'0710' if shared else '0700'} {folder}"
        return Check(name, "warn", f"{folder} is open to other users (mode {mode:04o})", advice)
    return Check(name, "ok", f"{folder} (mode {mode:04o})")


def check_space(name: str, folder: Path, least: int, statvfs: Callable[[Path], Space]) -> Check:
    try:
        space = statvfs(_existing(folder))
    except OSError as error:
        return Check(name, "fail", f"{folder}: {error.strerror}", "choose another folder")
    free = space.f_bavail * space.f_frsize
    found = f"{free / 2**20:,.0f} MiB free"
    advice = "free some, or choose another folder; in a container, enlarge /dev/shm (--shm-size)"
    if free < least // 16:
        return Check(name, "fail", found, advice)
    return Check(name, "warn", found, advice) if free < least else Check(name, "ok", found)


def check_file_system(
    name: str, folder: Path, mounts: Mapping[Path, str], *, wanted: Literal["memory", "local"]
) -> Check:
    """memory: a journal is written at memory speed and gone after a reboot; local: on a disk of this node,
    where locks and mapped files are reliable."""
    kind = file_system(folder, mounts)
    if kind in NETWORK_FILE_SYSTEMS or kind.startswith("fuse"):
        return Check(
            name,
            "warn",
            f"{kind}, a network or user-space file system",
            f"choose a folder on a local disk ({_setting(name.rpartition(' ')[2])})",
        )
    if wanted == "memory" and kind not in MEMORY_FILE_SYSTEMS:
        advice = "log() may wait for the disk; choose a folder in /dev/shm (TRACKAGENT_DIR)"
        return Check(name, "warn", f"{kind}, not in memory", advice)
    if wanted == "local" and kind in MEMORY_FILE_SYSTEMS:
        advice = "gone after a reboot; choose a folder on a disk (TRACKAGENT_STATE)"
        return Check(name, "warn", f"{kind}, in memory", advice)
    return Check(name, "ok", kind)


def read_mounts(proc: Path) -> dict[Path, str]:
    """Mount point → type of file system, as this process sees them; empty where it cannot be read."""
    try:
        lines = (proc / "self" / "mountinfo").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return {}
    mounts = {}
    for line in lines:
        # proc(5): ... root, mount point, options, optional fields, "-", type, ... with octal escapes.
        before, _, after = line.partition(" - ")
        point = re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), before.split(" ")[4])
        mounts[Path(point)] = after.split(" ")[0]
    return mounts


def file_system(folder: Path, mounts: Mapping[Path, str]) -> str:
    """Type of the file system that `folder` lies on, or would be made on."""
    place = Path(os.path.realpath(_existing(folder)))
    for above in (place, *place.parents):
        if above in mounts:
            return mounts[above]
    return "unknown"


def check_journals(config: AgentConfig, *, agent_runs: bool) -> Check:
    """Journals lie there while their processes run, and afterwards until an agent has read them."""
    found = {
        entry.name
        for base in (config.directory, config.state_directory)
        if (base / "journals").is_dir()
        for entry in (base / "journals").iterdir()
        if entry.is_dir()
    }
    text = f"{len(found)} journal{'' if len(found) == 1 else 's'}"
    if not found:
        return Check("journals", "ok", "none wait")
    if agent_runs:
        return Check("journals", "ok", f"{text}, which the agent looks after")
    return Check(
        "journals",
        "warn",
        f"{text} may hold undelivered records",
        "start an agent: it delivers them",
    )


def _existing(folder: Path) -> Path:
    return next(above for above in (folder, *folder.parents) if above.exists())


def _setting(name: str) -> str:
    return {"directory": "TRACKAGENT_DIR, --dir", "state_directory": "TRACKAGENT_STATE, --state"}[
        name
    ]


# --- the machine ------------------------------------------------------------------------------------


def check_clock(now: float, synchronised: bool | None) -> Check:
    """now: seconds since 1970-01-01 UTC. synchronised: None where the system does not say."""
    found = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now))
    if not CLOCK_FROM <= now < CLOCK_TO:
        return Check("clock", "fail", found, "set the clock: times in the store would be wrong")
    if synchronised is None:
        return Check("clock", "ok", f"{found}; the system does not say whether it is synchronised")
    if not synchronised:
        advice = "run chrony or another NTP client, or the times of several nodes do not line up"
        return Check("clock", "warn", f"{found}, not synchronised", advice)
    return Check("clock", "ok", f"{found}, synchronised")


def clock_synchronised() -> bool | None:
    """What the kernel says (adjtimex(2), only read); None where it does not."""
    try:
        adjtimex = ctypes.CDLL(None, use_errno=True).adjtimex
    except (OSError, AttributeError):
        return None
    # A zeroed struct timex (208 bytes on 64-bit Linux) changes nothing. The answer is the clock's state:
    # TIME_ERROR, 5, is one that nothing synchronises.
    state = adjtimex(ctypes.create_string_buffer(1024))
    return None if state < 0 else state != 5


def check_versions(version_of: Callable[[str], str | None], load: Callable[[], object]) -> Check:
    """load: imports the code generated from protos/, which refuses libraries that are too old or too new."""
    parts = [f"python {platform.python_version()}", f"sqlite {sqlite3.sqlite_version}"]
    parts += [f"{name} {version_of(name) or 'missing'}" for name in ("grpcio", "protobuf", "numpy")]
    if torch := version_of("torch"):
        parts.append(f"torch {torch}")
    found = ", ".join(parts)
    if sqlite3.sqlite_version_info < MIN_SQLITE:
        wanted = ".".join(map(str, MIN_SQLITE))
        return Check("versions", "fail", found, f"use a Python with SQLite {wanted} or newer")
    try:
        load()
    except Exception as error:  # noqa: BLE001 - grpc and protobuf raise types of their own
        advice = "install again: pip install --upgrade trackagent"
        return Check("versions", "fail", f"{found}; {str(error).splitlines()[0]}", advice)
    return Check("versions", "ok", found)


def installed_version(name: str) -> str | None:
    """Without importing it."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def load_generated() -> object:
    from trackagent.protos.v1 import agent_pb2_grpc

    return agent_pb2_grpc


def check_gpus(*kinds: Callable[[], list[str]]) -> Check:
    """kinds: each names the GPUs of one kind; RuntimeError says why there are no samples of them."""
    found: list[str] = []
    problems: list[str] = []
    for names in kinds:
        try:
            found += names()
        except (OSError, RuntimeError) as error:
            problems.append(str(error))
    counts = [f"{found.count(name)} × {name}" for name in dict.fromkeys(found)]
    said = "; ".join([*([", ".join(counts)] if counts else []), *problems])
    if problems:
        advice = "see nvidia-smi or amd-smi; without it no samples of these GPUs are taken"
        return Check("GPUs", "warn", said, advice)
    return Check("GPUs", "ok", said or "none found")


def nvidia_names() -> list[str]:
    """The GPUs that NVML shows; none without a driver."""
    try:
        import pynvml
    except ImportError:
        return []
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        absent = (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, pynvml.NVML_ERROR_DRIVER_NOT_LOADED)
        if error.value in absent:
            return []
        raise RuntimeError(f"NVML does not answer: {error}") from None
    try:
        count = pynvml.nvmlDeviceGetCount()
        return [
            pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(i)) for i in range(count)
        ]
    except pynvml.NVMLError as error:
        raise RuntimeError(f"NVML does not answer: {error}") from None
    finally:
        pynvml.nvmlShutdown()


def amd_names(
    sys: Path = Path("/sys"), load: Callable[[str], Any] = importlib.import_module
) -> list[str]:
    """The GPUs that AMD SMI shows; none without a driver."""
    if not (sys / "module" / "amdgpu").is_dir():
        return []
    try:
        library = load("amdsmi")
    except Exception as error:  # noqa: BLE001 - without its library it ends with whatever it comes upon
        raise RuntimeError(
            f"an AMD driver, but no amdsmi in this Python ({error!r}): install the one that comes with ROCm"
        ) from None
    try:
        amd = Amd(library=library)
    except Unavailable as error:
        raise RuntimeError(str(error)) from None
    names = [card.name for card in amd.devices()]
    amd.close()
    return names


def check_open_files(limits: tuple[int, int]) -> Check:
    shown = ["unlimited" if limit == resource.RLIM_INFINITY else str(limit) for limit in limits]
    found = f"{shown[0]} (may be raised to {shown[1]})"
    if limits[0] != resource.RLIM_INFINITY and limits[0] < LEAST_OPEN_FILES:
        return Check(
            "open files", "warn", found, f"ulimit -n {LEAST_OPEN_FILES} before many ranks start"
        )
    return Check("open files", "ok", found)
