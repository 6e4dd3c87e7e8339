"""The search against curves whose knee is known, trainings that fail, searches that are killed or shared."""

import math
import os
import platform
import random
import signal
import subprocess
import sys
import threading
import time

import pytest

from lora_fast import LoraFastError, search_rank
from lora_fast.rank_search import ARM, RANKS

optuna = pytest.importorskip("optuna")


def curve(number, knees=8):
    """(knee, {rank: loss}, standard deviation of the noise): gains that shrink up to the knee, by chance overfitting
    beyond it, noise from 0 to a quarter of the last gain. knees: it is one of so many of the smallest ranks."""
    chance = random.Random(number)
    index = chance.randrange(knees)
    last, growth, rising = chance.uniform(0.02, 0.2), chance.uniform(1, 2), chance.random() < 1 / 3
    loss = {RANKS[index]: 2.0}
    value, gain = 2.0, last
    for rank in reversed(RANKS[:index]):
        value += gain
        loss[rank], gain = value, gain * growth
    value = 2.0
    for rank in RANKS[index + 1 :]:
        value += last * chance.uniform(0.5, 1) if rising else 0.0
        loss[rank] = value
    return RANKS[index], loss, chance.uniform(0, 0.25) * last


def trainer(number, loss, noise):
    return lambda rank, *, seed: loss[rank] + random.Random(f"{number} {rank} {seed}").gauss(0, noise)


def training_time(rank):
    """A step's time grows with the rank as on the profiler's small model: 0.8 of full at r=1, 1.0 at 64."""
    return 0.8 + 0.2 * rank / 64


@pytest.mark.parametrize(("seeds", "share"), [(1, 0.5), (2, 0.45), (3, 0.45)])
def test_within_one_doubling_of_the_knee_at_half_the_cost_of_the_grid(seeds, share):
    """500 curves with knees from 1 to 128. With one seed, the two that the noise is judged by are paid in both."""
    close = spent = grid_spent = 0
    for number in range(500):
        knee, loss, noise = curve(number)
        found = search_rank(trainer(number, loss, noise), seeds=seeds)
        close += knee / 2 <= found.best_rank <= 2 * knee
        spent += sum(training_time(trial.rank) for trial in found.trials)
        grid_spent += seeds * sum(map(training_time, RANKS)) + (training_time(1) + training_time(2)) * (seeds == 1)
    assert close >= 475
    assert spent <= share * grid_spent


@pytest.mark.parametrize("seeds", [1, 2, 3])
def test_within_one_doubling_of_knees_up_to_the_largest_rank(seeds):
    """500 curves with knees from 1 to 512: where the knee is beyond 128, half of the grid's cost can't be kept (its two
    largest ranks are 36% of it), but the knee is found as well."""
    close = 0
    for number in range(500):
        knee, loss, noise = curve(number, len(RANKS))
        found = search_rank(trainer(number, loss, noise), seeds=seeds)
        close += knee / 2 <= found.best_rank <= 2 * knee
    assert close >= 475


def test_the_last_candidate_is_tried_though_it_is_no_doubling():
    found = search_rank(lambda rank: max(0, 11 - rank), [3, 5, 7, 9, 11])  # 3, 7, 11, and 9 between
    assert (found.best_rank, found.verdict) == (11, "still rising")
    assert [point.rank for point in found.points] == [3, 7, 9, 11]
    assert search_rank(lambda rank: max(0, 4 - rank), [1, 2, 4, 6]).points[-1].rank == 6


def test_a_rank_that_is_taken_by_name_only_is_given_by_name():
    def train(*, rank, seed):
        return 1 / rank + 1e-3 * seed

    assert search_rank(train, [1, 2, 4], "grid").best_rank == 4
    assert search_rank(lambda *, rank, **more: 1 / rank + 1e-3 * more["seed"], [1, 2, 4], "grid").best_rank == 4


def test_ranks_of_numpy_are_ranks():
    numpy = pytest.importorskip("numpy")
    found = search_rank(lambda rank: 1 / rank, numpy.array([1, 2, 4]))
    assert found.best_rank == 4 and type(found.points[0].rank) is int


def test_the_grid_finds_the_same_knees():
    close = 0
    for number in range(100):
        knee, loss, noise = curve(number)
        found = search_rank(trainer(number, loss, noise), strategy="grid", seeds=2)
        assert [point.rank for point in found.points] == list(RANKS)
        close += knee / 2 <= found.best_rank <= 2 * knee
    assert close >= 95


