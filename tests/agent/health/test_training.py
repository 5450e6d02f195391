"""The rules about a run fire on what is wrong, with its numbers, and keep still otherwise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from tests.agent.store.batches import RUN, batch, end, producer
from trackagent.agent.health.alarms import Finding
from trackagent.agent.health.settings import Thresholds
from trackagent.agent.health.training import findings, scores
from trackagent.agent.health.views import Views
from trackagent.agent.store.contract import Batch, Points, ProducerInfo

STEP_S = 0.5


@dataclass
class Job:
    """Ranks that log, told to the rules second by second."""

    thresholds: Thresholds = field(default_factory=Thresholds)
    nodes: Sequence[str] = ("a", "a", "b", "b")
    now_s: float = 1_000.0
    step: int = 0

    def __post_init__(self) -> None:
        self.views = Views(self.thresholds)
        self.ranks = [
            producer(rank, node=node, world_size=len(self.nodes))
            for rank, node in enumerate(self.nodes)
        ]

    def deliver(self, rank: int, step: int, **values: float) -> None:
        self.views.take(
            batch(1, self.ranks[rank], points=[self._points(rank, step, values)]), self.now_s
        )

    def _points(self, rank: int, step: int, values: dict[str, float]) -> Points:
        keys = tuple(key.replace("__", "/") for key in values)
        matrix = np.array([[value] for value in values.values()])
        times = np.array([int(self.now_s * 1e9)])
        return Points(self.ranks[rank].producer_id, keys, np.array([step]), times, matrix)

    def steps(self, count: int, *ranks: int, **values: float) -> None:
        """All ranks, or these, take so many steps."""
        for _ in range(count):
            self.now_s += STEP_S
            for rank in ranks or range(len(self.ranks)):
                self.deliver(rank, self.step, **(values or {"loss": 1.0}))
            self.step += 1

    def found(self, rule: str | None = None) -> list[Finding]:
        """As of a look by which all that had passed before was told."""
        self.views.settle()
        return self.told(rule)

    def told(self, rule: str | None = None) -> list[Finding]:
        """As of the first look since the last one."""
        run = self.views.runs.get(RUN) or self.views.ended.get(RUN)
        every = [] if run is None else findings(run, self.thresholds, self.now_s)
        return [one for one in every if rule in (None, one.rule)]


# --- hang


def test_ranks_whose_steps_do_not_move_hang() -> None:
    job = Job()
    job.steps(10)
    job.now_s += 61
    [hang] = job.found("hang")
    assert (hang.level, hang.run_id) == ("error", RUN)
    assert hang.numbers["still_s"] == 61.0
    assert hang.numbers["limit_s"] == 60.0
    assert hang.numbers["first_ranks"] == [0, 1, 2, 3]
    assert "all ranks stopped at step 9" in hang.message


def test_a_hang_names_the_rank_that_is_behind() -> None:
    job = Job()
    job.steps(10)
    job.steps(1, 0, 1, 3)
    job.now_s += 61
    [hang] = job.found("hang")
    assert hang.numbers["first_ranks"] == [2]
    assert hang.numbers["first_nodes"] == ["b"]
    assert (hang.numbers["step"], hang.numbers["last_step"]) == (9, 10)
    assert "first rank 2 (node b) stopped at step 9, others came to step 10" in hang.message


def test_a_hang_at_one_step_names_the_rank_that_came_to_it_long_before() -> None:
    job = Job()
    job.steps(10)
    job.deliver(1, 10, loss=1.0)
    job.now_s += 2
    for rank in (0, 2, 3):
        job.deliver(rank, 10, loss=1.0)
    job.now_s += 61
    [hang] = job.found("hang")
    assert hang.numbers["first_ranks"] == [1]


def test_a_hang_is_over_when_a_step_moves() -> None:
    job = Job()
    job.steps(10)
    job.now_s += 61
    assert job.found("hang")
    job.steps(1)
    assert job.found("hang") == []


def test_slow_steps_are_no_hang() -> None:
    job = Job()
    for _ in range(5):
        job.now_s += 40
        job.steps(1)
    job.now_s += 199
    assert job.found("hang") == []
    job.now_s += 5
    [hang] = job.found("hang")
    assert hang.numbers["limit_s"] == 202.5


def test_a_job_that_has_not_found_its_rhythm_does_not_hang() -> None:
    job = Job(nodes=("a",))
    job.steps(2)
    job.now_s += 1_000
    assert job.found() == []


def test_ranks_that_have_ended_do_not_hang() -> None:
    job = Job()
    job.steps(10)
    for rank in job.ranks:
        job.views.take(batch(2, rank, ends=[end(rank)]), job.now_s)
    job.now_s += 1_000
    assert (job.told(), job.views.settle()) == ([], [RUN])


def test_the_next_attempt_begins_anew() -> None:
    job = Job()
    job.steps(10)
    job.now_s += 61
    job.ranks = [producer(rank, attempt=2, world_size=4) for rank in range(4)]
    job.step = 3
    job.steps(1)
    assert job.found() == []
    assert {rank.info.attempt for rank in job.views.runs[RUN].ranks.values()} == {2}


def test_what_comes_late_of_an_earlier_attempt_changes_nothing() -> None:
    job = Job(nodes=("a",))
    earlier = job.ranks
    job.ranks = [producer(0, attempt=2)]
    job.steps(5)
    job.ranks = earlier
    job.deliver(0, 1_000, loss=math.nan)
    assert job.found() == []
    assert job.views.runs[RUN].ranks[0].step == 4


def test_steps_and_times_of_any_size_are_taken() -> None:
    job = Job(nodes=("a",))
    ends = np.array([-(1 << 63), (1 << 63) - 1, 0, -1, (1 << 63) - 1])
    who = job.ranks[0]
    odd = Points(who.producer_id, ("loss",), ends, np.sort(ends), np.ones((1, 5)))
    job.views.take(batch(1, who, points=[odd]), job.now_s)
    rank = job.views.runs[RUN].ranks[0]
    assert rank.step == (1 << 63) - 1
    assert min(rank.intervals) >= 0
    assert job.found() == []


# --- stragglers


def timed(job: Job, count: int, name: str, seconds: Sequence[float]) -> None:
    for _ in range(count):
        job.now_s += STEP_S
        for rank, value in enumerate(seconds):
            job.deliver(rank, job.step, **{f"time/{name}": value, "loss": 1.0})
        job.step += 1


def test_a_rank_that_is_slowed_by_40_percent_is_named_with_its_phase() -> None:
    job = Job()
    timed(job, 20, "forward", [0.1, 0.1, 0.14, 0.1])
    [finding] = job.found("straggler")
    assert finding.subject == "rank 2"
    assert finding.numbers["phase"] == "forward"
    assert finding.numbers["ratio"] == round(0.1 / 0.14, 4)
    assert finding.numbers["limit"] == 0.75
    assert (
        "rank 2 on node b is a straggler in forward: it takes 0.14 s, 40% more" in finding.message
    )


def test_in_a_phase_of_waiting_the_culprit_waits_least() -> None:
    job = Job()
    timed(job, 20, "allreduce", [0.1, 0.1, 0.02, 0.1])
    [finding] = job.found("straggler")
    assert finding.subject == "rank 2"
    assert finding.numbers["phase"] == "allreduce"
    assert (finding.numbers["median_s"], finding.numbers["compared_with_s"]) == (0.02, 0.1)


def test_who_is_slow_and_waited_for_is_told_once() -> None:
    job = Job()
    for _ in range(20):
        job.now_s += STEP_S
        for rank in range(4):
            slow = rank == 3
            forward, reduce = (0.14, 0.01) if slow else (0.1, 0.05)
            job.deliver(rank, job.step, **{"time/forward": forward, "time/allreduce": reduce})
        job.step += 1
    [finding] = job.found("straggler")
    assert (finding.subject, finding.numbers["phase"]) == ("rank 3", "forward")


def test_a_straggler_that_recovers_is_none() -> None:
    job = Job()
    timed(job, 20, "forward", [0.1, 0.1, 0.14, 0.1])
    timed(job, 30, "forward", [0.1, 0.1, 0.1, 0.1])
    assert job.found("straggler") == []


def test_a_difference_of_microseconds_makes_no_straggler() -> None:
    job = Job()
    timed(job, 20, "zero_grad", [0.0001, 0.0001, 0.0002, 0.0001])
    assert job.found() == []


def test_few_measurements_make_no_straggler() -> None:
    job = Job()
    timed(job, 9, "forward", [0.1, 0.1, 0.5, 0.1])
    assert job.found("straggler") == []


def test_a_rank_alone_is_no_straggler() -> None:
    job = Job(nodes=("a",))
    timed(job, 20, "forward", [0.1])
    assert job.found() == []


def test_scores_say_how_quick_each_rank_is_beside_the_fastest() -> None:
    job = Job()
    timed(job, 20, "forward", [0.1, 0.2, 0.1, 0.4])
    assert scores(job.views.runs[RUN], job.thresholds) == {0: 1.0, 1: 0.5, 2: 1.0, 3: 0.25}


# --- values that are not finite


def test_a_nan_gives_the_first_rank_and_step() -> None:
    job = Job()
    job.steps(5)
    job.deliver(3, 7, loss=math.nan)
    job.deliver(1, 5, loss=math.inf)
    job.deliver(1, 6, loss=math.nan)
    [finding] = job.found("nonfinite")
    assert (finding.subject, finding.level) == ("loss", "error")
    assert finding.numbers == {
        "key": "loss",
        "rank": 1,
        "step": 5,
        "value": "inf",
        "ranks": [1, 3],
    }
    assert "loss is inf on rank 1 from step 5 on, now on 2 ranks" in finding.message


def test_a_nan_is_over_when_the_value_is_finite_again() -> None:
    job = Job()
    job.deliver(3, 7, loss=math.nan)
    job.now_s += 1
    job.deliver(3, 8, lr=1.0)
    assert job.found("nonfinite")
    job.deliver(3, 8, loss=1.0)
    assert job.found("nonfinite") == []


def test_what_was_logged_before_a_nan_with_other_keys_does_not_end_it() -> None:
    job = Job(nodes=("a",))
    who = job.ranks[0]
    steps, times = np.arange(3), np.arange(3) * 10**9
    later = np.array([[math.nan]])
    parts = [
        Points(who.producer_id, ("loss",), np.array([3]), np.array([3 * 10**9]), later),
        Points(who.producer_id, ("loss", "lr"), steps, times, np.ones((2, 3))),
    ]
    job.views.take(batch(1, who, points=parts), job.now_s)
    [finding] = job.found()
    assert finding.numbers["step"] == 3
    assert job.views.runs[RUN].ranks[0].step == 3


def test_a_nan_that_has_passed_when_the_rules_look_is_told_once() -> None:
    job = Job(nodes=("a",))
    values = np.array([[1.0, math.nan, 2.0]])
    times = np.arange(3) * 10**9
    both = Points(job.ranks[0].producer_id, ("loss",), np.arange(3), times, values)
    job.views.take(batch(1, job.ranks[0], points=[both]), job.now_s)
    [finding] = job.told()
    assert (finding.rule, finding.numbers["step"]) == ("nonfinite", 1)
    assert job.found() == []


def test_a_nan_and_the_end_of_its_run_are_told() -> None:
    job = Job(nodes=("a",))
    job.deliver(0, 7, loss=math.nan)
    job.views.take(batch(2, job.ranks[0], ends=[end(job.ranks[0], "failed")]), job.now_s)
    assert [finding.rule for finding in job.told()] == ["nonfinite"]
    assert job.found() == []


def test_metrics_that_may_be_infinite_are_left_alone() -> None:
    job = Job(Thresholds(finite_keys="train/*"))
    job.deliver(0, 1, scale=math.inf)
    assert job.found() == []
    job.deliver(0, 1, train__loss=math.inf)
    [finding] = job.found()
    assert finding.subject == "train/loss"


def test_a_rank_that_ends_with_a_nan_takes_it_along() -> None:
    job = Job()
    job.steps(5)
    job.deliver(3, 6, loss=math.nan)
    job.views.take(batch(2, job.ranks[3], ends=[end(job.ranks[3], "failed")]), job.now_s)
    assert job.found("nonfinite") == []


# --- spikes


def test_a_loss_far_above_its_median_spikes() -> None:
    job = Job(nodes=("a",))
    job.steps(50, loss=2.0)
    job.steps(3, loss=5.0)
    assert job.found("spike") == []
    job.steps(1, loss=6.0)
    [finding] = job.found("spike")
    assert finding.level == "warning"
    assert finding.numbers == {
        "key": "loss",
        "rank": 0,
        "ranks": [0],
        "step": 53,
        "value": 6.0,
        "median": 2.0,
        "limit": 2.0,
        "in_a_row": 4,
    }


def test_a_spike_is_over_when_the_loss_comes_down() -> None:
    job = Job(nodes=("a",))
    job.steps(50, loss=2.0)
    job.steps(10, loss=5.0)
    assert job.found("spike")
    job.steps(1, loss=2.5)
    assert job.found("spike") == []


def test_a_spike_that_has_passed_when_the_rules_look_is_told_once() -> None:
    job = Job(nodes=("a",))
    job.steps(50, loss=2.0)
    job.steps(5, loss=9.0)
    job.steps(5, loss=2.0)
    [finding] = job.told("spike")
    assert (finding.numbers["value"], finding.numbers["in_a_row"]) == (9.0, 5)
    assert job.found() == []


def test_a_spike_is_told_beside_the_median_that_it_was_above() -> None:
    job = Job(nodes=("a",))
    job.steps(20, loss=2.0)
    job.steps(4, loss=9.0)
    job.steps(30, loss=0.0)  # before the rules look
    [finding] = job.told("spike")
    assert (finding.numbers["value"], finding.numbers["median"]) == (9.0, 2.0)


def test_a_spike_that_stays_is_a_new_level() -> None:
    job = Job(nodes=("a",))
    job.steps(100, loss=2.0)
    job.steps(150, loss=5.0)
    assert job.found("spike") == []


def test_only_losses_are_looked_at_for_spikes() -> None:
    job = Job(nodes=("a",))
    job.steps(50, **{"lr": 1.0, "val/Loss": 1.0})
    job.steps(10, **{"lr": 9.0, "val/Loss": 9.0})
    assert [one.subject for one in job.found("spike")] == ["val/Loss"]


# --- silent nodes


def test_a_node_of_which_nothing_comes_is_silent() -> None:
    job = Job()
    job.steps(10)
    job.steps(121, 0, 1)
    [finding] = job.found("silent_node")
    assert finding.subject == "b"
    assert finding.numbers == {
        "silent_s": 60.5,
        "limit_s": 60.0,
        "ranks": [2, 3],
        "last_steps": [9, 9],
    }
    assert finding.message.endswith("ranks 2 (last step 9), 3 (last step 9)")


def test_where_nobody_is_heard_no_node_is_silent() -> None:
    job = Job()
    job.steps(10)
    job.now_s += 200
    assert job.found("silent_node") == []


# --- nothing wrong


def test_a_healthy_hour_fires_nothing() -> None:
    job = Job()
    random = np.random.default_rng(4)
    for minute in range(60):
        for rank in range(4):
            steps = np.arange(120) + 120 * minute
            seconds = 0.1 + 0.01 * random.standard_normal(120).clip(-2, 2)
            loss = 3 / np.sqrt(1 + steps / 500) + 0.1 * random.standard_normal(120)
            times = ((job.now_s + np.arange(120) * STEP_S) * 1e9).astype(np.int64)
            job.views.take(
                Batch(
                    batch(1).id,
                    [job.ranks[rank]],
                    points=[
                        Points(
                            job.ranks[rank].producer_id,
                            ("train/loss", "time/forward", "lr"),
                            steps,
                            times,
                            np.stack([loss, seconds, np.full(120, 1e-3)]),
                        )
                    ],
                ),
                job.now_s + 60,
            )
        job.now_s += 60
        assert job.found() == []


def test_what_is_kept_of_a_run_is_bounded() -> None:
    job = Job(nodes=("a",))
    for number in range(2200):
        job.deliver(0, number, **{f"time/{number}": 1.0, f"loss{number}": math.nan})
    run = job.views.runs[RUN]
    kept = len(run.ranks[0].timers), len(run.not_finite), len(run.spikes)
    assert max(kept) <= 2048
    others: list[ProducerInfo] = [producer(0, run=f"{number:032x}") for number in range(400)]
    for other in others:
        one = Points(other.producer_id, ("loss",), np.array([1]), np.array([1]), np.ones((1, 1)))
        job.views.take(batch(1, other, points=[one]), job.now_s)
    assert len(job.views.runs) <= 256
