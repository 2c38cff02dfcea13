"""Bits per weight are one more choice of a search: its front mixes sizes and precisions, and what
stands in it is exported so. Latency is a function of size and bits here; accuracy is real."""

import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic import __main__
from elastic.config import LatencyConfig, SearchConfig, TableConfig, TimingConfig
from elastic.data import load_task
from elastic.errors import ConfigError, RunError
from elastic.evaluation.evaluate import evaluate
from elastic.formats.rounding import round_
from elastic.latency.bench import Bench
from elastic.latency.command import time_run
from elastic.latency.cost_table import Table, Tables
from elastic.latency.latency_table import record
from elastic.latency.target import Target
from elastic.searching.objective import Objective
from elastic.searching.sampler import AdditiveSampler
from elastic.searching.study import search
from elastic.spaces.bound import Candidate
from elastic.spaces.candidates import CandidateSpace, bits_of
from elastic.supernet.compact import compact
from elastic.supernet.held_out import HeldOut
from elastic.supernet.store import load_run
from tests.helpers import tiny
from tests.helpers.searches import GRAPH, SPEED, config, sub_of, trials_of
from tests.helpers.tiny_runs import copy_run, prefill_of

MODES = ["int8", "int4"]
SPACE = tiny.space(heads=True).bind(tiny.llama(), tiny.RANK)
WIDE = CandidateSpace.of(SPACE, MODES)
CANDIDATES = st.integers(0, 2**32).map(lambda seed: WIDE.random(random.Random(seed)))


@given(CANDIDATES)
def test_a_candidate_is_a_sub_adapter_and_a_compression(candidate):
    sub, mode = candidate.sub_adapter, candidate.compress
    indices = WIDE.indices(candidate)
    assert SPACE.check(sub) == sub and WIDE.at(indices) == candidate
    [bits] = (group for group in WIDE if group.name == "bits")
    assert bits.choices[indices.pop("bits")] == bits_of(mode)
    assert indices == SPACE.indices(sub)


@given(CANDIDATES)
def test_a_candidate_survives_its_file(candidate):
    text = json.dumps({"accuracy": 0.5, **candidate.as_dict()})
    assert Candidate.of(json.loads(text), "here") == candidate
    alone = json.loads(str(candidate.sub_adapter))
    assert Candidate.of(alone, "here") == Candidate(candidate.sub_adapter)


def test_the_space_has_every_sub_adapter_in_every_precision():
    assert WIDE.size == 3 * SPACE.size and WIDE.modes == (None, "int8", "int4")
    assert WIDE.maximal() == Candidate(SPACE.maximal())
    assert WIDE.minimal() == Candidate(SPACE.minimal(), "int4")
    alone = CandidateSpace.of(SPACE, [])
    assert alone.groups == SPACE.groups and alone.minimal() == Candidate(SPACE.minimal())
    assert alone.indices(alone.heuristic()) == SPACE.indices(SPACE.heuristic())


def test_the_smallest_of_every_precision_decides_what_cannot_be_met():
    """Fewer bits are smaller, not faster."""
    small = {None: 3.0, "int8": 1.0, "int4": 2.0}
    timetables = {
        mode: lambda sub, ms=ms: {"prefill_ms": ms, "decode_ms": ms, "memory_mb": len(sub.choices)}
        for mode, ms in small.items()
    }
    net = SimpleNamespace(model=tiny.llama(), space=SPACE)
    config = SearchConfig(compress=MODES, timing=GRAPH)
    held_out = HeldOut(net, config.compensation, [])
    objective = Objective(net, None, [], config, timetables, held_out)
    assert [costs["prefill_ms"] for costs in objective.smallest()] == list(small.values())


def tables() -> dict[int, Table]:
    """Different ones for every precision."""
    found = {}
    for number, bits in enumerate((32, 8, 4)):
        full = 100.0 / (number + 1)
        shares = [[choice / group.choices[0] for choice in group.choices] for group in SPACE]
        width = max(map(len, shares))
        effects = np.full((len(shares), width), np.inf)
        for row, own in zip(effects, shares, strict=True):
            row[: len(own)] = [(share - 1) * (3 - number) for share in own]
        found[bits] = Table(SPACE, full, effects)
    return found


