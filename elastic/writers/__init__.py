"""Every format in one shape: a model is written into a folder, and runs from there."""

from elastic.config.export import GRAPHS
from elastic.formats.compression import MODES
from elastic.writers.base import Format
from elastic.writers.compressed import Compressed
from elastic.writers.gguf import Gguf
from elastic.writers.graphs import Onnx, Openvino
from elastic.writers.in_torch import Hf, Peft

FORMATS: dict[str, Format] = {
    "hf": Hf(),
    "peft": Peft(),
    "onnx": Onnx(),
    "openvino": Openvino(),
    "gguf": Gguf(),
}
FORMATS |= {
    f"{kind}-{mode}": Compressed(kind, FORMATS[kind], mode) for kind in GRAPHS for mode in MODES
}
