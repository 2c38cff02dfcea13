"""Splits share nothing, answers are right, and faulty data is named by file and line."""

import dataclasses
import json
import re
import sys
import typing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic.config import TaskConfig
from elastic.data import TASKS, load_task
from elastic.data import arithmetic as problems
from elastic.data.task import Example, Split
from elastic.errors import ConfigError, DataError, DataMissing, MissingExtra

SPLITS: list[Split] = ["train", "validation", "test"]


def arithmetic(seed: int = 0, train: int = 150, validation: int = 40, test: int = 60):
    return load_task(
        TaskConfig(train_examples=train, validation_examples=validation, test_examples=test), seed
    )


def prompts(task, split: str) -> set[str]:
    return {example.prompt for example in getattr(task, split)}


# Arithmetic


def test_splits_never_share_a_prompt_within_or_across_seeds():
    drawn = [arithmetic(seed) for seed in range(6)] + [arithmetic(0, 600, 5, 5)]
    everything = {split: set().union(*(prompts(t, split) for t in drawn)) for split in SPLITS}
    for one in SPLITS:
        for other in SPLITS:
            if one != other:
                assert not everything[one] & everything[other], (one, other)
    assert len(everything["test"]) > 300, "seeds must differ for this to say anything"


@given(st.integers(0, 2**32))
def test_same_seed_same_examples(seed):
    assert arithmetic(seed, 5, 5, 5) == arithmetic(seed, 5, 5, 5)
    assert arithmetic(seed, 5, 5, 5) != arithmetic(seed + 1, 5, 5, 5)


def test_counts_are_as_asked_and_prompts_distinct():
    task = arithmetic(3)
    for split, count in zip(SPLITS, (150, 40, 60), strict=True):
        assert len(getattr(task, split)) == len(prompts(task, split)) == count


def test_a_problem_drawn_twice_counts_once(monkeypatch):
    def one_of_few(generator, largest):
        return Example(f"problem {generator.randint(1, 300)}", "1")

    monkeypatch.setattr(problems, "_problem", one_of_few)
    task = arithmetic(0, 100, 20, 40)
    assert [len(prompts(task, split)) for split in SPLITS] == [100, 20, 40]


def test_a_larger_split_begins_with_the_smaller_one():
    assert arithmetic(1, 50, 10, 10).train == arithmetic(1, 150, 10, 10).train[:50]


@pytest.mark.parametrize("largest", [5, 10, 20])
def test_no_number_is_larger_than_asked(largest):
    task = load_task(TaskConfig(largest=largest, train_examples=300), 0)
    seen = {int(number) for one in task.train for number in re.findall(r"\d+", one.prompt)}
    assert max(seen) == largest


def test_more_problems_than_there_are_is_a_line():
    with pytest.raises(DataError, match=r"100000 train examples, but numbers up to 5 make about"):
        load_task(TaskConfig(largest=5, train_examples=100_000), 0)


VERBS = {
    "has": 0, "owns": 0, "holds": 0, "starts": 0,
    "buys": 1, "finds": 1, "gets": 1, "wins": 1,
    "sells": -1, "loses": -1, "gives": -1, "drops": -1,
}  # fmt: skip


def solve(text: str) -> int:
    """The answer, read off the text: each number counts as the verb before it says."""
    total = sign = None
    for word in re.findall(r"[a-z]+|\d+", text):
        if word in VERBS:
            sign, total = (VERBS[word] or 1), (0 if VERBS[word] == 0 else total)
        elif word.isdigit():
            total, sign = total + sign * int(word), None  # a second number without a verb fails
    return total


def test_answers_are_right():
    task = arithmetic(5, 500, 100, 100)
    for split in SPLITS:
        for example in getattr(task, split):
            assert int(example.answer) == solve(example.prompt), example
            assert int(example.answer) > 0 and example.answer == str(int(example.answer))
            assert example.options == ()
    seen = " ".join(example.prompt for example in task.train)
    for template in (*problems.FIRST, *problems.MORE, *problems.FEWER):
        assert any(f" {verb} " in seen for verb in VERBS if f" {verb} " in template), template


# JSON Lines


def jsonl(tmp_path, rows, *, name="train.jsonl", test=None, **settings) -> TaskConfig:
    """Writes rows (strings as they are) and a test file; the configuration that reads them."""
    file = tmp_path / name
    write(file, rows)
    other = tmp_path / "test.jsonl"
    write(other, test if test is not None else [{"prompt": "only in test", "answer": "a"}])
    return TaskConfig(name="jsonl", train=str(file), test=str(other), **settings)


