"""Signal handlers that log, and end the run, whatever they interrupt."""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
from collections import Counter

import pytest

from tests.fakes import DEADLINE_S, AgentProcess, next_line, run_script, start_script

# Logs in a tight loop until SIGUSR1; the handler of SIGTERM, which may interrupt itself too, logs another
# series, and prints when it begins and ends. Of 50 records one finds keys that its segment does not know, of
# 600 one a full segment.
STORM = """
import itertools, os, signal
from trackagent import client

run = client.init(experiment="storm")
numbers = itertools.count()
handled = []

def handler(signal_number, frame):
    os.write(1, b"(")
    i = next(numbers)
    client.log({"handler": i, f"handler{i // 50}": 1.0}, step=i)
    handled.append(i)
    os.write(1, b")")

over = []
signal.signal(signal.SIGTERM, handler)
signal.signal(signal.SIGUSR1, lambda signal_number, frame: over.append(True))
print("ready", flush=True)
i = 0
while not over:
    client.log({"main": i, f"main{i // 50 % 100}": 1.0}, step=i)
    i += 1
print(f"\\n{run.id} {i} {len(handled)} {client.finish()}", flush=True)
"""
HANDLED = 3000
# Fewer than the log calls that may interrupt one another.
MAX_DEPTH = 32


def storm(process: subprocess.Popen[str]) -> str:
    """Sends SIGTERM as fast as the process can take it, until it was handled 3000 times; what it printed."""
    output = b""
    pending = 0
    over = False
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while True:
            if not over and output.count(b")") >= HANDLED:
                # Not before: a process that changes a handler while its signals arrive may have one ignored.
                process.send_signal(signal.SIGUSR1)
                over = True
            depth = output.count(b"(") - output.count(b")")
            room = not over and depth + pending < MAX_DEPTH
            if room:
                process.send_signal(signal.SIGTERM)
                pending += 1
            if selector.select(0 if room else DEADLINE_S):
                piece = os.read(process.stdout.fileno(), 4096)
                if not piece:
                    return output.decode()
                output += piece
                pending = 0
            else:
                assert room, "the process hangs"


def test_log_in_a_handler_that_interrupts_log_thousands_of_times_loses_nothing(
    agent: AgentProcess,
) -> None:
    with start_script(agent.folders, STORM, TRACKAGENT_SEGMENT_BYTES="65536") as process:
        assert next_line(process) == "ready"
        output = storm(process)
        errors = process.stderr.read()
    assert (process.returncode, errors) == (0, "")
    run_id, main, handled, delivered = output.splitlines()[-1].split()
    assert delivered == "True"
    run = agent.wait_for_status(run_id, "finished")
    assert run.lost_records == 0
    expected = [(f"main{i // 50 % 100}", i) for i in range(int(main))]
    expected += [(f"handler{i // 50}", i) for i in range(int(handled))]
    expected += [("main", i) for i in range(int(main))]
    expected += [("handler", i) for i in range(int(handled))]
    points = agent.exported(run_id)
    assert Counter((point.key, point.step) for point in points) == Counter(expected)


# Logs until SIGTERM, whose handler logs once more, ends the run, and exits.
GRACEFUL = """
import signal, sys
from trackagent import client

run = client.init(experiment="graceful")
i = 0

def handler(signal_number, frame):
    client.log({"last": 1.0}, step=0)
    delivered = client.finish("killed", "SIGTERM")
    print(run.id, i, delivered, flush=True)
    sys.exit(3)

signal.signal(signal.SIGTERM, handler)
print("ready", flush=True)
while True:
    client.log({"loss": i}, step=i)
    i += 1
"""


@pytest.mark.parametrize("attempt", range(3))
def test_a_handler_may_log_and_finish_and_exit(agent: AgentProcess, attempt: int) -> None:
    with start_script(agent.folders, GRACEFUL) as process:
        assert next_line(process) == "ready"
        process.terminate()
        output, errors = process.communicate(timeout=DEADLINE_S)
    assert (process.returncode, errors) == (3, "")
    run_id, returned, delivered = output.split()
    assert delivered == "True"
    run = agent.wait_for_status(run_id, "killed")
    assert run.error == "SIGTERM"
    points = agent.exported(run_id)
    steps = sorted(point.step for point in points if point.key == "loss")
    # The call that the handler interrupted may have got far enough, or not.
    assert steps in (list(range(int(returned))), list(range(int(returned) + 1)))
    assert [point.value for point in points if point.key == "last"] == [1.0]
    agent.wait_for_no_journals()


def test_a_process_that_sigterm_ends_at_once_loses_nothing(agent: AgentProcess) -> None:
    program = GRACEFUL.replace("signal.signal(signal.SIGTERM, handler)", "").replace(
        "    i += 1", "    i += 1\n    if i == 1000: print(run.id, flush=True)"
    )
    with start_script(agent.folders, program) as process:
        assert next_line(process) == "ready"
        run_id = next_line(process)
        process.terminate()
        process.communicate(timeout=DEADLINE_S)
    assert process.returncode == -signal.SIGTERM
    agent.wait_for_status(run_id, "killed")
    steps = [point.step for point in agent.exported(run_id)]
    assert len(steps) >= 1000
    assert sorted(steps) == list(range(len(steps)))


