"""Searches: killed and begun again, failing, shared by processes, refused."""

import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
from optuna.distributions import IntDistribution
from optuna.trial import TrialState

from compressor.errors import BackendError, DataError
from compressor.search.execution import Here
from compressor.search.samplers import ABANDONED, RIVALS, AACPSampler, LeGRSampler
from compressor.search.samplers.aacp import MEMBER
from compressor.search.storage import lost_trials
from compressor.search.study import FAILURE, OUTCOME, STRUCTURE, Job, Search
from compressor.values.progress import Progress

ROOT = Path(__file__).parents[2]
SPACE = {f"width:{k}": IntDistribution(1, 16) for k in range(4)}


def evaluate(task):
    if sum(task) % 7 == 0:
        raise BackendError("the engine does not build")
    return float(sum((x - 5) ** 2 for x in task))


def job(sampler="aacp", trials=40, parallel=1, digest="d", distinct=True):
    def make(index):
        if sampler == "aacp":
            return AACPSampler(1, population=6, lag=parallel, space=SPACE)
        if sampler == "legr":
            return LeGRSampler(1, population=6, samples=3, generations=trials, lag=parallel, space=SPACE)
        return RIVALS[sampler](1000 + index)

    def decode(params, index):
        return {"task": [params[name] for name in SPACE]}

    value = lambda x: (x, {"x": x})  # noqa: E731
    return Job("widths", digest, SPACE, make, "minimize", trials, parallel, decode, task_of, value, distinct=distinct)


def task_of(params, structure):
    return structure["task"]


def summary(search):
    trials = [t for t in search.study.trials if ABANDONED not in t.system_attrs]
    return [(t.params, t.state, t.value) for t in trials]


SCRIPT = textwrap.dedent("""
    import sys, time
    sys.path.insert(0, {root!r})
    from tests.search.test_study import job, evaluate
    from compressor.search.execution import Here
    from compressor.search.study import Search
    def slow(task):
        time.sleep({delay})
        return evaluate(task)
    Search(job({sampler!r}, 40), Here(slow), {url!r}).run()
""")


def start(sampler, url, delay=0.03):
    script = SCRIPT.format(root=str(ROOT), sampler=sampler, url=url, delay=delay)
    return subprocess.Popen([sys.executable, "-c", script], cwd=ROOT)


def count(file):
    try:
        with sqlite3.connect(f"file:{file}?mode=ro", uri=True) as connection:
            return connection.execute("select count(*) from trials").fetchone()[0]
    except sqlite3.OperationalError:
        return 0


# Optuna's CMA-ES draws from the number of a trial: killed while it proposes, it goes on with another draw (below).
@pytest.mark.parametrize("sampler", ["aacp", "legr", "tpe", "nsgaii", "random"])
def test_killed_twice_and_begun_again_the_search_is_the_uninterrupted_one(sampler, tmp_path):
    whole = Search(job(sampler), Here(evaluate))
    whole.run()
    file = tmp_path / "study.db"
    for least in (8, 20):
        process = start(sampler, f"sqlite:///{file}")
        deadline = time.monotonic() + 120
        while count(file) < least and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert count(file) >= least
    again = Search(job(sampler), Here(evaluate), f"sqlite:///{file}")
    again.run()
    assert summary(again) == summary(whole)


@pytest.mark.parametrize("parallel", [1, 3])
def test_a_candidate_that_was_begun_stays_what_it_was_though_the_decoder_has_learnt(parallel, tmp_path):
    """A latency model learns from the leaders: asked again after a kill, it would decode the same parameters differently."""

    class Killed(BaseException):
        pass

    def searching(url, dies=None):
        learnt, judged = [0], []

        def decode(params, index):
            return {"task": [params[name] + 100 * learnt[0] for name in SPACE]}

        def learn(count):
            learnt[0] = count // 3

        def judge(task):
            judged.append(task)
            if len(judged) == dies:
                raise Killed
            return float(sum(x % 100 for x in task))

        search = Search(replace(job(parallel=parallel, trials=12), decode=decode), Here(judge), url)
        search.after = learn
        return search

    whole = searching(None)
    whole.run()
    for dies in (5, 9):
        url = f"sqlite:///{tmp_path / f'{dies}.db'}"
        with pytest.raises(Killed):
            searching(url, dies).run()
        again = searching(url)
        again.run()
        assert [t.user_attrs[STRUCTURE] for t in again.study.trials] == [t.user_attrs[STRUCTURE] for t in whole.study.trials]
        assert summary(again) == summary(whole)


