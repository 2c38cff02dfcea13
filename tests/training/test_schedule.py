"""Learning rates and open dimensions, against the formulas."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic.config import ScheduleConfig, StageConfig, TrainConfig
from elastic.errors import ConfigError
from elastic.training.schedule import Position, Schedule
from tests.helpers import tiny

ALL = ["rank", "width", "heads"]
N = 5


def schedule(*stages: StageConfig, n: int = N, **lr) -> Schedule:
    return Schedule(stages, ScheduleConfig(**lr), n)


def test_stage_cosine_is_the_published_formula():
    """lr(s) = 0.5 * init_lr * (1 + cos(pi * (s - e) / (epochs_lr * n)))"""
    two = schedule(
        StageConfig(epochs=2, init_lr=3e-4), StageConfig(epochs=3, init_lr=1e-4, epochs_lr=4)
    )
    for init_lr, start, epochs, epochs_lr in [(3e-4, 0, 2, 2), (1e-4, 2 * N, 3, 4)]:
        for e in range(epochs):
            for b in range(N):
                s = e * N + b + 1
                expected = 0.5 * init_lr * (1 + math.cos(math.pi * (s - e) / (epochs_lr * N)))
                assert two.learning_rate(start + s - 1) == pytest.approx(expected, rel=1e-12)


def test_stage_cosine_by_numbers():
    one = schedule(StageConfig(epochs=2, init_lr=1.0), n=4)
    # (s - e) / 8: 1 2 3 4, then 4 5 6 7
    eighths = [0.96194, 0.85355, 0.69134, 0.5, 0.5, 0.30866, 0.14645, 0.03806]
    assert [one.learning_rate(i) for i in range(8)] == pytest.approx(eighths, abs=1e-5)


def test_each_stage_starts_its_cosine_anew():
    stage = StageConfig(epochs=2, init_lr=3e-4)
    two = schedule(stage, stage)
    first = [two.learning_rate(i) for i in range(2 * N)]
    assert [two.learning_rate(2 * N + i) for i in range(2 * N)] == first
    assert first[-1] < first[0]


def test_warmup_inside_a_stage_then_its_cosine():
    stage = dict(epochs=2, init_lr=3e-4)
    cold, warm = schedule(StageConfig(**stage)), schedule(StageConfig(**stage, warmup_steps=4))
    for offset in range(2 * N):
        expected = 3e-4 * (offset + 1) / 4 if offset < 4 else cold.learning_rate(offset)
        assert warm.learning_rate(offset) == pytest.approx(expected, rel=1e-12)
    late = schedule(StageConfig(**stage), StageConfig(**stage, warmup_steps=4))
    assert late.learning_rate(2 * N) == pytest.approx(3e-4 / 4)


def test_a_cosine_shorter_than_its_stage_ends_at_zero_and_stays():
    short = schedule(StageConfig(epochs=3, init_lr=1.0, epochs_lr=1))
    rates = [short.learning_rate(i) for i in range(3 * N)]
    assert rates[-1] == pytest.approx(0, abs=1e-15)
    assert rates == sorted(rates, reverse=True)


def test_global_warmup_is_the_published_formula_then_a_cosine_to_zero():
    """lr = warm + (base - warm) * (e*n + b + 1) / (W*n), over all stages."""
    lr = dict(base_lr=1e-3, warmup_lr=1e-4, warmup_epochs=2)
    both = schedule(StageConfig(), StageConfig(epochs=4), **lr)
    warmup, total = 2 * N, 5 * N
    for e in range(2):
        for b in range(N):
            expected = 1e-4 + 9e-4 * (e * N + b + 1) / warmup
            assert both.learning_rate(e * N + b) == pytest.approx(expected, rel=1e-12)
    for step in range(warmup, total + 1):
        turn = math.pi * (step - warmup) / (total - warmup)
        expected = 0.5e-3 * (1 + math.cos(turn))
        assert both.learning_rate(step) == pytest.approx(expected, rel=1e-12, abs=1e-18)
    assert both.learning_rate(warmup) == pytest.approx(1e-3)
    assert both.learning_rate(total) == pytest.approx(0, abs=1e-18)
    assert both.learning_rate(total - 1) > 0, "the last step must still train"


@given(
    st.floats(0, 3),
    st.integers(1, 30),
    st.lists(st.integers(1, 3), min_size=1, max_size=3),
)
def test_global_rates_stay_between_zero_and_base(warmup_epochs, n, epochs):
    whole = schedule(
        *(StageConfig(epochs=e) for e in epochs), n=n, base_lr=2.0, warmup_epochs=warmup_epochs
    )
    rates = [whole.learning_rate(step) for step in range(whole.steps)]
    assert whole.steps == n * sum(epochs)
    assert all(0 < rate <= 2.0 + 1e-12 for rate in rates)


def test_positions_count_within_the_stage():
    two = schedule(StageConfig(epochs=2), StageConfig(epochs=1))
    found = [two.position(step) for step in (0, N, 2 * N - 1, 2 * N, 3 * N - 1, 3 * N)]
    assert found == [
        Position(0, 0, 0), Position(0, N, 1), Position(0, 2 * N - 1, 1),
        Position(1, 0, 0), Position(1, N - 1, 0), Position(1, N, 1),
    ]  # fmt: skip
    assert (two.epochs, two.steps) == (3, 3 * N)


def test_closed_dimensions_stay_maximal_and_open_ones_offer_their_first_choices():
    space = tiny.space(heads=True).bind(tiny.llama(), tiny.RANK)
    stages = [
        StageConfig(),
        StageConfig(train_dims=["rank"]),
        StageConfig(train_dims=["rank", "width"], width_indicator=2),
        StageConfig(train_dims=ALL),
    ]
    plan = schedule(*stages, n=1)
    expected = {
        "attention_rank": [(8,), (8, 4, 1), (8, 4), (8, 4, 1)],
        "mlp_rank": [(8,), (8, 5, 2), (8, 5), (8, 5, 2)],
        "mlp_width": [(64,), (64,), (64, 48), (64, 48, 32, 16)],
        "attention_heads": [(2,), (2,), (2,), (2, 1)],
    }
    for step in range(4):
        opened = plan.open_space(space, step)
        assert opened.targets == space.targets
        for group in opened:
            assert group.choices == expected[group.name.rpartition(".")[2]][step]
            assert opened.maximal() == space.maximal()
            space.check(opened.minimal())
    wide = schedule(StageConfig(train_dims=["rank"], width_indicator=99))
    assert wide.open_space(space, 0).minimal()["model.layers.0.mlp_rank"] == 2


def stages(*dims: list[str], **settings) -> TrainConfig:
    return TrainConfig(stages=[StageConfig(train_dims=d) for d in dims], **settings)


def test_dimensions_open_in_order_and_stay_open():
    stages([], ["rank"], ["width", "rank"], ALL)
    stages(["width"], ["width", "rank"], progressivity=["width", "rank"])
    stages(["rank", "width"], ["rank", "width"])
    stages([], ["width"])  # what no stage opens holds up nothing
    for number, wrong in (
        (0, [["width"], ["rank", "width"]]), (1, [["rank"], []]), (1, [["rank"], ["width"]]),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=rf"stages\[{number}\]\.train_dims .*progressivity"):
            stages(*wrong)


def test_every_stage_has_its_rate_or_none_has():
    own, other = StageConfig(init_lr=1e-3), StageConfig()
    TrainConfig(stages=[own, own])
    TrainConfig(stages=[other, other])
    for mixed in ([own, other], [other, own]):
        with pytest.raises(ConfigError, match="init_lr to every stage, or to none"):
            TrainConfig(stages=mixed)


@pytest.mark.parametrize(
    "setting",
    [
        {"epochs": 0},
        {"sample_rate": 0},
        {"warmup_steps": -1},
        {"width_indicator": 0},
        {"epochs_lr": 0},
        {"init_lr": 0.0},
    ],
)
def test_a_stage_refuses_impossible_settings(setting):
    (value,) = setting.values()
    with pytest.raises(ConfigError, match=str(value)):
        StageConfig(**setting)


def test_unset_stages_follow_the_sampling():
    """Published training opens everything from the start, ours trains the maximal one first."""
    everything = TrainConfig().progressivity
    assert set(ALL) < set(everything)
    assert [stage.train_dims for stage in TrainConfig().resolved_stages] == [[], everything]
    lonas = TrainConfig(sampling="lonas", progressivity=everything[:2])
    assert [stage.train_dims for stage in lonas.resolved_stages] == [everything[:2]]
    assert (lonas.resolved_order, lonas.draw_for) == ("none", "micro_batch")
    ours = TrainConfig()
    assert (ours.resolved_order, ours.draw_for) == ("activation", "step")
    epochs = [sum(s.epochs for s in c.resolved_stages) for c in (ours, lonas)]
    assert epochs[0] == epochs[1]
    own = TrainConfig(sampling="lonas", order="norm", sample_each="step", stages=[StageConfig()])
    assert (own.resolved_order, own.draw_for) == ("norm", "step")
    assert own.resolved_stages == [StageConfig()]


def test_a_limit_ends_training_and_the_rate_with_it():
    stages, lr = [StageConfig(epochs=3)], ScheduleConfig(base_lr=1e-3)
    limited, whole = (Schedule(stages, lr, 10, most) for most in (7, 99))
    assert (limited.steps, whole.steps) == (7, 30)
    rates = [limited.learning_rate(step) for step in range(8)]
    assert rates == sorted(rates, reverse=True) and rates[7] == 0.0
    assert rates[3] == pytest.approx(0.5e-3 * (1 + math.cos(math.pi * 3 / 7)))


def test_a_warm_up_that_training_ends_in_is_told():
    """Exactly where no step has the configured rate."""
    for most in range(1, 12):
        for lr, stage in (
            (ScheduleConfig(base_lr=1e-3, warmup_epochs=0.7), StageConfig(epochs=3)),
            (ScheduleConfig(), StageConfig(epochs=3, init_lr=1e-3, warmup_steps=7)),
        ):
            one = Schedule([stage], lr, 10, most)
            highest = max(one.learning_rate(step) for step in range(one.steps))
            assert (one.rising() is None) == (highest == pytest.approx(1e-3)) == (most >= 7)
    told = Schedule([StageConfig()], ScheduleConfig(base_lr=1.0, warmup_epochs=2), 4).rising()
    assert "after 4 of 8 steps: the learning rate rises to 5.0e-01, not to 1.0e+00" in told
