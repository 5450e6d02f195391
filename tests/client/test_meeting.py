"""What a job is called where its ranks meet without torch."""

from __future__ import annotations

import pytest

from trackagent.client.errors import ConfigError
from trackagent.client.meeting import job_id

SLURM = {"SLURM_JOB_ID": "12", "SLURM_STEP_ID": "0", "SLURM_PROCID": "1"}
MPIRUN = {"OMPI_COMM_WORLD_RANK": "1", "PMIX_NAMESPACE": "prterun-a-7@1"}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        pytest.param({}, "", id="nobody says"),
        pytest.param({"TRACKAGENT_JOB_ID": "x"} | SLURM | MPIRUN, "job x", id="the user"),
        pytest.param(SLURM, "slurm 12.0", id="srun"),
        pytest.param(SLURM | {"SLURM_CLUSTER_NAME": "c"}, "slurm c 12.0", id="of a cluster"),
        pytest.param({"SLURM_JOB_ID": "12"}, "", id="a batch script, outside of srun"),
        pytest.param(MPIRUN, "mpirun prterun-a-7@1", id="mpirun"),
        pytest.param(
            {"OMPI_COMM_WORLD_RANK": "0", "OMPI_MCA_ess_base_jobid": "77"},
            "mpirun 77",
            id="an older mpirun",
        ),
        pytest.param(SLURM | MPIRUN, "mpirun prterun-a-7@1", id="mpirun under srun"),
        pytest.param(
            SLURM | {"PMIX_NAMESPACE": "slurm.pmix.12.0"}, "slurm 12.0", id="srun with PMIx"
        ),
    ],
)
def test_a_job_is_called_what_its_launcher_calls_it(environ: dict[str, str], expected: str) -> None:
    assert job_id(environ) == expected


@pytest.mark.parametrize("bad", ["x" * 201, "a\nb"])
def test_a_name_that_cannot_be_one_is_refused(bad: str) -> None:
    with pytest.raises(ConfigError, match=r"TRACKAGENT_JOB_ID is .*at most 200 printable"):
        job_id({"TRACKAGENT_JOB_ID": bad})


def test_a_long_name_of_a_launchers_is_cut() -> None:
    assert len(job_id({"PMIX_NAMESPACE": "x" * 1000})) == 200
