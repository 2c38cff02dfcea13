"""The benchmarks of the methods' papers: asked by the documented commands, judged as the papers do.

The data sets are folders of their names in the working directory, rows made up here; a tiny model
shows that all runs, scripted answers show that right is right and wrong is wrong.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable

import lm_eval.evaluator
import psutil
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from elastic.__main__ import main
from elastic.config import EvaluateConfig, StageConfig
from elastic.errors import ConfigError, DataError
from elastic.evaluation import harness, papers, programs
from elastic.training.one_task import train_one
from tests.helpers import tiny
from tests.helpers.families import model_of
from tests.helpers.papers import BBH, GSM8K, HUMANEVAL, MATH, MMLU, TYDIQA, data_sets
from tests.helpers.tiny_runs import train_config

SAFE = [
    "sorsa_gsm8k", "sorsa_math", "soslora_gsm8k", "soslora_math", "prolora_mmlu", "prolora_gsm",
    "prolora_bbh", "prolora_tydiqa",
]  # fmt: skip
ROWS = {"gsm8k": 3, "gsm": 3, "math": 7, "mmlu": 4, "bbh": 3, "tydiqa": 4, "humaneval": 2}


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory):
    """A working directory with the data sets."""
    import datasets

    folder = tmp_path_factory.mktemp("papers")
    data_sets(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder / "cache"))
        patch.setattr(papers, "bbh_tasks", lambda: list(BBH))
        # Processes that ask for compilers and drivers, a second each time.
        patch.setattr(lm_eval.evaluator, "add_env_info", lambda results: None)
        patch.setattr(lm_eval.evaluator, "get_git_commit_hash", lambda: None)
        yield folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Of a model that has room for eight worked examples and stops after few tokens."""
    folder = tmp_path_factory.mktemp("run")
    base = tiny.save_tiny(folder / "base", max_position_embeddings=8192, num_hidden_layers=1)
    ends = {"eos_token_id": list(range(tiny.EOS, 60)), "pad_token_id": tiny.PAD}
    (base / "generation_config.json").write_text(json.dumps(ends))
    return train_one(train_config(base, folder / "run", stages=[StageConfig()]))


@pytest.mark.slow
def test_the_documented_commands_run(run, capsys):
    """Whole, on a tiny model: `elastic evaluate RUN --harness ...`, as docs/guides/recipes.md."""
    command = ["evaluate", str(run.path), "--batch", "4", "--harness"]
    assert main([*command, ",".join(SAFE)]) == 0, capsys.readouterr().err
    code = ["sorsa_humaneval", "prolora_humaneval"]
    assert main([*command, ",".join(code), "--run_code", "true"]) == 0, capsys.readouterr().err
    found: dict = {}
    for file in (run.path / "evaluate").glob("*.json"):
        kept = json.loads(file.read_text())
        found |= {name: (kept["n"][name], kept["results"][name]) for name in kept["results"]}
    assert set(found) == {*SAFE, *code}
    for name, (count, metrics) in found.items():
        assert count == ROWS[name.partition("_")[2]]
        assert metrics and all(0 <= each["value"] <= 1 for each in metrics.values())


def test_one_documented_command_runs(run, capsys):
    """Of every kind of task one: likelihoods, text, code."""
    command = ["evaluate", str(run.path), "--harness", "prolora_mmlu,prolora_bbh,sorsa_humaneval"]
    assert main([*command, "--run_code", "true"]) == 0, capsys.readouterr().err
    told = json.loads(capsys.readouterr().out.splitlines()[-1])["harness"]
    assert set(told) == {"prolora_mmlu", "prolora_bbh", "sorsa_humaneval"}
    assert told["prolora_mmlu"]["acc"]["interval"] and "pass@1" in told["sorsa_humaneval"]


class Scripted(LM):
    """Says what a function of the prompt says; of choices it prefers those that the function
    begins with."""

    def __init__(self, answer: Callable[[str], str]) -> None:
        super().__init__()
        self.answer, self.asked = answer, []

    def generate_until(self, requests, disable_tqdm=False):
        self.asked += requests
        return [self.answer(request.args[0]) for request in requests]

    def loglikelihood(self, requests, disable_tqdm=False):
        self.asked += requests
        return [(float(self.answer(r.args[0]).startswith(r.args[1])), False) for r in requests]

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        raise NotImplementedError