@given(CANDIDATES)
def test_joined_tables_say_of_every_candidate_what_its_own_says(candidate):
    by_bits = tables()
    at = np.array(list(WIDE.indices(candidate).values()))
    costs = [each[np.arange(len(at)), at].sum() for each in Tables(WIDE, by_bits).alternatives()]
    assert sum(np.isfinite(costs)) == 1
    own = by_bits[bits_of(candidate.compress)](candidate.sub_adapter)
    assert min(costs) == pytest.approx(own - by_bits[32].full)


@given(st.floats(-90, -1), st.integers(0, 99))
def test_the_best_of_a_cost_is_the_best_of_any_precision(budget, seed):
    """Against each precision on its own."""
    gains = -np.abs(np.random.default_rng(seed).normal(size=(len(WIDE.groups), 5)))
    gains[:, 0] = 0
    sampler = AdditiveSampler(WIDE, examples=10)
    alternatives = list(Tables(WIDE, tables()).alternatives())
    gains = gains[:, : alternatives[0].shape[1]]
    rows = np.arange(len(WIDE.groups))
    chosen = sampler._best(gains, alternatives, budget)
    alone = [sampler._best(gains, [costs], budget) for costs in alternatives]
    fitting = [
        gains[rows, each].sum()
        for each, costs in zip(alone, alternatives, strict=True)
        if costs[rows, each].sum() <= budget + 1e-9
    ]
    if fitting:
        assert gains[rows, chosen].sum() == max(fitting)
        assert min(costs[rows, chosen].sum() for costs in alternatives) <= budget + 1e-9


@pytest.mark.parametrize("sampler", ["additive", pytest.param("nsga2", marks=pytest.mark.slow)])
def test_a_front_mixes_sizes_and_precisions(trained, tmp_path, fake_graphs, sampler):
    run = copy_run(trained, tmp_path / "run")
    found = search(config(run, trials=14, starts=8, compress=MODES, timing=GRAPH, sampler=sampler))
    modes = {one.candidate.compress for one in found.trials}
    assert modes == {None, *MODES}
    assert any(member.candidate.compress for member in found.members)
    net = load_run(run)[2]
    for one in found.trials:
        size = sum(p.numel() for p in compact(net, one.sub_adapter).parameters())
        expected = prefill_of(size) * SPEED[one.candidate.compress]
        assert one.figures.prefill_ms == pytest.approx(expected, rel=0.02)
    for member in found.members:
        assert member.measured.prefill_ms == pytest.approx(member.figures.prefill_ms, rel=0.02)
    rows = trials_of(run)
    assert [row["compress"] or None for row in rows] == [
        one.candidate.compress for one in found.trials
    ]
    assert all(net.space.check(sub_of(row)) for row in rows)


def test_accuracy_is_that_of_the_rounded_weights(trained, tmp_path, fake_graphs):
    run = copy_run(trained, tmp_path / "run")
    found = search(config(run, trials=8, starts=6, compress=["int4"], timing=GRAPH))
    one = next(one for one in found.trials if one.candidate.compress)
    trained_as, base, net = load_run(run)
    model = round_(compact(net, one.sub_adapter, one.figures.degree), "int4", "onnx")
    examples = load_task(trained_as.task, trained_as.seed).validation
    score = evaluate(model, base.tokenizer, examples, quiet=True)
    assert one.figures.accuracy == score.accuracy


def test_what_was_chosen_is_meant(trained, tmp_path, fake_graphs, capsys):
    """evaluate says so, latency times it so, export writes it so."""
    run = copy_run(trained, tmp_path / "run")
    settings = ["--trials", "10", "--starts", "8", "--compress", "int8", "--timing.runtime", "onnx",
                "--compensation.degrees", "0"]  # fmt: skip
    assert __main__.main(["search", str(run.path), "--budget.prefill_ms", "45%", *settings]) == 0
    best = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert best["compress"] == "int8" == run.chosen("best").compress
    assert set(json.loads((run.sub_adapters / "best.json").read_text())["sub_adapter"]) == {
        group.name for group in load_run(run)[2].space
    }
    __main__.main(["evaluate", str(run.path), "--sub_adapter", "best"])
    assert "best was chosen with int8 weights" in capsys.readouterr().err
    fake_graphs.clear()
    report = time_run(LatencyConfig(run=str(run.path), timing=GRAPH))
    assert fake_graphs == [None, "int8"] and report.as_dict()["compress"] == "int8"
    assert report.memory_mb["candidate"] < report.memory_mb["full"]
    quick = ["--accuracy", "false", "--runtime_examples", "0", "--weigh", "false"]
    assert __main__.main(["export", str(run.path), "--formats", "onnx", *quick]) == 0
    written = json.loads((run.path / "export" / "best" / "report.json").read_text())
    assert list(written["formats"]) == ["onnx", "onnx-int8"]
    # The front's accuracy is that of rounded weights, not of the model that was compared.
    assert written["accuracy"] is None


