"""The benchmarks of the methods' papers, as tasks of lm-evaluation-harness ask and judge them.

`configs/harness` has the tasks, in the harness's own form; what a template cannot say is here:
prompts with examples, data that come in parts, judging. Every function takes what the harness has:
a row of the data, and what the model said to it.
"""

from __future__ import annotations

import re
import string
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import yaml

from elastic.evaluation import programs

if TYPE_CHECKING:
    from datasets import Dataset

Row = Mapping[str, Any]
Grouped = tuple[str, float]
"""Of which part of a benchmark, and how right."""

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{}\n\n### Response:"
)
STEPS = " Let's think step by step."
MARKER = "The answer is: "
"""Behind which models trained on MetaMathQA put their answer."""
SUBJECTS = (
    "algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory",
    "prealgebra", "precalculus",
)  # fmt: skip
"""Parts of MATH."""


def by_part(scores: Iterable[Grouped]) -> float:
    """The mean over parts of each part's mean: every part counts alike, however large it is."""
    parts = defaultdict(list)
    for part, score in scores:
        parts[part].append(score)
    return fmean(map(fmean, parts.values()))


def all_of(responses: Sequence[Any], rows: Sequence[Row]) -> Sequence[Any]:
    """A filter of the harness that keeps every sample; its usual one keeps the first."""
    return responses


# SORSA and SOS-LoRA: GSM8K and MATH after MetaMathQA, the answer behind a marker


def sorsa_gsm8k_prompt(row: Row) -> str:
    """Alpaca's form, asked to go step by step."""
    return ALPACA.format(row["question"]) + STEPS


def sorsa_math_prompt(row: Row) -> str:
    """The same of MATH."""
    return ALPACA.format(row["problem"]) + STEPS


def soslora_gsm8k_prompt(row: Row) -> str:
    """Alpaca's form alone."""
    return ALPACA.format(row["question"])


def soslora_math_prompt(row: Row) -> str:
    """The same of MATH."""
    return ALPACA.format(row["problem"])


def math_rows(**_: Any) -> dict[str, Dataset]:
    """The 5,000 test problems of MATH, whose seven parts are data sets of their own."""
    from datasets import concatenate_datasets, load_dataset

    parts = [load_dataset("EleutherAI/hendrycks_math", part, split="test") for part in SUBJECTS]
    return {"test": concatenate_datasets(parts)}


def sorsa_gsm8k(row: Row, said: Sequence[str]) -> dict[str, float]:
    """The first number behind the last marker, to an integer; no marker is wrong."""
    _, marker, behind = said[0].rpartition(MARKER)
    return {"exact_match": _same_number(_numbers(behind)[:1] if marker else [], row)}


def soslora_gsm8k(row: Row, said: Sequence[str]) -> dict[str, float]:
    """The last number behind the last marker; without a marker the last number of all."""
    _, _, behind = said[0].rpartition(MARKER)
    return {"exact_match": _same_number(_numbers(behind)[-1:], row)}


def marked_math(row: Row, said: Sequence[str]) -> dict[str, float]:
    """What stands behind the last marker, up to the end of its sentence, is the boxed answer but
    for how LaTeX writes it; no marker is wrong."""
    from lm_eval.tasks.hendrycks_math.utils import is_equiv

    _, marker, behind = said[0].rpartition(MARKER)
    found = behind.split(".\n")[0].strip().removesuffix(".").strip("$")
    return {"exact_match": float(bool(marker) and is_equiv(found, _boxed(row["solution"])))}


def _boxed(solution: str) -> str:
    from lm_eval.tasks.hendrycks_math.utils import last_boxed_only_string, remove_boxed

    return remove_boxed(last_boxed_only_string(solution))


def _numbers(text: str) -> list[float]:
    """Those in a text, thousands with or without commas."""
    return [float(found) for found in re.findall(r"-?\d*\.?\d+", text.replace(",", ""))]


def _same_number(found: Sequence[float], row: Row) -> float:
    """Whether the one found, if any, is the one behind GSM8K's ####, rounded to an integer."""
    [expected] = _numbers(row["answer"].rpartition("####")[2])
    return float(any(round(one) == round(expected) for one in found))


# PRoLoRA: in the form of its training data (Tulu)


def chat(asked: str, begun: str) -> str:
    """One turn of each side; the answer begins with what is given."""
    return f"<|user|>\n{asked.strip()}\n<|assistant|>\n{begun}"


def prolora_mmlu_prompt(row: Row) -> str:
    """A question with its four choices; the answer is one of their letters."""
    choices = "".join(f"{letter}. {c}\n" for letter, c in zip("ABCD", row["choices"], strict=True))
    subject = row["subject"].replace("_", " ")
    return chat(
        f"The following are multiple choice questions (with answers) about {subject}.\n\n"
        f"{row['question'].strip()}\n{choices}Answer:",
        "The answer is",
    )


def prolora_gsm_prompt(row: Row) -> str:
    """Eight worked examples, then the question."""
    shots = _stock("gsm8k/gsm8k-cot.yaml")["fewshot_config"]["samples"]
    worked = "".join(
        f"Question: {shot['question']}\nAnswer: {shot['target']}\n\n" for shot in shots
    )
    asked = f"Answer the following questions.\n\n{worked}Question: {row['question'].strip()}"
    return chat(asked, "Answer:")


def prolora_gsm(row: Row, said: Sequence[str]) -> dict[str, float]:
    """The last number is right."""
    return {"exact_match": _same_number(_numbers(said[0])[-1:], row)}