def write(file, rows) -> None:
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    file.write_text("".join(line + "\n" for line in lines))


def rows(n: int, prefix: str = "p") -> list[dict]:
    return [{"prompt": f"{prefix}{i}", "answer": f"a{i}"} for i in range(n)]


def test_rows_by_position_are_as_earlier_versions_took_them(tmp_path):
    task = load_task(jsonl(tmp_path, rows(10), validation_examples=3, draw="position"), 0)
    assert [e.prompt for e in task.train] == [f"p{i}" for i in range(7)]
    assert [e.prompt for e in task.validation] == ["p7", "p8", "p9"]
    assert task.train[2] == Example("p2", "a2")
    assert task.train[2].where == f"{tmp_path / 'train.jsonl'}:3"


def test_at_most_half_is_held_out(tmp_path):
    task = load_task(jsonl(tmp_path, rows(10)), 0)
    assert (len(task.train), len(task.validation)) == (5, 5)


def test_files_of_their_own_and_limits(tmp_path):
    write(tmp_path / "validation.jsonl", rows(8, "v"))
    config = jsonl(
        tmp_path,
        rows(10),
        test=rows(9, "t"),
        validation=str(tmp_path / "validation.jsonl"),
        train_examples=4,
        validation_examples=3,
        test_examples=2,
    )
    task = load_task(config, 0)
    assert [len(getattr(task, split)) for split in SPLITS] == [4, 3, 2]
    for split in SPLITS:
        assert all(
            prompt[0] == {"train": "p"}.get(split, split[0]) for prompt in prompts(task, split)
        )


def test_fields_are_mapped(tmp_path):
    row = {"question": "2+2?", "hint": "small", "label": 4, "choices": [3, 4]}
    settings = dict(
        prompt="{question} ({hint})", answer="label", options="choices", validation_examples=1,
        draw="position",
    )  # fmt: skip
    other = {**row, "question": "1+3?", "choices": "3, 4 ,5"}
    third = {**row, "question": "0+4?"}
    task = load_task(jsonl(tmp_path, [row, other], test=[third], **settings), 0)
    assert task.train == [Example("2+2? (small)", "4", ("3", "4"))]
    assert task.validation == [Example("1+3? (small)", "4", ("3", "4", "5"))]


def test_what_overlaps_the_test_or_validation_split_is_dropped(tmp_path):
    test = [{"prompt": "p1", "answer": "other answer, same prompt"}]
    by = dict(validation_examples=2, draw="position")
    task = load_task(jsonl(tmp_path, [*rows(6), *rows(1)], test=test, **by), 0)
    assert prompts(task, "train") == {"p2", "p3", "p4"}  # p0 came again and is held out
    assert prompts(task, "validation") == {"p5", "p0"}
    assert prompts(task, "test") == {"p1"}
    held_out = [{"prompt": "p5", "answer": "a"}]
    task = load_task(jsonl(tmp_path, rows(6), test=held_out, **by), 0)
    assert prompts(task, "validation") == {"p3", "p4"}
    write(tmp_path / "validation.jsonl", rows(3))
    own = jsonl(tmp_path, rows(6), test=test, validation=str(tmp_path / "validation.jsonl"))
    task = load_task(own, 0)
    assert prompts(task, "validation") == {"p0", "p2"}
    assert prompts(task, "train") == {"p3", "p4", "p5"}


