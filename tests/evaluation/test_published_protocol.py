"""Published answers are found in texts as published, the same in every batch; what is not found is
counted."""

import functools
import json
from importlib import metadata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic import __main__
from elastic.config import EvaluateConfig, TaskConfig
from elastic.data import llm_adapters, load_task
from elastic.data.llm_adapters import extract, file_of, kind_of, labels_in, matches, read, sets_of
from elastic.data.task import Example, Judge
from elastic.errors import ConfigError, DataError, DataMissing
from elastic.evaluation.command import _file
from elastic.evaluation.evaluate import evaluate
from elastic.run import Run
from elastic.training.one_task import train_one
from tests.helpers.learnt import LEARNT, PROMPTS, TOKENIZER
from tests.helpers.tiny_runs import randomize_factors, train_config


@pytest.mark.parametrize(
    "kind, text, answer",
    [
        ("number", "12 + 20 = 32, so 32 - 20 = 12 cats. The answer is 12.", "12."),
        ("number", "It is 1,234,567 in all", "1234567"),
        ("number", "from 5 to -3.50", "-3.50"),
        ("number", "none", None),
        ("letter", "The answer is B, not C", "B"),
        ("letter", "the answer is b", None),
        ("answer", "the correct answer is Answer3", "answer3"),
        ("answer", "answer7 or answer2", "answer2"),
        ("boolean", "It is True that false", "true"),
        ("solution", "solution2", "solution2"),
        ("ending", "", None),
    ],
)
def test_what_counts_as_the_answer(kind, text, answer):
    assert extract(kind, text) == answer


@pytest.mark.parametrize(
    "kind, found, expected, right",
    [
        ("number", "12.", "12.0", True),
        ("number", "12.0009", "12", True),
        ("number", "12.002", "12", False),
        ("number", "1234567", "1,234,567", True),
        ("letter", "B", "B", True),
        ("answer", "answer1", "answer2", False),
        ("number", None, "12", False),
    ],
)
def test_what_is_right(kind, found, expected, right):
    assert matches(kind, found, expected) is right


@given(st.integers(-(10**6), 10**6), st.sampled_from(["", "The answer is ", "3 + 4 = "]))
def test_a_number_that_ends_the_text_is_found(number, before):
    assert matches("number", extract("number", f"{before}{number:,}"), str(number))


@pytest.mark.parametrize(
    "answer, kind",
    [("576.0", "number"), ("-3", "number"), ("1,024", "number"), ("C", "letter"), ("F", None),
     ("answer4", "answer"), ("TRUE", "boolean"), ("solution2", "solution"), ("cats", None),
     ("", None)],
)  # fmt: skip
def test_kinds_of_answers(answer, kind):
    assert kind_of(answer) == kind


def test_labels_are_those_the_question_names():
    question = "Which? Answer1: a Answer2: b\n\nAnswer format: answer1/answer2"
    assert labels_in("answer", question) == ("answer1", "answer2")
    assert labels_in("number", "1 or 2") == ()


# Rows


def rows(tmp_path, values, listed: bool = False):
    file = tmp_path / "rows.json"
    text = json.dumps(values) if listed else "\n".join(map(json.dumps, values))
    file.write_text(text)
    return file


CHOICE = {"instruction": "Which?\n\nAnswer1: a Answer2: b\n\nAnswer format: answer1/answer2",
          "input": "", "output": "the correct answer is answer2", "answer": "answer2"}  # fmt: skip
SUM = {"instruction": " 2 + 3? ", "input": "", "output": "2 + 3 = 5. The answer is 5.",
       "answer": "5.0"}  # fmt: skip


@pytest.mark.parametrize("listed", [False, True])
def test_rows_become_examples(tmp_path, listed):
    free = {"instruction": "Say hello", "input": "to Tom", "output": "Hello, Tom"}
    bare = {"instruction": "7 + 1?", "answer": "8"}
    choice, number, words, only = read(rows(tmp_path, [CHOICE, SUM, free, bare], listed))
    assert choice.options == ("the correct answer is answer1", "the correct answer is answer2")
    assert choice.answer == choice.options[1]
    assert choice.judge == Judge("answer", "answer2", 32)
    assert choice.prompt.startswith("Below is an instruction that describes a task. Write")
    assert choice.prompt.endswith("answer1/answer2\n\n### Response:")
    assert number.answer == SUM["output"] and number.options == ()
    assert number.judge == Judge("number", "5.0", 256)
    assert "### Instruction:\n2 + 3?\n\n" in number.prompt
    assert "### Input:\nto Tom" in words.prompt and words.judge is None
    assert (only.answer, only.judge.expected) == ("8", "8")
    [nothing] = read(rows(tmp_path, [{"instruction": "7 - 7?", "answer": 0}], listed))
    assert (nothing.answer, nothing.judge.expected) == ("0", "0")


