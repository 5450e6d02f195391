"""Forked processes that begin runs of their own, end in every way, or are forked at an awkward moment."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from uuid import uuid4

import pytest

from tests.fakes import (
    DEADLINE_S,
    AgentProcess,
    Folders,
    Point,
    next_line,
    run_script,
    start_script,
    wait_until,
)

# A rank whose sender has connected, so that gRPC is of no more use in what it forks.
CONNECTED = """
import multiprocessing, os, signal, sys, threading, time
from trackagent import client

def connected():
    for _ in range(1500):
        if "grpc" in sys.modules and run._sender._stream is not None:
            return
        time.sleep(0.02)
    raise AssertionError("no agent answers")

run = client.init(experiment="forks")
client.log({"parent": 1.0}, step=0)
connected()
"""
OWN = "own = client.init(experiment='own')\nclient.log({'child': 2.0}, step=0)\n"


def child(program: str) -> str:
    """A script whose forked child runs `program`, and that waits for it."""
    lines = "".join(f"        {line}\n" for line in program.splitlines())
    return CONNECTED + (
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    try:\n"
        f"{lines}"
        "        sys.stdout.flush()\n"
        "    except Exception as error:\n"
        "        print(repr(error), flush=True)\n"
        "    os._exit(0)\n"
        "os.waitpid(pid, 0)\n"
        "print(run.id, client.finish())\n"
    )


def test_a_forked_child_may_begin_and_finish_a_run_of_its_own(agent: AgentProcess) -> None:
    program = child(OWN + "print(own.id, client.finish(), client.finish())")
    [own, delivered, again], [run_id, parents] = map(
        str.split, run_script(agent.folders, program).stdout.splitlines()
    )
    assert (delivered, again, parents) == ("True", "True", "True")
    agent.wait_for_status(own, "finished")
    agent.wait_for_status(run_id, "finished")
    assert own != run_id
    assert agent.exported(own) == [Point("child", "rank 0", 0, 2.0)]
    assert agent.exported(run_id) == [Point("parent", "rank 0", 0, 1.0)]


def test_what_a_forked_childs_own_run_logs_is_stored_while_it_lives(agent: AgentProcess) -> None:
    program = child(OWN + "print(own.id, flush=True)\nsys.stdin.readline()\nclient.finish()")
    with start_script(agent.folders, program) as process:
        own = next_line(process)
        wait_until(lambda: agent.run(own) is not None and agent.exported(own))
        assert agent.exported(own) == [Point("child", "rank 0", 0, 2.0)]
        process.communicate("\n")
    agent.wait_for_status(own, "finished")


def test_a_forked_childs_finish_without_an_agent_is_false_at_once_and_delivers_later(
    folders: Folders, own_agent: Callable[..., AgentProcess]
) -> None:
    program = child(OWN + "print(own.id, client.finish())").replace(
        "\nconnected()\n", "\nimport grpc\n"
    )
    [own, delivered], _ = map(str.split, run_script(folders, program).stdout.splitlines())
    assert delivered == "False"
    agent = own_agent("--deliver-interval-s", "0.02").start()
    agent.wait_for_status(own, "finished")
    assert agent.exported(own) == [Point("child", "rank 0", 0, 2.0)]


# How the child's own run ends; its status and error.
ENDINGS = {
    "sys.exit()": ("sys.exit()", "finished", ""),
    "sys.exit(3)": ("sys.exit(3)", "failed", "SystemExit: 3"),
    "an exception": ("raise KeyError('x')", "failed", "KeyError: 'x'"),
    "os._exit": ("os._exit(0)", "killed", "the process ended without finish()"),
    "SIGKILL": (
        "os.kill(os.getpid(), signal.SIGKILL)",
        "killed",
        "the process ended without finish()",
    ),
    "SIGTERM": (
        "os.kill(os.getpid(), signal.SIGTERM)",
        "killed",
        "the process ended without finish()",
    ),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_the_run_that_a_forked_child_began_says_how_it_ended(
    agent: AgentProcess, ending: str
) -> None:
    last, status, error = ENDINGS[ending]
    lines = (OWN + f"print(own.id, flush=True)\n{last}").splitlines()
    program = CONNECTED + (
        "pid = os.fork()\nif pid == 0:\n    "
        + "\n    ".join(lines)
        + "\nos.waitpid(pid, 0)\nprint(run.id, client.finish())\n"
    )
    own, end = run_script(agent.folders, program).stdout.splitlines()
    run = agent.wait_for_status(own, status)
    assert run.error == error
    assert agent.exported(own) == [Point("child", "rank 0", 0, 2.0)]
    assert agent.wait_for_status(end.split()[0], "finished").error == ""


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
@pytest.mark.parametrize(
    ("target", "status", "error"),
    [
        ("pass", "finished", ""),
        ("raise KeyError('x')", "failed", "KeyError: 'x'"),
        ("sys.exit(3)", "failed", "SystemExit: 3"),
        ("os._exit(0)", "killed", "the process ended without finish()"),
    ],
)
def test_a_target_of_multiprocessing_that_ends_ends_its_run(
    agent: AgentProcess, tmp_path: Path, target: str, status: str, error: str, method: str
) -> None:
    script = tmp_path / "training.py"  # what is spawned imports it
    script.write_text(f"""
