"""The default sampler proposes from the front of what it believes, the same every time."""

from random import Random

import numpy as np
import optuna
import pytest

from elastic.latency.cost_table import Table, kinds, least, places
from elastic.searching.sampler import BEGIN, AdditiveSampler, foresight, learn
from elastic.spaces.bound import BoundSpace, Group
from elastic.spaces.dims import Cut

optuna.logging.set_verbosity(optuna.logging.ERROR)


def group(layer: int, name: str, dim: str, choices: tuple[int, ...]) -> Group:
    return Group(f"layers.{layer}.{name}", dim, choices, (Cut("site", "out", 1),))


SPACE = BoundSpace(
    tuple(
        group(layer, name, dim, choices)
        for layer in range(8)
        for name, dim, choices in (("q_rank", "rank", (8, 4, 2)), ("mlp", "width", (64, 48, 32)))
    ),
    (),
)
WEIGHTS = np.exp(np.random.default_rng(5).normal(size=8))
"""How much accuracy each layer's width is worth."""


def latency(sub) -> float:
    widths = [sub[f"layers.{layer}.mlp"] for layer in range(8)]
    return 10 + sum(width / 64 for width in widths)


def accuracy(sub) -> float:
    lost = sum(
        weight * (1 - sub[f"layers.{layer}.mlp"] / 64)
        + 0.1 * (1 - sub[f"layers.{layer}.q_rank"] / 8)
        for layer, weight in enumerate(WEIGHTS)
    )
    return 0.9 - 0.04 * lost


def searched(trials: int, *, stop: int = 0, costs=(latency,), **settings) -> optuna.Study:
    """A study of so many trials, in two pieces if `stop` says where."""
    study = optuna.create_study(directions=["maximize"] + ["minimize"] * len(costs))
    for sub in SPACE.ladder():
        study.enqueue_trial(SPACE.indices(sub))
    settings = {"examples": 1000, **settings}
    study.sampler = AdditiveSampler(SPACE, **settings)
    for number in range(trials):
        if number == stop:
            study.sampler = AdditiveSampler(SPACE, **settings)
        trial = study.ask()
        sub = SPACE.at({g.name: trial.suggest_int(g.name, 0, len(g.choices) - 1) for g in SPACE})
        study.tell(trial, [accuracy(sub), *(cost(sub) for cost in costs)])
    return study


def subs(study: optuna.Study) -> list:
    return [SPACE.at(trial.params) for trial in study.trials]


def test_same_seed_same_proposals_also_when_resumed():
    once = subs(searched(20))
    assert subs(searched(20, stop=11)) == once
    assert subs(searched(20, seed=1)) != once


def _parts() -> np.ndarray:
    """What screening would find: what every choice truly costs."""
    full = SPACE.indices(SPACE.maximal())
    lost = [
        [accuracy(SPACE.maximal()) - accuracy(SPACE.at({**full, g.name: i})) for i in range(3)]
        for g in SPACE
    ]
    return np.array(lost)


def test_with_parts_too_it_goes_on_as_it_would_have():
    once = subs(searched(20, parts=_parts()))
    assert subs(searched(20, stop=11, parts=_parts())) == once
    assert once != subs(searched(20))
    assert len(set(once)) == 20


def test_accuracies_are_foreseen_and_a_sum_that_holds_the_better():
    measured = {SPACE.at(trial.params): trial.values[0] for trial in searched(30).trials}
    told = foresight(SPACE, measured, 1000, parts=_parts())
    assert told.n == 30 - BEGIN and told.r2 > 0.99 and told.rank_correlation > 0.95
    mixed = dict(
        zip(measured, np.random.default_rng(0).permutation([*measured.values()]), strict=True)
    )
    assert foresight(SPACE, mixed, 1000, parts=_parts()).r2 < 0.5
    assert foresight(SPACE, dict(list(measured.items())[: BEGIN + 3]), 1000) is None


def test_nothing_is_proposed_twice():
    found = subs(searched(60))
    assert len(set(found)) == 60


def test_ranks_stay_whole_where_cutting_them_saves_nothing():
    ranks = [sub[f"layers.{layer}.q_rank"] for sub in subs(searched(30))[10:] for layer in range(8)]
    assert np.mean(np.array(ranks) == 8) > 0.9


def test_what_matters_is_cut_last():
    late = subs(searched(50))[25:]
    widths = np.mean([[sub[f"layers.{layer}.mlp"] for layer in range(8)] for sub in late], 0)
    assert np.corrcoef(widths, WEIGHTS)[0, 1] > 0.6


def test_proposals_cover_the_range_and_stay_below_a_limit():
    times = [latency(sub) for sub in subs(searched(40))[3:]]
    assert min(times) < 14.5 and max(times) > 17.5
    limited = [latency(sub) for sub in subs(searched(40, room=0.25))[3:]]
    assert max(limited) <= 15.05 and min(limited) < 14.5


def test_half_of_the_proposals_are_at_the_limit():
    """As near as the choices allow: a quarter of a millisecond apart, and the table is learnt."""
    times = [latency(sub) for sub in subs(searched(30, room=0.4))[3:]]
    assert np.mean([15.0 <= time <= 15.6 for time in times]) > 0.4
    free = [latency(sub) for sub in subs(searched(30))[3:]]
    assert np.mean([15.0 <= time <= 15.6 for time in free]) < 0.3


