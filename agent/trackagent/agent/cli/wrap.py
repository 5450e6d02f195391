"""`trackagent run -- COMMAND`: an agent for just as long as a command runs.

The command always runs, and its exit code is what counts: without an agent its records wait in its journal
for the next one. While it runs, an agent that has gone is replaced.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from typing import Any

import click

from trackagent.agent.cli.asking import ask_status, lock_holder
from trackagent.agent.cli.options import agent_flags, configured
from trackagent.agent.config import AgentConfig, flag
from trackagent.agent.errors import AgentError

HEALTHY_TIMEOUT_S = 15.0
HEALTHY_POLL_S = 0.05
# How often it is looked whether the agent still runs, and the longest pause before it is started again.
WATCH_INTERVAL_S = 1.0
MAX_BACKOFF_S = 30.0
# What an agent may take beyond its drain timeout.
STOP_GRACE_S = 10.0

NOT_FOUND, NOT_EXECUTABLE = 127, 126
_FORWARDED = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
)
# Would stay ignored in a program that is started from here.
_IGNORED_BY_PYTHON = (signal.SIGPIPE, signal.SIGXFSZ)
# siginfo's si_code for what the kernel sends, such as Ctrl-C to everyone at the terminal: the command has
# got it already.
_SI_KERNEL = 0x80


@click.command("run", context_settings={"ignore_unknown_options": False})
@configured
@agent_flags
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@click.pass_obj
def run_command(where: dict[str, Any], config: AgentConfig, command: tuple[str, ...]) -> int:
    """Run COMMAND with an agent beside it.

    Returns COMMAND's exit code. Uses the agent that serves the folder, or starts one and stops
    it afterwards, when it has delivered what it can. Signals are passed on to COMMAND, and the
    folders, as TRACKAGENT_DIR and TRACKAGENT_STATE. Where `trackagent run` itself is killed with
    SIGKILL, COMMAND and the agent go on; `trackagent stop` ends the agent.

    \b
    Examples:
      trackagent run -- python train.py
      trackagent run -- torchrun --nproc-per-node 8 train.py
      srun --ntasks-per-node 1 trackagent run -- torchrun ...

    \b
    Exit codes: COMMAND's; 128 + n if signal n ended it, 127 if it was not found,
      126 if it cannot be executed.
    """
    # Blocked before anything starts a thread: threads inherit it, so that every signal waits for
    # sigtimedwait, where who sent it can be seen. Children are started with nothing blocked.
    watched = {*_FORWARDED, signal.SIGCHLD}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, watched)
    companion = Companion(config, _agent_arguments(where, config))
    try:
        companion.ensure()
        return _run(command, _environment(where, config), companion)
    except _Interrupted as interrupted:
        return 128 + interrupted.signal
    finally:
        companion.stop()
        # A signal that still waits was meant for what has ended.
        while signal.sigtimedwait(watched, 0) is not None:
            pass
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _agent_arguments(where: dict[str, Any], config: AgentConfig) -> list[str]:
    given = {name: value for name, value in where["flags"].items() if value is not None}
    given |= {"directory": config.directory, "state_directory": config.state_directory}
    if where["origins"]["log_level"] == "default":
        # It shares the command's standard error: only what matters.
        given["log_level"] = "warning"
    arguments = [f"{flag(name)}={value}" for name, value in given.items()]
    if where["file"]:
        arguments.append(f"--config={where['file']}")
    return [sys.executable, "-m", "trackagent.agent.cli", "start", *arguments]


def _environment(where: dict[str, Any], config: AgentConfig) -> dict[str, str]:
    """The command's: it uses the folders that the agent uses, whoever chose them."""
    chosen = {"TRACKAGENT_DIR": config.directory, "TRACKAGENT_STATE": config.state_directory}
    if where["file"]:
        chosen["TRACKAGENT_CONFIG"] = where["file"].absolute()
    return dict(os.environ) | {name: str(value) for name, value in chosen.items()}


