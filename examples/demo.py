"""The whole of trackagent on this machine, in under a minute: `make demo`.

Trains examples/train_digits.py on four processes with an agent beside them, shows what the store then holds,
and compares what the processes say they logged, what their training must have produced, and what is stored.
Exit code 0 only when all are equal. Leaves the store in build/demo, and nothing else.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console

ROOT = Path(__file__).resolve().parents[1]
TRAINING = Path(__file__).with_name("train_digits.py")

# What the training does with its defaults: 1437 images shared by the ranks, 16 of a rank's a step.
IMAGES, BATCH_SIZE = 1437, 16
# Loss, accuracy, learning rate and three timers a step; test accuracy an epoch.
POINTS_A_STEP, POINTS_AN_EPOCH = 6, 1

STOP_TIMEOUT_S = 45.0
SHOWN_LOG_LINES = 40

console = Console(highlight=False, soft_wrap=True)


def main() -> int:
    """The exit code."""
    options = parse_arguments()
    for module, package in (("torch", "torch"), ("sklearn", "scikit-learn")):
        if importlib.util.find_spec(module) is None:
            fail(f"the demo trains with {package}: `make setup`, or pip install 'trackagent[demo]'")
    state: Path = options.folder.absolute() / "state"
    state.mkdir(parents=True, exist_ok=True)
    # The folder of the socket: in memory, and with a short path.
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    directory = tempfile.mkdtemp(prefix="trackagent-demo-", dir=memory)
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("TRACKAGENT_") and name != "MLFLOW_RUN_ID"
    }
    environment |= {
        "TRACKAGENT_DIR": directory,
        "TRACKAGENT_STATE": str(state),
        "OMP_NUM_THREADS": "1",
    }
    try:
        began_ns = time.time_ns()
        phase(1, f"{options.processes} processes train on handwritten digits, beside an agent")
        train(options, environment, options.folder.absolute() / "training.log")

        phase(2, "what the store holds")
        show = ["show", "latest"]
        run = json.loads(trackagent([*show, "--json"], environment, quiet=True))
        if run["start_time_ns"] < began_ns:
            fail("the run that was just trained is not in the store")
        drawn = ("train/loss", "test/accuracy", "system/cpu/percent", "process/cpu*")
        keys = [word for key in drawn for word in ("--key", key)]
        trackagent([*show, *keys], environment)

        phase(3, "whether all of it arrived")
        complete = compare(run, options)
        command = f"TRACKAGENT_STATE={shown(state)} .venv/bin/trackagent show --key 'time/*'"
        console.print(f"\nThe store is kept; look further with\n  {command}")
        return 0 if complete else 1
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def parse_arguments() -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=12, help="default: %(default)s")
    parser.add_argument("--processes", type=int, default=4, help="ranks; default: %(default)s")
    parser.add_argument(
        "--folder", type=Path, default=ROOT / "build" / "demo", help="default: build/demo"
    )
    options = parser.parse_args()
    if options.epochs < 1 or options.processes < 1:
        parser.error("give at least one epoch and one process")
    return options


def train(options: argparse.Namespace, environment: dict[str, str], log: Path) -> None:
    """Trains, with an agent that runs for as long as the training; what both say on stderr goes to `log`."""
    torchrun = ["--standalone", "--nproc-per-node", str(options.processes)]
    # The batch size is said here, since `compare` counts on it.
    training = ["--epochs", str(options.epochs), "--batch-size", str(BATCH_SIZE), "--device", "cpu"]
    console.print(
        f"$ trackagent run -- torchrun {' '.join(torchrun)} \\\n"
        f"    {shown(TRAINING)} {' '.join(training)}"
    )
    console.print("(until every process has imported torch: 5 to 20 s)", style="dim")
    python = sys.executable
    command = [python, "-m", "trackagent.agent.cli", "run", "--"]
    command += [python, "-m", "torch.distributed.run", *torchrun, str(TRAINING), *training]
    with log.open("wb") as stderr:
        # In a session of its own, so that Ctrl-C ends it in order: by us, once.
        process = subprocess.Popen(command, env=environment, stderr=stderr, start_new_session=True)
        try:
            code = process.wait()
        except KeyboardInterrupt:
            console.print("\ninterrupted: ending the training, then the agent")
            process.send_signal(signal.SIGINT)
            try:
                process.wait(STOP_TIMEOUT_S)
            except (KeyboardInterrupt, subprocess.TimeoutExpired):
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            raise
    if code:
        said = log.read_text(errors="replace").splitlines()[-SHOWN_LOG_LINES:]
        print("\n".join(said), file=sys.stderr)
        fail(f"the training ended with exit code {code}; all it said is in {shown(log)}")
    if log.stat().st_size:
        console.print(f"(warnings of the training: {shown(log)})", style="dim")


def compare(run: dict[str, Any], options: argparse.Namespace) -> bool:
    """Prints the counts of both sides; whether nothing is missing and nothing is there twice."""
    steps = math.ceil(math.ceil(IMAGES / options.processes) / BATCH_SIZE)
    points = options.processes * options.epochs * (steps * POINTS_A_STEP + POINTS_AN_EPOCH)
    batches = f"{options.processes} ranks x {options.epochs} epochs"
    rows = (
        ("ranks", options.processes, run["ranks"], "started"),
        (
            "records",
            run["records_logged"],
            run["records_stored"],
            "as the ranks counted their calls",
        ),
        ("points", points, run["points"], f"{batches} x ({steps} steps x {POINTS_A_STEP} + 1)"),
    )
    console.print(f"  {'':8}{'logged':>8}{'stored':>8}", style="bold")
    for what, expected, stored, origin in rows:
        console.print(
            f"  {what:8}{expected!s:>8}{stored:>8}  {origin}",
            style=None if expected == stored else "bold red",
        )
    complete = all(expected == stored for _, expected, stored, _ in rows)
    complete = complete and run["lost_records"] == 0 and run["status"] == "finished"
    if complete:
        console.print("Everything that was logged is stored, once.", style="bold green")
    else:
        console.print(
            f"trackagent demo: what is stored is not what was logged (run {run['run_id']}, "
            f"{run['status']}, {run['lost_records']} records known to be lost): a bug in trackagent",
            style="bold red",
        )
    return complete


def trackagent(
    arguments: Sequence[str], environment: dict[str, str], *, quiet: bool = False
) -> str:
    """Runs a command of trackagent; quiet: returns what it prints instead of showing it."""
    if not quiet:
        console.print(f"$ trackagent {' '.join(arguments)}")
    done = subprocess.run(
        [sys.executable, "-m", "trackagent.agent.cli", *arguments],
        env=environment,
        stdout=subprocess.PIPE if quiet else None,
        text=True,
        check=False,
    )
    if done.returncode:
        fail(f"`trackagent {' '.join(arguments)}` ended with exit code {done.returncode}")
    return done.stdout or ""


def phase(number: int, title: str) -> None:
    """A heading."""
    console.print(f"{'' if number == 1 else chr(10)}{number}/3  {title}", style="bold")
    sys.stdout.flush()


def shown(path: Path) -> str:
    """The path as it is shortest from here."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def fail(message: str) -> NoReturn:
    """Ends the demo."""
    sys.stdout.flush()
    print(f"trackagent demo: {message}", file=sys.stderr)
    sys.exit(1)


def interrupt(*_: object) -> NoReturn:
    """SIGTERM ends the demo as Ctrl-C does."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, interrupt)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        console.print("the demo was interrupted; nothing of it runs any more")
        sys.exit(130)
