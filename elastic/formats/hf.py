"""A compact model as a Hugging Face folder.

Uniform widths need nothing special: the family's own class with smaller sizes in its config. When
sizes differ from layer to layer no class rebuilds them from its config, and the folder gets a small
model class of its own, which does, from a list there. Beside the list the same stands in the words
that transformers has since 5.15, `per_layer_config`, where they can say it. No class of a release
(5.24) builds layers from it; a change to Llama's is open (transformers#45332).
"""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from transformers.dynamic_module_utils import custom_object_save
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.pytorch_utils import Conv1D
from transformers.utils import TRANSFORMERS_DYNAMIC_MODULE_NAME

from elastic.files import read_json, write_text
from elastic.formats import processor, shards
from elastic.formats.auto_class import auto_of, known_classes
from elastic.formats.code_names import without_code
from elastic.formats.config_sizes import (
    expert_sizes,
    layer_words,
    query_groups,
    shapes_of,
    tensor_sizes,
    uniform_sizes,
)
from elastic.formats.shards import Tensors, tensors_of
from elastic.models import compat, cut_head
from elastic.models.modules import PREFIX, as_cut_, linear_, meta, modules_of
from elastic.models.vocabulary import cut_head_of
from elastic.models.wrappers import OWN, text_config, wraps
from elastic.spaces.dims import QUERIES

if TYPE_CHECKING:
    from transformers import (
        GenerationConfig,
        PretrainedConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
    )

CODE = "modeling_elastic.py"
SHARD = "50GB"
"""The largest file of weights, as transformers has it."""
_CLASS = '''"""{base} whose linear layers have sizes of their own; written by elastic-adapters.

Load with {auto}.from_pretrained(folder, trust_remote_code=True). The code is the
few lines below; the computation is all {base}'s.
"""

from torch import nn
from transformers import {names}
from transformers.pytorch_utils import Conv1D
{imports}

class Elastic{config}({config}):
    """`linear_sizes` maps a layer's name to its [out_features, in_features], `attention_sizes` an
    attention module's, or another's, to attributes of its own, `tensor_sizes` a tensor's of experts
    or what chooses among them to its shape."""

    model_type = "{model_type}"

    def __init__(self, linear_sizes=None, attention_sizes=None, tensor_sizes=None, **kwargs):
        self.linear_sizes = linear_sizes or {{}}
        self.attention_sizes = attention_sizes or {{}}
        self.tensor_sizes = tensor_sizes or {{}}
        super().__init__(**kwargs)

{inner}
class Elastic{base}({ahead}{base}):
    config_class = Elastic{config}

    @classmethod
    def is_custom_code(cls):
        """All that fills weights and buffers is transformers' own; of other code it would skip
        some that are in no file."""
        return False

    def __init__(self, config):
{before}        super().__init__(config)
        for name, (out_features, in_features) in config.linear_sizes.items():
            parent, _, leaf = name.rpartition(".")
            layer = self.get_submodule(name)
{head}            if isinstance(layer, Conv1D):
                linear = Conv1D(out_features, in_features)
            else:
                linear = nn.Linear(in_features, out_features, bias=layer.bias is not None)
            setattr(self.get_submodule(parent), leaf, linear)
        for name, shape in config.tensor_sizes.items():
            parent, _, leaf = name.rpartition(".")
            module = self.get_submodule(parent)
            before = getattr(module, leaf)
            tensor = before.new_zeros(shape)
            if isinstance(before, nn.Parameter):
                tensor = nn.Parameter(tensor, before.requires_grad)
            setattr(module, leaf, tensor)
        for name, sizes in config.attention_sizes.items():
            for key, value in sizes.items():
                setattr(self.get_submodule(name), key, value)
        self.post_init()
{behind}'''
_LAYERS = {
    "before": """        layers = config.to_dict().get("per_layer_config")
        config.per_layer_config = None
""",
    "behind": "        config.per_layer_config = layers\n",
}
"""Around the code of the family, which builds layers of one size, where the config says
`per_layer_config`: it then refuses to name one size for all."""
_HEAD = """            if layer is self.get_output_embeddings():
                tokens, has_bias = layer.out_features, layer.bias is not None
                head = CutHead(in_features, out_features, tokens, has_bias)
                setattr(self.get_submodule(parent), leaf, head)
                self.resize_token_embeddings = no_resizing
                tied = self._tied_weights_keys
                if isinstance(tied, dict):  # it is no part of the embeddings any more
                    pairs = tied.items()
                    tied = {key: at for key, at in pairs if not (key + at).count(name + ".")}
                    self._tied_weights_keys = tied
                continue
"""
_INNER = """
class Elastic{inner}({inner}):
    config_class = Elastic{config}


AutoModel.register(Elastic{config}, Elastic{inner})  # the class below asks it for its stack

"""
_IMPORT = f"from .{cut_head.__name__.rpartition('.')[2]} import CutHead, no_resizing"
"""Where the head computes some tokens alone."""