def test_a_table_of_every_precision_serves(trained, tmp_path, fake_graphs):
    run, files = copy_run(trained, tmp_path / "run"), []
    sizes = TableConfig(seen=6, unseen=0)
    for mode in (None, "int8"):
        files.append(str(tmp_path / f"{mode}.json"))
        time_run(LatencyConfig(
            run=str(run.path), compress=mode or "none", save=files[-1], timing=GRAPH, table=sizes
        ))  # fmt: skip
    fake_graphs.clear()
    front = search(config(run, compress=["int8"], timing=GRAPH, table=TableConfig(file=files)))
    assert {mode: each.target.compress for mode, each in front.timetables.items()} == {
        None: None, "int8": "int8"
    }  # fmt: skip
    assert fake_graphs.count("int8") <= len(front.members)  # the finalists alone
    other = copy_run(trained, tmp_path / "other")
    with pytest.raises(RunError, match="recorded with compress int8; give one table for each of: "):
        search(config(other, timing=GRAPH, table=TableConfig(file=files)))
    device = front.timetables[None].target.device
    with pytest.raises(RunError, match="without a table of it for compress int8; record one there"):
        search(config(
            other, compress=["int8"], timing=GRAPH,
            table=TableConfig(file=files[:1], target=device),
        ))  # fmt: skip


def test_tables_of_several_precisions_have_one_unit(trained, fake_graphs, monkeypatch):
    """The machine was twice as slow when the second was recorded."""
    net = load_run(trained)[2]
    sizes = TableConfig(seen=6, unseen=2)

    def recorded(mode):
        return record(net, Target.of(trained, GRAPH, mode), GRAPH, sizes, seed=0)

    whole, small = recorded(None), recorded("int8")
    monkeypatch.setitem(SPEED, None, 2.0)
    monkeypatch.setitem(SPEED, "int8", 1.0)
    slow = recorded("int8")
    for sub in (net.space.maximal(), net.space.minimal()):
        near = slow.beside(whole)(sub)
        assert near == pytest.approx(small(sub), rel=0.02)
        assert slow(sub)["prefill_ms"] == pytest.approx(2 * near["prefill_ms"], rel=0.02)
    assert small.seen[0].values["prefill_ms"] == pytest.approx(whole.full["prefill_ms"] / 2)


def test_a_changed_choice_of_precisions_is_refused(trained, tmp_path, fake_graphs):
    run = copy_run(trained, tmp_path / "run")
    search(config(run, trials=4, compress=["int8"], timing=GRAPH))
    with pytest.raises(RunError, match=r"other settings: compress \(\['int8'\] there, \[\] here\)"):
        search(config(run, trials=4, timing=GRAPH))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"compress": ["int8"]}, "compress int8: it is graphs .* give timing.runtime onnx or"),
        ({"compress": ["int8", "int8_sym"], "timing": GRAPH}, "give one mode for each"),
    ],
)
def test_nonsense_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        SearchConfig(**settings)


def test_calibrated_modes_are_no_choice(capsys):
    arguments = ["search", "somewhere", "--compress", "int4_awq", "--timing.runtime", "onnx"]
    assert __main__.main(arguments) != 0
    assert "int4_awq" in capsys.readouterr().err


@pytest.mark.parametrize("runtime", ["onnx", "openvino"])
def test_a_compressed_graph_is_really_timed(trained, runtime):
    net = load_run(trained)[2]
    timing = TimingConfig(runtime=runtime, rounds=1, max_rounds=1, prompt_tokens=4, new_tokens=1)
    with Bench(net, timing) as timed:
        sub = net.space.maximal()
        whole, small = Candidate(sub), Candidate(sub, "int8")
        found = timed(small)
        assert found.ratios["candidate"].prefill_ms > 0 and found is timed(small)
        assert timed(whole) is not found
        assert timed.memory_mb(small) < timed.memory_mb(whole)