def asked(task: str, answer: Callable[[str], str]) -> tuple[dict[str, float], list]:
    """Metrics of the task with these answers, and the requests."""
    config = EvaluateConfig(harness=[task], run_code=task.endswith("humaneval"))
    model = Scripted(answer)
    manager = harness.task_manager(config)
    found = harness._evaluate(model, config, harness.loaded(config, manager), manager)
    metrics = harness._metrics(found["results"][task])
    return {name: each["value"] for name, each in metrics.items()}, model.asked


def by_prompt(rows: list, field: str, answer: Callable[[dict], str]) -> Callable[[str], str]:
    """Of the row whose field stands last in the prompt, what `answer` makes of it."""
    return lambda prompt: answer(max(rows, key=lambda row: prompt.rfind(row[field])))


def gold(row: dict) -> str:
    return row["answer"].partition("#### ")[2]


@pytest.mark.parametrize(
    ("task", "text", "expected"),
    [
        ("sorsa_gsm8k", "So 7. The answer is: 9. The answer is: {}.", 1),
        ("sorsa_gsm8k", "The answer is: {}.4, not 9", 1),  # the first, to an integer
        ("sorsa_gsm8k", "The answer is: 9 {}", 0),
        ("sorsa_gsm8k", "It is {}", 0),  # no marker
        ("soslora_gsm8k", "The answer is: 9 {}", 1),  # the last
        ("soslora_gsm8k", "7 or rather {}", 1),
        ("soslora_gsm8k", "The answer is: {} or 9", 0),
        ("prolora_gsm", " Some 9 and so $ {}.00.", 1),
        ("prolora_gsm", " {}, not 9.", 0),
    ],
)
def test_gsm8k_is_judged_as_each_paper_does(task, text, expected):
    for row in GSM8K:  # 1,200 has a comma
        said = text.format(f"{int(gold(row)):,}")
        assert getattr(papers, task)(row, [said]) == {"exact_match": expected}


@pytest.mark.parametrize("task", ["sorsa_gsm8k", "soslora_gsm8k", "prolora_gsm"])
def test_gsm8k_asks_every_row(task):
    right = by_prompt(GSM8K, "question", lambda row: f"The answer is: {gold(row)}")
    found, requests = asked(task, right)
    assert found == {"exact_match": 1} and len(requests) == 3
    prompt = requests[0].args[0]
    assert prompt.count("Question: ") == (9 if task == "prolora_gsm" else 0)


def test_alpaca_prompts_are_those_of_the_training():
    """But for the step by step that SORSA adds."""
    from elastic.config import TrainConfig
    from elastic.config.parsing import parse
    from elastic.data.rows import example_of

    question = GSM8K[0]["question"]
    for method, field, end in [("sorsa", "query", papers.STEPS), ("soslora", "instruction", "")]:
        recipe = parse(TrainConfig, ["--config", f"{method}-llama2-7b-math-train"])
        trained = example_of({field: question, recipe.task.answer: "1"}, recipe.task, "x:1")
        _, [first, *_] = asked(f"{method}_gsm8k", lambda prompt: "")
        assert first.args[0] == trained.prompt + end


def test_math_is_compared_as_latex():
    def boxed(row: dict) -> str:
        return row["solution"].partition("boxed{")[2].removesuffix("}$.")

    rows = [row for part in MATH.values() for row in part]
    alike = by_prompt(rows, "problem", lambda r: f"The answer is: {boxed(r).replace('d', '')}.\nSo")
    for task, tokens in (("sorsa_math", 2048), ("soslora_math", 1024)):
        found, requests = asked(task, alike)
        assert found == {"exact_match": 1} and len(requests) == 7
        assert requests[0].args[1]["max_gen_toks"] == tokens
    for wrong in (lambda r: boxed(r), lambda r: "The answer is: 0"):
        assert asked("sorsa_math", by_prompt(rows, "problem", wrong))[0] == {"exact_match": 0}