@pytest.mark.parametrize(
    ("row", "settings", "message"),
    [
        ('{"prompt": "x"', {}, "broken JSON"),
        ('["prompt"]', {}, "expected a JSON object, got list"),
        ({"question": "x", "answer": "a"}, {},
         "field 'prompt' is missing; the row has answer, question"),
        ({"prompt": "x", "label": "a"}, {}, "field 'answer' is missing; the row has label, prompt"),
        ({"prompt": "x", "answer": "a"}, {"options": "choices"}, "field 'choices' is missing"),
        ({"prompt": "x", "answer": "c"}, {"answer": "prompt", "prompt": "{answer"}, "task.prompt"),
        ({"prompt": "x", "answer": "a"}, {"prompt": "{prompt.text}"}, "task.prompt"),
        ({"prompt": 3, "answer": "a"}, {"prompt": "{prompt[0]}"}, "task.prompt"),
        ({"prompt": "x", "answer": ""}, {}, "the answer in field 'answer' is empty"),
        ({"prompt": "x", "answer": None}, {}, "the answer in field 'answer' is empty"),
        ({"prompt": "x", "answer": " \n"}, {}, "the answer in field 'answer' is ' \\n', blank"),
        ({"prompt": {"text": "x"}, "answer": "a"}, {}, "{'text': 'x'}; give one text"),
        ({"prompt": "x", "answer": "c", "o": ["a", "b"]}, {"options": "o"},
         "answer 'c' is not among the options ['a', 'b']"),
        ({"prompt": "x", "answer": "c", "o": []}, {"options": "o"},
         "answer 'c' is not among the options []"),
        ({"prompt": "x", "answer": "c", "o": None}, {"options": "o"}, "field 'o' is null"),
        ({"prompt": "x", "answer": ["b", "c"]}, {},
         "the answer in field 'answer' is ['b', 'c']; give one text"),
        ({"prompt": "x", "answer": {"text": "b"}}, {},
         "the answer in field 'answer' is {'text': 'b'}; give one text"),
        ({"prompt": None, "answer": "a"}, {}, "field 'prompt' is null; the row has answer ("),
        ({"prompt": "x", "answer": "a", "choices": None}, {"second": "{choices}"},
         "field 'choices' is null"),
    ],
)  # fmt: skip
def test_a_faulty_row_is_named_by_file_and_line(tmp_path, row, settings, message):
    good = {"prompt": "p", "answer": "a", "choices": ["a"], "o": ["a"]}
    # A blank line counts as a line. A template that suits no row fails on the first one.
    everywhere = "task.prompt" in message and "give" not in message
    lines = [row] if everywhere else [good, "", row]
    config = jsonl(tmp_path, lines, test=[{**good, "prompt": "t"}] if not everywhere else [row])
    config = TaskConfig(**{**vars(config), **settings})
    with pytest.raises(DataError) as caught:
        load_task(config, 0)
    where = f"{config.test}:1: " if everywhere else f"{config.train}:3: "
    assert str(caught.value).startswith(where), caught.value
    assert message in str(caught.value)


@pytest.mark.parametrize("answer", [0, 7, -1.5, True, False, "0"])
def test_numbers_and_booleans_are_answers(tmp_path, answer):
    row = {"prompt": "x", "answer": answer, "aside": None}
    test = load_task(jsonl(tmp_path, rows(4), test=[row]), 0).test
    assert test == [Example("x", str(answer))]


def test_an_empty_or_absent_file(tmp_path):
    with pytest.raises(DataError, match=r"train\.jsonl: no rows"):
        load_task(jsonl(tmp_path, ["", "  "]), 0)
    config = jsonl(tmp_path, rows(4))
    (tmp_path / "train.jsonl").unlink()
    with pytest.raises(DataError, match=r"train\.jsonl: no such data file"):
        load_task(config, 0)


def test_an_empty_split_is_named(tmp_path):
    with pytest.raises(DataError, match="the train split is empty once overlaps are removed"):
        load_task(jsonl(tmp_path, rows(2), test=rows(2)), 0)
    with pytest.raises(DataError, match="the validation split is empty"):
        load_task(jsonl(tmp_path, rows(1)), 0)


def test_a_jsonl_task_names_its_files():
    with pytest.raises(ConfigError, match=r"task\.train"):
        TaskConfig(name="jsonl", test="x")
    with pytest.raises(ConfigError, match=r"task\.test"):
        TaskConfig(name="jsonl", train="x")
    with pytest.raises(ConfigError, match=r"task\.test_examples is 0"):
        TaskConfig(test_examples=0)


def test_every_task_is_known_by_name():
    assert set(TASKS) == set(typing.get_args(typing.get_type_hints(TaskConfig)["name"]))


# Other forms of rows


def test_a_list_is_read_like_lines(tmp_path):
    lines = jsonl(tmp_path, rows(6), test=[{"prompt": "t", "answer": "a"}])
    (tmp_path / "list.json").write_text(json.dumps(rows(6), indent=1))
    listed = dataclasses.replace(lines, train=str(tmp_path / "list.json"))
    assert load_task(listed, 0) == load_task(lines, 0)
    (tmp_path / "list.json").write_text('[{"prompt": "x"},\n {"prompt"')
    with pytest.raises(DataError, match=r"list\.json:2: broken JSON"):
        load_task(listed, 0)
    (tmp_path / "list.json").write_text('[{"prompt": "x", "answer": "a"}, 3]')
    with pytest.raises(DataError, match=r"list\.json: row 2: expected a JSON object, got int"):
        load_task(listed, 0)


