"""A compact model as a Hugging Face folder.

Uniform widths need nothing special: the family's own class with smaller sizes in its config. When
sizes differ from layer to layer no configuration of that class can say so, and the folder gets a
small model class of its own, which rebuilds those linear layers from a list in its config.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from elastic.adapters.attach import modules_of
from elastic.files import write_text

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

CODE = "modeling_elastic.py"

_CLASS = '''"""{base} whose linear layers have sizes of their own; written by elastic-adapters.

Load with AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True). The code is the
thirty lines below; the computation is all {base}'s.
"""

from torch import nn
from transformers import {base}, {config}


class Elastic{config}({config}):
    """`linear_sizes` maps a layer's name to its [out_features, in_features]."""

    model_type = "elastic_{model_type}"

    def __init__(self, linear_sizes=None, **kwargs):
        self.linear_sizes = linear_sizes or {{}}
        super().__init__(**kwargs)


class Elastic{base}({base}):
    config_class = Elastic{config}

    def __init__(self, config):
        super().__init__(config)
        for name, (out_features, in_features) in config.linear_sizes.items():
            parent, _, leaf = name.rpartition(".")
            bias = self.get_submodule(name).bias is not None
            linear = nn.Linear(in_features, out_features, bias=bias)
            setattr(self.get_submodule(parent), leaf, linear)
        self.post_init()
'''


def write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    directory: Path,
    *,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write weights (safetensors, in `dtype` if given), config, code if needed, tokenizer.

    `model` is compact: plain linear layers, any sizes. It is left as it is.
    """
    config = described_config(model)
    state = {name: t if dtype is None else t.to(dtype) for name, t in model.state_dict().items()}
    # A shell of the same class around the same tensors: the caller's config is not touched.
    shell = copy.copy(model)
    shell.config = config
    directory.mkdir(parents=True, exist_ok=True)
    shell.save_pretrained(directory, state_dict=state)
    # save_pretrained names the type and the class it saw, not those of the files in the folder.
    saved = directory / "config.json"
    values = json.loads(saved.read_text(encoding="utf-8"))
    values["dtype"] = str(dtype or model.dtype).removeprefix("torch.")
    if hasattr(config, "linear_sizes"):
        base, kind = type(model).__name__, type(model.config).__name__
        values["architectures"] = [f"Elastic{base}"]
        code = _CLASS.format(base=base, config=kind, model_type=model.config.model_type)
        write_text(directory / CODE, code)
    write_text(saved, json.dumps(values, indent=2) + "\n")
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    return directory


def described_config(model: PreTrainedModel, *, code: bool = True) -> PretrainedConfig:
    """A new config that says the compact model's sizes: the family's own where they are uniform,
    else one with `linear_sizes`, of the class that reads them if `code` comes with it."""
    config = copy.deepcopy(model.config)
    # transformers 4.x reads the base of rotary embeddings at the top level only, and without it
    # falls back to another one silently.
    rope = getattr(config, "rope_parameters", None)
    if isinstance(rope, Mapping) and "rope_theta" in rope:
        config.rope_theta = rope["rope_theta"]
    sizes = _linear_sizes(model)
    uniform = _uniform_sizes(model, sizes)
    if uniform is not None:
        for name, size in uniform.items():
            setattr(config, name, size)
        return config
    if not code:
        config.linear_sizes = sizes
        return config
    base, kind, stem = type(model).__name__, type(config).__name__, Path(CODE).stem
    custom = type(f"Elastic{kind}", (type(config),), {"model_type": f"elastic_{config.model_type}"})
    values = {key: value for key, value in config.to_dict().items() if key != "model_type"}
    described = custom(**values)
    described.linear_sizes = sizes
    described.auto_map = {
        "AutoConfig": f"{stem}.Elastic{kind}",
        "AutoModelForCausalLM": f"{stem}.Elastic{base}",
    }
    return described


def load(directory: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The folder again, through AutoModelForCausalLM as a user would."""
    from transformers import AutoModelForCausalLM

    # The only remote code this ever runs is the class above, from a folder just written here.
    code = (directory / CODE).is_file()
    return AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, trust_remote_code=code
    ).eval()


def _linear_sizes(model: PreTrainedModel) -> dict[str, list[int]]:
    """[out, in] of every linear layer that differs from what the config says."""
    import torch
    from torch import nn

    with torch.device("meta"):
        plain = type(model)(copy.deepcopy(model.config))
    expected = {name: list(m.weight.shape) for name, m in modules_of(plain, nn.Linear)}
    return {
        name: list(module.weight.shape)
        for name, module in modules_of(model, nn.Linear)
        if list(module.weight.shape) != expected[name]
    }


def _uniform_sizes(model: PreTrainedModel, sizes: Mapping[str, list[int]]) -> dict[str, int] | None:
    """Config values under which the family's own class has these sizes; None if there are none."""
    import torch

    if not sizes:
        return {}
    widths = {size[1] for name, size in sizes.items() if re.search(r"\.down_proj$", name)}
    if len(widths) != 1 or not hasattr(model.config, "intermediate_size"):
        return None
    found = {"intermediate_size": widths.pop()}
    config = copy.deepcopy(model.config)
    config.intermediate_size = found["intermediate_size"]
    with torch.device("meta"):
        smaller = type(model)(config)
    shapes = {name: tensor.shape for name, tensor in smaller.state_dict().items()}
    same = all(shapes[name] == tensor.shape for name, tensor in model.state_dict().items())
    return found if same else None
