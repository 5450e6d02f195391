"""How the interpreter is about to end, for a run that nobody finishes.

By normal end, by which exception, or with which code: the last word counts. A SystemExit that the script
caught is forgotten, since the script went on to its end; one that was raised without sys.exit() is told to
nobody by the interpreter, so its code stays unknown.
"""

from __future__ import annotations

import atexit
import contextlib
import opcode
import os
import sys
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, NoReturn

# What an ending is made of: a run's status and error.
Ending = tuple[str, str]

NORMAL: Ending = ("finished", "")
UNKNOWN_CODE = (
    "the script was ended by a SystemExit raised without sys.exit(): its exit code is not known"
)

_said: Ending | None = None
_main: FrameType | None = None
_installed = False
_worker = 0  # the process of multiprocessing in which `finish` is called at its end


def forget() -> None:
    """A new run begins: what was said so far is not about its end."""
    global _said
    _said = None


def ending() -> tuple[Ending, str]:
    """How the interpreter ends, called while it does, and a warning for the run or ""."""
    if _main is not None and _main_frame() is None:
        if _returned(_main):
            return NORMAL, ""
        if _said is None:
            return NORMAL, UNKNOWN_CODE
    return _said or NORMAL, ""


def ending_of(error: BaseException | None) -> Ending:
    """How a run ends that this exception, or none, ends."""
    import traceback  # only when something ends

    if error is None or (isinstance(error, SystemExit) and not error.code):
        return NORMAL
    line = "".join(traceback.format_exception_only(type(error), error)).strip().replace("\n", " ")
    return "killed" if isinstance(error, KeyboardInterrupt) else "failed", line


def install(finish: Callable[[Ending, str], object]) -> bool:
    """Has `finish` called with `ending()` when the interpreter ends; False when it was before."""
    global _installed, _main
    _install_in_worker(finish)
    if _installed:
        return False
    _installed = True
    _main = _main_frame()
    previous, leave = sys.excepthook, sys.exit

    def remember(
        kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        _remember(error)
        previous(kind, error, trace)

    def remember_code(status: Any = None) -> NoReturn:
        if threading.current_thread() is threading.main_thread():
            _remember(SystemExit(status))
        leave(status)

    sys.excepthook = remember
    sys.exit = remember_code
    atexit.register(_leave, finish)
    return True


def _leave(finish: Callable[[Ending, str], object]) -> None:
    how, warning = ending()
    finish(how, warning)
    if how[0] == "killed":
        # CPython ends with SIGINT's status when the script was left by KeyboardInterrupt, which it notes in
        # one flag. Any later exec() of source text overwrites it (namedtuple() does one, and so may what is
        # imported to finish a run): set it again.
        with contextlib.suppress(KeyboardInterrupt):
            exec("raise KeyboardInterrupt")


def _install_in_worker(finish: Callable[[Ending, str], object]) -> None:
    """A process of multiprocessing ends when its target returns or raises, mostly without the interpreter's
    end, and no excepthook is told."""
    global _worker
    process = sys.modules.get("multiprocessing.process")
    if process is None or process.parent_process() is None or _worker == os.getpid():
        return
    _worker = os.getpid()
    from multiprocessing.util import Finalize

    Finalize(None, lambda: finish(ending_of(sys.exc_info()[1]), ""), exitpriority=0)


def _remember(error: BaseException) -> None:
    global _said
    _said = ending_of(error)


def _main_frame() -> FrameType | None:
    """Where the main thread executes the script; None when it does not (an embedded interpreter)."""
    identifier = threading.main_thread().ident
    frame = sys._current_frames().get(identifier) if identifier is not None else None
    while frame is not None:
        if frame.f_code.co_name == "<module>" and frame.f_globals.get("__name__") == "__main__":
            return frame
        frame = frame.f_back
    return None


def _returned(frame: FrameType) -> bool:
    """Whether a frame that is no longer executed came to its end; else an exception left it. A frame
    keeps its last instruction: a return, or the one that raised."""
    if not 0 <= frame.f_lasti < len(frame.f_code.co_code):
        return False
    return opcode.opname[frame.f_code.co_code[frame.f_lasti]].startswith("RETURN_")