def write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    directory: Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = SHARD,
    tensors: Tensors | None = None,
) -> Path:
    """Write weights (safetensors, in `dtype` if given), config, code if needed, tokenizer, and of
    a model that reads pictures the processor's settings.

    `model` is compact: plain linear layers, any sizes. It is left as it is. Weights of more than
    `max_shard_size` (bytes, or as in "5GB") become several files with an index; no more than one of
    them is copied at a time. Where `tensors` come beside it, the model needs no data.
    """
    config = described_config(model)
    layers = modules_of(meta(type(model), model.config), Conv1D)
    directory.mkdir(parents=True, exist_ok=True)
    shards.write(
        model,
        tensors_of(model) if tensors is None else tensors,
        directory,
        dtype=dtype or model.dtype,
        # Names that transformers translates by the type of model are unknown of a type of our own.
        original=not hasattr(config, "linear_sizes"),
        max_shard_size=max_shard_size,
        transposed=frozenset(f"{name}.weight" for name, _ in layers),
    )
    config.architectures = [type(model).__name__]
    if model.is_remote_code():  # of the base model's, which its user has allowed
        custom_object_save(model, directory, config=config)
    own = hasattr(config, "linear_sizes")
    by_layer = layer_words(model) if own else {}
    if own:
        cuts = cut_head_of(model) is not None
        write_text(directory / CODE, code_of(model, by_layer=bool(by_layer), cuts_head=cuts))
        if cuts:
            write_module(cut_head, directory)
    write_settings(model, config, directory, dtype or model.dtype, own=own, by_layer=by_layer)
    if tokenizer is not None:
        write_tokenizer(tokenizer, directory)
    processor.copy_beside(model, directory)
    return directory


def code_of(
    model: PreTrainedModel,
    ahead: str = "",
    imports: str = "",
    *,
    by_layer: bool = False,
    cuts_head: bool = False,
) -> str:
    """The two small classes for models of this class, one with another class ahead of it, which
    this line imports; for a configuration with `per_layer_config` if `by_layer`, for heads of some
    tokens if `cuts_head` (`elastic.models.cut_head` then goes with it)."""
    base, kind = type(model).__name__, type(model.config).__name__
    imports = "\n".join(filter(None, [imports, _IMPORT if cuts_head else ""]))
    inner = type(model.base_model).__name__ if asks_auto(type(model)) else None
    names = ", ".join(filter(None, ["AutoModel" if inner else None, base, kind, inner]))
    return _CLASS.format(
        base=base, config=kind, model_type=PREFIX + model.config.model_type, auto=auto_of(base),
        names=names, inner=_INNER.format(inner=inner, config=kind) if inner else "",
        ahead=ahead and f"{ahead}, ", imports=imports and f"\n{imports}\n",
        head=_HEAD if cuts_head else "",
        **(_LAYERS if by_layer else dict.fromkeys(_LAYERS, "")),
    )  # fmt: skip


def asks_auto(kind: type[PreTrainedModel]) -> bool:
    """Whether models of this class have AutoModel build their stack, by the type of configuration:
    classes with a head for all families do."""
    return issubclass(kind, GenericForSequenceClassification)


def write_module(module: ModuleType, directory: Path) -> None:
    """A module of ours that needs nothing of this package, for the classes beside it."""
    name = module.__name__.rpartition(".")[2]
    write_text(directory / f"{name}.py", inspect.getsource(module))


def write_settings(
    model: PreTrainedModel,
    config: PretrainedConfig,
    directory: Path,
    dtype: torch.dtype,
    *,
    own: bool,
    by_layer: Mapping[str, Any] | None = None,
) -> None:
    """How a model is made of this configuration, by a class of its `own` or by the family's, and
    how it generates. `by_layer` is what `per_layer_config` says."""
    # Only in the file: a config of transformers 5 takes `rope_scaling` for `rope_parameters`, and
    # one with `per_layer_config` refuses to name one size for all layers.
    words = compat.rotary_words(config)
    words["dtype"] = str(dtype).removeprefix("torch.")
    if own:
        words["architectures"] = [f"{OWN}{type(model).__name__}"]
    if by_layer:
        words["per_layer_config"] = dict(by_layer)
    write_config(config, directory, **words)
    if model.can_generate():
        write_generation(model.generation_config, directory)


def write_config(config: PretrainedConfig, directory: Path, **words: Any) -> None:
    """config.json, with these words besides; of `described_config`, which names no code but what
    is written beside it."""
    config.save_pretrained(directory)
    values = read_json(directory / "config.json")
    if wraps(config) and "text_config" in values:
        values["text_config"] |= compat.rotary_words(text_config(config))
    own = {name: values[name] for name in ("auto_map",) if name in values}
    _write(directory / "config.json", without_code(values) | own | words)


def write_generation(config: GenerationConfig, directory: Path) -> None:
    """generation_config.json, of however the base generates."""
    config.save_pretrained(directory)
    file = directory / "generation_config.json"
    _write(file, without_code(read_json(file)))


