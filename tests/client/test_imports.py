"""Forks while a thread of ours imports something."""

from __future__ import annotations

import pytest

from tests.fakes import DEADLINE_S, Folders, run_script

FORK = """
import os, signal, sys, threading
from trackagent.client import imports

is_held, may_end = threading.Event(), threading.Event()

def importing():
    with imports.whole():
        is_held.set()
        may_end.wait()

def can_import():
    done = threading.Event()
    def thread():
        with imports.whole():
            done.set()
    threading.Thread(target=thread, daemon=True).start()
    return done.wait(DEADLINE_S)

def fork(*questions):
    pid = os.fork()
    if pid == 0:
        os._exit(0 if all(question() for question in questions) else 1)
    may_end.set()
    return os.waitpid(pid, 0)[1] == 0

class Stop(Exception):
    pass

def stop(*_):
    raise Stop

thread = threading.Thread(target=importing)
thread.start()
is_held.wait()
AWKWARD
print(fork(can_import, lambda: fork(can_import)))
thread.join()
print(can_import(), fork(can_import))
with imports.whole():
    print(fork(can_import, lambda: fork(can_import)))
print(can_import(), fork(can_import))
""".replace("DEADLINE_S", str(DEADLINE_S / 4))
# A hook that is registered later is called earlier: the alarm goes off in the midst of the wait.
RAISING = """
signal.signal(signal.SIGALRM, stop)
alarms = [0.1]
os.register_at_fork(before=lambda: alarms and signal.setitimer(signal.ITIMER_REAL, alarms.pop()))
"""


@pytest.mark.parametrize(
    ("awkward", "said"),
    [
        pytest.param("imports.PATIENCE_S = 0.01", 0, id="it takes too long"),
        pytest.param(RAISING, 1, id="a signal handler raises"),
    ],
)
def test_a_fork_that_does_not_wait_for_an_import_leaves_both_processes_able_to_import(
    folders: Folders, awkward: str, said: int
) -> None:
    done = run_script(folders, FORK.replace("AWKWARD", awkward))
    assert done.stdout == "True\nTrue True\nTrue\nTrue True\n"
    assert done.stderr.count("Exception ignored") == said, done.stderr
