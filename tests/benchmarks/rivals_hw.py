"""The same rivals on a space that others made: HW-GPT-Bench (Sukthanker et al. 2024).

    python -m tests.benchmarks.rivals_hw FOLDER [--seeds 6] [--units 1,2,4] [--save]

FOLDER has perplexity_s.pt, perplexity_m.pt and perplexity_l.pt of the repository
automl/HW-GPT-Bench (data_collection/gpt_datasets/predictor_ckpts/metric): networks fitted to the
perplexities of 10,000 sub-networks of trained GPT-2 supernets. Searched is what varies by layer,
the MLP's ratio (2, 3, 4) and the heads, in models of full depth and width: 3^24, 3^48 and 3^72
sub-networks. The cost is parameters of the blocks, counted. Their benchmark has one measure, so
both of ours are made of it, with noise: an accuracy falls by 15 points with the logarithm of the
perplexity, from the full to the smallest sub-network, and has the noise of 1,000 examples; a
divergence is that logarithm less the full model's, with the noise of its rows. What is selected is
judged by their network, without noise. A figure is the hypervolume in percent of the box between
the smallest and the full sub-network.
"""

from __future__ import annotations

import argparse
import itertools
import time
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import optuna
import torch

from elastic.latency.cost_table import Table
from elastic.searching.pareto import hypervolume
from elastic.spaces.bound import BoundSpace, Group
from elastic.spaces.dims import Cut
from tests.benchmarks.common import report
from tests.benchmarks.rivals import RIVALS, SHAKEN, SLOW, UNIT
from tests.benchmarks.simulated import EXAMPLES
from tests.benchmarks.worlds import Row, World, interval

SIZES = {"s": (768, 12, (12, 8, 4)), "m": (1024, 24, (16, 12, 8)), "l": (1280, 36, (20, 16, 8))}
"""Width, layers, and the heads to choose from."""
RATIOS, HEAD = (4, 3, 2), 64
RANGE, NOISE = 0.15, 0.008
"""What the smallest one loses, and the standard deviation of a measure, in shares of examples."""


class Foreign(World):
    """One of their three spaces, with noise of a seed."""

    examples, rows, most_rows = EXAMPLES, 32, 400

    def __init__(self, folder: Path, size: str, seed: int) -> None:
        super().__init__()
        self.seed = seed
        self.width, self.layers, heads = SIZES[size]
        state = torch.load(folder / f"perplexity_{size}.pt", map_location="cpu", weights_only=True)
        self._net = [
            (state[f"fc{i}.weight"].double().numpy(), state[f"fc{i}.bias"].double().numpy())
            for i in range(1, 6)
        ]
        choices = {"mlp_ratio": RATIOS, "heads": heads}
        self.space = BoundSpace(
            tuple(
                Group(f"layers.{layer}.{name}", "width", sizes, (Cut("layer", "out"),))
                for name, sizes in choices.items()
                for layer in range(self.layers)
            ),
            (),
        )
        per = {"mlp_ratio": 2 * self.width**2, "heads": 4 * self.width * HEAD}

        def each(group: Group) -> int:
            return per[group.name.split(".")[-1]]

        saved = [
            [each(group) * (choice - group.choices[0]) for choice in group.choices]
            for group in self.space
        ]
        effects = np.array(saved, dtype=float)
        full = sum(per[name] * sizes[0] * self.layers for name, sizes in choices.items())
        self.table = Table(self.space, float(full), effects)
        self._most = self.lost(self.minimal)

    def perplexity(self, row: Row) -> float:
        """Theirs: one-hot of width, depth, ratios and heads by layer, and bias."""
        ratios, heads = np.zeros((self.layers, 3)), np.zeros((self.layers, 3))
        at = np.array(row).reshape(2, self.layers)
        # Their choices ascend, ours descend.
        ratios[np.arange(self.layers), 2 - at[0]] = 1
        heads[np.arange(self.layers), 2 - at[1]] = 1
        x = np.concatenate([[0, 0, 1], [0, 0, 1], ratios.ravel(), heads.ravel(), [1, 0]])
        for number, (weight, bias) in enumerate(self._net):
            x = weight @ x + bias
            x = np.maximum(x, 0) if number < 4 else x
        return float(x[0])

    def lost(self, row: Row) -> float:
        """Logarithm of the perplexity above the full model's."""
        return float(np.log(self.perplexity(row) / self.perplexity(self.maximal)))

    def share(self, row: Row) -> float:
        """What stands for an accuracy."""
        return 0.8 - RANGE * self.lost(row) / self._most

    def scored(self, row: Row) -> float:
        return self.share(row) + NOISE * self._drawn(row, 0)

    def diverged(self, row: Row, rows: int, draw: int) -> float:
        shaken = np.exp(SHAKEN / np.sqrt(rows) * self._drawn(row, 1 + draw))
        return float(max(self.lost(row), 1e-6) * shaken)

    def importance(self) -> Mapping[str, float]:
        return {}

    def _drawn(self, row: Row, number: int) -> float:
        return float(np.random.default_rng([self.seed, number, *row]).normal())


