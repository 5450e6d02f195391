"""The `trackagent` command: `main` is the command, `entry` the program, each file here a group of commands.

Exit codes: 0 done, 1 error, 2 wrong use (arguments, environment, configuration file), 3 no agent runs or
nothing is there, 130 interrupted, 141 the reader of the output has gone. Errors are one line on stderr.
A command's module is imported when the command is used, so that `trackagent --help` needs no grpc or numpy.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import io
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any, NoReturn, TextIO

import click

from trackagent.agent.errors import AgentError, ConfigError
from trackagent.client.errors import TrackagentError

OK, ERROR, USAGE, NOTHING, INTERRUPTED, BROKEN_PIPE = 0, 1, 2, 3, 130, 141

# Command → module in this package, which holds <command>_command.
COMMANDS = {
    "start": "agent",
    "status": "agent",
    "stop": "agent",
    "run": "wrap",
    "runs": "runs",
    "show": "show",
    "reduction": "reductions",
    "tail": "points",
    "top": "top",
    "export": "points",
    "forward": "forward",
    "dead-letters": "deadletters",
    "doctor": "setup",
    "config": "setup",
}


class Program(click.Group):
    """Loads a command when it is used, and turns exceptions into one line on stderr and an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"{__name__}.{COMMANDS[cmd_name]}")
        command: click.Command = getattr(module, f"{cmd_name.replace('-', '_')}_command")
        return command

    def main(self, args: Sequence[str] | None = None, *rest: Any, **extra: Any) -> Any:
        extra["standalone_mode"] = False
        extra["prog_name"] = "trackagent"
        _stand_in_for_closed()
        try:
            code = super().main(args, *rest, **extra)
        except click.ClickException as error:
            context = getattr(error, "ctx", None)
            hint = f" (see {context.command_path} --help)" if context else ""
            code = _fail(USAGE, f"{error.format_message().rstrip('.')}{hint}")
        except click.Abort:
            code = INTERRUPTED
        except OSError as error:  # of --help and --version
            code = _fail(ERROR, f"cannot print: {error.strerror or error}")
        _drop_unwritten(interrupted=code == INTERRUPTED)
        sys.exit(code if isinstance(code, int) else OK)

    def invoke(self, ctx: click.Context) -> Any:
        """The exit code: what the command returned, or what its exception stands for."""
        try:
            code = super().invoke(ctx)
            sys.stdout.flush()
            return code
        except KeyboardInterrupt:
            return INTERRUPTED
        except BrokenPipeError:
            return BROKEN_PIPE
        except NothingThere as error:
            return _fail(NOTHING, str(error))
        except ConfigError as error:
            return _fail(USAGE, str(error))
        except (AgentError, TrackagentError) as error:
            return _fail(ERROR, str(error))
        except UnicodeError:
            return _fail(USAGE, "an argument is no valid text: give it in UTF-8")
        except OSError as error:
            printing = error.errno == errno.ENOSPC and not error.filename
            what = f"cannot print: {error.strerror}" if printing else error.strerror or error
            where = f": {error.filename}" if error.filename else ""
            return _fail(ERROR, f"{ctx.invoked_subcommand}: {what}{where}")


class NothingThere(AgentError):
    """No agent runs, there is no store yet, or no such run in it."""


class _ClosedOutput(io.TextIOBase):
    """A standard output that was closed (>&-): printing is an error, as it is on a full disk."""

    encoding = "utf-8"
    errors = "strict"

    def write(self, _: str) -> NoReturn:
        raise OSError(errno.EBADF, "standard output is closed")


def _stand_in_for_closed() -> None:
    """Sees to it that no file or socket becomes a standard stream which was closed at the start."""
    if None not in (sys.stdin, sys.stdout, sys.stderr):
        return
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    if sys.stdout is None:
        sys.stdout = _ClosedOutput()


def _drop_unwritten(*, interrupted: bool) -> None:
    """What an output did not take must not fail again when the interpreter ends. Nor wait there, for a reader
    that does not read, once the command was interrupted."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if interrupted and stream is sys.stdout:
                _forget(stream)
            elif stream is not None:
                stream.flush()
        except OSError:
            _forget(stream)


def _forget(stream: TextIO | None) -> None:
    """Lets what is yet to be written go nowhere."""
    if stream is not None:
        with contextlib.suppress(io.UnsupportedOperation):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _fail(code: int, message: str) -> int:
    with contextlib.suppress(OSError):  # standard error may be where the output is
        click.echo(f"trackagent: {message}", err=True)
    return code


def _print_version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted:
        click.echo(f"trackagent {version()}")
        ctx.exit(OK)


def version() -> str:
    """The version of the installed distribution."""
    from importlib import metadata

    try:
        return metadata.version("trackagent")
    except metadata.PackageNotFoundError:
        return "0+source"


@click.command(cls=Program, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_print_version,
    help="Show the version and exit.",
)
def main() -> None:
    """Experiment tracker for distributed training: one agent a node takes the metrics of all ranks.

    \b
    Examples:
      trackagent run -- torchrun --nproc-per-node 8 train.py
      trackagent runs
      trackagent show latest

    \b
    Exit codes: 0 done, 1 error, 2 wrong use, 3 no agent runs or nothing is there.
    """


def entry() -> None:
    """Ends the process with the command's exit code."""
    try:
        main()
    finally:
        # The command is done: a Ctrl-C while the interpreter ends changes nothing.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