@pytest.mark.parametrize(
    "value, message",
    [
        ({"input": "x", "output": "y"}, r"rows\.json:1: no field 'instruction'; .* input, output"),
        ({"instruction": "x"}, r"rows\.json:1: neither 'output' nor 'answer'"),
        ({"instruction": None, "output": "y"}, r"rows\.json:1: no field 'instruction'; .* output$"),
        (
            {"instruction": "x", "answer": ["a", "b"]},
            r"rows\.json:1: field 'answer' is \['a', 'b'\]; give one text",
        ),
        ("text", r"rows\.json:1: expected a JSON object, got str"),
    ],
)
def test_rows_that_cannot_be_used_are_named(tmp_path, value, message):
    with pytest.raises(DataError, match=message):
        read(rows(tmp_path, [value]))


def test_files_that_cannot_be_used_are_named(tmp_path):
    with pytest.raises(DataMissing, match="no such data file"):
        read(tmp_path / "absent.json")
    file = tmp_path / "broken.json"
    file.write_text("[{")
    with pytest.raises(DataError, match="broken JSON"):
        read(file)
    file.write_text("[]")
    with pytest.raises(DataError, match="no rows"):
        read(file)
    with pytest.raises(ConfigError, match="name the test file of a llm_adapters task"):
        TaskConfig(name="llm_adapters", train=str(file))


def test_a_task_trains_on_outputs_and_is_judged_by_answers(tmp_path):
    many = [{**SUM, "instruction": f"{i} + 3?", "answer": str(i + 3)} for i in range(10)]
    test = rows(tmp_path, many[:2])
    training = test.rename(tmp_path / "test.json") and rows(tmp_path, many)
    config = TaskConfig(name="llm_adapters", train=str(training), validation_examples=3,
                        test=str(tmp_path / "test.json"))  # fmt: skip
    task = load_task(config, 0)
    assert (len(task.train), len(task.validation), len(task.test)) == (5, 3, 2)
    assert all(example.judge and example.answer == SUM["output"] for example in task.train)


# Sets


def test_sets_by_name():
    assert sets_of(["math", "gsm8k"]) == ["gsm8k", "aqua", "mawps", "svamp"]
    assert len(sets_of(["commonsense"])) == 8 and sets_of([]) == []
    with pytest.raises(ConfigError, match="did you mean 'gsm8k'"):
        sets_of(["gsm8"])


@pytest.mark.parametrize(
    "place", ["gsm8k.test.jsonl", "math/gsm8k.test.jsonl", "gsm8k/test.json"]
)  # fmt: skip
def test_files_of_sets(tmp_path, place):
    with pytest.raises(DataMissing, match="gsm8k: none of"):
        file_of("gsm8k", tmp_path)
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).write_text("[]")
    assert file_of("gsm8k", tmp_path) == tmp_path / place


# Scores


def judged(expected=None) -> list[Example]:
    answers = [learnt.strip() for learnt in LEARNT] + ["7", "8"]
    return [
        Example(prompt, "no matter", judge=Judge("number", answer, 8))
        for prompt, answer in zip(PROMPTS, answers, strict=True)
    ]


@pytest.mark.parametrize("beams", [None, 3])
def test_generated_answers_are_judged(model, beams):
    score = evaluate(model, TOKENIZER, judged(), beams=beams, quiet=True)
    assert score.correct[: len(LEARNT)] == (True,) * len(LEARNT)
    assert score.n == len(PROMPTS) and all(text is not None for text in score.said)
    wrong = [Example(e.prompt, "", judge=Judge("number", "5000", 8)) for e in judged()]
    assert evaluate(model, TOKENIZER, wrong, beams=beams, quiet=True).accuracy == 0


@functools.cache
def in_pairs(model, beams):
    return evaluate(model, TOKENIZER, judged(), beams=beams, batch=2, quiet=True)


