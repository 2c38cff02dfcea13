"""Small random models of every family that a space is shipped for, of the real classes."""

from __future__ import annotations

import torch
import transformers
from torch import nn
from transformers import BloomConfig, BloomForCausalLM, PreTrainedModel

from elastic.models.modules import linear_
from elastic.spaces.declared import SearchSpace
from elastic.supernet.supernet import Supernet
from tests.helpers import tiny

SMALL = {"vocab_size": tiny.VOCABULARY, "pad_token_id": tiny.PAD, "bos_token_id": tiny.BOS,
         "eos_token_id": tiny.EOS, "initializer_range": 0.2}  # fmt: skip
DECODER = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2,
           "num_attention_heads": 4, "max_position_embeddings": 128}  # fmt: skip
GROUPED = {**DECODER, "num_key_value_heads": 2, "head_dim": 16}
T5 = {"d_model": 64, "d_ff": 192, "d_kv": 16, "num_heads": 4, "num_layers": 2,
      "decoder_start_token_id": tiny.PAD}  # fmt: skip
FAMILIES: dict[str, tuple[str, str, dict]] = {  # name: class, space, settings
    "llama": ("LlamaForCausalLM", "llama", GROUPED),
    "llama, tied": ("LlamaForCausalLM", "llama", {**GROUPED, "tie_word_embeddings": True}),
    "mistral": ("MistralForCausalLM", "llama", {**GROUPED, "sliding_window": 4}),
    "qwen2": ("Qwen2ForCausalLM", "llama", GROUPED),
    "qwen3": ("Qwen3ForCausalLM", "llama", GROUPED),
    "gemma": ("GemmaForCausalLM", "llama", GROUPED),
    "gemma2": ("Gemma2ForCausalLM", "llama", {**GROUPED, "sliding_window": 4}),
    "phi3": ("Phi3ForCausalLM", "phi3", {**DECODER, "num_key_value_heads": 2}),
    "bloom": ("BloomForCausalLM", "bloom", {"hidden_size": 64, "n_layer": 2, "n_head": 4}),
    "falcon": ("FalconForCausalLM", "bloom", {**DECODER, "num_kv_heads": 2,
               "new_decoder_architecture": True}),
    "falcon, one key": ("FalconForCausalLM", "bloom", {**DECODER, "multi_query": True}),
    "gpt-neox": ("GPTNeoXForCausalLM", "gpt-neox", DECODER),
    "gpt2": ("GPT2LMHeadModel", "gpt2", {"n_embd": 64, "n_inner": 192, "n_layer": 2, "n_head": 4}),
    "opt": ("OPTForCausalLM", "opt", {"hidden_size": 64, "ffn_dim": 192,
            "num_hidden_layers": 2, "num_attention_heads": 4, "word_embed_proj_dim": 64,
            "max_position_embeddings": 128}),
    "rwkv": ("RwkvForCausalLM", "rwkv", {"hidden_size": 64, "attention_hidden_size": 64,
             "intermediate_size": 192, "num_hidden_layers": 2, "context_length": 64}),
    "bert, classes": ("BertForSequenceClassification", "bert", {**DECODER, "num_labels": 3}),
    "bert, a score": ("BertForSequenceClassification", "bert", {**DECODER, "num_labels": 1,
                      "initializer_range": 0.4}),
    "llama, classes": ("LlamaForSequenceClassification", "llama", {**GROUPED, "num_labels": 3}),
    "roberta": ("RobertaForSequenceClassification", "bert", {**DECODER, "num_labels": 3}),
    "minilm": ("BertForMaskedLM", "bert", DECODER),
    "t5": ("T5ForConditionalGeneration", "t5", {**T5, "feed_forward_proj": "relu"}),
    "flan-t5": ("T5ForConditionalGeneration", "flan-t5", {**T5, "feed_forward_proj": "gated-gelu"}),
}  # fmt: skip
LAYERS = ("num_hidden_layers", "n_layer", "num_layers")


def model_of(
    family: str, dtype: torch.dtype = torch.float64, layers: int | None = None, **overrides
) -> PreTrainedModel:
    """Biases and norms moved away from where they start; `overrides` are of its config."""
    name, _, settings = FAMILIES[family]
    settings = settings | overrides
    if layers:
        settings = settings | {key: layers for key in LAYERS if key in settings}
    kind = getattr(transformers, name)
    config = kind.config_class(**(SMALL | settings))
    config.use_cache = False
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind(config)
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):
                nn.init.normal_(parameter, std=0.3)
    return linear_(model.to(dtype)).eval().requires_grad_(False)


def output(model: PreTrainedModel) -> torch.Tensor:
    """Logits of two sequences, whatever kind of head the model has."""
    ids = tiny.tokens()
    inputs = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids.flip(1)
    return model(**inputs).logits


ROUNDED = {"bloom", "gemma", "gemma2", "gpt-neox", "rwkv", "t5", "flan-t5"}
"""Families whose code rounds to float32 somewhere, whatever the type."""


def net_of(family: str) -> Supernet:
    net = Supernet(model_of(family), SearchSpace.load(FAMILIES[family][1]), tiny.ADAPTERS["lora"])
    net.reorder(tiny.permutations(net))
    return tiny.randomize_(net)


def bloom(dtype: torch.dtype = torch.float64, **overrides) -> BloomForCausalLM:
    """Two random layers, biases and norms moved away from where they start."""
    settings = dict(vocab_size=tiny.VOCABULARY, hidden_size=64, n_layer=2, n_head=4,
                    pad_token_id=tiny.PAD, bos_token_id=tiny.BOS, eos_token_id=tiny.EOS,
                    initializer_range=0.2)  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BloomForCausalLM(BloomConfig(**(settings | overrides)))
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter, std=0.3)
    return model.to(dtype).eval().requires_grad_(False)


def save_bloom(folder, **overrides):
    bloom(torch.float32, **overrides).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 16}  # fmt: skip
