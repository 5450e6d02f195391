"""Experiment tracking that costs the training loop nothing and loses nothing.

    from trackagent import client

    client.init(experiment="digits", params={"lr": 3e-4})      # on every rank; the same run everywhere
    for step, batch in enumerate(loader):
        with client.timer("forward"):
            loss = model(batch)
        client.log({"train/loss": loss}, step=step)
    client.finish()

The functions here act on this process's current run, which `init` returns. None but `init` raises,
whatever it is given (unless `init` was told `strict=True`), and all may be called from any thread
and from signal handlers.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from trackagent.client.instrument import Timer

if TYPE_CHECKING:
    from trackagent.client.errors import (
        ConfigError,
        IdentityError,
        JournalError,
        TrackagentError,
        ValueRefused,
    )
    from trackagent.client.run import Run

__all__ = [
    "ConfigError",
    "IdentityError",
    "JournalError",
    "Run",
    "TrackagentError",
    "ValueRefused",
    "current_run",
    "define",
    "event",
    "finish",
    "init",
    "log",
    "log_params",
    "set_tags",
    "timer",
    "track",
]

P = ParamSpec("P")
R = TypeVar("R")

# Imported on use: a script that only imports this package pays next to nothing.
_MODULES = {
    "ConfigError": "errors",
    "IdentityError": "errors",
    "JournalError": "errors",
    "Run": "run",
    "TrackagentError": "errors",
    "ValueRefused": "errors",
}

_run: Run | None = None
_ever_begun = False
_warned_no_run = False
# How long finish() waits for git, which runs since init(), and for ranks that do not know their run yet.
_FACTS_TIMEOUT_S = 2.0
_LATE_RANKS_TIMEOUT_S = 5.0


def init(
    experiment: str,
    *,
    run_name: str = "",
    params: Mapping[str, Any] | None = None,
    tags: Mapping[str, Any] | None = None,
    run_id: str | None = None,
    groups: Mapping[str, str | int] | None = None,
    agent: str | None = None,
    strict: bool = False,
) -> Run:
    """Begins this process's part of a run and makes it the current one. Call it on every rank.

    experiment: the experiment's name, 1 to 250 characters. run_name: for people; made up if empty.
    params, tags: as for `log_params` and `set_tags`. run_id: 32 hexadecimal digits, to continue a
    run or to agree on one without a launcher; else TRACKAGENT_RUN_ID, MLFLOW_RUN_ID, or rank 0's
    word. groups: the named groups of ranks that this one is in, such as {"tp": 0, "dp": 3}, at most
    8, over each of which values can be looked at. agent: address of another agent's socket
    (unix:/path) than this node's. strict: let later calls raise what they refuse.

    No agent needs to be running. A run that this process has not finished is finished first. Raises
    ConfigError for a wrong argument or variable, IdentityError when the ranks cannot agree on a
    run, JournalError when there is no room for a journal.
    """
    global _run, _ever_begun
    import logging
    import threading
    from functools import partial

    from trackagent.client import (
        exits,
        facts,
        history,
        identity,
        meeting,
        naming,
        reductions,
        trust,
        values,
    )
    from trackagent.client.config import ClientConfig
    from trackagent.client.errors import ConfigError, ValueRefused
    from trackagent.client.run import Run

    try:
        values.check_key(experiment, "experiment name")
        if run_name:
            values.check_key(run_name, "run name")
        member_of = reductions.to_groups(groups)
    except ValueRefused as error:
        raise ConfigError(str(error)) from None
    config = ClientConfig.load(agent=agent)
    finish()
    exits.forget()
    decision = identity.decide(
        run_id=run_id,
        timeout_s=config.identity_timeout_s,
        hubs=naming.NodeHubs(config),
        meet=partial(meeting.find_meeting, config),
    )
    for warning in decision.warnings:
        logging.getLogger("trackagent").warning("%s", warning)
    # One of the two will do: another user must not be able to keep training from starting.
    for folder in (config.directory, config.state_directory):
        if why := trust.why_refused(folder):
            logging.getLogger("trackagent").warning("no journal is kept there: %s", why)
    who = decision.identity

    git = threading.Thread(target=lambda: _record_git(run), name="trackagent-git", daemon=True)

    def on_finish(deadline: float) -> None:
        global _run
        if _run is run:
            _run = None
        history.run_has_ended(who.run_id)
        # At most half of the time: the rest is for what was logged.
        decision.stop_serving(min(_LATE_RANKS_TIMEOUT_S, (deadline - time.monotonic()) / 2))
        if git.is_alive() and threading.current_thread() is not git:
            git.join(min(_FACTS_TIMEOUT_S, max(0.0, deadline - time.monotonic()) / 2))

    try:
        # Two steps: once it is the current one, a signal handler may end it, and on_finish needs it.
        run = Run(
            config=config,
            who=who,
            experiment=experiment,
            run_name=run_name,
            groups=member_of,
            strict=strict,
            on_finish=on_finish,
        )
    except BaseException:
        decision.stop_serving(0.0)
        raise
    _run = run
    _ever_begun = True
    exits.install(_finish_at_exit)
    if who.rank == 0:
        run.set_tags(facts.quick())
        git.start()
    if params:
        run.log_params(params)
    if tags:
        run.set_tags(tags)
    return run


def current_run() -> Run | None:
    """The run that `init` began and that has not been finished, if any."""
    return _run


def log(
    metrics: Mapping[str, Any], step: int | None = None, timestamp: Any = None, weight: Any = None
) -> None:
    """Records metrics at a step: see Run.log."""
    if _run is None:
        _warn_no_run()
    else:
        _run.log(metrics, step, timestamp, weight)


def define(pattern: str, *, reduce: str = "mean", keep: str | None = None, every: int = 1) -> None:
    """Says how the values of keys are reduced across ranks: see Run.define."""
    if _run is None:
        _warn_no_run()
    else:
        _run.define(pattern, reduce=reduce, keep=keep, every=every)


def log_params(params: Mapping[str, Any]) -> None:
    """Records parameters, nested mappings as dotted keys: see Run.log_params."""
    if _run is None:
        _warn_no_run()
    else:
        _run.log_params(params)


def set_tags(tags: Mapping[str, Any]) -> None:
    """Sets tags: see Run.set_tags."""
    if _run is None:
        _warn_no_run()
    else:
        _run.set_tags(tags)


def event(message: str, level: str = "info", step: int | None = None) -> None:
    """Records that something happened: see Run.event."""
    if _run is None:
        _warn_no_run()
    else:
        _run.event(message, level, step)


def timer(name: str) -> Timer:
    """Times a block or a decorated function and logs the seconds under `time/<name>`, in the run
    that is current when it ends."""
    return Timer(name, _log_seconds)


def finish(status: str = "finished", error: str = "") -> bool:
    """Ends the current run's part in this process: see Run.finish. Does nothing, and returns True,
    without one."""
    return True if _run is None else _run.finish(status, error)


def track(experiment: str, **init_options: Any) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Makes each call of the decorated function a run of `experiment`.

    Its scalar arguments (defaults included) become params, its duration the metric
    `time/<function>`, a returned dict's numbers metrics; an exception marks the run failed and is
    raised. `init_options` go to `init`.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        import inspect  # 10 ms that most training scripts need not pay

        signature = inspect.signature(function)

        @functools.wraps(function)
        def tracked(*args: P.args, **kwargs: P.kwargs) -> R:
            run = init(experiment, **{"run_name": function.__name__, **init_options})
            try:
                bound = signature.bind(*args, **kwargs)
                bound.apply_defaults()
                scalars = (str, int, float, bool, type(None))
                run.log_params({k: v for k, v in bound.arguments.items() if isinstance(v, scalars)})
                start = time.perf_counter()
                result = function(*args, **kwargs)
                numbers: dict[Any, Any] = {f"time/{function.__name__}": time.perf_counter() - start}
                if isinstance(result, Mapping):
                    numbers.update({k: v for k, v in result.items() if hasattr(v, "__float__")})
                run.log(numbers)
            except BaseException as error:
                from trackagent.client.exits import ending_of

                run.finish(*ending_of(error))
                raise
            run.finish()
            return result

        return tracked

    return decorate


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def _log_seconds(name: str, seconds: float) -> None:
    if _run is None:
        _warn_no_run()
    else:
        _run._log_seconds(name, seconds)


def _record_git(run: Run) -> None:
    from trackagent.client import facts

    tags = facts.slow()
    if tags and run.status == "running":
        run.set_tags(tags)


def _warn_no_run() -> None:
    """Once. A signal handler may have interrupted the import of this very module, or of one that it needs,
    and at its end the interpreter imports nothing: then another call warns."""
    global _warned_no_run
    if _warned_no_run:
        return
    if _ever_begun:
        problem = "nothing is recorded: the run has finished"
    else:
        problem = "nothing is recorded: call trackagent.client.init(experiment=...) first"
    try:
        import logging

        logger = logging.getLogger("trackagent")
    except Exception:  # noqa: BLE001 - a module that is half imported may lack anything
        return
    _warned_no_run = True
    logger.warning("%s", problem)


def _finish_at_exit(how: tuple[str, str], warning: str) -> None:
    if warning and _run is not None:
        _run.event(warning, "warning")
    if _run is not None:
        # Nobody asks whether it was delivered: no need to wait for an agent that comes by itself.
        _run._finish(*how, wait=False)
