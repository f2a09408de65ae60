"""LeGR's and AACP's samplers: the algorithms, against plain loops that are written as the released codes are."""

import numpy as np
import optuna
import pytest
from optuna.distributions import FloatDistribution, IntDistribution
from optuna.trial import TrialState

from compressor.search.samplers import ABANDONED, AACPSampler, LeGRSampler
from compressor.search.samplers.aacp import MEMBER

SPACE = {
    **{f"scale:{k}": FloatDistribution(np.exp(-4), np.exp(4), log=True) for k in range(5)},
    **{f"shift:{k}": FloatDistribution(-4.0, 4.0) for k in range(5)},
}
WIDTHS = {f"width:{k}": IntDistribution(8, 64, step=8) for k in range(6)}


def sphere(params):
    return sum((np.log(v) if name.startswith("scale") else v / 10 - 1) ** 2 for name, v in params.items())


def searched(sampler, trials, space, value=sphere, study=None, direction="minimize"):
    study = study or optuna.create_study(sampler=sampler, direction=direction)
    for _ in range(trials):
        trial = study.ask(space)
        study.tell(trial, value(trial.params))
    return study


def points(study):
    return [t.params for t in study.trials if ABANDONED not in t.system_attrs]


@pytest.mark.parametrize("make", [
    lambda: LeGRSampler(3, population=8, samples=3, generations=60, space=SPACE), lambda: AACPSampler(3, space=SPACE),
])  # fmt: skip
def test_the_same_seed_gives_the_same_search_and_an_abandoned_trial_leaves_no_trace(make):
    whole = searched(make(), 40, SPACE)
    study = searched(make(), 23, SPACE)
    lost = study.ask(SPACE)
    study._storage.set_trial_system_attr(lost._trial_id, ABANDONED, True)
    study.tell(lost, state=TrialState.FAIL)
    study.sampler = make()
    searched(None, 17, SPACE, study=study)
    assert points(study) == points(whole)


@pytest.mark.parametrize("make", [
    lambda: LeGRSampler(3, population=8, samples=3, generations=60, lag=4, space=SPACE), lambda: AACPSampler(3, lag=4, space=SPACE),
])  # fmt: skip
def test_with_several_trials_under_way_the_order_in_which_they_finish_does_not_matter(make):
    def run(eager):
        study, trials, told = optuna.create_study(sampler=make()), [], set()
        for n in range(40):
            ready = {k for k in range(n) if k <= n - 4 or (eager and k % 3 == n % 3)}  # all that are older than the lag, and some
            for k in sorted(ready - told, reverse=True):
                study.tell(trials[k], sphere(trials[k].params))
            told |= ready
            trials.append(study.ask(SPACE))
        return points(study)

    assert run(eager=False) == run(eager=True)


def test_legr_is_aging_evolution_with_the_identity_last_in_the_first_population():
    sampler = LeGRSampler(0, population=6, samples=4, generations=50, mutate=0.4, space=SPACE)
    study = searched(sampler, 30, SPACE)
    identity = study.trials[5].params
    assert all(v == pytest.approx(1.0 if name.startswith("scale") else 0.0) for name, v in identity.items())
    for k, trial in enumerate(study.trials[6:], 6):
        pool = study.trials[k - 6 : k]  # the oldest leaves, not the worst
        same = [sum(p.params[name] == v for name, v in trial.params.items()) for p in pool]
        parent = pool[int(np.argmax(same))]
        changed = {name.partition(":")[2] for name, v in trial.params.items() if v != parent.params[name]}
        assert 1 <= len(changed) <= 2, "at most 0.4 of five layers are drawn, with replacement"
        for key in changed:
            assert all(trial.params[f"{kind}:{key}"] != parent.params[f"{kind}:{key}"] for kind in ("scale", "shift"))


@pytest.mark.parametrize("make", [
    lambda: LeGRSampler(3, population=8, samples=3, generations=60, space=SPACE), lambda: AACPSampler(3, population=8, space=SPACE),
])  # fmt: skip
def test_drawn_again_a_candidate_is_another_one_and_the_same_each_time(make):
    sampler = make()
    study = searched(sampler, 30, SPACE)
    past = sampler.past(study, 30)
    drawn = [sampler.draw(past, SPACE, again) for again in range(5)]
    assert drawn == [make().draw(past, SPACE, again) for again in range(5)]
    assert len({tuple(params.values()) for params, _ in drawn}) == 5
    assert all(attributes == drawn[0][1] for _, attributes in drawn), "the same member's turn"
    assert all(d.low <= params[name] <= d.high for params, _ in drawn for name, d in SPACE.items())


