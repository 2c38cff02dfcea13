"""Small random models of families whose blocks are of several kinds, of the real classes."""

from __future__ import annotations

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from elastic.models.modules import linear_
from tests.helpers import tiny
from tests.helpers.families import SMALL

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 128}  # fmt: skip
DELTA = {"head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
         "linear_key_head_dim": 8, "linear_value_head_dim": 8}  # fmt: skip
LATENT = {**SIZES, "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 24,
          "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 6}  # fmt: skip
MAMBA = {"mamba_d_state": 8, "mamba_expand": 2}
MAMBA2 = {**MAMBA, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1,
          "mamba_chunk_size": 4}  # fmt: skip
HYBRIDS: dict[str, tuple[str, dict]] = {  # name: class, settings
    "deepseek-v3": ("DeepseekV3ForCausalLM", {
        **LATENT, "num_hidden_layers": 4, "first_k_dense_replace": 2, "moe_intermediate_size": 48,
        "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2}),
    "llama4": ("Llama4ForCausalLM", {
        **SIZES, "num_hidden_layers": 4, "intermediate_size_mlp": 96, "head_dim": 8,
        "interleave_moe_layer_step": 2, "num_local_experts": 4, "attention_chunk_size": 4}),
    "qwen3-next": ("Qwen3NextForCausalLM", {
        **SIZES, **DELTA, "num_hidden_layers": 4, "num_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 48, "shared_expert_intermediate_size": 48,
        "layer_types": ["linear_attention", "full_attention"] * 2}),
    "qwen3.5": ("Qwen3_5ForCausalLM", {
        **SIZES, **DELTA, "num_hidden_layers": 6,
        "layer_types": ["linear_attention", "linear_attention", "full_attention"] * 2}),
    "lfm2": ("Lfm2ForCausalLM", {
        **SIZES, "num_hidden_layers": 6, "block_auto_adjust_ff_dim": False,
        "layer_types": ["conv", "conv", "full_attention"] * 2}),
    "jamba": ("JambaForCausalLM", {
        **SIZES, **MAMBA, "num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1,
        "num_experts": 4, "expert_layer_period": 4, "expert_layer_offset": 2}),
    "bamba": ("BambaForCausalLM", {
        **SIZES, **MAMBA2, "num_hidden_layers": 5, "attn_layer_indices": [1, 3]}),
    "afmoe": ("AfmoeForCausalLM", {
        **SIZES, "head_dim": 8, "num_hidden_layers": 5, "num_dense_layers": 2, "num_experts": 4,
        "num_experts_per_tok": 2, "moe_intermediate_size": 48, "num_shared_experts": 1,
        "global_attn_every_n_layers": 2, "sliding_window": 4}),
    "falcon-h1": ("FalconH1ForCausalLM", {
        **SIZES, **MAMBA2, "num_hidden_layers": 3, "head_dim": 8, "mamba_d_ssm": 64,
        "ssm_multipliers": [0.5, 0.7, 1.1, 1.3, 0.9]}),
}  # fmt: skip


def hybrid(name: str, dtype: torch.dtype = torch.float64, **overrides) -> PreTrainedModel:
    """Biases moved away from where they start; `overrides` are of its config."""
    kind, settings = HYBRIDS[name]
    kind = getattr(transformers, kind)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind(kind.config_class(**(SMALL | settings | overrides)))
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):
                nn.init.normal_(parameter, std=0.3)
    return runnable_(linear_(model.to(dtype)))


def runnable_(model: PreTrainedModel) -> PreTrainedModel:
    """With experts in the implementation that takes float64."""
    for module in model.modules():  # modules may have a configuration that is not the model's
        if hasattr(module, "config"):
            module.config._experts_implementation = "eager"
    return model.eval().requires_grad_(False)


def save_hybrid(folder, name: str, **overrides):
    """In float32, with a tokenizer."""
    hybrid(name, torch.float32, **overrides).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder
