"""How a process learns its run, attempt and rank by itself: arguments, variables, process group."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from tests.fakes import in_a_forked_process
from trackagent.client.errors import ConfigError
from trackagent.client.history import History, run_has_ended
from trackagent.client.identity import Decision, Identity, decide
from trackagent.client.ranks import Ranks, launcher_ranks, spans_nodes

A = "a" * 32
B = "b" * 32


def nothing_found(environ: Mapping[str, str]) -> Any:
    return None, None, "there is no store"


def alone(**changes: Any) -> Decision:
    arguments: dict[str, Any] = {
        "run_id": None,
        "timeout_s": 1.0,
        "environ": {},
        "history": History(),
        "find": nothing_found,
    }
    return decide(**(arguments | changes))


# A single process


def test_a_single_process_begins_a_fresh_run() -> None:
    assert alone().identity.run_id != alone().identity.run_id


def test_a_fresh_run_id_has_32_lowercase_hex_digits() -> None:
    assert set(alone().identity.run_id) <= set("0123456789abcdef")
    assert len(alone().identity.run_id) == 32


def test_a_fresh_run_is_at_its_first_attempt() -> None:
    assert alone().identity.attempt == 1


def test_a_single_process_is_rank_0_of_1() -> None:
    who = alone().identity
    assert (who.rank, who.local_rank, who.world_size) == (0, 0, 1)


def test_the_second_init_of_a_process_is_a_run_of_its_own() -> None:
    history = History()
    first, second = alone(history=history).identity, alone(history=history).identity
    assert (first.run_id == second.run_id, second.attempt) == (False, 1)


def test_the_second_init_with_the_same_given_id_is_its_second_attempt() -> None:
    history = History()
    attempts = [alone(run_id=A, history=history).identity.attempt for _ in range(2)]
    assert attempts == [1, 2]


# A run id that the user gives


def test_the_argument_comes_before_the_environment() -> None:
    environ = {"TRACKAGENT_RUN_ID": B}
    assert alone(run_id=A, environ=environ).identity.run_id == A


def test_our_variable_comes_before_mlflows() -> None:
    environ = {"TRACKAGENT_RUN_ID": A, "MLFLOW_RUN_ID": B}
    assert alone(environ=environ).identity.run_id == A


def test_mlflows_variable_is_heeded() -> None:
    assert alone(environ={"MLFLOW_RUN_ID": B}).identity.run_id == B


def test_an_empty_variable_is_one_that_is_not_set() -> None:
    environ = {"TRACKAGENT_RUN_ID": "", "MLFLOW_RUN_ID": B}
    assert alone(environ=environ).identity.run_id == B


def test_a_uuid_with_dashes_and_capitals_is_normalised() -> None:
    given = "AAAAAAAA-aaaa-aaaa-aaaa-aaaaaaaaaaaa"
    assert alone(run_id=given).identity.run_id == A


@pytest.mark.parametrize("bad", ["", "run-7", "a" * 31, "a" * 33, "g" * 32, "\u0660" * 32])
def test_an_unusable_run_id_argument_is_refused(bad: str) -> None:
    with pytest.raises(ConfigError, match=r"run_id is .*give 32 hex digits"):
        alone(run_id=bad)


@pytest.mark.parametrize("variable", ["TRACKAGENT_RUN_ID", "MLFLOW_RUN_ID"])
def test_an_unusable_run_id_variable_is_named(variable: str) -> None:
    with pytest.raises(ConfigError, match=f"{variable} is 'nonsense'"):
        alone(environ={variable: "nonsense"})


def test_the_attempt_can_be_given() -> None:
    environ = {"TRACKAGENT_RUN_ID": A, "TRACKAGENT_ATTEMPT": "3"}
    assert alone(environ=environ).identity.attempt == 3


@pytest.mark.parametrize("bad", ["0", "-1", "two", "1_0"])
def test_an_unusable_attempt_is_named(bad: str) -> None:
    with pytest.raises(ConfigError, match=f"TRACKAGENT_ATTEMPT is '{bad}'"):
        alone(environ={"TRACKAGENT_ATTEMPT": bad})


# The node


def test_the_node_is_the_hosts_name() -> None:
    assert alone(hostname=lambda: "n7").identity.node == "n7"


def test_in_kubernetes_the_node_is_the_nodes_name() -> None:
    environ = {"NODE_NAME": "worker-3"}
    assert alone(environ=environ, hostname=lambda: "pod-x").identity.node == "worker-3"


def test_the_nodes_name_can_be_given() -> None:
    environ = {"NODE_NAME": "worker-3", "TRACKAGENT_NODE": "rack-7"}
    assert alone(environ=environ, hostname=lambda: "pod-x").identity.node == "rack-7"


def test_the_node_is_bounded() -> None:
    assert len(alone(hostname=lambda: "n" * 1000).identity.node) == 253


# Ranks, as launchers say them

TORCHRUN = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8"}
SLURM = {
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "4",
}
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_COMM_WORLD_SIZE": "6",
}


def ranks(rank: int, local_rank: int, world_size: int) -> Ranks:
    return Ranks(rank=rank, local_rank=local_rank, world_size=world_size)


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        pytest.param(TORCHRUN, ranks(5, 1, 8), id="torchrun"),
        pytest.param(SLURM, ranks(3, 1, 4), id="srun"),
        pytest.param(OPENMPI, ranks(2, 0, 6), id="mpirun"),
        pytest.param(SLURM | TORCHRUN, ranks(5, 1, 8), id="torchrun under srun"),
        pytest.param(OPENMPI | TORCHRUN, ranks(5, 1, 8), id="torchrun under mpirun"),
        pytest.param(SLURM | OPENMPI, ranks(2, 0, 6), id="mpirun under srun"),
        pytest.param(
            SLURM | {"WORLD_SIZE": "4"}, ranks(3, 1, 4), id="srun, script sets WORLD_SIZE"
        ),
        pytest.param(SLURM | {"RANK": "3", "WORLD_SIZE": "4"}, ranks(3, 1, 4), id="srun, both set"),
        pytest.param(
            SLURM | {"SLURM_STEP_NUM_TASKS": "5"}, ranks(3, 1, 5), id="srun, part of the job"
        ),
        pytest.param({"RANK": "1", "WORLD_SIZE": "2"}, ranks(1, 0, 2), id="one process a pod"),
        pytest.param({"WORLD_SIZE": "1"}, None, id="a world of one"),
        pytest.param({}, None, id="no launcher"),
    ],
)
def test_a_launchers_ranks_are_read(environ: dict[str, str], expected: Ranks | None) -> None:
    assert launcher_ranks(environ) == expected


def test_a_batch_script_outside_srun_is_a_single_process() -> None:
    batch = {name: text for name, text in SLURM.items() if name != "SLURM_STEP_ID"}
    assert launcher_ranks(batch) is None


@pytest.mark.parametrize("launcher", [TORCHRUN, SLURM, OPENMPI], ids=["torchrun", "srun", "mpirun"])
@pytest.mark.parametrize("position", [0, 1, 2])
def test_a_malformed_number_is_named(launcher: dict[str, str], position: int) -> None:
    variable = [name for name in launcher if name != "SLURM_STEP_ID"][position]
    with pytest.raises(ConfigError, match=f"{variable} is 'x'"):
        launcher_ranks(launcher | {variable: "x"})


def test_a_rank_beyond_the_world_is_refused() -> None:
    with pytest.raises(ConfigError, match="RANK is 8 but WORLD_SIZE is 8"):
        launcher_ranks({"RANK": "8", "WORLD_SIZE": "8"})


def test_a_world_without_a_rank_is_refused() -> None:
    with pytest.raises(ConfigError, match="WORLD_SIZE is '8' but RANK is not set"):
        launcher_ranks({"WORLD_SIZE": "8"})


@pytest.mark.parametrize(
    ("world_size", "environ", "spans"),
    [
        pytest.param(8, {"LOCAL_WORLD_SIZE": "4"}, True, id="torchrun, two nodes"),
        pytest.param(8, {"LOCAL_WORLD_SIZE": "8"}, False, id="torchrun, one node"),
        pytest.param(6, {"OMPI_COMM_WORLD_LOCAL_SIZE": "3"}, True, id="mpirun, two nodes"),
        pytest.param(6, {"OMPI_COMM_WORLD_LOCAL_SIZE": "6"}, False, id="mpirun, one node"),
        pytest.param(4, {"SLURM_NNODES": "2"}, True, id="srun, two nodes"),
        pytest.param(
            4,
            {"SLURM_NNODES": "2", "SLURM_STEP_NUM_NODES": "1"},
            False,
            id="srun, one of two nodes",
        ),
        pytest.param(
            4,
            {"LOCAL_WORLD_SIZE": "4", "SLURM_NNODES": "2"},
            False,
            id="torchrun on one of two nodes",
        ),
        pytest.param(1, {"SLURM_NNODES": "2"}, False, id="one process"),
        pytest.param(4, {}, None, id="nobody says"),
    ],
)
def test_a_launcher_says_whether_ranks_are_on_several_nodes(
    world_size: int, environ: dict[str, str], spans: bool | None
) -> None:
    assert spans_nodes(ranks(0, 0, world_size), environ) is spans


def test_a_malformed_number_of_nodes_is_named() -> None:
    with pytest.raises(ConfigError, match="SLURM_NNODES is 'two'"):
        spans_nodes(ranks(0, 0, 2), {"SLURM_NNODES": "two"})


# A process group


def in_group(environ: Mapping[str, str]) -> Ranks:
    """The ranks of the process that is number 2 of 4 in its process group."""

    def find(environ: Mapping[str, str]) -> Any:
        return None, (2, 4), "no store"

    who = alone(run_id=A, environ=environ, find=find).identity
    return ranks(who.rank, who.local_rank, who.world_size)


def test_a_process_group_knows_better_than_the_environment() -> None:
    environ = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    assert in_group(environ) == ranks(2, 0, 4)


@pytest.mark.parametrize(
    ("environ", "local_rank"),
    [
        pytest.param(SLURM, 1, id="the launcher's"),
        pytest.param(SLURM | {"LOCAL_RANK": "3"}, 3, id="the script's own"),
        pytest.param({}, 0, id="nobody's"),
    ],
)
def test_the_local_rank_in_a_process_group_comes_from_outside(
    environ: dict[str, str], local_rank: int
) -> None:
    assert in_group(environ) == ranks(2, local_rank, 4)


def test_a_malformed_local_rank_in_a_process_group_is_named() -> None:
    with pytest.raises(ConfigError, match="LOCAL_RANK is 'x'"):
        in_group({"LOCAL_RANK": "x"})


# --- the job's beginning


def test_a_single_process_knows_when_it_began() -> None:
    assert alone(now_ns=lambda: 17).identity.job_time_ns == 17


def test_ranks_that_cannot_ask_rank_0_do_not_know_when_the_job_began() -> None:
    environ = {"RANK": "0", "WORLD_SIZE": "2"}
    decision = alone(run_id="a" * 32, environ=environ, now_ns=lambda: 17)
    assert decision.identity.job_time_ns == 0


# --- processes that a rank starts


def started(environ: Mapping[str, str], **changes: Any) -> Identity:
    """Who a process is that is started with this environment and knows nothing else."""
    return in_a_forked_process(lambda: alone(environ=dict(environ), **changes).identity)


MPIRUN = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1", "PMIX_NAMESPACE": "prterun-1"}
LAUNCHED = pytest.mark.parametrize(
    "launcher",
    [
        pytest.param({}, id="no launcher"),
        pytest.param(TORCHRUN | {"MASTER_ADDR": "n0", "MASTER_PORT": "29500"}, id="torchrun"),
        pytest.param(SLURM, id="srun"),
        pytest.param(MPIRUN, id="mpirun"),
    ],
)


@LAUNCHED
@pytest.mark.parametrize("later", [{}, {"MASTER_ADDR": "node0", "MASTER_PORT": "12910"}])
def test_what_a_rank_starts_has_a_run_of_its_own(
    launcher: dict[str, str], later: dict[str, str]
) -> None:
    environ = dict(launcher)
    rank = alone(run_id=A, environ=environ).identity
    own = started(later | environ)
    assert (own.run_id == rank.run_id, own.rank, own.world_size) == (False, 0, 1)
    assert own.attempt == 1


@LAUNCHED
def test_what_a_rank_starts_with_its_runs_id_is_of_the_same_attempt(
    launcher: dict[str, str],
) -> None:
    environ, history = dict(launcher), History()
    for attempt in (1, 2):
        rank = alone(run_id=A, environ=environ, history=history).identity
        other = started(environ | {"TRACKAGENT_RUN_ID": A})
        assert (other.attempt, other.job_time_ns) == (attempt, rank.job_time_ns)
        assert (other.rank, other.world_size) == (rank.rank, rank.world_size)


@LAUNCHED
def test_what_a_rank_starts_after_its_run_has_ended_is_the_next_attempt(
    launcher: dict[str, str],
) -> None:
    environ, history = dict(launcher), History()
    rank = alone(run_id=A, environ=environ, history=history).identity
    run_has_ended(A, environ, history)
    other = started(environ | {"TRACKAGENT_RUN_ID": A})
    again = alone(run_id=A, environ=environ, history=history).identity
    assert (rank.attempt, other.attempt, again.attempt) == (1, 2, 2)
    assert other.job_time_ns == rank.job_time_ns


def test_what_one_shell_starts_with_the_same_run_id_is_two_jobs() -> None:
    shell = {"TRACKAGENT_RUN_ID": A}
    times = [started(shell, now_ns=lambda now=now: now).job_time_ns for now in (17, 18)]
    assert times == [17, 18]


@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param(MPIRUN | {"PMIX_NAMESPACE": "prterun-2"}, id="another mpirun"),
        pytest.param(MPIRUN | {"RANK": "0", "WORLD_SIZE": "1"}, id="torchrun"),
    ],
)
def test_what_a_launcher_within_a_rank_starts_is_a_rank_of_its_own(
    launcher: dict[str, str],
) -> None:
    environ = dict(MPIRUN)
    alone(run_id=A, environ=environ, now_ns=lambda: 17)
    own = started(environ | launcher, run_id=A, now_ns=lambda: 18)
    assert own.job_time_ns == 18