LOSSES = {
    "plateau": ({1: 3.0, 2: 2.5, 4: 2.2, 8: 2.2, 16: 2.2}, 4),
    "rises then falls": ({1: 3.0, 2: 2.5, 4: 2.2, 8: 2.6, 16: 2.9}, 4),
    "still rising": ({1: 3.0, 2: 2.5, 4: 2.2, 8: 2.0, 16: 1.9}, 16),
    "flat": ({1: 2.2, 2: 2.2, 4: 2.2, 8: 2.2, 16: 2.2}, 1),
}


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
@pytest.mark.parametrize("strategy", ["grid", "progressive"])
@pytest.mark.parametrize("verdict", LOSSES)
def test_verdicts(verdict, strategy, direction):
    losses, best = LOSSES[verdict]
    sign = 1 if direction == "minimize" else -1
    found = search_rank(lambda rank: sign * losses[rank], list(losses), strategy, direction=direction)
    assert (found.verdict, found.best_rank) == (verdict, best)
    assert f"r={best}" in found.sentence or verdict == "flat"
    assert found.noise == 0
    assert all(point.mean == sign * losses[point.rank] for point in found.points)
    if strategy == "progressive" and verdict in ("plateau", "rises then falls"):
        assert [point.rank for point in found.points] == [1, 2, 4, 8]


def test_noise_is_the_pooled_standard_deviation_and_hides_gains_below_it():
    values = {(1, 0): 2.0, (1, 1): 2.4, (2, 0): 1.95, (2, 1): 2.35, (4, 0): 1.9, (4, 1): 2.3}
    found = search_rank(lambda rank, seed: values[rank, seed], [1, 2, 4], "grid", seeds=2)
    assert found.noise == pytest.approx(math.sqrt(0.08))
    assert (found.best_rank, found.verdict) == (1, "flat")


def test_start_and_refinement():
    """From 8 by doublings: 8, 16, 32; 12 and 10 were skipped below 16 and do as well or not."""
    asked = []

    def train(rank):
        asked.append(rank)
        return max(0, 12 - rank)

    found = search_rank(train, [2, 4, 8, 10, 12, 16, 24, 32], start=8)
    assert found.best_rank == 12
    assert set(asked) == {8, 16, 32, 12, 10}


def test_full_fine_tuning_is_an_arm():
    losses = {1: 2.0, 2: 1.9, 4: 1.9, "full": 1.5}
    found = search_rank(losses.get, list(losses))
    assert (found.best_rank, found.verdict) == ("full", "full fine-tuning")
    assert found.points[-1].rank == "full"
    losses["full"] = 1.9
    assert search_rank(losses.get, list(losses)).best_rank == 2


@pytest.mark.parametrize("strategy", ["grid", "progressive"])
def test_a_training_that_fails_is_a_row_and_the_search_goes_on(strategy):
    def train(rank, *, seed):
        if rank == 2:
            raise RuntimeError("out of luck")
        if rank == 4:
            return math.nan
        return {1: 3.0, 8: 2.0, 16: 2.0}[rank]

    found = search_rank(train, [1, 2, 4, 8, 16], strategy, seeds=2)
    assert found.best_rank == 8
    failed = {trial.rank: trial.error for trial in found.trials if trial.status == "failed"}
    assert failed == {2: "RuntimeError: out of luck", 4: "ValueError: train_and_evaluate returned nan"}
    nothing = search_rank(lambda rank: math.inf, [1, 2])
    assert (nothing.best_rank, nothing.verdict) == (None, "no answer")
    assert nothing.sentence.endswith("the first: ValueError: train_and_evaluate returned inf")
    assert search_rank(lambda rank: 1e308, [1, 2], seeds=2).best_rank is None


def test_a_hopeless_training_is_stopped_early():
    steps = []

    def train(rank, report):
        for step in range(10):
            steps.append(rank)
            report(step, 10.0 if rank == 16 else 1.0 / rank)
        return 10.0 if rank == 16 else 1.0 / rank

    found = search_rank(train, [1, 2, 4, 8, 16], "grid")
    assert [trial.status for trial in found.trials if trial.rank == 16] == ["pruned"]
    assert steps.count(16) < 10 <= steps.count(8)


SCRIPT = """
import sys, time
from lora_fast import search_rank
log, storage, pause = sys.argv[1], sys.argv[2], float(sys.argv[3])
def train(rank, *, seed):
    time.sleep(pause)
    open(log, "a").write(f"{rank} {seed}\\n")
    return max(0, 8 - rank) + 0.01 * seed
found = search_rank(train, [1, 2, 4, 8, 16], "grid", seeds=2, storage=storage)
print(found.best_rank, len(found.trials))
"""