def test_aacp_drawn_again_moves_widths_by_steps():
    sampler = AACPSampler(1, population=6, crossover=0.0, max_stay=50, space=WIDTHS)
    study = searched(sampler, 40, WIDTHS)
    past = sampler.past(study, 40)
    member = sampler.draw(past, WIDTHS)[1][MEMBER][0]
    own = [t for t in study.trials if t.system_attrs[MEMBER][0] == member]
    own = min(own, key=lambda t: (t.value, t.number)).params
    for again in range(1, 4):
        params, _ = sampler.draw(past, WIDTHS, again)
        moved = [abs(params[name] - v) for name, v in own.items() if params[name] != v]
        assert len(moved) <= again + 1, "one from the mutant, and as many steps as it was drawn again"
        assert sum(d <= 8 * again for d in moved) >= len(moved) - 1


def test_legr_chooses_the_best_of_those_it_draws():
    sampler = LeGRSampler(0, population=6, samples=200, generations=50, mutate=0.2, space=SPACE)  # all are drawn
    study = searched(sampler, 30, SPACE)
    for k, trial in enumerate(study.trials[6:], 6):
        best = min(study.trials[k - 6 : k], key=lambda t: t.value)
        assert sum(best.params[name] == v for name, v in trial.params.items()) == 8


def test_legr_noise_of_scales_is_annealed_and_that_of_shifts_is_not():
    steps = {"scale": [[], []], "shift": [[], []]}
    for seed in range(150):
        sampler = LeGRSampler(seed, population=1, samples=1, generations=20, mutate=1.0, space=SPACE)
        study = searched(sampler, 20, SPACE, value=lambda p: 0.0)
        for late, k in enumerate((1, 19)):
            for name, v in study.trials[k].params.items():
                before = study.trials[k - 1].params[name]
                kind = name.partition(":")[0]
                edge = np.exp(4) if kind == "scale" else 4
                if v != before and abs(np.log(v) if kind == "scale" else v) < (4 if kind == "scale" else edge) - 1e-9:
                    steps[kind][late].append(np.log(v / before) if kind == "scale" else v - before)
    assert np.std(steps["scale"][0]) == pytest.approx(1 - 1 / 25, rel=0.15)
    assert np.std(steps["scale"][1]) == pytest.approx(1 - 19 / 25, rel=0.15)
    assert np.std(steps["shift"][0]) == pytest.approx(1.0, rel=0.15)
    assert np.std(steps["shift"][1]) == pytest.approx(1.0, rel=0.2)  # less where it comes to an end of the range


def test_aacp_replaces_a_member_only_by_a_better_one_and_draws_stagnant_ones_anew():
    study = searched(
        AACPSampler(1, population=5, max_stay=2, space=WIDTHS), 80, WIDTHS, value=lambda p: -sphere(p), direction="maximize"
    )
    fitness, stay, turn, restart = {}, {}, -1, False
    for trial in study.trials:
        member, kind = trial.system_attrs[MEMBER]
        if kind == "first":
            assert member == len(fitness)
        elif restart:
            assert (member, kind) == (turn, "trial"), "a restart is followed by the member's own turn"
            restart = False
        else:
            turn = (turn + 1) % 5
            assert member == turn
            assert (kind == "restart") == (stay[member] >= 2)
            restart = kind == "restart"
        if kind != "trial" or trial.value > fitness[member]:
            fitness[member], stay[member] = trial.value, 0
        else:
            stay[member] += 1
    assert any(t.system_attrs[MEMBER][1] == "restart" for t in study.trials)


def test_aacp_crosses_with_the_best_moved_by_a_difference_on_the_grid():
    study = searched(AACPSampler(1, population=6, crossover=0.0, max_stay=50, space=WIDTHS), 40, WIDTHS)
    members = {t.system_attrs[MEMBER][0]: t for t in study.trials[:6]}
    for k, trial in enumerate(study.trials[6:], 6):
        member, _ = trial.system_attrs[MEMBER]
        best = min(study.trials[:k], key=lambda t: t.value)
        own = members[member]
        changed = [name for name, v in trial.params.items() if v != own.params[name]]
        assert len(changed) <= 1, "with CR = 0 one parameter comes from the mutant"
        others = [members[o].params for o in members if o != member]
        for name in changed:
            moves = {int(best.params[name] + 0.5 * (a[name] - b[name])) for a in others for b in others if a is not b}
            grid = {min(max(8 * round(v / 8), 8), 64) for v in moves}  # as the released code rounds
            assert trial.params[name] in grid
        if trial.value < own.value:
            members[member] = trial


