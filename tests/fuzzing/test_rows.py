"""Whatever a file of examples holds, it is read and encoded, or refused in one line."""

import json
import tempfile
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from elastic.config import TaskConfig
from elastic.data import load_task
from elastic.data.encoding import encode_all
from tests.helpers.fuzzing import damaged, fuzzed, mutated, works_or_is_refused
from tests.helpers.tiny import llama, tokenizer

MODEL, TOKENIZER = llama(), tokenizer()
JSONL = {"prompt": "2 + 2 =", "answer": "4", "options": ["3", "4"], "second": "Well?"}
MATHS = {"instruction": "2 + 2 = ?", "input": "", "output": "the answer is 4", "answer": "4"}
CHAT = {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}
CASES = [
    (JSONL, {}),
    (JSONL, {"options": "options"}),
    (JSONL, {"second": "{second}"}),
    (JSONL, {"prompt": "Q: {prompt}\nA:"}),
    (JSONL, {"prompt": "{prompt[0]}"}),
    (JSONL, {"prompt": "{"}),
    (JSONL, {"answer": "none"}),
    (MATHS, {"name": "llm_adapters"}),
    (CHAT, {"prompt": "chat"}),
]
"""A row, and settings by which it is read."""


def read(config: TaskConfig) -> None:
    task = load_task(config, 0)
    for examples in (task.train, task.validation, task.test):
        encode_all(TOKENIZER, examples, MODEL)


def numbered(row: dict, number: int) -> dict:
    return json.loads(json.dumps(row).replace("2 + 2", f"2 + {number}"))


@fuzzed
@given(data=st.data())
def test_rows_are_read_or_refused(data):
    row, settings = data.draw(st.sampled_from(CASES))
    rows = data.draw(mutated(st.just([numbered(row, n) for n in range(4)])))
    as_lines = isinstance(rows, list) and data.draw(st.booleans())
    text = "\n".join(map(json.dumps, rows)) if as_lines else json.dumps(rows)
    content = text.encode()
    if data.draw(st.booleans()):
        content = data.draw(damaged(content))
    with tempfile.TemporaryDirectory() as folder:
        train, test = Path(folder) / "train.jsonl", Path(folder) / "test.jsonl"
        train.write_bytes(content)
        test.write_text(json.dumps(numbered(row, 9)))
        files = {"train": str(train), "test": str(test)}
        config = TaskConfig(**{"name": "jsonl", "validation_examples": 1, **files, **settings})
        works_or_is_refused(read, config)