def bbh_rows(**_: Any) -> dict[str, Dataset]:
    """BBH's 27 tasks, each row with the name of its task, and with the task's description and three
    answered examples as `shots`."""
    from datasets import concatenate_datasets, load_dataset

    parts = []
    for name in bbh_tasks():
        known = _stock(f"bbh/fewshot/{name}.yaml")
        shots = "\n\n".join(
            f"Q: {shot['input']}\nA: {shot['target']}"
            for shot in known["fewshot_config"]["samples"]
        )
        rows = load_dataset("SaylorTwift/bbh", known["dataset_name"], split="test")
        told = [f"{known['description'].strip()}\n\n{shots}"] * len(rows)
        parts.append(rows.add_column("part", [name] * len(rows)).add_column("shots", told))
    return {"test": concatenate_datasets(parts)}


def bbh_tasks() -> list[str]:
    """As the harness names them."""
    return sorted(file.stem for file in _harness_tasks().glob("bbh/fewshot/[!_]*.yaml"))


def prolora_bbh_prompt(row: Row) -> str:
    """Description, examples and question; answered directly."""
    return chat(f"{row['shots']}\n\nQ: {row['input']}", "A:")


def prolora_bbh(row: Row, said: Sequence[str]) -> dict[str, Grouped]:
    """The answer, alone or behind "the answer is", but for case and punctuation."""
    found = re.search(r"[tT]he answer is (.*?)\.", said[0])
    text = found[1] if found else said[0]
    return {"exact_match": (row["part"], float(_plain(text) == _plain(row["target"])))}


def tydiqa_rows(**_: Any) -> dict[str, Dataset]:
    """Questions of nine languages with the passage that answers them, each with the first training
    row of its language as an example."""
    from datasets import load_dataset

    both = load_dataset("google-research-datasets/tydiqa", "secondary_task")
    first: dict[str, str] = {}
    for row in both["train"]:
        language = row["id"].partition("-")[0]
        first.setdefault(language, f"{_passage(row)}\nAnswer: {row['answers']['text'][0]}")
    rows = both["validation"]
    languages = [name.partition("-")[0] for name in rows["id"]]
    shots = [first[language] for language in languages]
    return {"validation": rows.add_column("part", languages).add_column("shots", shots)}


def prolora_tydiqa_prompt(row: Row) -> str:
    """One answered example, then passage and question."""
    told = "Answer the following question based on the information in the given passage."
    return chat(f"{told}\n\n{row['shots']}\n\n{_passage(row)}", "Answer:")


def prolora_tydiqa(row: Row, said: Sequence[str]) -> dict[str, Grouped]:
    """Equality, and overlap of words (F1), with the best of the known answers, as SQuAD has it."""
    found = _words(said[0])
    known = [_words(answer) for answer in row["answers"]["text"]]
    return {
        "exact_match": (row["part"], float(found in known)),
        "f1": (row["part"], max(_f1(found, answer) for answer in known)),
    }


def _passage(row: Row) -> str:
    return f"Passage: {row['context']}\nQuestion: {row['question']}"


def _words(text: str) -> list[str]:
    """Without case, punctuation and articles."""
    return [word for word in _plain(text).split() if word not in ("a", "an", "the")]


def _f1(found: Sequence[str], expected: Sequence[str]) -> float:
    common = sum((Counter(found) & Counter(expected)).values())
    return 2 * common / (len(found) + len(expected)) if common else 0.0


def _plain(text: str) -> str:
    """Without case and punctuation."""
    return text.lower().translate(str.maketrans("", "", string.punctuation)).strip()


def _harness_tasks() -> Path:
    """Where the harness has its own tasks."""
    import lm_eval.tasks

    return Path(lm_eval.tasks.__file__).parent


def _stock(name: str) -> dict[str, Any]:
    """A task of the harness, for its examples."""
    return yaml.safe_load((_harness_tasks() / name).read_text(encoding="utf-8"))


# HumanEval, which runs what the model writes


def sorsa_humaneval_prompt(row: Row) -> str:
    """Alpaca's form."""
    return ALPACA.format(row["prompt"].strip()) + STEPS


def sorsa_humaneval(row: Row, said: Sequence[Sequence[str]]) -> dict[str, float]:
    """pass@1 of the first fenced block, or of the whole text without one."""
    blocks = [
        re.search(r"```(?:python|py)?\s*\n(.*?)(?:```|\Z)", text, re.DOTALL) for text in said[0]
    ]
    texts = [block[1] if block else text for block, text in zip(blocks, said[0], strict=True)]
    # The prompt is a function without a body; a block repeats it whole, behind what it imports.
    return _pass_at_1(row, ["\n" + text for text in texts])


def prolora_humaneval_prompt(row: Row) -> str:
    """The function as the request and as the beginning of the answer."""
    asked = f"Complete the following python function.\n\n\n{row['prompt']}"
    return chat(asked, f"Here is the completed function:\n\n\n{row['prompt']}")


def prolora_humaneval(row: Row, said: Sequence[Sequence[str]]) -> dict[str, float]:
    """pass@1: how many of the samples, as they go on, pass the tests."""
    return _pass_at_1(row, said[0])


def _pass_at_1(row: Row, texts: Sequence[str]) -> dict[str, float]:
    tests = f"\n\n{row['test']}\n\ncheck({row['entry_point']})\n"
    return {"pass@1": fmean(programs.passed([row["prompt"] + text + tests for text in texts]))}
