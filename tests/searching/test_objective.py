"""Accuracy of one sub-adapter, and when looking at more examples is a waste. Models are strings of
right and wrong answers here."""

import random
from dataclasses import replace
from types import SimpleNamespace

import pytest

from elastic.config import SearchConfig
from elastic.evaluation.statistics import Score
from elastic.searching import objective
from elastic.searching.objective import LOOKS, Figures, Objective, chance, wins
from elastic.spaces.bound import BoundSpace, Candidate, SubAdapter
from elastic.supernet.cost import Cost
from elastic.supernet.held_out import Compensated

N = 200
COSTS = {"prefill_ms": 50.0, "decode_ms": 5.0, "memory_mb": 1.0}
SPACE = BoundSpace((), ())
SOMEBODY = Candidate(SubAdapter(()))


def figures(correct: str, prefill_ms: float = 40.0) -> Figures:
    return Figures(
        accuracy=correct.count("1") / len(correct), accuracy_n=len(correct), prefill_ms=prefill_ms,
        decode_ms=5.0, tokens_per_second=200.0, memory_mb=1.0, params=1, macs=1, correct=correct,
    )  # fmt: skip


class Decided:
    """Makes up for half of what is cut, whatever that is."""

    def __init__(self, answers: str) -> None:
        self.answers = answers

    def __call__(self, sub) -> Compensated:
        return Compensated(0.5, losses={"0": 2.0, "0.5": 1.0})

    def model(self, sub, made_up: Compensated) -> str:
        assert made_up == self(sub)
        return self.answers


@pytest.fixture
def score(monkeypatch):
    """Figures of answers given as a string, and how many of them were looked at."""
    looked = []

    def evaluated(model, tokenizer, examples, **settings):
        looked.extend(examples)
        return Score(tuple(model[example] == "1" for example in examples))

    def scored(answers: str, rivals, race: float = 0.05) -> tuple[Figures, int]:
        looked.clear()
        monkeypatch.setattr(objective, "evaluate", evaluated)
        monkeypatch.setattr(objective, "Counter", lambda *_: lambda sub: Cost(1, 1, 1))
        net = SimpleNamespace(model=None, space=SPACE)
        ask = Objective(
            net, None, range(len(answers)), SearchConfig(race=race), {None: lambda sub: COSTS},
            Decided(answers),
        )  # fmt: skip
        ask.examples = list(range(len(answers)))  # in order, as the strings are
        found = ask(SOMEBODY, {str(n): rival for n, rival in enumerate(rivals)})
        return found, len(looked)

    return scored


def test_a_clear_loser_is_stopped_early(score):
    rival = figures("1" * 180 + "0" * 20)
    found, looked = score("0" * N, [rival])
    assert looked == found.accuracy_n == len(found.correct) == LOOKS[0] * N
    assert found.made_up == Compensated(0.5, losses={"0": 2.0, "0.5": 1.0})
    assert found.accuracy == 0.0  # 0.9, less what it lost; never below nothing
    some, looked = score("01" * 100, [rival])
    assert looked < N
    assert some.accuracy == pytest.approx(0.9 - 0.5)


@pytest.mark.parametrize("race", [0.0, 0.05])
def test_without_a_rival_or_a_race_everything_is_looked_at(score, race):
    rival = figures("1" * N)
    rivals = [] if race else [rival]
    found, looked = score("01" * 100, rivals, race)
    assert looked == found.accuracy_n == N and found.accuracy == 0.5


def test_only_those_no_slower_are_rivals_and_only_when_known_in_full(score):
    slower = figures("1" * N, prefill_ms=COSTS["prefill_ms"] + 0.1)
    stopped = replace(figures("1" * N), correct="1" * 50, accuracy_n=50)
    assert score("0" * N, [slower, stopped])[1] == N
    assert score("0" * N, [slower, stopped, figures("1" * N, prefill_ms=50.0)])[1] < N


def test_the_rival_is_the_most_accurate_one(score):
    weak, strong = figures("0" * N), figures("1" * N)
    assert score("0" * N, [weak])[1] == N
    assert score("0" * N, [weak, strong, weak])[1] == LOOKS[0] * N


def test_one_that_is_better_or_equal_is_never_stopped(score):
    answers = "".join(random.Random(0).choices("01", k=N))
    found, looked = score(answers, [figures(answers)])
    assert looked == N and found.accuracy == answers.count("1") / N
    assert score("1" * N, [figures(answers)])[1] == N


@pytest.mark.parametrize("agree", [0.5, 0.9])
def test_as_accurate_ones_are_stopped_as_seldom_as_promised(score, agree):
    """Of two models that are right equally often, independently where they disagree."""
    generator, stopped, times = random.Random(1), 0, 1000
    for _ in range(times):
        mine, theirs = "", ""
        for _ in range(N):
            first = generator.choice("01")
            other = first if generator.random() < agree else generator.choice("01")
            mine, theirs = mine + first, theirs + other
        stopped += score(mine, [figures(theirs)], race=0.2)[1] < N
    assert stopped / times < 0.2


def test_the_luckiest_of_many_rivals_stops_no_more(score):
    generator, stopped, times = random.Random(2), 0, 300
    for _ in range(times):
        mine, *others = ("".join(generator.choices("01", k=N)) for _ in range(21))
        stopped += score(mine, [figures(answers) for answers in others], race=0.2)[1] < N
    assert stopped / times < 0.2


@pytest.mark.parametrize(
    "won, lost, expected",
    [(0, 0, 1.0), (0, 5, 1 / 32), (5, 0, 1.0), (1, 2, 0.5), (2, 8, 56 / 1024)],
)
def test_the_sign_test(won, lost, expected):
    assert chance(won, lost) == pytest.approx(expected)


def test_wins_are_counted_on_what_both_saw():
    assert wins("1100", "1010") == (1, 1)
    assert wins("10", "0111111") == (1, 1)
    assert wins("", "01") == (0, 0)