def test_mmlu_takes_the_likeliest_letter():
    def letter(row: dict) -> str:
        return " " + "ABCD"[row["answer"]]

    found, requests = asked("prolora_mmlu", by_prompt(MMLU, "question", letter))
    assert found == {"acc": 1} and len(requests) == 16
    assert requests[0].args == (
        "<|user|>\nThe following are multiple choice questions (with answers) about plain "
        "counting.\n\nWhich one is 0?\nA. 0\nB. 1\nC. 2\nD. 3\nAnswer:\n<|assistant|>\n"
        "The answer is",
        " A",
    )
    assert asked("prolora_mmlu", lambda prompt: " C")[0] == {"acc": 0.25}


def test_bbh_is_the_mean_over_tasks():
    """Three examples each; two right ones of the one task and none of the other are a half."""
    found, requests = asked("prolora_bbh", lambda prompt: " true.")
    assert found == {"exact_match": 0.5}
    rows = [row for part in BBH.values() for row in part]
    told = by_prompt(rows, "input", lambda row: f"I think. So the answer is {row['target']}. Yes.")
    assert asked("prolora_bbh", told)[0] == {"exact_match": 1}
    prompt = requests[0].args[0]
    assert prompt.startswith("<|user|>\nEvaluate the result of a random Boolean expression.\n\nQ: ")
    assert prompt.endswith("\n\nQ: not 0 is\n<|assistant|>\nA:")
    assert prompt.count("Q: ") == 4 and prompt.count("A: ") == 3


def test_bbh_has_its_tasks(monkeypatch):
    monkeypatch.undo()
    assert len(list(papers._harness_tasks().glob("bbh/fewshot/[!_]*.yaml"))) == 27


def test_tydiqa_counts_words_and_languages():
    rows = TYDIQA["validation"]
    right = by_prompt(rows, "question", lambda row: " the smiths.")
    assert asked("prolora_tydiqa", right)[0] == {"f1": 1, "exact_match": 1}
    found, requests = asked("prolora_tydiqa", lambda prompt: " Smiths live there")
    assert found == {"f1": pytest.approx(0.5), "exact_match": 0}  # 1 of 3 words, 1 of 1
    prompt = requests[-1].args[0]
    assert prompt.count("Passage: ") == 2 and "Answer: The Smiths\n\nPassage" in prompt
    assert papers.by_part([("a", 1.0), ("a", 1.0), ("b", 0.0)]) == 0.5


@pytest.mark.parametrize("task", ["sorsa_humaneval", "prolora_humaneval"])
def test_humaneval_runs_what_is_written(task):
    def said(row: dict) -> str:
        body = row["canonical_solution"]
        return f"Here:\n```python\n{row['prompt']}{body}```" if task.startswith("sorsa") else body

    rows = by_prompt(HUMANEVAL, "prompt", said)
    repeats = 1 if task.startswith("sorsa") else 20
    found, requests = asked(task, lambda prompt: rows(prompt + "\n"))
    assert found == {"pass@1": 1}
    assert requests[0].repeats == repeats


def test_pass_at_1_is_the_part_of_the_samples_that_passes():
    row, right = HUMANEVAL[0], "    return 2 * x\n"
    said = [right, "    return x\n", right, "    return"]
    assert papers.prolora_humaneval(row, [said]) == {"pass@1": 0.5}
    for text in ("```python\ndef double(x):\n    return x\n```", "", "```"):
        assert papers.sorsa_humaneval(row, [[text]]) == {"pass@1": 0.0}


def test_code_is_refused_without_leave(run, capsys, forbid_weights):
    """Before any weight is read; a group or a tag is as unsafe as what it stands for."""
    assert main(["evaluate", str(run.path), "--harness", "sorsa_humaneval"]) == 1
    said = capsys.readouterr().err
    assert "'sorsa_humaneval' runs programs that the model writes" in said and "run_code" in said


def test_data_that_are_not_there_are_named(run, capsys, forbid_weights, tmp_path, monkeypatch):
    """Before any weight is read."""
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", str(run.path), "--harness", "sorsa_gsm8k"]) == 1
    assert "harness: Couldn't reach 'openai/gsm8k'" in capsys.readouterr().err


def test_a_package_that_is_not_there_is_named():
    """As of minerva_math, which wants packages of its own."""
    with pytest.raises(DataError, match="harness: install this"), harness._named():
        raise ImportError("install\nthis")
    with pytest.raises(AssertionError), harness._named():  # a mistake here says nothing
        raise AssertionError