def test_templates_by_name_and_by_file(tmp_path):
    row = {"instruction": "Add.", "input": "1 2", "answer": "3"}
    others = [{**row, "instruction": f"{n}"} for n in range(3)]
    config = jsonl(tmp_path, [row, *others], test=[others[0]], draw="position")
    (tmp_path / "mine.txt").write_text("Do: {instruction}\nOn: {input}\nAnswer:\n")
    for prompt, wanted in [
        ("alpaca", "### Instruction:\nAdd.\n\n### Response:"),
        ("alpaca-input", "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:"),
        (str(tmp_path / "mine.txt"), "Do: Add.\nOn: 1 2\nAnswer:"),
    ]:
        task = load_task(dataclasses.replace(config, prompt=prompt, validation_examples=1), 0)
        assert task.train[0].prompt.endswith(wanted)
    with pytest.raises(DataError, match=r"none\.txt: no such data file"):
        load_task(dataclasses.replace(config, prompt="none.txt"), 0)


# Hugging Face data sets


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """As `save_to_disk` leaves GLUE: numbered classes, sorted by them, a test split without."""
    import datasets

    folder = tmp_path_factory.mktemp("glue") / "rte"
    features = datasets.Features({
        "sentence1": datasets.Value("string"), "sentence2": datasets.Value("string"),
        "label": datasets.ClassLabel(names=["entailment", "not_entailment"]),
    })  # fmt: skip

    def split(start: int, count: int, label) -> datasets.Dataset:
        numbers = range(start, start + count)
        return datasets.Dataset.from_dict({
            "sentence1": [f"one {n}" for n in numbers], "sentence2": [f"two {n}" for n in numbers],
            "label": [label(n) for n in numbers],
        }, features=features)  # fmt: skip

    datasets.DatasetDict({
        "train": split(0, 40, lambda n: n // 20), "validation": split(100, 9, lambda n: n % 2),
        "test": split(200, 5, lambda n: -1),
    }).save_to_disk(folder)  # fmt: skip
    return folder


def of_dataset(folder, **settings) -> TaskConfig:
    known = dict(
        name="datasets", dataset=str(folder), prompt="{sentence1}", second="{sentence2}",
        answer="label", test="validation", train_examples=20, validation_examples=8,
    )  # fmt: skip
    return TaskConfig(**(known | settings))


def test_a_dataset_of_pairs(pairs):
    task = load_task(of_dataset(pairs), 0)
    assert [len(task.train), len(task.validation), len(task.test)] == [20, 8, 9]
    assert {example.answer for example in task.train} == {"entailment", "not_entailment"}
    first = task.train[0]
    number = int(first.prompt.removeprefix("one "))
    assert first.second == f"two {number}"
    assert first.answer == ("entailment" if number < 20 else "not_entailment")
    assert load_task(of_dataset(pairs), 0) == task != load_task(of_dataset(pairs), 1)
    assert not prompts(task, "train") & prompts(task, "validation")


def test_a_folder_of_files_is_a_dataset(tmp_path):
    for split, start in (("train", 0), ("test", 50)):
        lines = [json.dumps({"q": f"q{n}", "a": str(n)}) for n in range(start, start + 10)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    config = of_dataset(tmp_path, prompt="{q}", second=None, answer="a", test="test")
    task = load_task(dataclasses.replace(config, validation_examples=2), 0)
    assert len(task.train) == 8 and len(task.test) == 10


def test_what_a_dataset_has_not_is_named(pairs, tmp_path, monkeypatch):
    with pytest.raises(DataError, match="has no split 'dev'; it has train, validation, test"):
        load_task(of_dataset(pairs, validation="dev"), 0)
    with pytest.raises(DataError, match=r"split test: no row has an answer .* such as validation"):
        load_task(of_dataset(pairs, test="test"), 0)
    with pytest.raises(DataError, match=r"split train: row \d+: field 'premise' is missing"):
        load_task(of_dataset(pairs, prompt="{premise}"), 0)
    with pytest.raises(DataMissing, match=r"task\.dataset .*nowhere"):
        load_task(of_dataset(tmp_path / "nowhere"), 0)
    with pytest.raises(ConfigError, match=r"task\.dataset: name the folder"):
        TaskConfig(name="datasets")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtra, match=r"elastic-adapters\[datasets\]"):
        load_task(of_dataset(pairs), 0)