def early(sub) -> float:
    """What the first half of the layers costs."""
    return sum(sub[f"layers.{layer}.mlp"] / 64 for layer in range(4))


def late(sub) -> float:
    return sum(sub[f"layers.{layer}.mlp"] / 64 for layer in range(4, 8))


def test_several_costs_are_all_traded():
    """Some proposals save the one, some the other; a sum of both would never part them."""
    apart = {
        costs: [early(sub) - late(sub) for sub in subs(searched(60, costs=costs))[3:]]
        for costs in ((early, late), (early,), (latency,))
    }
    assert min(apart[early, late]) < -1.5 and max(apart[early, late]) > 1.5
    assert max(apart[early,]) < 1
    assert min(apart[latency,]) > -1.5 and max(apart[latency,]) < 1.5


def test_accuracy_alone_is_looked_for_at_the_limit():
    tables = [Table.counted(SPACE, latency)]
    found = subs(searched(20, costs=(), tables=tables, tradeoff=False, room=0.4))[3:]
    times = [latency(sub) for sub in found]
    assert max(times) <= 15.6
    assert np.mean([time >= 15.0 for time in times]) > 0.7


def test_a_counted_table_is_exact_where_costs_are_sums():
    table = Table.counted(SPACE, latency)
    for seed in range(20):
        sub = SPACE.stratified(Random(seed))
        assert table(sub) == pytest.approx(latency(sub))
    assert -least(table.alternatives()) == pytest.approx(4.0)


def test_a_limit_nobody_meets_is_answered_by_the_smallest():
    found = subs(searched(8, room=-3.0))[4:]
    assert {latency(sub) for sub in found} == {latency(SPACE.minimal())}


def test_trials_that_failed_or_still_run_are_left_out_but_not_repeated():
    study = searched(12)
    study.tell(study.ask(), state=optuna.trial.TrialState.FAIL)
    running = study.ask()
    trial = study.ask()
    assert running.relative_params and trial.relative_params != running.relative_params


def test_two_workers_at_once_propose_different_sub_adapters():
    study = searched(12)
    asked = [study.ask() for _ in range(4)]
    for trial in asked:
        for g in SPACE:
            trial.suggest_int(g.name, 0, len(g.choices) - 1)
    assert len({tuple(trial.params.items()) for trial in asked}) == 4


def test_a_group_of_no_choice_is_no_obstacle():
    space = BoundSpace((*SPACE.groups, group(9, "mlp", "width", (64,))), ())
    study = optuna.create_study(
        directions=["maximize", "minimize"], sampler=AdditiveSampler(space, examples=100)
    )
    for value in range(6):
        trial = study.ask()
        for g in space:
            trial.suggest_int(g.name, 0, len(g.choices) - 1)
        study.tell(trial, [value / 10, value])
    assert len(study.trials) == 6


def test_a_foreign_parameter_is_refused():
    trial = optuna.create_study(
        directions=["maximize", "minimize"], sampler=AdditiveSampler(SPACE, examples=100)
    ).ask()
    with pytest.raises(ValueError, match="no group of this search space"):
        trial.suggest_int("strange", 0, 3)


def test_estimates_are_nearer_to_the_truth_than_lucky_scores():
    generator = np.random.default_rng(0)
    found = subs(searched(50))
    noisy = {sub: accuracy(sub) + 0.03 * generator.normal() for sub in found}
    estimates = dict(zip(found, learn(SPACE, noisy, examples=150).fitted, strict=True))

    def error(of) -> float:
        return float(np.mean([(of[sub] - accuracy(sub)) ** 2 for sub in found]))

    assert error(estimates) < 0.5 * error(noisy)


# The latency table.


def test_a_table_predicts_what_it_never_saw():
    generator = np.random.default_rng(0)
    seen = [*SPACE.ladder(), *(SPACE.stratified(Random(i)) for i in range(9))]
    measured = {sub: latency(sub) * (1 + 0.005 * generator.normal()) for sub in seen}
    table = Table.fit(SPACE, measured)
    unseen = [SPACE.stratified(Random(100 + i)) for i in range(50)]
    for sub in unseen:
        assert table(sub) == pytest.approx(latency(sub), rel=0.02)
    ranks = [g.dim == "rank" for g in SPACE]
    assert (table.effects[ranks] == 0).all()
    assert places(SPACE, [SPACE.minimal()]).tolist() == [[2] * 16]


def test_a_table_of_one_measurement_says_that():
    assert Table.fit(SPACE, {SPACE.maximal(): 7.0})(SPACE.minimal()) == 7.0


@pytest.mark.parametrize(
    "names, expected",
    [
        (["model.layers.0.rank", "model.layers.1.rank"], ["rank", "rank"]),
        (["layers.0.attn.rank", "layers.0.mlp.rank"], ["attn.rank", "mlp.rank"]),
        (["encoder.block.3.w", "decoder.block.3.w"], ["encoder.block.w", "decoder.block.w"]),
        (["h.0.w", "h.0.r", "h.11.w"], ["w", "r", "w"]),
    ],
)
def test_kinds_are_names_without_the_block(names, expected):
    groups = tuple(Group(name, "width", (4, 2), (Cut("x", "out"),)) for name in names)
    assert kinds(BoundSpace(groups, ())) == expected