def _as_of_another_machine(search, since, width=6):
    """A trial that somebody else has begun whom nobody here can look for."""
    params = dict.fromkeys(SPACE, width)
    who = {"host": "elsewhere 1 pid:[2]", "pid": 1, "started": "3", "since": since}
    trial = optuna.trial.create_trial(state=TrialState.RUNNING, params=params, distributions=SPACE, user_attrs={"owner": who})
    search.study._storage.create_new_trial(search.study._study_id, trial)


def test_who_is_alone_adopts_what_was_begun_on_a_machine_that_was_started_anew(tmp_path):
    url = f"sqlite:///{tmp_path / 'study.db'}"
    _as_of_another_machine(Search(job(trials=5), Here(evaluate), url), time.time())
    search = Search(job(trials=5), Here(evaluate), url, alone=True)
    search.run()
    assert [t.state.is_finished() for t in search.study.trials] == [True] * 5
    assert search.study.trials[0].value == 4.0


def test_a_trial_of_another_machine_is_adopted_when_its_owner_has_long_been_silent(tmp_path):
    url = f"sqlite:///{tmp_path / 'study.db'}"
    first = Search(job(trials=5), Here(evaluate), url)
    _as_of_another_machine(first, time.time())
    assert lost_trials(first.study.trials) == []
    _as_of_another_machine(first, time.time() - 600)
    assert [t.number for t in lost_trials(first.study.trials)] == [1]


def test_an_owner_says_that_it_is_there_until_it_lets_go(tmp_path, monkeypatch):
    monkeypatch.setattr("compressor.search.storage._BEAT_S", 0.05)
    seen = []

    def slow(task):
        for _ in range(2):
            seen.append(search.study.trials[-1].user_attrs["owner"]["since"])
            time.sleep(0.5)
        return evaluate(task)

    search = Search(job(trials=1), Here(slow), f"sqlite:///{tmp_path / 'study.db'}")
    search.run()
    assert seen[1] > seen[0]


def test_a_trial_that_kills_who_judges_it_fails_in_the_end(tmp_path):
    """Where judging takes more memory than there is, the kernel ends the process, again and again."""
    url = f"sqlite:///{tmp_path / 'study.db'}"
    first = Search(job(trials=4), Here(evaluate), url)
    _as_of_another_machine(first, time.time(), width=2)
    for attempts in range(2, 6):  # four more processes are lost with it
        (trial,) = lost_trials(first.study.trials, alone=True)
        assert trial.user_attrs.get("attempts", 1) == attempts - 1
        with pytest.raises(SystemExit):
            Search(job(trials=4), Here(lambda task: sys.exit(1)), url, alone=True).run()
        first.study._storage.set_trial_user_attr(trial._trial_id, "owner", dict(trial.user_attrs["owner"], host="lost"))
    search = Search(job(trials=4), Here(evaluate), url, alone=True)
    search.run()
    assert "5 processes that judged it were lost" in search.study.trials[0].user_attrs[FAILURE]
    assert [t.state.is_finished() for t in search.study.trials] == [True] * 4


def test_cmaes_goes_on_and_loses_no_finished_trial(tmp_path):
    file = tmp_path / "study.db"
    process = start("cmaes", f"sqlite:///{file}")
    while count(file) < 12 and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    again = Search(job("cmaes"), Here(evaluate), f"sqlite:///{file}")
    before = [t for t in again.study.trials if t.state.is_finished()]
    again.run()
    assert [t.params for t in again.study.trials[: len(before)]] == [t.params for t in before]
    assert len(summary(again)) == 40


def test_failures_are_recorded_with_their_reason_and_the_search_goes_on():
    search = Search(job(), Here(evaluate))
    good = search.run()
    failed = [t for t in search.study.trials if t.state == TrialState.FAIL]
    assert failed
    assert all(t.user_attrs[FAILURE] == "BackendError: the engine does not build" for t in failed)
    assert len(good) + len(failed) == 40
    assert [t.value for t in good] == sorted(t.value for t in good)


def test_nothing_but_failures_ends_the_search_with_the_reason():
    def broken(task):
        raise MemoryError("out of memory")

    with pytest.raises(Exception, match="the first 5 trials all failed, the last with: out of memory"):
        Search(job(), Here(broken)).run()


def test_an_error_of_the_program_is_no_failed_trial():
    def broken(task):
        raise TypeError("a bug")

    with pytest.raises(TypeError, match="a bug"):
        Search(job(), Here(broken)).run()


