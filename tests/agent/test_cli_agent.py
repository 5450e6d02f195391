"""start, status, stop and run, with real agents in folders of their own."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tests.fakes import wait_until
from trackagent.agent.cli import NothingThere, main
from trackagent.agent.cli.asking import ask_status, lock_holder
from trackagent.agent.config import AgentConfig
from trackagent.agent.processes import holds

TIMEOUT_S = 20


@pytest.fixture
def config() -> Iterator[AgentConfig]:
    """Folders whose socket path is short enough wherever pytest keeps its own."""
    with tempfile.TemporaryDirectory(prefix="ta-") as folder:
        base = Path(folder)
        yield AgentConfig(directory=base / "d", state_directory=base / "s")


def program(config: AgentConfig, *arguments: str) -> list[str]:
    """A command line; the folders stand right behind the command."""
    where = ["--dir", str(config.directory), "--state", str(config.state_directory)]
    return [sys.executable, "-m", "trackagent.agent.cli", arguments[0], *where, *arguments[1:]]


def invoke(config: AgentConfig, *arguments: str) -> Result:
    return CliRunner().invoke(main, program(config, *arguments)[3:])


def answers(config: AgentConfig) -> bool:
    try:
        ask_status(config)
    except NothingThere:
        return False
    return True


def agent_pid(config: AgentConfig) -> int:
    holder = lock_holder(config)
    return holder.pid if holder else 0


@contextlib.contextmanager
def started(config: AgentConfig) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(program(config, "start"), stderr=subprocess.PIPE, text=True) as agent:
        try:
            wait_until(lambda: answers(config))
            yield agent
        finally:
            agent.kill()


@pytest.fixture(scope="module")
def standing() -> Iterator[AgentConfig]:
    """An agent that runs for all tests that only need one."""
    folder = Path(tempfile.mkdtemp(prefix="ta-"))
    config = AgentConfig(directory=folder / "d", state_directory=folder / "s")
    with started(config):
        yield config
    shutil.rmtree(folder)


def test_the_command_has_an_agent_and_the_agent_ends_with_it(config: AgentConfig) -> None:
    status = program(config, "status", "--json")
    done = ran(config, *status)
    assert json.loads(done.stdout)["directory"] == str(config.directory)
    assert (done.returncode, done.stderr, lock_holder(config)) == (0, "", None)


# --- start, status, stop


def test_an_agent_answers_and_stops(config: AgentConfig) -> None:
    with started(config) as agent:
        shown = json.loads(invoke(config, "status", "--json").stdout)
        assert shown["pid"] == agent.pid
        assert invoke(config, "stop").stdout == f"the agent (pid {agent.pid}) has stopped\n"
        assert agent.wait(TIMEOUT_S) == 0
        assert invoke(config, "status").exit_code == 3


def test_status_shows_losses_zero_as_zero(standing: AgentConfig) -> None:
    assert "lost    0 records" in invoke(standing, "status").stdout.splitlines()


def test_a_second_agent_is_refused_in_one_line(standing: AgentConfig) -> None:
    second = subprocess.run(
        program(standing, "start"), capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert (second.returncode, len(second.stderr.splitlines())) == (1, 1)
    assert f"pid {agent_pid(standing)}" in second.stderr


def test_status_without_an_agent_says_how_to_start_one(config: AgentConfig) -> None:
    result = invoke(config, "status")
    assert (result.exit_code, result.stdout) == (3, "")
    assert "trackagent start" in result.stderr


def test_the_socket_that_a_killed_agent_left_is_no_agent(config: AgentConfig) -> None:
    config.directory.mkdir()
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(config.socket_path))
    assert invoke(config, "status").exit_code == 3


def test_an_agent_that_does_not_answer_is_an_error(config: AgentConfig) -> None:
    config.directory.mkdir()
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(config.socket_path))
        silent.listen()
        result = invoke(config, "status", "--timeout", "0.2")
    assert (result.exit_code, result.stderr) == (
        1,
        f"trackagent: the agent at {config.socket_path} did not answer within 0.2 s; see its log\n",
    )


def test_stop_without_an_agent_is_done(config: AgentConfig) -> None:
    result = invoke(config, "stop")
    assert (result.exit_code, result.stdout) == (0, f"no agent runs for {config.directory}\n")


def test_stop_does_not_believe_a_lock_file_that_nobody_holds(config: AgentConfig) -> None:
    config.directory.mkdir()
    about = {"pid": os.getpid(), "started_ns": 1, "version": "1"}
    config.lock_path.write_text(json.dumps(about))
    assert invoke(config, "stop").exit_code == 0


@contextlib.contextmanager
def held_lock(config: AgentConfig, pid: int) -> Iterator[None]:
    config.directory.mkdir(exist_ok=True)
    with open(config.lock_path, "w") as lock:
        json.dump({"pid": pid, "started_ns": 1, "version": "1"}, lock)
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def test_stop_leaves_a_process_alone_that_does_not_hold_the_lock(config: AgentConfig) -> None:
    with subprocess.Popen(["sleep", "60"]) as other:
        with held_lock(config, other.pid):
            result = invoke(config, "stop")
        assert (result.exit_code, other.poll()) == (1, None)
        assert "another container" in result.stderr
        other.kill()


def test_stop_of_an_agent_that_does_not_end_is_bounded(config: AgentConfig) -> None:
    script = (
        "import fcntl, json, os, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "lock = open(sys.argv[1], 'w')\n"
        "json.dump({'pid': os.getpid(), 'started_ns': 1, 'version': '1'}, lock)\n"
        "lock.flush()\n"
        "fcntl.flock(lock, fcntl.LOCK_EX)\n"
        "print('held', flush=True)\n"
        "time.sleep(60)\n"
    )
    config.directory.mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", script, str(config.lock_path)], stdout=subprocess.PIPE
    ) as stubborn:
        assert stubborn.stdout is not None
        stubborn.stdout.readline()
        result = invoke(config, "stop", "--timeout", "0.1")
        stubborn.kill()
    assert result.exit_code == 1
    assert "has not ended within 0.1 s" in result.stderr


def test_a_lock_is_held_by_who_has_it_open(tmp_path: Path) -> None:
    with open(tmp_path / "lock", "w"):
        assert holds(os.getpid(), tmp_path / "lock")
    assert not holds(os.getpid(), tmp_path / "lock")


# --- run


def ran(config: AgentConfig, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        program(config, "run", "--", *command),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


def test_an_agent_that_runs_already_is_used_and_left(standing: AgentConfig) -> None:
    before = agent_pid(standing)
    done = ran(standing, *program(standing, "status", "--json"))
    assert (json.loads(done.stdout)["pid"], agent_pid(standing)) == (before, before)


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (["sh", "-c", "exit 7"], 7),
        (["sh", "-c", "kill -9 $$"], 137),
        (["no-such-command-anywhere"], 127),
        (["/dev/null"], 126),
    ],
)
def test_the_exit_code_is_the_command_s(
    standing: AgentConfig, command: list[str], code: int
) -> None:
    assert ran(standing, *command).returncode == code


def test_the_options_of_the_command_are_its_own(standing: AgentConfig) -> None:
    assert ran(standing, "echo", "--dir", "x", "--help").stdout == "--dir x --help\n"


def test_the_command_reads_what_the_program_is_given(standing: AgentConfig) -> None:
    done = subprocess.run(
        program(standing, "run", "--", "cat"),
        input="from outside",
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.stdout == "from outside"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_command_once(standing: AgentConfig, number: signal.Signals) -> None:
    script = (
        "import signal, sys, time\n"
        "count = []\n"
        f"signal.signal({int(number)}, lambda *_: count.append(1))\n"
        "print('ready', flush=True)\n"
        "while not count: time.sleep(0.01)\n"
        "time.sleep(0.2)\n"
        "sys.exit(40 + len(count))\n"
    )
    with subprocess.Popen(
        program(standing, "run", "--", sys.executable, "-c", script), stdout=subprocess.PIPE
    ) as run:
        assert run.stdout is not None
        run.stdout.readline()
        run.send_signal(number)
        assert run.wait(TIMEOUT_S) == 41


def test_a_signal_before_the_command_runs_keeps_it_from_running(config: AgentConfig) -> None:
    config.directory.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as silent, held_lock(config, os.getpid()):
        # An agent that is there and never answers.
        silent.bind(str(config.socket_path))
        silent.listen()
        with subprocess.Popen(
            program(config, "run", "--", "echo", "ran"), stdout=subprocess.PIPE, text=True
        ) as run:
            connection, _ = silent.accept()
            with connection:
                run.terminate()
                assert run.stdout is not None
                assert (run.stdout.read(), run.wait(TIMEOUT_S)) == ("", 128 + signal.SIGTERM)


def test_the_command_does_not_ignore_the_signals_that_python_ignores(
    standing: AgentConfig,
) -> None:
    assert ran(standing, "sh", "-c", "kill -PIPE $$").returncode == 128 + signal.SIGPIPE


def test_an_agent_that_dies_is_replaced(config: AgentConfig) -> None:
    with subprocess.Popen(
        program(config, "run", "--", "sleep", "60"), stderr=subprocess.PIPE, text=True
    ) as run:
        wait_until(lambda: answers(config))
        first = agent_pid(config)
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: agent_pid(config) not in (0, first))
        run.terminate()
        assert run.wait(TIMEOUT_S) == 128 + signal.SIGTERM
    assert lock_holder(config) is None


def test_a_command_runs_although_no_agent_can(config: AgentConfig) -> None:
    config.state_directory.touch()
    done = ran(config, "echo", "trained")
    assert (done.returncode, done.stdout) == (0, "trained\n")
    assert "no agent answers" in done.stderr


def test_what_the_command_logs_is_in_the_store_when_run_returns(config: AgentConfig) -> None:
    script = (
        "from trackagent import client\n"
        "client.init(experiment='gpt')\n"
        "for step in range(100): client.log({'loss': 1 / (step + 1)}, step=step)\n"
        "client.finish()\n"
    )
    done = subprocess.run(
        program(config, "run", "--", sys.executable, "-c", script),
        env={k: v for k, v in os.environ.items() if not k.startswith("TRACKAGENT_")},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (run,) = json.loads(invoke(config, "runs", "--json").stdout)
    assert (run["status"], run["records_stored"], run["records_logged"]) == ("finished", 100, 100)