def test_aacp_repairs_every_candidate_the_first_ones_too():
    def repair(params, random):
        params = dict(params)
        while sum(params.values()) > 150:
            name = sorted(params)[random.integers(len(params))]
            params[name] = max(params[name] - 8, 8)
        return params

    study = searched(AACPSampler(1, population=6, repair=repair, space=WIDTHS), 40, WIDTHS)
    assert all(sum(t.params.values()) <= 150 for t in study.trials)
    assert len({tuple(t.params.values()) for t in study.trials[:6]}) == 6


@pytest.mark.parametrize("make", [
    lambda s: LeGRSampler(s, population=12, samples=4, generations=150, space=SPACE), lambda s: AACPSampler(s, space=SPACE),
])  # fmt: skip
def test_both_search_better_than_chance(make):
    found = [searched(make(s), 150, SPACE).best_value for s in range(3)]
    chance = [searched(optuna.samplers.RandomSampler(seed=s), 150, SPACE).best_value for s in range(3)]
    assert np.median(found) < 0.7 * np.median(chance)


def test_aacp_draws_stagnant_members_as_it_is_told():
    def fresh(random):
        return {name: 8 * int(random.integers(1, 3)) for name in WIDTHS}

    study = searched(AACPSampler(1, population=5, max_stay=2, space=WIDTHS, fresh=fresh), 80, WIDTHS, lambda p: -sum(p.values()))
    anew = [t.params for t in study.trials if t.system_attrs[MEMBER][1] == "restart"]
    assert len(anew) > 3
    assert all(width <= 16 for params in anew for width in params.values())
    assert len({tuple(params.values()) for params in anew}) > 1
    first = [t.params for t in study.trials if t.system_attrs[MEMBER][1] == "first"]
    assert any(width > 16 for params in first for width in params.values())


def test_aacp_takes_what_has_turned_out_to_be_infeasible_for_no_best_and_lets_any_other_take_its_place():
    near = {"crossover": 1.0, "factor": 1e-9, "population": 6, "max_stay": 50, "space": WIDTHS}  # a child is the best itself
    study = searched(AACPSampler(1, **near), 12, WIDTHS, value=lambda p: sum(p.values()))
    assert study.trials[-1].params == study.best_params

    def allowed(candidates):
        return np.array([sum(params.values()) >= 200 for params in candidates])

    sampler = AACPSampler(1, **near, allowed=allowed)
    feasible = [t for t in study.trials if sum(t.params.values()) >= 200]
    assert 0 < len(feasible) < 6
    params, _ = sampler.draw(sampler.past(study, 12), WIDTHS)
    assert params == min(feasible, key=lambda t: t.value).params
    study.sampler = sampler
    searched(None, 12, WIDTHS, value=lambda p: sum(p.values()), study=study)
    members = {t.system_attrs[MEMBER][0]: t for t in study.trials[12:]}
    assert len(members) == 6
    assert all(allowed([t.params for t in members.values()])), "worse than what they replace, but feasible"

    strict = AACPSampler(1, **near, allowed=lambda candidates: np.zeros(len(candidates), dtype=bool))
    params, _ = strict.draw(strict.past(study, 24), WIDTHS)
    assert params == study.best_params, "where nothing is feasible, the best is the best"


def test_failed_trials_are_no_members():
    sampler = AACPSampler(1, population=5, space=WIDTHS)
    study = optuna.create_study(sampler=sampler)
    for k in range(40):
        trial = study.ask(WIDTHS)
        if k % 3 == 0:
            study.tell(trial, state=TrialState.FAIL)
        else:
            study.tell(trial, sphere(trial.params))
    members = {t.system_attrs[MEMBER][0] for t in study.trials if t.state == TrialState.COMPLETE}
    assert members == set(range(5)), "a member that failed at first is filled later"


@pytest.mark.parametrize("make", [
    lambda: LeGRSampler(population=0), lambda: LeGRSampler(mutate=0.0), lambda: LeGRSampler(lag=0),
    lambda: AACPSampler(population=3), lambda: AACPSampler(crossover=1.5),
])  # fmt: skip
def test_settings_out_of_range_are_refused(make):
    with pytest.raises(ValueError, match=r"lag|LeGRSampler|AACPSampler"):
        make()
