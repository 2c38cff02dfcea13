"""A latency table predicts what it never saw, says how well, and is used for nothing else than
what it was measured on. Latency is a function of the size here."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from elastic import __main__
from elastic.config import LatencyConfig, TableConfig, TimingConfig
from elastic.errors import ConfigError
from elastic.latency import bench, latency_table
from elastic.latency.bench import CANDIDATE, Bench
from elastic.latency.command import time_run
from elastic.latency.latency_table import Timetable, known_timetable, record, spearman
from elastic.latency.measure import Latency
from elastic.latency.target import Target
from elastic.searching.study import search
from elastic.spaces.bound import Candidate
from elastic.supernet.compact import compact
from elastic.supernet.store import load_run
from tests.helpers.searches import config
from tests.helpers.tiny import RANK
from tests.helpers.tiny_runs import (
    ONE_ROUND,
    copy_run,
    decode_of,
    fake_measure,
    prefill_of,
    randomize_factors,
)

pytestmark = pytest.mark.usefixtures("fake_latency")

SIZES = TableConfig(seen=9, unseen=5)


def recorded(run, timing=ONE_ROUND, sizes=SIZES) -> Timetable:
    return record(load_run(run)[2], Target.of(run, timing), timing, sizes, seed=0)


def test_it_predicts_sub_adapters_it_never_saw(trained, nothing_known):
    table = recorded(trained)
    assert (len(table.seen), len(table.unseen)) == (1 + 9, 5)
    assert table.seen[0].sub_adapter == table.space.maximal()
    assert not {each.sub_adapter for each in table.seen} & {e.sub_adapter for e in table.unseen}
    net = load_run(trained)[2]
    for sub in [
        net.space.minimal(),
        net.space.uniform(0.6),
        *(e.sub_adapter for e in table.unseen),
    ]:
        size = sum(p.numel() for p in compact(net, sub).parameters())
        assert table(sub)["prefill_ms"] == pytest.approx(prefill_of(size), rel=0.01)
        assert table(sub)["decode_ms"] == pytest.approx(decode_of(size), rel=0.01)
    for error in table.errors.values():
        assert error.mean < 0.02 and error.rank_correlation > 0.95 and error.n == 5


def test_its_error_is_that_of_its_predictions(trained, nothing_known):
    table = recorded(trained)
    off = [
        replace(each, values={**each.values, "prefill_ms": 1.25 * each.values["prefill_ms"]})
        for each in table.unseen
    ]
    assert replace(table, unseen=off).errors["prefill_ms"].mean == pytest.approx(0.2, abs=0.01)
    upside_down = [
        replace(each, values={**each.values, "decode_ms": 100 - each.values["decode_ms"]})
        for each in table.unseen
    ]
    found = replace(table, unseen=upside_down).errors["decode_ms"]
    assert found.rank_correlation == pytest.approx(-table.errors["decode_ms"].rank_correlation)
    assert replace(table, unseen=[]).errors == {}


@pytest.mark.parametrize(
    "a, b, expected",
    [
        ([1, 2, 3, 4], [10, 20, 30, 400], 1.0),
        ([1, 2, 3, 4], [9, 7, 5, 1], -1.0),
        ([1, 2, 3, 4, 5], [2, 1, 4, 3, 5], 0.8),  # 1 - 6 · 4 / (5 · 24)
        ([1, 2], [1, 2], None),
        ([1, 1, 1], [1, 2, 3], None),
    ],
)
def test_rank_correlation(a, b, expected):
    found = spearman(np.array(a, float), np.array(b, float))
    assert found == (expected if expected is None else pytest.approx(expected))


def test_a_file_holds_all_of_it(trained, nothing_known):
    table = recorded(trained)
    again = Timetable.from_dict(json.loads(json.dumps(table.as_dict())), table.space)
    for sub in (table.space.maximal(), table.space.uniform(0.7), table.space.minimal()):
        assert again(sub) == table(sub)
    assert again.errors == table.errors and again.describe() == table.describe()


def test_it_is_measured_once_for_a_target(trained, tmp_path, counted, nothing_known):
    search(config(copy_run(trained, tmp_path / "one"), trials=2, starts=2))
    assert len(counted) == 9 + 4 + 2  # the table, and the two of the front
    counted.clear()
    search(config(copy_run(trained, tmp_path / "two"), trials=2, starts=2))
    assert len(counted) == 2
    assert known_timetable(Target.of(trained, replace(ONE_ROUND, batch=2)), TableConfig()) is None
    here = Target.of(trained, ONE_ROUND)
    assert known_timetable(here, TableConfig()) is not None
    for more in (TableConfig(seen=10), TableConfig(unseen=5), TableConfig(rounds=6)):
        assert known_timetable(here, more) is None
    for less in (TableConfig(seen=8), TableConfig(unseen=3), TableConfig(rounds=4)):
        assert known_timetable(here, less) is not None
    file = latency_table._cache_file(here)
    kept = json.loads(file.read_text())
    assert kept.pop("rounds") == 5
    file.write_text(json.dumps(kept))  # as an earlier version kept it
    assert known_timetable(here, TableConfig()) is None


def test_a_table_of_few_rounds_is_measured_again_for_more(
    trained, tmp_path, counted, nothing_known
):
    for number, (rounds, measured) in enumerate([(3, 13), (5, 13), (4, 0)]):
        run = copy_run(trained, tmp_path / str(number))
        search(config(run, trials=2, screen=0, table=TableConfig(rounds=rounds)))
        assert len(counted) == measured + 2  # those of the front
        counted.clear()


def test_what_a_busy_machine_says_is_told_and_not_kept(
    trained, tmp_path, monkeypatch, nothing_known, capsys
):  # fmt: skip
    def noisy(*args, **kwargs):
        return replace(fake_measure(*args, **kwargs), control=0.5)

    monkeypatch.setattr(bench, "measure", noisy)
    front = search(config(copy_run(trained, tmp_path / "run"), trials=2, starts=2))
    assert known_timetable(Target.of(trained, ONE_ROUND), TableConfig()) is None
    front.show()
    said = capsys.readouterr().out
    assert "too busy to trust" in said and "2 of 2 measurements cannot be trusted" in said


@pytest.mark.parametrize("table", [False, True])
def test_latency_is_refused_on_a_busy_machine(
    trained, monkeypatch, tmp_path, nothing_known, capsys, table
):  # fmt: skip
    def busy(*args, **kwargs):
        return replace(fake_measure(*args, **kwargs), control=0.25)

    monkeypatch.setattr(bench, "measure", busy)
    file = tmp_path / "table.json"
    command = ["latency", str(trained.path), "--sub_adapter", "minimal"]
    command += ["--save", str(file)] if table else []
    assert __main__.main(command) == 1
    said = capsys.readouterr()
    assert "differs from itself by 25.0% (more than 3%)" in said.err
    assert "--timing.tolerance" in said.err and "prefill" not in said.out
    assert not file.exists()
    assert __main__.main([*command, "--timing.tolerance", "0.3"]) == 0
    assert file.exists() is table


# Unmerged, ranks cost.


def test_all_take_turns_in_as_many_rounds_as_a_table_is_to_have(
    trained, monkeypatch, nothing_known
):
    asked = []

    def counting(runners, config, **kwargs):
        asked.append((config.rounds, config.max_rounds))
        return fake_measure(runners, config, **kwargs)

    monkeypatch.setattr(bench, "measure", counting)
    net, timing = load_run(trained)[2], TimingConfig(rounds=7, max_rounds=9)
    record(net, Target.of(trained, timing), timing, TableConfig(seen=2, unseen=1, rounds=3), 0)
    assert set(asked) == {(3, 3)}
    with pytest.raises(ConfigError, match=r"table\.rounds is 0"):
        TableConfig(rounds=0)


def test_ranks_cost_only_unmerged(trained, nothing_known):
    net = load_run(trained)[2]
    full = net.space.indices(net.space.maximal())
    last = {g.name: len(g.choices) - 1 for g in net.space if g.dim == "rank"}
    low = net.space.at({**full, **last})
    merged = recorded(trained)
    assert merged(low) == merged(net.space.maximal())
    unmerged = recorded(trained, replace(ONE_ROUND, merged=False))
    assert unmerged(low)["prefill_ms"] < unmerged(net.space.maximal())["prefill_ms"]
    assert unmerged(low)["memory_mb"] < unmerged(net.space.maximal())["memory_mb"]


# The bench.


def test_sub_adapters_that_differ_in_rank_share_a_measurement(trained, counted):
    net = load_run(trained)[2]
    minimal = net.space.indices(net.space.minimal())
    ranks = {g.name: 0 for g in net.space if g.dim == "rank"}
    subs = [net.space.at(minimal), net.space.at(minimal | ranks)]
    for merged, expected in ((True, 1), (False, 2)):
        counted.clear()
        with Bench(net, replace(ONE_ROUND, merged=merged)) as timed:
            found = [timed(Candidate(sub)) for sub in subs]
        assert len(counted) == expected
        assert (found[0] == found[1]) is merged


@pytest.mark.parametrize("most", [1, 3, 8])
def test_as_many_take_turns_as_there_is_room_for(trained, monkeypatch, most):
    """And each is told what it would be told alone."""
    net, groups = load_run(trained)[2], []

    def grouped(runners, *args, **kwargs):
        groups.append(len(runners) - 1)
        return fake_measure(runners, *args, **kwargs)

    monkeypatch.setattr(bench, "measure", grouped)
    monkeypatch.setattr(bench, "MOST", most)
    asked = [Candidate(net.space.uniform(part)) for part in (1.0, 0.7, 0.5, 0.0)]
    different = len({bench.shape_of(net.space, one.sub_adapter, merged=True) for one in asked})
    assert different > 2
    with Bench(net, ONE_ROUND) as together, Bench(net, ONE_ROUND) as alone:
        found = together.together(asked)
        assert groups == [min(most, different - n) for n in range(0, different, most)]
        assert found == [alone(one) for one in asked]
    monkeypatch.setattr(bench, "ROOM", 1.0)  # of less than a model
    groups.clear()
    with Bench(net, ONE_ROUND) as timed:
        timed.together(asked)
    assert groups == [1] * different


def test_a_machine_that_slows_down_favours_nobody(trained, monkeypatch, nothing_known):
    """Every measurement is slower than the one before; candidates are told by their ratio."""
    steady, times = recorded(trained), []

    def slower(runners, *args, **kwargs):
        found = fake_measure(runners, *args, **kwargs)
        slow = 1 + 0.2 * len(times)
        times.extend([slow] * (len(runners) - 1))
        slowed = {
            name: Latency(slow * each.prefill_ms, slow * each.decode_ms, 0.0)
            for name, each in found.latencies.items()
        }
        return replace(found, latencies=slowed)

    monkeypatch.setattr(bench, "MOST", 3)
    monkeypatch.setattr(bench, "measure", slower)
    drifting = recorded(trained)
    unit = np.median(times)
    pairs = zip([*drifting.seen, *drifting.unseen], [*steady.seen, *steady.unseen], strict=True)
    for slow, same in pairs:
        assert slow.sub_adapter == same.sub_adapter
        for metric in ("prefill_ms", "decode_ms"):
            assert slow.values[metric] == pytest.approx(unit * same.values[metric])


def test_memory_is_weights_cache_and_activations(trained):
    net = load_run(trained)[2]
    minimal, maximal = net.space.minimal(), net.space.maximal()

    def weights(sub) -> float:
        model = compact(net, sub)
        held = {t.data_ptr(): t for t in [*model.parameters(), *model.buffers()]}
        return sum(t.numel() * t.element_size() for t in held.values()) / 1e6

    def memory(sub, **shape) -> float:
        return Bench(net, replace(ONE_ROUND, **shape)).memory_mb(Candidate(sub))

    saved = memory(maximal) - memory(minimal)
    assert saved >= weights(maximal) - weights(minimal)
    cache = net.model.config
    per_token = 2 * 4 * cache.num_hidden_layers * cache.num_key_value_heads * cache.head_dim / 1e6
    more = memory(maximal, prompt_tokens=40, batch=3) - memory(maximal, prompt_tokens=20, batch=3)
    assert memory(maximal) > weights(maximal)
    assert more > 3 * 20 * per_token
    assert memory(maximal) == memory(maximal)


# `elastic latency`.


def test_a_report_has_both_models(trained, nothing_known, capsys):
    report = time_run(LatencyConfig(run=str(trained.path), sub_adapter="minimal", timing=ONE_ROUND))
    net = load_run(trained)[2]
    sizes = {
        name: sum(p.numel() for p in compact(net, sub).parameters())
        for name, sub in (("", net.space.minimal()), ("full_", net.space.maximal()))
    }
    report.show()
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    for name, size in sizes.items():
        assert last[f"{name}prefill_ms"] == pytest.approx(prefill_of(size))
        assert last[f"{name}tokens_per_second"] == pytest.approx(1000 / decode_of(size))
    assert last["memory_mb"] < last["full_memory_mb"]
    target = asdict(Target.of(trained, ONE_ROUND))
    assert {key: last[key] for key in target if key != "model"} == {
        key: value for key, value in target.items() if key != "model"
    }


def test_real_runs_are_timed(trained, monkeypatch, nothing_known):
    """With the machine's own clock; nothing is asked of it but to go on."""
    from elastic.latency.measure import measure

    monkeypatch.setattr(bench, "measure", measure)
    with Bench(load_run(trained)[2], ONE_ROUND) as timed:
        found = timed(Candidate(timed.net.space.minimal()))
    assert set(found.latencies) == {"full", CANDIDATE}
    assert all(each.prefill_ms > 0 and each.decode_ms > 0 for each in found.latencies.values())
    assert torch.is_grad_enabled()


def test_a_target_is_known_by_sizes_not_by_weights(trained, tmp_path):
    here = Target.of(trained, ONE_ROUND)
    run = copy_run(trained, tmp_path / "run")
    randomize_factors(run, seed=3)
    assert Target.of(run, ONE_ROUND) == here
    text = run.config_file.read_text()
    for old, new in ((f"rank: {RANK}", f"rank: {2 * RANK}"), ("dtype: float32", "dtype: bfloat16")):
        assert old in text
        run.config_file.write_text(text.replace(old, new, 1))
        assert Target.of(run, ONE_ROUND).digest != here.digest
    for change in ({"batch": 2}, {"prompt_tokens": 5}, {"merged": False}, {"runtime": "onnx"}):
        assert Target.of(trained, replace(ONE_ROUND, **change)).digest != here.digest
    assert Target.of(trained, replace(ONE_ROUND, rounds=9, max_rounds=9)) == here
