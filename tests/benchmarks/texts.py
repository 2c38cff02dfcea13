"""A real run as a world: accuracies and divergences of sub-adapters that are active in the
supernet, with all that does not depend on the model done once, and every measure in a file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from elastic.config import CompensationConfig, SearchConfig
from elastic.data import load_task
from elastic.data.answers import answer_logits
from elastic.data.collating import IGNORED, answer_width, collate, collated, length_sorted
from elastic.data.encoding import Encoded, encode_all
from elastic.data.prefix import read
from elastic.data.task import Example
from elastic.evaluation.evaluate import is_generated, rows_of
from elastic.latency.latency_table import Timetable, read_timetable_of
from elastic.run import Run
from elastic.spaces.bound import SubAdapter, generator_for
from elastic.supernet.group_importance import group_importance
from elastic.supernet.held_out import HeldOut
from elastic.supernet.store import load_run
from tests.benchmarks.worlds import Row, World


class Texts:
    """Sequences in batches on the device; what all begin with is read once per model."""

    def __init__(self, model, tokenizer, sequences: Sequence[Encoded], batch_tokens: int) -> None:
        self.sequences = sequences
        prefix = read(model, sequences)
        self.has_prefix = prefix is not None
        left = [prefix.without(each) for each in sequences] if prefix else sequences
        self.batches = [
            (numbers, collate(together, tokenizer.pad_token_id))
            for numbers, together in length_sorted(left, batch_tokens)
        ]
        self.on_device = [
            {name: tensor.to(model.device) for name, tensor in batch.items()}
            for _, batch in self.batches
        ]

    def __call__(
        self, model, asked: Collection[int] | None = None
    ) -> Iterator[tuple[list[int], int, list[int], Tensor, Tensor]]:
        """Of every batch with sequences that are asked (None: all) their numbers, the number of the
        batch, their places in it, logits (rows, width, vocabulary) and labels (rows, width)."""
        prefix = read(model, self.sequences) if self.has_prefix else None
        for number, ((numbers, _), batch) in enumerate(
            zip(self.batches, self.on_device, strict=True)
        ):
            places = [p for p, each in enumerate(numbers) if asked is None or each in asked]
            if not places:
                continue
            part = {name: tensor[places] for name, tensor in batch.items()}
            told = answer_logits(model, part, prefix=prefix)
            yield [numbers[place] for place in places], number, places, *told


class Accuracy:
    """As `elastic.evaluation.evaluate` scores what is not generated, one gather a batch."""

    def __init__(self, model, tokenizer, examples: Sequence[Example], batch_tokens: int) -> None:
        if any(is_generated(model, example) for example in examples):
            raise SystemExit("generated answers are not measured here")
        self.count = len(examples)
        self.rows = [
            row
            for number, example in enumerate(examples)
            for row in rows_of(tokenizer, model, number, example)
        ]
        sequences = [row.encoded for row in self.rows]
        self.texts = Texts(model, tokenizer, sequences, batch_tokens)
        self.plans = [self._plan(numbers, batch["labels"]).to(model.device)
                      for numbers, batch in self.texts.batches]  # fmt: skip

    def _plan(self, numbers: Sequence[int], labels: Tensor) -> Tensor:
        """(tokens, 4): row of the batch, position, token, and which option of the row."""
        labels = labels[:, -answer_width(labels) :]
        found = [
            (place, position, token, option)
            for place, number in enumerate(numbers)
            for option, (_, tokens) in enumerate(self.rows[number].options)
            for position, token in zip(
                (labels[place] != IGNORED).nonzero()[:, 0].tolist(), tokens, strict=False
            )
        ]
        return torch.tensor(found, dtype=torch.int64).reshape(-1, 4)

    def __call__(self, model) -> str:
        """One digit per example, 1 where it is right."""
        best = [(-float("inf"), False)] * self.count
        for numbers, number, _, logits, labels in self.texts(model):
            plan = self.plans[number]
            most = max(1, max(len(self.rows[each].options) for each in numbers))
            values = torch.zeros(len(numbers) * most, device=logits.device)
            if len(plan):
                row, position, token, option = plan.T
                chosen = logits[row, position].log_softmax(-1)[torch.arange(len(plan)), token]
                values.index_add_(0, row * most + option, chosen)
            exact = ((logits.argmax(-1) == labels) | (labels == IGNORED)).all(1).tolist()
            values = values.reshape(len(numbers), most).tolist()
            for place, each in enumerate(numbers):
                row = self.rows[each]
                value, right = 0.0, exact[place]
                if row.options:
                    told = values[place][: len(row.options)]
                    value = max(told)
                    right = row.options[told.index(value)][0]
                best[row.index] = max(best[row.index], (value, right), key=lambda one: one[0])
        return "".join("01"[right] for _, right in best)


class Divergence:
    """KL(full ‖ model) of the answers, example by example."""

    def __init__(self, model, tokenizer, examples: Sequence[Example], batch_tokens: int) -> None:
        sequences = encode_all(tokenizer, examples, model)
        self.texts = Texts(model, tokenizer, sequences, batch_tokens)
        self.full = [logits.log_softmax(-1) for *_, logits, _ in self.texts(model)]

    def __call__(self, model, asked: Collection[int]) -> list[float | None]:
        """Sums over the tokens of an answer; None of an example that is not asked."""
        found: list[float | None] = [None] * len(self.texts.sequences)
        for numbers, number, places, logits, labels in self.texts(model, asked):
            full = self.full[number][places, -labels.shape[1] :]
            apart = (full.exp() * (full - logits.log_softmax(-1))).sum(-1)
            sums = (apart * (labels != IGNORED)).sum(1).tolist()
            for each, value in zip(numbers, sums, strict=True):
                found[each] = float(f"{value:.6g}")
        return found


class Measured(World):
    """A trained run under a latency table. A seed draws the validation examples that accuracies are
    of, and the rows of divergences."""

    gradients = 192
    """64 training examples, whose backward pass is twice a forward pass."""

    def __init__(self, run: Run, table: str, file: Path, given) -> None:
        """`given` has the settings of `tests.benchmarks.rivals_on`."""
        super().__init__()
        config, base, net = load_run(run, given.dtype)
        self.config, self.base, self.net, self.space = config, base, net, net.space
        read_table = read_timetable_of(run, table)
        self.table = Timetable.from_dict(read_table, net.space).tables[given.cost]
        task = load_task(config.task, config.seed)
        if given.validation:
            wanted = dataclasses.replace(config.task, validation_examples=given.validation)
            seen = {example.text for example in task.train}
            task = dataclasses.replace(
                task,
                validation=[
                    example
                    for example in load_task(wanted, config.seed).validation
                    if example.text not in seen
                ],
            )
        self.degrees = [float(each) for each in given.degrees.split(",")]
        self.passes = len(self.degrees)
        settings = CompensationConfig(degrees=self.degrees, sequential=False, room_mb=4000)
        HeldOut.of(run, net, base.tokenizer, task, settings)
        net.model.eval()
        examples = list(task.validation)
        generator_for(given.seed, "validation").shuffle(examples)
        self.train, self.members = task.train, given.members
        self.examples = min(given.examples, len(examples))
        self.most_rows = min(given.pool, len(examples))
        self.rows = min(given.rows, self.most_rows)
        self.file, self.known = file, _known(file)
        with net.active(net.space.maximal()) as model, torch.inference_mode():
            asked = model, base.tokenizer
            self.right = Accuracy(*asked, examples[: self.examples], given.batch_tokens)
            self.apart = Divergence(*asked, examples[: self.most_rows], given.batch_tokens)
            self.test = Accuracy(*asked, task.test[: given.test], given.batch_tokens)

    def scored(self, row: Row) -> float:
        marks = self._kept("accuracy", row, self._degree(row), self.right)
        return marks.count("1") / len(marks)

    def diverged(self, row: Row, rows: int, draw: int) -> float:
        return min(self._apart(row, degree, rows, draw) for degree in self.degrees)

    def tested(self, row: Row) -> str:
        """Right or wrong on the test split."""
        return self._kept("test", row, self._degree(row), self.test)

    def importance(self) -> Mapping[str, float]:
        if "importance" not in self.known:
            asked = self.train[: SearchConfig().importance_examples]
            encoded = encode_all(self.base.tokenizer, asked, self.net.model)
            pad = self.base.tokenizer.pad_token_id
            batches = list(collated(encoded, 8, pad, self.net.model.device))
            self.known["importance"] = group_importance(self.net, batches)
        return self.known["importance"]

    def _degree(self, row: Row) -> float:
        """With which it is least far from the full model; asked where there is a choice."""
        if len(self.degrees) == 1:
            return self.degrees[0]
        self.divergence(row)
        return min(self.degrees, key=lambda degree: self._apart(row, degree, self.rows, 0))

    def _apart(self, row: Row, degree: float, rows: int, draw: int) -> float:
        some = range(rows)
        if draw:
            numbers = np.random.default_rng(draw).choice(self.most_rows, rows, replace=False)
            some = numbers.tolist()
        known = self.known.get(("divergence", row, degree), [None] * self.most_rows)
        if lacking := {each for each in some if known[each] is None}:
            new = self._measured(row, degree, lambda model: self.apart(model, lacking))
            known = [a if b is None else b for a, b in zip(known, new, strict=True)]
            self._keep("divergence", row, degree, known)
        return float(np.mean([known[each] for each in some]))

    def _kept(self, what: str, row: Row, degree: float, measure):
        if (what, row, degree) not in self.known:
            self._keep(what, row, degree, self._measured(row, degree, measure))
        return self.known[what, row, degree]

    def _measured(self, row: Row, degree: float, measure):
        sub: SubAdapter = self.space.at(dict(zip(self._names, row, strict=True)))
        with self.net.active(sub, degree) as model, torch.inference_mode():
            return measure(model)

    def _keep(self, what: str, row: Row, degree: float, value) -> None:
        self.known[what, row, degree] = value
        self.write({"what": what, "at": row, "degree": degree, "value": value})

    def write(self, line: Mapping) -> None:
        with self.file.open("a") as file:
            file.write(json.dumps(line) + "\n")

    @property
    def _names(self) -> list[str]:
        return [group.name for group in self.space]


def _known(file: Path) -> dict:
    """What the file says; a last line that was cut by a kill is left out."""
    found: dict = {}
    for line in file.read_text().splitlines() if file.is_file() else []:
        try:
            one = json.loads(line)
        except ValueError:
            continue
        if "at" in one:
            found[one["what"], tuple(one["at"]), one["degree"]] = one["value"]
    return found