import multiprocessing, os, sys, time
from trackagent import client

def connected():
    for _ in range(1500):
        if "grpc" in sys.modules and run._sender._stream is not None:
            return
        time.sleep(0.02)
    raise AssertionError("no agent answers")

def work():
    own = client.init(experiment="own")
    client.log({{"child": 2.0}}, step=0)
    print(own.id, flush=True)
    {target}

if __name__ == "__main__":
    run = client.init(experiment="forks")
    client.log({{"parent": 1.0}}, step=0)
    connected()
    worker = multiprocessing.get_context({method!r}).Process(target=work)
    worker.start()
    worker.join()
    print(run.id)
""")
    begin = f"import runpy; runpy.run_path({str(script)!r}, run_name='__main__')"
    own, run_id = run_script(agent.folders, begin).stdout.split()
    assert agent.wait_for_status(own, status).error == error
    assert agent.exported(own) == [Point("child", "rank 0", 0, 2.0)]
    assert agent.wait_for_status(run_id, "finished").error == ""
    assert agent.exported(run_id) == [Point("parent", "rank 0", 0, 1.0)]


def test_a_forked_child_that_finishes_the_run_that_it_inherited_logs_no_more_into_it(
    agent: AgentProcess,
) -> None:
    program = child("print(client.finish(), client.finish()); run.log({'late': 1.0})")
    answers, end = run_script(agent.folders, program).stdout.splitlines()
    assert answers == "True True"
    agent.wait_for_status(end.split()[0], "finished")
    agent.wait_for_no_journals()
    agent.wait_for_delivery()
    assert agent.exported(end.split()[0]) == [Point("parent", "rank 0", 0, 1.0)]


def test_a_process_forked_after_finish_may_begin_a_run(agent: AgentProcess) -> None:
    lines = (OWN + "print(own.id, client.finish(), flush=True)\nos._exit(0)").splitlines()
    begun = "\n    ".join(["if pid == 0:", *lines])
    program = f"{CONNECTED}client.finish()\npid = os.fork()\n{begun}\nos.waitpid(pid, 0)\n"
    own, delivered = run_script(agent.folders, program).stdout.split()
    assert delivered == "True"
    agent.wait_for_status(own, "finished")
    assert agent.exported(own) == [Point("child", "rank 0", 0, 2.0)]


def test_processes_forked_while_other_threads_log_can_log_and_so_can_what_they_fork(
    agent: AgentProcess,
) -> None:
    program = (
        CONNECTED
        + """
done = threading.Event()

def work(thread):
    step = 0
    while not done.is_set():
        client.log({f"t{thread}": step, f"t{thread}/{step % 7}": 1.0}, step=step)
        client.event("x") if step % 50 == 0 else None
        step += 1

threads = [threading.Thread(target=work, args=(thread,)) for thread in range(3)]
for thread in threads:
    thread.start()
for number in range(6):
    pid = os.fork()
    if pid == 0:
        client.log({"child": number}, step=number)
        if os.fork() == 0:
            client.log({"grandchild": number}, step=number)
            os._exit(0)
        os.wait()
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
done.set()
for thread in threads:
    thread.join()
print(run.id, client.finish())
"""
    )
    run_id, delivered = run_script(agent.folders, program).stdout.split()
    assert delivered == "True"
    assert agent.wait_for_status(run_id, "finished").lost_records == 0
    agent.wait_for_no_journals()
    agent.wait_for_delivery()
    logged = Counter((p.key, p.step) for p in agent.exported(run_id) if "child" in p.key)
    assert logged == Counter((key, n) for key in ("child", "grandchild") for n in range(6))


def test_a_fork_in_the_middle_of_a_log_call_writes_that_record_once(agent: AgentProcess) -> None:
    program = """