def worth(world: Foreign, rows: list[Row]) -> float:
    """Percent of the box."""
    full, least = world.maximal, world.minimal
    points = [(world.cost(row), -world.share(row)) for row in (full, least, *rows)]
    box = (world.cost(full) - world.cost(least)) * (world.share(full) - world.share(least))
    return 100 * hypervolume(points, (world.cost(full), -world.share(least))) / box


def additivity(world: Foreign, count: int = 4000) -> tuple[float, float]:
    """R², on a fourth that was not fitted, of the best sum of choices for the logarithm of the
    perplexity, of sub-networks drawn at random; and with products of what is cut in neighbouring
    layers, and in the MLP and the heads of one, beside it."""
    generator = np.random.default_rng(0)
    at = generator.integers(0, 3, (count, 2 * world.layers))
    values = np.array([world.lost(tuple(row)) for row in at])
    hot = np.eye(3)[at][:, :, 1:].reshape(count, -1)
    cut = at.reshape(count, 2, world.layers) / 2
    beside = (cut[:, :, 1:] * cut[:, :, :-1]).reshape(count, -1)
    pairs = np.hstack([hot, beside, cut[:, 0] * cut[:, 1]])
    seen, found = count * 3 // 4, []
    for features in (hot, pairs):
        x, middle = features - features[:seen].mean(0), values[:seen].mean()
        gram = x[:seen].T @ x[:seen] + np.eye(x.shape[1])
        weights = np.linalg.solve(gram, x[:seen].T @ (values[:seen] - middle))
        left = values[seen:]
        wrong = np.square(left - middle - x[seen:] @ weights).sum()
        found.append(float(1 - wrong / np.square(left - left.mean()).sum()))
    return found[0], found[1]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--units", default="1,2,4")
    parser.add_argument("--only", nargs="*", default=[name for name in RIVALS if name not in SLOW])
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore")
    units = [float(each) for each in given.units.split(",")]
    rows: dict[str, dict[str, float]] = {}
    for size in SIZES:
        whole = Foreign(given.folder, size, 0)
        alone, pairs = additivity(whole)
        ends = {"full": whole.perplexity(whole.maximal), "least": whole.perplexity(whole.minimal)}
        rows[f"{size}: space"] = {"R² of sums": alone, "with pairs": pairs, **ends}
        print(size, rows[f"{size}: space"], flush=True)
        for name in given.only:
            began = time.perf_counter()
            found: dict[float, list[float]] = {unit: [] for unit in units}
            worlds = [Foreign(given.folder, size, seed) for seed in range(given.seeds)]
            for (seed, world), unit in itertools.product(enumerate(worlds), units):
                world.begin(unit * UNIT * EXAMPLES)
                found[unit].append(worth(world, RIVALS[name](world, seed)))
            line: dict[str, float] = {}
            for unit in units:
                line[f"{unit:g}"], line[f"± {unit:g}"] = interval(found[unit])
            line["seconds"] = (time.perf_counter() - began) / given.seeds
            rows[f"{size}: {name}"] = line
            print(f"{size}: {name}", {k: round(v, 1) for k, v in line.items()}, flush=True)
    report(
        "rivals_hw",
        f"HW-GPT-Bench: hypervolume in percent of the box after so many units of {UNIT} accuracies "
        f"of {EXAMPLES} examples, mean of {given.seeds} seeds and 95 % interval",
        rows, save=given.save,
        command=f"python -m tests.benchmarks.rivals_hw FOLDER --units {given.units}",
    )  # fmt: skip


if __name__ == "__main__":
    main()