@pytest.mark.parametrize("beams", [None, 3])
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_no_batch_changes_an_answer(model, beams, batch):
    alone = in_pairs(model, beams)
    again = evaluate(model, TOKENIZER, judged()[::-1], beams=beams, batch=batch, quiet=True)
    assert again.said[::-1] == alone.said and again.correct[::-1] == alone.correct


def test_a_text_without_an_answer_is_counted(model):
    letters = [Example(prompt, "A", judge=Judge("letter", "A", 4)) for prompt in PROMPTS[:6]]
    score = evaluate(model, TOKENIZER, letters, quiet=True)
    assert (score.accuracy, score.unanswered) == (0, 6)
    assert score.as_dict()["unanswered"] == 6


def test_options_are_scored_unless_beams_are_asked_for(model):
    """All kinds in one list, in their order."""
    options = ("1", "23")
    mixed = [
        Example(PROMPTS[0], "1", options, Judge("number", "1", 8)),
        Example(PROMPTS[1], "23"),
        judged()[2],
        Example(PROMPTS[1], "1", options),
    ]
    scored = evaluate(model, TOKENIZER, mixed, quiet=True)
    assert scored.correct == (True, True, True, False)
    assert [text is None for text in scored.said] == [True, True, False, True]
    generated = evaluate(model, TOKENIZER, mixed, beams=2, quiet=True)
    assert generated.correct == (True, True, True, False)
    assert [text is None for text in generated.said] == [False, True, False, True]


def test_the_command_writes_every_prediction(tiny_folder, tmp_path, capsys, monkeypatch):
    for kind in llm_adapters.TOKENS:  # random weights do not stop before
        monkeypatch.setitem(llm_adapters.TOKENS, kind, 8)
    folder = tmp_path / "data"
    (folder / "math").mkdir(parents=True)
    for name in llm_adapters.GROUPS["math"]:
        value = {**SUM, "answer": "B"} if name == "aqua" else SUM
        (folder / "math" / f"{name}.test.jsonl").write_text(
            "\n".join(json.dumps({**value, "instruction": f"{i} + 3?"}) for i in range(3))
        )
    run = train_one(train_config(tiny_folder, tmp_path / "run"))
    randomize_factors(run)
    command = ["evaluate", str(run.path), "--sub_adapter", "heuristic", "--tasks", "math",
               "--data", str(folder), "--examples", "2", "--beams", "2"]  # fmt: skip
    assert __main__.main(command) == 0
    said = capsys.readouterr().out
    [file] = (run.path / "evaluate").iterdir()
    assert file.name.startswith("heuristic-published-math-beams-2-data-")
    assert file.name.endswith("-2-drawn.json")
    found = json.loads(file.read_text())
    assert found["data"] == str(folder)
    assert list(found["sets"]) == ["gsm8k", "aqua", "mawps", "svamp"] and found["beams"] == 2
    for name, each in found["sets"].items():
        assert each["accuracy_n"] == 2 == len(each["predictions"])
        assert f"heuristic on {name}: " in said
        for row in each["predictions"]:
            assert row["prompt"].endswith("### Response:") and isinstance(row["said"], str)
    assert found["versions"]["torch"] == metadata.version("torch")
    assert "average of 4:" in said
    kept = file.read_bytes()
    assert __main__.main([*command, "--beams", "1"]) == 0
    assert file.read_bytes() == kept and len(list((run.path / "evaluate").iterdir())) == 2
    capsys.readouterr()
    assert __main__.main([*command[:6], "--data", str(tmp_path)]) == 1
    assert "gsm8k: none of" in capsys.readouterr().err


def test_results_of_other_settings_are_other_files(tmp_path):
    def name_of(**settings) -> str:
        return _file(Run(tmp_path), "best", EvaluateConfig(tasks=["math"], **settings)).name

    assert name_of() == "best-published-math.json"
    assert name_of(protocol="likelihood", examples=3) == "best-likelihood-math-3-drawn.json"
    changes = [{}, {"beams": 1}, {"beams": 2}, {"data": "there"}, {"data": str(tmp_path)},
               {"beams": 1, "data": "there"}, {"examples": 1}]  # fmt: skip
    names = [name_of(**change) for change in changes]
    assert len(set(names)) == len(changes)
    assert names == [name_of(**change) for change in changes], "the same settings, the same file"