def test_a_state_has_no_longest_text():
    """RWKV-4 names the 1,024 tokens that it was trained on, fewer than an answer and its prompt."""
    model, tokenizer = model_of("rwkv", torch.float32), tiny.tokenizer()
    model.generation_config.eos_token_id = list(range(tiny.EOS, 60))
    room = model.config.max_position_embeddings
    request = Instance("generate_until", {}, ("ab", {"max_gen_toks": room, "until": ["q"]}), 0)
    assert harness.in_memory(model, tokenizer, 4).generate_until([request]) != [""]
    small = harness.in_memory(tiny.llama(dtype=torch.float32), tokenizer, 4)
    request.arguments[1]["max_gen_toks"] = 300
    with pytest.raises(DataError, match=r"300.* maximum sequence length"), harness._named():
        small.generate_until([request])


@pytest.mark.parametrize("named", ["group", "tag"])
def test_what_stands_for_code_is_refused(named, place, monkeypatch):
    from lm_eval.tasks import TaskManager

    folder = place / named
    folder.mkdir()
    inside = "{task: inner, unsafe_code: true, tag: some_tag, output_type: generate_until}"
    (folder / "inner.yaml").write_text(inside)
    (folder / "group.yaml").write_text("{group: some_group, task: [inner]}")
    tasks = TaskManager(include_path=str(folder), include_defaults=False)
    assert list(harness._running_code(tasks, [f"some_{named}"])) == ["inner"]


def test_leave_is_passed_on_to_code_eval(monkeypatch):
    """The harness's own humaneval asks this variable, and only while it runs."""
    monkeypatch.delenv(harness.CODE_EVAL, raising=False)
    with harness._code_allowed(False):
        assert harness.CODE_EVAL not in os.environ
    with harness._code_allowed(True):
        assert os.environ[harness.CODE_EVAL] == "1"
    assert harness.CODE_EVAL not in os.environ


def test_an_unknown_task_is_named_beside_those_of_the_papers(monkeypatch):
    import lm_eval.tasks

    known = lm_eval.tasks.TaskManager
    monkeypatch.setattr(
        lm_eval.tasks,
        "TaskManager",
        lambda **settings: known(**settings | {"include_defaults": False}),
    )  # the harness has thousands of its own
    with pytest.raises(ConfigError, match="did you mean 'sorsa_gsm8k'"):
        harness.task_manager(EvaluateConfig(harness=["sorsa_gsm8"]))


@pytest.mark.parametrize(
    ("program", "passes"),
    [
        ("from __future__ import annotations\nassert 1 + 1 == 2", True),
        ("assert 1 + 1 == 3", False),
        ("raise SystemExit(0)", False),  # nothing is tested behind it
        ("import os; os._exit(0)", False),
        ("while True: pass", False),
        ("import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'while 1: 1'])", True),
        ("open('x', 'w').write('a' * (2 << 20))", False),
        ("x = bytearray(5 << 30)", False),
        ("import os; assert not any('SECRET' in name for name in os.environ)", True),
        ("assert not __import__('os').path.exists('pyproject.toml'); open('x', 'w')", True),
        ("print('\ud800')", True),
    ],
)  # fmt: skip
def test_a_program_passes_only_if_it_comes_to_its_end(program, passes, monkeypatch):
    monkeypatch.setenv("ELASTIC_SECRET", "1")
    seconds = 1.0 if program.startswith("while") else 20.0  # the machine may be busy
    assert programs.passes(program, seconds) is passes


def test_nothing_stays_behind(tmp_path, monkeypatch):
    """No folder, and no process that a program has started."""
    monkeypatch.setattr(programs.tempfile, "tempdir", str(tmp_path))
    file = tmp_path / "pid"
    child = f"import os, time; open({str(file)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    program = (
        f"import subprocess, sys, time\nsubprocess.Popen([sys.executable, '-c', {child!r}])\n"
        f"while not __import__('os').path.exists({str(file)!r}): time.sleep(0.01)\ntime.sleep(0.05)"
    )
    assert programs.passed([program, "1 / 0"], 20.0) == [True, False]
    assert [path.name for path in tmp_path.iterdir()] == ["pid"]
    with contextlib.suppress(psutil.NoSuchProcess):  # a container may have no init that takes it
        begun, left = time.monotonic(), psutil.Process(int(file.read_text()))
        while left.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < begun + 5
            time.sleep(0.01)
