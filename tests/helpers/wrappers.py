"""Small random models that read images beside text, and an image for each."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from elastic.config import ModelConfig
from elastic.models.loading import load_model
from elastic.models.modules import PREFIX
from tests.helpers import tiny

IMAGE = tiny.VOCABULARY - 1
"""The token that stands for a patch of a picture."""
TEXT = {"vocab_size": tiny.VOCABULARY, "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 256, "initializer_range": 0.3, "pad_token_id": tiny.PAD,
        "bos_token_id": tiny.BOS, "eos_token_id": tiny.EOS}  # fmt: skip
TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3,
         "num_attention_heads": 2, "image_size": 8, "patch_size": 4}  # fmt: skip
PATCHES = {"spatial_merge_size": 1, "temporal_patch_size": 1, "patch_size": 4, "num_heads": 2,
           "depth": 3}  # fmt: skip
THREE = {"rope_type": "default", "rope_theta": 10000.0}
TOKENS = {"image_token_id": IMAGE, "video_token_id": IMAGE - 1, "vision_start_token_id": IMAGE - 2,
          "vision_end_token_id": IMAGE - 3}  # fmt: skip
INDEX = {"image_token_index": IMAGE}
WRAPPERS: dict[str, tuple[str, dict[str, Any]]] = {  # name: class without its ending, settings
    "gemma3": ("Gemma3", {
        "text_config": {**TEXT, "head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8},
        "vision_config": {**TOWER, "vision_use_head": False}, "mm_tokens_per_image": 4,
        "boi_token_index": IMAGE - 2, "eoi_token_index": IMAGE - 3, **INDEX}),
    "mistral3": ("Mistral3", {
        "text_config": {**TEXT, "head_dim": 8, "model_type": "mistral", "sliding_window": None},
        "vision_config": {**TOWER, "head_dim": 8, "model_type": "pixtral"},
        "spatial_merge_size": 1, "tie_word_embeddings": False, **INDEX}),
    "qwen2-vl": ("Qwen2VL", {
        "text_config": {**TEXT, "rope_parameters": {**THREE, "mrope_section": [1, 1, 2]}},
        "vision_config": {**PATCHES, "embed_dim": 16, "hidden_size": 32}, **TOKENS}),
    "qwen2.5-vl": ("Qwen2_5_VL", {
        "text_config": {**TEXT, "rope_parameters": {**THREE, "mrope_section": [1, 1, 2]}},
        "vision_config": {**PATCHES, "hidden_size": 16, "intermediate_size": 32,
                          "out_hidden_size": 32, "window_size": 8, "fullatt_block_indexes": [1]},
        **TOKENS}),
    "qwen3-vl": ("Qwen3VL", {
        "text_config": {**TEXT, "head_dim": 8,
                        "rope_parameters": {**THREE, "mrope_section": [2, 1, 1]}},
        "vision_config": {**PATCHES, "hidden_size": 16, "intermediate_size": 32,
                          "out_hidden_size": 32, "num_position_embeddings": 16,
                          "deepstack_visual_indexes": [0, 1]}, **TOKENS}),
    "llava": ("Llava", {
        "text_config": {**TEXT, "head_dim": 8, "model_type": "llama"},
        "vision_config": {**TOWER, "model_type": "clip_vision_model", "projection_dim": 16},
        **INDEX}),
}  # fmt: skip


PROCESSOR = {"image_seq_length": 4, "auto_map": {"AutoProcessor": "code.Strange"}}


def whole(name: str, seed: int = 0, **text: Any) -> PreTrainedModel:
    """In float32, as it would be saved; `text` are settings of its language model."""
    stem, settings = WRAPPERS[name]
    settings = {**settings, "text_config": {**settings["text_config"], **text}}
    kind = getattr(transformers, f"{stem}ForConditionalGeneration")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = kind(kind.config_class(**settings))
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.data += 0.2 * torch.randn(parameter.shape)
        if name == "gemma3":  # starts with zeros, which hide every picture
            torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)
    return model.eval().requires_grad_(False)


def save(name: str, folder: Path) -> Path:
    """A folder as `ModelConfig(path=...)` takes it, with a processor's settings."""
    whole(name).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    (folder / "processor_config.json").write_text(json.dumps(PROCESSOR))
    (folder / "preprocessor_config.json").write_text(json.dumps({"size": 8}))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


def load(folder: Path, dtype: str = "float64") -> PreTrainedModel:
    """As every command loads it."""
    return load_model(str(folder), ModelConfig(path=str(folder), dtype=dtype, device="cpu"))


def logits(model: PreTrainedModel) -> Tensor:
    """Of two texts."""
    with torch.no_grad():
        return model(input_ids=tiny.tokens() % IMAGE, use_cache=False).logits


def pictured(model: PreTrainedModel) -> Mapping[str, Tensor]:
    """A text with a picture of 8 x 8 in it, as the model's processor would give it."""
    wide = torch.Generator().manual_seed(5)
    ids = torch.cat([tiny.tokens(1, 3), torch.full((1, 4), IMAGE), tiny.tokens(1, 2, seed=1)], 1)
    found: dict[str, Tensor] = {"input_ids": ids}
    kind, dtype = model.config.model_type.removeprefix(PREFIX), model.dtype
    if "qwen" in kind:
        pixels = torch.randn(4, 3 * 16, generator=wide)
        found["image_grid_thw"] = torch.tensor([[1, 2, 2]])
        found["mm_token_type_ids"] = (ids == IMAGE).int()
    else:
        pixels = torch.randn(1, 3, 8, 8, generator=wide)
    if kind == "gemma3":
        found["token_type_ids"] = (ids == IMAGE).long()
    if kind == "mistral3":
        found["image_sizes"] = torch.tensor([[8, 8]])
    return found | {"pixel_values": pixels.to(dtype)}


def seen(model: PreTrainedModel) -> Tensor:
    """Logits of a text with a picture."""
    with torch.no_grad():
        return model(**pictured(model), use_cache=False).logits


def features(model: PreTrainedModel) -> Tensor:
    """What of the picture reaches the language model."""
    given = {k: x for k, x in pictured(model).items() if k in ("pixel_values", "image_grid_thw",
                                                               "image_sizes")}  # fmt: skip
    with torch.no_grad():
        found = model.get_image_features(**given, return_dict=True).pooler_output
    return found if isinstance(found, Tensor) else torch.cat(list(found))


Output = Callable[[PreTrainedModel], Tensor]