def _run(command: tuple[str, ...], environ: dict[str, str], companion: Companion) -> int:
    try:
        child = os.posix_spawnp(
            command[0], command, environ, setsigmask=[], setsigdef=_IGNORED_BY_PYTHON
        )
    except OSError as error:
        code = NOT_FOUND if error.errno == errno.ENOENT else NOT_EXECUTABLE
        _say(f"cannot run {command[0]}: {error.strerror}")
        return code
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code
        received = signal.sigtimedwait({*_FORWARDED, signal.SIGCHLD}, WATCH_INTERVAL_S)
        if received is None:
            companion.ensure(wait=False)
        elif received.si_signo != signal.SIGCHLD and received.si_code != _SI_KERNEL:
            os.kill(child, received.si_signo)


class Companion:
    """The agent beside the command: someone else's where one serves the folder, else one of its own."""

    def __init__(self, config: AgentConfig, arguments: list[str]) -> None:
        self._config = config
        self._arguments = arguments
        self._pid: int | None = None
        self._starts = 0
        self._next_start = 0.0

    def ensure(self, *, wait: bool = True) -> None:
        """Starts an agent if none runs; wait: until it answers, HEALTHY_TIMEOUT_S at most. Says on standard
        error when that fails; does not raise for it."""
        if self._reaped() and not self._served() and time.monotonic() >= self._next_start:
            self._start()
        if wait and not self._healthy():
            _say(
                "no agent answers; the records wait in the journals of their processes",
                self._config,
            )

    def stop(self) -> None:
        """Ends the agent that was started here, after it has delivered what it can."""
        if self._reaped() or self._pid is None:
            return
        os.kill(self._pid, signal.SIGTERM)
        deadline = time.monotonic() + self._config.stopping_s + STOP_GRACE_S
        while not self._reaped():
            left = deadline - time.monotonic()
            received = signal.sigtimedwait({*_FORWARDED, signal.SIGCHLD}, max(0.0, min(left, 1.0)))
            if received is not None and received.si_signo != signal.SIGCHLD:
                _say(f"the agent (pid {self._pid}) goes on delivering and ends by itself")
                return
            if left <= 0:
                # Loses nothing: what it has acknowledged is on disk, for the next agent to deliver.
                _say(f"the agent (pid {self._pid}) does not end; killing it")
                os.kill(self._pid, signal.SIGKILL)
                os.waitpid(self._pid, 0)
                return

    def _start(self) -> None:
        # In a session of its own: Ctrl-C at the terminal is not for the agent. Its standard output is the
        # command's standard error, so that it never mixes with what the command prints.
        self._pid = os.posix_spawn(
            sys.executable,
            self._arguments,
            os.environ,
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_DUP2, 2, 1),
            ],
            setsid=True,
            setsigmask=[],
            setsigdef=_IGNORED_BY_PYTHON,
        )
        self._next_start = time.monotonic() + min(2.0**self._starts, MAX_BACKOFF_S)
        self._starts += 1

    def _reaped(self) -> bool:
        """Whether no agent of its own runs (any more)."""
        if self._pid is not None and os.waitpid(self._pid, os.WNOHANG)[0]:
            self._pid = None
        return self._pid is None

    def _served(self) -> bool:
        try:
            return lock_holder(self._config) is not None
        except AgentError:
            return False

    def _healthy(self) -> bool:
        deadline = time.monotonic() + HEALTHY_TIMEOUT_S
        while time.monotonic() < deadline:
            try:
                ask_status(self._config, min(1.0, max(0.1, deadline - time.monotonic())))
                return True
            except AgentError:
                if self._reaped() and not self._served():
                    return False
            if received := signal.sigtimedwait(_FORWARDED, HEALTHY_POLL_S):
                raise _Interrupted(received.si_signo)
        return False


class _Interrupted(Exception):
    """A signal came before there was a command to pass it on to."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = number


def _say(message: str, config: AgentConfig | None = None) -> None:
    click.echo(
        f"trackagent: {message}" + (f" (folder {config.directory})" if config else ""), err=True
    )