def write_tokenizer(tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Tokenizer and chat template, in words that transformers 4.x knows as well."""
    tokenizer.save_pretrained(directory)
    file = directory / "tokenizer_config.json"
    values = compat.tokenizer_words(read_json(file))
    own = {}
    if type(tokenizer).__module__.startswith(TRANSFORMERS_DYNAMIC_MODULE_NAME):
        # Of code that the user has allowed, which is written too.
        own = {"auto_map": {"AutoTokenizer": values["auto_map"]["AutoTokenizer"]}}
    _write(file, without_code(values) | own)


def _write(file: Path, values: Mapping[str, Any]) -> None:
    write_text(file, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def described_config(model: PreTrainedModel, *, code: bool = True) -> PretrainedConfig:
    """A new config that says the compact model's sizes: the family's own where they are uniform,
    else one with `linear_sizes`, of the class that reads them if `code` comes with it."""
    config = _sized_config(model, code)
    if theta := compat.rotary_words(config).get("rope_theta"):
        config.rope_theta = theta
    return config


def _sized_config(model: PreTrainedModel, code: bool) -> PretrainedConfig:
    config = copy.deepcopy(model.config)
    config.__dict__.pop("auto_map", None)  # of the base's folder, or a stranger's
    plain = linear_(meta(type(model), model.config))
    expected, groups = {**shapes_of(plain), **expert_sizes(plain)}, query_groups(plain)
    sizes = {**shapes_of(model), **expert_sizes(model)}
    changed = {name: size for name, size in sizes.items() if size != expected[name]}
    uniform = uniform_sizes(model, changed, expected)
    if uniform is not None:
        for name, size in uniform.items():
            setattr(text_config(config), name, size)
        return config
    grouped: dict[str, dict[str, int]] = {
        name: {QUERIES: own} for name, own in query_groups(model).items() if own != groups[name]
    }
    for name, counted in compat.counted_heads(model, expected).items():
        grouped[name] = grouped.get(name, {}) | counted
    shapes, says = tensor_sizes(model, plain)
    for name, counted in says.items():
        grouped[name] = grouped.get(name, {}) | counted
    if code:
        config = own_config(config, type(model).__name__)
    linear = {name for name in shapes_of(model) if f"{name}.weight" not in shapes}
    config.linear_sizes = {name: size for name, size in changed.items() if name in linear}
    if code or grouped:
        config.attention_sizes = grouped
    if code or shapes:
        config.tensor_sizes = shapes
    return config


def own_config(config: PretrainedConfig, base: str) -> PretrainedConfig:
    """The same of the type that `code_of` models of the class `base` gives."""
    kind, stem = type(config).__name__, Path(CODE).stem
    custom = type(f"{OWN}{kind}", (type(config),), {"model_type": PREFIX + config.model_type})
    values = {key: value for key, value in config.to_dict().items() if key != "model_type"}
    config = custom(**values)
    config.auto_map = {
        "AutoConfig": f"{stem}.Elastic{kind}",
        auto_of(base): f"{stem}.Elastic{base}",
    }
    return config


def is_plain(model: PreTrainedModel) -> bool:
    """Whether the family's own class, with a config of its own, has the sizes of this model."""
    return not hasattr(described_config(model, code=False), "linear_sizes")


def why_not(model: PreTrainedModel) -> str | None:
    """Why this compact model cannot be a folder; None if it can."""
    if model.is_remote_code() and not is_plain(model):
        return (
            f"layers have sizes of their own, and {type(model).__name__}, which would have to "
            "rebuild them, is code of the base's folder: choose hf.uniform true or hf.padded true"
        )
    kind, auto = model.config.model_type, auto_of(type(model).__name__)
    if not model.is_remote_code() and kind not in known_classes().get(auto, (kind,)):
        return f"{auto} loads no model of the type {kind}, which is part of a larger one"
    return None


def why_not_untied(model: PreTrainedModel) -> str | None:
    """Why a model whose head is no longer its embeddings cannot be a folder; None if it can."""
    config = model.config
    read_again = type(config).from_dict(config.to_dict())
    if config.tie_word_embeddings or not read_again.tie_word_embeddings:
        return None
    return (
        "what was merged changed the head and the embeddings differently, and "
        f"{type(model).__name__} is always loaded with one tensor for both"
    )


def load(directory: Path, dtype: torch.dtype, trust_remote_code: bool = False) -> PreTrainedModel:
    """The folder again, through transformers' auto class as a user would; `trust_remote_code` where
    the user trusted the base model's."""
    import transformers

    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    auto = getattr(transformers, auto_of(config["architectures"][0]))
    # Else the only code this ever runs is the class above, from a folder just written here.
    code = trust_remote_code or (directory / CODE).is_file()
    model = auto.from_pretrained(directory, dtype=dtype, trust_remote_code=code)
    return linear_(as_cut_(model)).eval()