def start(tmp_path, pause):
    command = [sys.executable, "-P", "-c", SCRIPT, tmp_path / "log", f"sqlite:///{tmp_path}/search.db", str(pause)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def finished(tmp_path):
    log = tmp_path / "log"
    return log.read_text().splitlines() if log.exists() else []


def test_a_killed_search_goes_on_and_several_processes_share_one(tmp_path):
    killed = start(tmp_path, 0.3)
    while len(finished(tmp_path)) < 3:
        assert killed.poll() is None
        time.sleep(0.05)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    done = finished(tmp_path)
    assert 3 <= len(done) < 10

    both = [start(tmp_path, 0.3), start(tmp_path, 0.3)]
    assert [process.communicate()[0].split() for process in both] == [["8", "10"], ["8", "10"]]
    assert all(process.returncode == 0 for process in both)
    ran = finished(tmp_path)
    assert set(ran) == {f"{rank} {seed}" for rank in (1, 2, 4, 8, 16) for seed in (0, 1)}
    # Nothing that was told ran again, nothing ran twice but perhaps what was cut off between its line and its end.
    assert [line for line in set(ran) if ran.count(line) > 1] in ([], [done[-1]])


def test_processes_that_begin_at_once_make_one_study(tmp_path):
    """On a database that none of them has made yet; trials so short that they meet at most of them."""
    several = [start(tmp_path, 0.01) for _ in range(3)]
    assert [process.communicate()[0].split() for process in several] == [["8", "10"]] * 3
    assert sorted(finished(tmp_path)) == sorted(f"{rank} {seed}" for rank in (1, 2, 4, 8, 16) for seed in (0, 1))


def test_a_trial_that_another_process_is_about_to_name_is_not_run_twice(tmp_path):
    """The other has begun a trial and not yet written which; here it takes a moment over it."""
    storage = f"sqlite:///{tmp_path}/search.db"
    search_rank(lambda rank: 1 / rank, [1], storage=storage)  # makes the study
    theirs = optuna.load_study(study_name="lora-rank", storage=storage).ask()
    arm = {"rank": 2, "seed": 0, "host": platform.node(), "pid": os.getpid()}

    def name_and_finish():
        time.sleep(0.5)
        theirs.set_user_attr(ARM, arm)
        optuna.load_study(study_name="lora-rank", storage=storage).tell(theirs.number, 0.25)

    ran = []
    thread = threading.Thread(target=name_and_finish)
    thread.start()
    found = search_rank(
        lambda rank, seed: ran.append((rank, seed)) or 1 / rank, [1, 2, 4], "grid", seeds=[0], storage=storage
    )
    thread.join()
    assert (2, 0) not in ran and (4, 0) in ran
    assert [trial.value for trial in found.trials if (trial.rank, trial.seed) == (2, 0)] == [0.25]


def test_an_interrupt_leaves_no_trial_behind(tmp_path):
    storage = f"sqlite:///{tmp_path}/search.db"

    def interrupted(rank):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search_rank(interrupted, [1, 2], storage=storage)
    found = search_rank(lambda rank: 1 / rank, [1, 2], storage=storage)
    assert found.best_rank == 2 and {trial.status for trial in found.trials} == {"ok"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strategy": "random"}, "strategy='random'; expected one of progressive, grid"),
        ({"direction": "up"}, "direction='up'"),
        ({"ranks": [1, 2.5]}, "ranks: 2.5 is no rank"),
        ({"ranks": ["fulll"]}, "ranks: 'fulll' is no rank"),
        ({"ranks": []}, "expected at least one rank"),
        ({"ranks": [1, 2], "start": 4}, "start=4 is above every candidate"),
        ({"start": 0}, "start=0"),
        ({"seeds": 0}, "seeds=0; expected at least 1"),
        ({"seeds": [1, 1]}, r"seeds=\[1, 1\]"),
        ({"min_gain": -1}, "min_gain=-1"),
        ({"storage": "nowhere://x"}, "storage='nowhere://x'"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(LoraFastError, match=message):
        search_rank(lambda rank: 1.0, **arguments)


def test_a_study_of_the_other_direction_is_not_mixed_in(tmp_path):
    storage = f"sqlite:///{tmp_path}/search.db"
    search_rank(lambda rank: 1.0, [1], storage=storage)
    with pytest.raises(LoraFastError, match="was begun with direction='minimize'"):
        search_rank(lambda rank: 1.0, [1], storage=storage, direction="maximize")