import os
from trackagent import client

class Forking:
    def __float__(self):
        self.pid = os.fork()
        if self.pid == 0:
            os.read(parent_is_done, 1)
        return 1.0 if self.pid else 2.0

parent_is_done, tell = os.pipe()
run = client.init(experiment="fork")
value = Forking()
client.log({"before": 0.0}, step=0)
client.log({"value": value}, step=0)
if value.pid == 0:
    client.log({"child": 3.0}, step=0)
    os._exit(0)
os.write(tell, b".")
os.waitpid(value.pid, 0)
client.log({"after": 4.0}, step=0)
print(run.id, client.finish())
"""
    # The record waits in the journal until the child has ended.
    done = run_script(agent.folders, program, TRACKAGENT_FLUSH_INTERVAL_S="5")
    run_id, delivered = done.stdout.split()
    assert delivered == "True"
    run = agent.wait_for_status(run_id, "finished")
    agent.wait_for_delivery()
    values = sorted((point.key, point.value) for point in agent.exported(run_id))
    assert values == [("after", 4.0), ("before", 0.0), ("child", 3.0), ("value", 1.0)]
    assert run.lost_records == 0


def test_ranks_that_a_rank_forks_are_of_its_attempt(agent: AgentProcess) -> None:
    program = """
import os
from trackagent import client

os.environ.update(RANK="0", WORLD_SIZE="3")
run = client.init(experiment="ranks", run_id="cf" * 16)
for rank in (1, 2):
    if os.fork() == 0:
        os.environ["RANK"] = str(rank)
        client.init(experiment="ranks", run_id=run.id)
        client.log({"loss": rank}, step=0)
        os._exit(0 if client.finish() else 1)
assert [os.wait()[1] for rank in (1, 2)] == [0, 0]
client.log({"loss": 0.0}, step=0)
assert client.finish()
"""
    run_script(agent.folders, program)
    run = agent.wait_for_status("cf" * 16, "finished")
    assert (run.ranks, run.attempt) == (3, 1)
    points = agent.exported("cf" * 16)
    assert sorted(points) == [Point("loss", f"rank {n}", 0, float(n)) for n in range(3)]


def test_a_process_forked_while_its_rank_finishes_does_not_hold_the_journal(
    folders: Folders, own_agent: Callable[..., AgentProcess]
) -> None:
    program = """
import os, sys, threading, time
from trackagent import client

run = client.init(experiment="fork")
client.log({"loss": 1.0}, step=0)
forked = threading.Event()

forking = threading.Event()
on_finish = run._on_finish
def slowly(deadline):
    forking.set()
    forked.wait()
    on_finish(deadline)
run._on_finish = slowly
thread = threading.Thread(target=client.finish)
thread.start()
forking.wait()
if os.fork() == 0:
    print(run.id, os.getpid(), flush=True)
    sys.stdin.read()
    os._exit(0)
forked.set()
thread.join()
os._exit(0)
"""
    process = start_script(folders, program)
    run_id, pid = next_line(process).split()
    process.wait(DEADLINE_S)
    agent = own_agent("--deliver-interval-s", "0.02").start()
    agent.wait_for_status(run_id, "finished")
    assert Path(f"/proc/{pid}").exists()
    process.communicate(timeout=DEADLINE_S)


def test_what_is_forked_at_the_beginning_of_a_run_finds_no_half_imported_module(
    agent: AgentProcess,
) -> None:
    program = """
import os, sys, threading, time
from trackagent import client

def begun():
    git = "trackagent-git" in [thread.name for thread in threading.enumerate()]
    return not git and "grpc" in sys.modules and run._sender._stream is not None

def half_imported():
    specs = [getattr(module, "__spec__", None) for module in list(sys.modules.values())]
    return [spec.name for spec in specs if getattr(spec, "_initializing", False)]

