"""One elastic training step against one plain PEFT LoRA step: same model, targets, rank, batch.

    python -m tests.benchmarks.step [--save]

A step is forward, loss on the answer positions, backward and AdamW; the PEFT model is measured
twice (A/A control). Beside the measured ratio stands the ratio of multiply-accumulates.
"""

from __future__ import annotations

import copy
import statistics

import torch
from peft import LoraConfig, get_peft_model

from elastic import models
from elastic.batching import IGNORED, answer_logits
from elastic.config import AdapterConfig, ModelConfig
from elastic.cost import Counter
from elastic.errors import ModelError
from elastic.sampler import generator_for
from elastic.space import SearchSpace
from elastic.supernet import Supernet
from tests.benchmarks.common import TARGETS, interleaved, llama, report, summary

RANK, ALPHA, BATCH, LENGTH, ANSWER, REPETITIONS = 32, 64, 16, 32, 4, 5


def batch_of(vocabulary: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(vocabulary, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :-ANSWER] = IGNORED
    mask = torch.ones_like(ids)
    return {
        "input_ids": ids, "attention_mask": mask, "position_ids": mask.cumsum(1) - 1,
        "labels": labels,
    }  # fmt: skip


def main() -> None:
    try:
        model, name = models.load_model(models.locate("smollm2"), ModelConfig()), "SmolLM2-135M"
    except ModelError:
        model, name = llama(12), "random Llama, 12 layers of SmolLM2's size"
    plain = get_peft_model(
        copy.deepcopy(model), LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS)
    ).train()
    net = Supernet(model, SearchSpace.load("llama"), AdapterConfig(rank=RANK, alpha=ALPHA))
    net.model.train()
    batch = batch_of(model.config.vocab_size)
    optimizers = {
        id(m): torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-4)
        for m in (plain, net.model)
    }

    def step(m: torch.nn.Module) -> None:
        logits, labels = answer_logits(m, batch)
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
        optimizers[id(m)].step()
        optimizers[id(m)].zero_grad()

    generator = generator_for(0, "benchmark")
    draws = [net.space.random(generator) for _ in range(REPETITIONS + 1)]
    turn = iter(draws * 2)

    def elastic(sub) -> None:
        with net.active(sub):
            step(net.model)

    seconds = interleaved(
        {
            "peft": lambda: step(plain),
            "peft again (control)": lambda: step(plain),
            "elastic, maximal": lambda: elastic(net.space.maximal()),
            "elastic, uniform draws": lambda: elastic(next(turn)),
            "elastic, minimal": lambda: elastic(net.space.minimal()),
        },
        REPETITIONS,
    )
    cost = Counter(net.model, net.space)
    # The head runs at few positions and nothing in it is elastic: left out of the operations.
    head = model.config.hidden_size * model.config.vocab_size
    drawn = statistics.mean(cost(sub).macs - head for sub in draws)
    operations = {
        "elastic, maximal": 1.0,
        "elastic, uniform draws": drawn / (cost.full.macs - head),
        "elastic, minimal": (cost(net.space.minimal()).macs - head) / (cost.full.macs - head),
    }
    base = statistics.median(seconds["peft"])
    rows = {
        row: summary(found)
        | {"ratio": statistics.median(found) / base}
        | ({"operations": operations[row]} if row in operations else {})
        for row, found in seconds.items()
    }
    report(
        "step",
        f"training step, {name}, {str(model.dtype).removeprefix('torch.')}, batch {BATCH} x "
        f"{LENGTH}, rank {RANK}",
        rows,
        model=name,
    )


if __name__ == "__main__":
    main()