RAISING = """
import signal, sys, time
from trackagent import client

class Raised(Exception):
    pass

def handle(number, frame):
    if logging_now:
        raise Raised

logging_now = False
run = client.init(experiment="raising handler")
print(run.id, flush=True)
signal.signal(signal.SIGALRM, handle)
signal.setitimer(signal.ITIMER_REAL, 0.002, 0.002)
returned = []
raised = step = 0
while raised < 100:
    step += 1
    try:
        logging_now = True
        client.log({"loss": float(step)}, step=step)
        logging_now = False
        returned.append(step)
    except Raised:
        logging_now = False
        raised += 1
signal.setitimer(signal.ITIMER_REAL, 0.0)
print(client.finish(), flush=True)
print(*returned, flush=True)
"""


def test_records_are_kept_when_a_handler_raises_inside_log(agent: AgentProcess) -> None:
    with start_script(agent.folders, RAISING) as process:
        run_id = next_line(process)
        assert next_line(process) == "True"
        returned = {int(step) for step in next_line(process).split()}
        process.communicate(timeout=DEADLINE_S)
    agent.wait_for_delivery()
    stored = [point.step for point in agent.exported(run_id)]
    assert returned - set(stored) == set()
    assert len(stored) == len(set(stored))


# Raises what a signal handler might raise, at each bytecode instruction of ours in log() in turn; argv[1]
# says which log(), and the slower ones skip some. The second log() of each turn must go well.
RAISING_ANYWHERE = """
import os, sys
from itertools import count
from trackagent import client

class Raised(Exception):
    pass

def raise_at(instruction):
    left = instruction

    def trace(frame, event, argument):
        nonlocal left
        if "/trackagent/client/" not in frame.f_code.co_filename:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode":
            left -= 1
            if left == 0:
                raise Raised
        return trace

    return trace

def log(metrics, step, instruction):
    sys.settrace(raise_at(instruction))
    try:
        client.log(metrics, step=step)
    except Raised:
        sys.settrace(None)
        return False
    sys.settrace(None)
    print(step, flush=True)
    return True

def known_keys():
    for i in count(1):
        whole = log({"known": 1.0}, 2 * i, i)
        log({"known": 1.0}, 2 * i + 1, 1 << 60)
        if whole:
            break

def full_segments():
    # The SCHEMA of each takes half of a segment: whenever the other one comes, a new segment is needed.
    some, others = ({f"{name}{j}".ljust(250, "\U0001f600"): 1.0 for j in range(33)} for name in "ab")
    for i in count(1, 3):
        whole = log(some, 2 * i, i)
        log(others, 2 * i + 1, 1 << 60)
        if whole:
            break

def forked_processes():
    for i in count(1, 23):
        child = os.fork()
        if not child:
            whole = log({"forked": 1.0}, 2 * i, i)
            log({"forked": 1.0}, 2 * i + 1, 1 << 60)
            os._exit(whole)
        if os.waitpid(child, 0)[1]:
            break

run = client.init(experiment="raising anywhere")
print(run.id, flush=True)
client.log({"known": 1.0}, step=0)
{"known": known_keys, "full": full_segments, "forked": forked_processes}[sys.argv[1]]()
print(client.finish(), flush=True)
"""


@pytest.mark.parametrize("case", ["known", "full", "forked"])
def test_records_are_kept_when_a_handler_raises_at_any_instruction_of_log(
    agent: AgentProcess, case: str
) -> None:
    done = run_script(agent.folders, RAISING_ANYWHERE, case, TRACKAGENT_SEGMENT_BYTES="65536")
    run_id, *returned, delivered = done.stdout.split()
    assert (delivered, done.stderr) == ("True", "")
    agent.wait_for_delivery()
    points = agent.exported(run_id)
    stored = {point.step for point in points}
    assert {int(step) for step in returned} - stored == set()
    assert len({(point.key, point.step) for point in points}) == len(points)
    run = agent.run(run_id)
    assert run is not None
    assert (run.status, run.lost_records) == ("finished", 0)


# While init() imports what it needs: at each line of logging, and where each other module begins, a child
# that goes on from there is interrupted by a signal whose handler logs.
EARLY = """
import os, signal, sys
from trackagent import client

assert "logging" not in sys.modules
points, problems = 0, set()

def handler(signal_number, frame):
    try:
        client.log({"loss": 1.0})
        client.event("interrupted")
        with client.timer("handler"):
            pass
        os._exit(0 if client.finish() else 1)
    except BaseException as error:
        os.write(2, f"{frame.f_code.co_filename}, line {frame.f_lineno}: {error!r}\\n".encode())
        os._exit(1)

def interrupted(frame, event, argument):
    global points
    name = frame.f_globals["__name__"]
    if frame.f_code.co_name != "<module>" or (event == "line" and name != "logging"):
        return None
    if len(sys._current_frames()) > 1:  # beside other threads there is no forking
        return None
    points += 1
    child = os.fork()
    if not child:
        sys.settrace(None)
        signal.raise_signal(signal.SIGUSR1)
    if os.waitpid(child, 0)[1]:
        problems.add(name)
    return interrupted

signal.signal(signal.SIGUSR1, handler)
sys.settrace(interrupted)
client.init(experiment="early")
sys.settrace(None)
print(points > 100, sorted(problems))
"""


def test_log_in_a_handler_before_init_has_returned_is_log_without_a_run(
    agent: AgentProcess,
) -> None:
    ran = run_script(agent.folders, EARLY)
    assert ran.stdout == "True []\n"
    said = "nothing is recorded: call trackagent.client.init(experiment=...) first"
    assert set(ran.stderr.splitlines()) == {said}