run = client.init(experiment="forks")
found, forks = set(), 0
deadline = time.monotonic() + 25
while not begun() and time.monotonic() < deadline:
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(writing, " ".join(half_imported()).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as said:
        found.update(said.read().split())
    os.waitpid(pid, 0)
    forks += 1
print(begun(), forks > 0, sorted(found))
"""
    assert run_script(agent.folders, program).stdout == "True True []\n"


# How a rank makes another process, which then calls work().
MAKING = {
    "fork": "multiprocessing.get_context('fork').Process(target=work)",
    "spawn": "multiprocessing.get_context('spawn').Process(target=work)",
    "a script": "Script()",
}


def job(tmp_path: Path, work: str, rank: str, making: str) -> Path:
    """A script that runs `rank`; there `other` is a process to be started and joined, which runs `work`."""
    script = tmp_path / "training.py"  # what is spawned imports it
    script.write_text(f"""
import multiprocessing, os, subprocess, sys
from trackagent import client

class Script:
    def start(self):
        self.join = subprocess.Popen([sys.executable, __file__, *sys.argv[1:], "work"]).wait

def work():
{indented(work)}

def rank():
    other = {MAKING[making]}
{indented(rank)}

if __name__ == "__main__":
    work() if sys.argv[-1] == "work" else rank()
""")
    return script


def indented(program: str) -> str:
    return "\n".join(f"    {line}" for line in program.strip().splitlines())


@pytest.mark.parametrize("making", MAKING)
@pytest.mark.parametrize(
    "launcher",
    [pytest.param({"RANK": "0", "WORLD_SIZE": "1"}, id="RANK"), pytest.param({}, id="no launcher")],
)
def test_a_process_that_is_given_its_ranks_run_is_of_its_attempt(
    agent: AgentProcess, tmp_path: Path, making: str, launcher: dict[str, str]
) -> None:
    run_id = uuid4().hex
    given = f"client.init(experiment='given', run_id={run_id!r})\n"
    script = job(
        tmp_path,
        given + "client.log({'other': 1.0}, step=0)\nclient.finish()",
        given + "other.start()\nother.join()\nclient.log({'rank': 1.0}, step=0)\nclient.finish()",
        making,
    )
    begin = f"import runpy; runpy.run_path({str(script)!r}, run_name='__main__')"
    for attempt in (1, 2):
        run_script(agent.folders, begin, **launcher)
        agent.wait_for_delivery()
        run = agent.wait_for_status(run_id, "finished")
        assert (run.attempt, run.ranks) == (attempt, 1)
    exported = agent.run_cli("export", run_id, "--attempt", "2").stdout.splitlines()
    assert sorted(json.loads(line)["key"] for line in exported) == ["other", "rank"]


@pytest.mark.slow
@pytest.mark.skipif(find_spec("torch") is None, reason="torch is in the demo extra")
@pytest.mark.parametrize("making", ["spawn", "a script"])
def test_what_ranks_of_torchrun_spawn_has_runs_of_its_own(
    agent: AgentProcess, tmp_path: Path, making: str
) -> None:
    script = job(
        tmp_path,
        "run = client.init(experiment='own')\n"
        "open(f'{sys.argv[1]}/own.{os.getpid()}', 'w').write(run.id)\n"
        "client.finish()",
        "for name in ('first', 'second'):\n"
        "    run = client.init(experiment='ranks')\n"
        "    client.log({'rank': run.rank}, step=0)\n"
        "    open(f'{sys.argv[1]}/{name}.{run.rank}', 'w').write(run.id)\n"
        "    if name == 'first':\n"
        "        other.start(); other.join()\n"
        "    client.finish()",
        making,
    )
    told = tmp_path / "told"
    told.mkdir()
    options = ("--standalone", "--nproc-per-node=2", "--monitor-interval=0.1")
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *options, str(script), str(told)],
        env=agent.folders.environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        timeout=2 * DEADLINE_S,
        check=True,
    )
    runs = {path.name: path.read_text() for path in told.iterdir()}
    assert runs["first.0"] == runs["first.1"] != runs["second.0"] == runs["second.1"]
    own = [run_id for name, run_id in runs.items() if name.startswith("own.")]
    assert len({*own, runs["first.0"], runs["second.0"]}) == 4
    for run_id, ranks in ((runs["first.0"], 2), (runs["second.0"], 2), (own[0], 1), (own[1], 1)):
        run = agent.wait_for_status(run_id, "finished")
        assert (run.attempt, run.ranks) == (1, ranks)


@pytest.mark.parametrize("making", MAKING)
def test_a_process_that_is_given_a_run_that_has_ended_is_the_next_attempt(
    agent: AgentProcess, tmp_path: Path, making: str
) -> None:
    run_id = uuid4().hex
    work = f"client.init(experiment='given', run_id={run_id!r})\nassert client.finish()\n"
    script = job(tmp_path, work, f"{work}other.start()\nother.join()\n", making)
    begin = f"import runpy; runpy.run_path({str(script)!r}, run_name='__main__')"
    run_script(agent.folders, begin)
    agent.wait_for_delivery()
    assert agent.wait_for_status(run_id, "finished").attempt == 2