@pytest.mark.parametrize("sampler", ["aacp", "legr"])
def test_candidates_are_drawn_until_they_stand_for_something_new(sampler):
    def decode(params, index):
        return {"task": [2 + p // 3 for p in params.values()]}

    copies = []
    for distinct in (False, True):
        search = Search(replace(job(sampler, 150, distinct=distinct), decode=decode), Here(evaluate))
        search.run()
        copies.append(sum("same_as" in t.user_attrs.get(OUTCOME, {}) for t in search.study.trials))
    assert copies[0] > 10
    assert copies[1] <= 1, "there are 1296 structures"


def test_where_nothing_new_is_left_the_search_ends_all_the_same():
    few = {"width:0": IntDistribution(1, 5)}
    made = replace(job(trials=30), space=few, sampler=lambda index: AACPSampler(1, population=6, space=few))
    search = Search(replace(made, decode=lambda params, index: {"task": list(params.values())}), Here(evaluate))
    assert len(search.run()) == 30
    assert len({t.params["width:0"] for t in search.study.trials}) == 5


def test_a_structure_that_was_judged_is_not_judged_again():
    asked = []

    def counting(task):
        asked.append(tuple(task))
        return evaluate(task)

    search = Search(job(trials=150, distinct=False), Here(counting))
    search.run()
    judged = [task for task in asked if sum(task) % 7]
    assert len(set(judged)) == len(judged)
    copies = [t for t in search.study.trials if "same_as" in t.user_attrs.get(OUTCOME, {})]
    assert copies
    for trial in copies:
        assert trial.params == search.study.trials[trial.user_attrs[OUTCOME]["same_as"]].params


@pytest.mark.parametrize("parallel", [1, 3])
def test_the_search_depends_on_how_many_are_under_way_not_on_who_is_first(parallel):
    class Later(Here):
        """Evaluates when it is submitted, in another order than that of the answers."""

        def submit(self, number, task):
            try:
                answer = evaluate(task)
            except BackendError as error:
                answer = error
            super().submit(number, answer)

        def outcome(self, number):
            answer = self._waiting.pop(number)
            if isinstance(answer, Exception):
                raise answer
            return answer

    one, other = Search(job(parallel=parallel), Here(evaluate)), Search(job(parallel=parallel), Later(evaluate))
    one.run()
    other.run()
    assert summary(one) == summary(other)


def test_two_processes_share_a_study(tmp_path):
    file = tmp_path / "study.db"
    first, second = (start("aacp", f"sqlite:///{file}", delay=0.6) for _ in range(2))
    assert first.wait(120) == 0
    assert second.wait(120) == 0
    search = Search(job(), Here(evaluate), f"sqlite:///{file}")
    assert len(summary(search)) == 40
    trials = [t for t in search.study.trials if ABANDONED not in t.system_attrs]
    assert len({t.user_attrs["owner"]["pid"] for t in trials}) == 2
    assert [t.system_attrs[MEMBER] for t in trials[:6]] == [[k, "first"] for k in range(6)], "each draws its own"
    judged = [tuple(t.params.values()) for t in trials if "same_as" not in t.user_attrs.get(OUTCOME, {})]
    assert len(set(judged[:6])) == 6


def test_another_study_of_this_name_is_refused(tmp_path):
    url = f"sqlite:///{tmp_path / 'study.db'}"
    Search(job(trials=3), Here(evaluate), url).run()
    with pytest.raises(DataError, match="holds another study named widths"):
        Search(job(trials=3, digest="other"), Here(evaluate), url)


@pytest.mark.parametrize("url", ["nothing://here", "sqlite:////proc/1/study.db", "postgresql://nobody@127.0.0.1:1/x"])
def test_a_storage_that_cannot_be_opened_is_named(url):
    with pytest.raises(DataError, match="cannot be opened"):
        Search(job(), Here(evaluate), url)


def test_a_file_that_is_no_database_is_named(tmp_path):
    file = tmp_path / "study.db"
    file.write_bytes(b"not a database at all, but long enough to be looked at" * 100)
    with pytest.raises(DataError, match=r"study\.db is damaged, or of another version"):
        Search(job(), Here(evaluate), f"sqlite:///{file}")


def test_progress_tells_best_current_rate_and_time_left():
    seen = []

    class Seen(Progress):
        def search(self, state):
            seen.append(state)

    Search(job(trials=12), Here(evaluate), progress=Seen()).run()
    assert [s.done for s in seen] == list(range(1, 13))
    assert seen[-1].left_s == 0
    assert seen[-1].total == 12
    values = [s.current for s in seen if s.current is not None]
    assert seen[-1].best == min(values)
    assert "trials/min" in seen[-1].line()
