"""Are compact models as fast as their operations allow?

    python -m tests.benchmarks.compact [--runtimes torch onnx openvino] [--save]

SmolLM2 with MLPs of 0.75 and 0.5 of their width on average (layers differ: 1 and 0.5 take turns,
0.75 and 0.25), in every runtime, in float32 and with int8 weights (NNCF; the runtimes alone). A
model whose MLPs have 64 of 1,536 channels tells the fixed part: attention, head, norms, calls. What
is left of the MLPs could then take its share of the rest, so `allowed` is the speed-up on the
straight line from that model to the full one; `reached` is the measured speed-up over it. All take
turns, the full model twice (control).
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from elastic.config import AdapterConfig, ModelConfig, TimingConfig
from elastic.console import say
from elastic.formats import onnx, openvino
from elastic.formats.compression import compress
from elastic.formats.runner import runner_of
from elastic.latency.measure import REFERENCE, measure
from elastic.models import loading
from elastic.spaces.bound import SubAdapter
from elastic.spaces.declared import SearchSpace
from elastic.supernet.compact import compact
from elastic.supernet.cost import count
from elastic.supernet.supernet import Supernet
from tests.benchmarks.common import report

WIDTHS = {REFERENCE: (1.0, 1.0), "0.75": (1.0, 0.5), "0.5": (0.75, 0.25), "fixed": (64, 64)}
SPACE = {
    "blocks": "model.layers.*",
    "adapt": ["self_attn.q_proj"],
    "groups": {
        "mlp_width": {
            "dim": "width", "outputs": ["mlp.gate_proj", "mlp.up_proj"],
            "inputs": ["mlp.down_proj"], "choices": [1.0, 0.75, 0.5, 0.25, 64],
        },
    },
}  # fmt: skip


def sized(net: Supernet, pair: tuple[float, float]) -> SubAdapter:
    """Layers of these two widths, in turn; parts of the full one, or channels."""
    chosen = {}
    for number, group in enumerate(net.space):
        width = pair[number % 2]
        full = group.choices[0]
        chosen[group.name] = width if isinstance(width, int) else round(width * full)
    return net.space.check(SubAdapter(tuple(chosen.items())))


def runners(small: dict, runtime: str, mode: str, folder: Path) -> dict:
    found = {}
    for name, model in small.items():
        if runtime == "torch":
            found[name] = runner_of(model)
            continue
        place = folder / name
        file = onnx.graph_in(place)
        if not file.is_file():
            onnx.write(model, place)
        if runtime == "openvino":
            file = place / openvino.FILE
            if not file.is_file():
                openvino.write(onnx.graph_in(place), place)
        if mode != "float32":
            file = compress(file, place / mode / runtime, mode).path
        found[name] = (onnx if runtime == "onnx" else openvino).open_runner(file)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runtimes", nargs="+", default=["torch", "onnx", "openvino"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    base = loading.load(ModelConfig(path="smollm2", dtype="float32"))
    net = Supernet(base.model, SearchSpace.from_dict(SPACE), AdapterConfig(rank=8))
    small = {name: compact(net, sized(net, pair)) for name, pair in WIDTHS.items()}
    macs = {name: count(model).macs for name, model in small.items()}
    timing = TimingConfig(rounds=given.rounds, max_rounds=2 * given.rounds)
    vocabulary, rows = base.model.config.vocab_size, {}
    with tempfile.TemporaryDirectory() as folder:
        for runtime in given.runtimes:
            for mode in ("float32",) if runtime == "torch" else ("float32", "int8"):
                say(f"Timing {runtime}, {mode}")
                ready = runners(small, runtime, mode, Path(folder))
                found = measure(ready, timing, vocabulary=vocabulary)
                for name in ("0.75", "0.5"):
                    row = {"control": found.control, "macs": macs[name] / macs[REFERENCE]}
                    share = (macs[name] - macs["fixed"]) / (macs[REFERENCE] - macs["fixed"])
                    for step in ("prefill", "decode"):
                        own, fixed = (
                            getattr(found.ratios[each], f"{step}_ms") for each in (name, "fixed")
                        )
                        allowed = fixed + share * (1 - fixed)
                        row |= {step: 1 / own, f"{step} allowed": 1 / allowed,
                                f"{step} reached": allowed / own}  # fmt: skip
                    rows[f"{runtime}, {mode}, {name}"] = row
    report(
        "compact",
        "SmolLM2-135M, MLPs of 0.75 and 0.5 of their width on average: speed-up over the full "
        f"model in the same runtime, prompt of {timing.prompt_tokens} tokens, batch 1",
        rows, save=given.save,
    )  # fmt: skip


if __name__ == "__main__":
    main()
