"""Building the supernet of a 32-layer model on random weights, without importance; the model
itself is built outside the clock. PEFT wraps the same model for comparison.

    python -m tests.benchmarks.construction [--save]
"""

from __future__ import annotations

import statistics

from peft import LoraConfig, get_peft_model

from elastic.config import AdapterConfig
from elastic.models.modules import module_tree
from elastic.spaces.declared import SearchSpace
from elastic.supernet.supernet import Supernet
from tests.benchmarks.common import TARGETS, interleaved, llama, report, summary

REPETITIONS = 4


def main() -> None:
    model = llama(32, hidden=1024, intermediate=2816)
    # The same tensors in all of them: construction changes no weight.
    fresh = iter([module_tree(model) for _ in range(3 * (REPETITIONS + 1))])
    space = SearchSpace.load("llama")

    def elastic() -> None:
        Supernet(next(fresh), space, AdapterConfig(rank=32))

    def peft() -> None:
        get_peft_model(next(fresh), LoraConfig(r=32, target_modules=TARGETS))

    seconds = interleaved(
        {"elastic": elastic, "elastic again (control)": elastic, "peft": peft}, REPETITIONS
    )
    base = statistics.median(seconds["elastic"])
    rows = {
        row: summary(found) | {"ratio": statistics.median(found) / base}
        for row, found in seconds.items()
    }
    report("construction", "supernet of a random 32-layer Llama, hidden 1024, rank 32", rows)


if __name__ == "__main__":
    main()
