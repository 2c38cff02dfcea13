"""Every causal, encoder-decoder and classification family of the installed transformers, small.

`SIZES` shrinks what most configurations call their sizes by the same few names; `SPECIAL` says what
else a family needs to be small, and to have a block of each of its kinds.
"""

from __future__ import annotations

from typing import Any

from tests.helpers import tiny

WIDE, INNER, HEADS, HEAD, LAYERS, EXPERTS, LENGTH = 32, 96, 4, 8, 2, 4, 64
SIZES: dict[str, Any] = {
    # Tokens, as the tokenizer of the tests has them
    "vocab_size": tiny.VOCABULARY, "pad_token_id": tiny.PAD, "bos_token_id": tiny.BOS,
    "eos_token_id": tiny.EOS, "decoder_start_token_id": tiny.PAD, "blank_token_id": tiny.PAD,
    "type_vocab_size": 2, "unpadded_vocab_size": tiny.VOCABULARY,
    # The residual stream
    "hidden_size": WIDE, "d_model": WIDE, "n_embd": WIDE, "dim": WIDE, "emb_dim": WIDE,
    "embedding_size": WIDE, "word_embed_proj_dim": WIDE, "embedding_dim": WIDE,
    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": tiny.VOCABULARY,
    "hidden_size_global": WIDE, "input_embedding_size": WIDE, "output_embedding_size": WIDE,
    # MLPs
    "intermediate_size": INNER, "ffn_dim": INNER, "ffn_hidden_size": INNER, "n_inner": INNER,
    "d_ff": INNER, "dff": INNER, "d_inner": INNER, "hidden_dim": INNER, "dim_ff": INNER,
    "encoder_ffn_dim": INNER, "decoder_ffn_dim": INNER, "dense_intermediate_size": INNER,
    "intermediate_size_mlp": INNER, "shared_intermediate_size": INNER, "feed_forward_size": INNER,
    "prefix_dense_intermediate_size": INNER, "num_dense_layers": 1,
    # Blocks
    "num_hidden_layers": LAYERS, "n_layer": LAYERS, "num_layers": LAYERS, "n_layers": LAYERS,
    "encoder_layers": LAYERS, "decoder_layers": LAYERS, "num_decoder_layers": LAYERS,
    "num_encoder_layers": LAYERS,
    # Attention
    "num_attention_heads": HEADS, "n_head": HEADS, "n_heads": HEADS, "num_heads": HEADS,
    "attention_heads": HEADS, "encoder_attention_heads": HEADS, "decoder_attention_heads": HEADS,
    "num_encoder_attention_heads": HEADS, "num_decoder_attention_heads": HEADS,
    "num_key_value_heads": 2, "num_kv_heads": 2, "head_dim": HEAD, "d_kv": HEAD, "d_head": HEAD,
    "kv_channels": HEAD, "dim_head": HEAD, "attention_head_size": HEAD, "rotary_dim": HEAD,
    "swa_num_attention_heads": HEADS, "swa_num_key_value_heads": 2, "swa_head_dim": HEAD,
    "sliding_window": 4, "sliding_window_size": 4, "window_size": 4,
    "attention_window_size": 4, "attention_window": 4,
    "local_attention": 4, "attention_chunk_size": 4, "query_pre_attn_scalar": HEAD,
    # Latent attention, and what looks for the keys that matter
    "kv_lora_rank": 16, "q_lora_rank": 16, "o_lora_rank": 16, "qk_rope_head_dim": HEAD,
    "qk_nope_head_dim": HEAD, "v_head_dim": HEAD, "index_head_dim": HEAD, "index_n_heads": 2,
    "index_topk": 4,
    # Experts
    "num_experts": EXPERTS, "num_local_experts": EXPERTS, "n_routed_experts": EXPERTS,
    "moe_num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_k": 2, "moe_topk": 2,
    "moe_intermediate_size": 48, "expert_ffn_hidden_size": 48, "n_group": 1, "topk_group": 1,
    "shared_expert_intermediate_size": 48, "shared_experts_intermediate_size": 48,
    "moe_shared_expert_intermediate_size": 48, "first_k_dense_replace": 1, "expert_capacity": 64,
    # Mixers with a state
    "mamba_d_state": 8, "mamba_n_heads": 8, "mamba_d_head": HEAD, "mamba_chunk_size": 4,
    "state_size": 8, "ssm_state_size": 8, "chunk_size": 4, "n_groups": 1, "mamba_num_heads": 8,
    "mamba_head_dim": HEAD, "mamba_n_groups": 1, "mamba_d_ssm": 64, "linear_key_head_dim": HEAD,
    "linear_value_head_dim": HEAD, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_num_heads": HEADS, "linear_head_dim": HEAD,
    # Positions
    "max_position_embeddings": LENGTH, "n_positions": LENGTH, "n_ctx": LENGTH,
    "max_seq_len": LENGTH, "max_source_positions": LENGTH, "max_target_positions": LENGTH,
    "max_encoder_position_embeddings": LENGTH, "max_decoder_position_embeddings": LENGTH,
}  # fmt: skip
SLIDING = {"layer_types": ["sliding_attention", "full_attention"]}
LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
CONVOLUTION = {"layer_types": ["conv", "full_attention"]}
HYBRID = {"layer_types": ["hybrid_sliding", "hybrid"]}
CHUNKED = {"layer_types": ["chunked_attention", "full_attention"], "interleave_moe_layer_step": 2}
INDEXED = {**LINEAR, "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": HEAD,
           "indexer_budget": 4, "indexer_compress_ratio": 2}  # fmt: skip
SHARED = {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2}
BOXES = {"coordinate_size": 6, "shape_size": 4}
WAVES = {"num_filters": 2, "depths": [1] * 7}
SPECIAL: dict[str, dict[str, Any]] = {
    "afmoe": SLIDING,
    "bailing_hybrid": LINEAR,
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 50},
    "canine": {"num_hash_buckets": 50},
    "cohere2": SLIDING,
    "cohere2_moe": SLIDING,
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}},
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4}},
    "deepseek_v4": {
        "layer_types": ["heavily_compressed_attention", "compressed_sparse_attention"],
    },
    "dory": SLIDING,
    "dots1": {"n_shared_experts": 1},
    "dots3_note": {
        "vision_config": {
            "pyramid_num_routed": [-1, 2], "adapter_in_dim": WIDE, "adapter_out_dim": WIDE,
        },
        "audio_config": {"adapter_input_size": WIDE, "adapter_out_dim": WIDE},
    },
    "esmc": {"num_key_value_heads": HEADS},
    "exaone4": SLIDING,
    "exaone_moe": SLIDING,
    "falcon_h1": {
        "ssm_multipliers": [0.5, 0.25, 2.0, 4.0, 0.125], "mlp_multipliers": [0.5, 2.0],
        "key_multiplier": 0.5, "attention_out_multiplier": 2.0, "lm_head_multiplier": 0.5,
    },
    "gemma3": {"text_config": SLIDING},
    "gemma3_text": SLIDING,
    "gemma3n_text": {
        "num_hidden_layers": 4, "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "gemma4": {"text_config": {"global_head_dim": 16}},
    "gemma4_assistant": {
        "text_config": {
            "model_type": "gemma4_text", "global_head_dim": 16, "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0,
        },
    },
    "gemma4_text": {"global_head_dim": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": LINEAR,
    "inkling2_loop_text": HYBRID,
    "inkling2_text": HYBRID,
    "inkling_text": HYBRID,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": LINEAR,
    "kolibri1": SLIDING,
    "layoutlmv2": BOXES,
    "layoutlmv3": BOXES,
    "lfm2": CONVOLUTION,
    "lfm2_moe": CONVOLUTION,
    "lfm3": CONVOLUTION,
    "lilt": {"hidden_size": 48},
    "llama4": {"text_config": CHUNKED},
    "llama4_text": CHUNKED,
    "longt5": {"local_radius": 3, "global_block_size": 2},
    "luke": {"entity_vocab_size": 20, "entity_emb_size": WIDE},
    "mamba2": {"num_heads": 8},
    "markuplm": {"max_depth": 4, "xpath_unit_hidden_size": 8},
    "mellum": {"mlp_layer_types": ["dense", "sparse"]},
    "ministral": SLIDING,
    "nemo_speechlm": {
        "audio_config": {"diarization_config": {"head_config": {"audio_hidden_size": WIDE}}},
    },
    "nllb-moe": {"encoder_sparse_step": 2, "decoder_sparse_step": 2},
    "olmo3": SLIDING,
    "pegasus_x": {"block_size": 4, "num_global_tokens": 2},
    "perceiver": {
        "num_latents": 8, "d_latents": WIDE, "num_self_attends_per_block": 2,
        "num_self_attention_heads": HEADS, "num_cross_attention_heads": HEADS,
    },
    "qwen3_5": {"text_config": LINEAR},
    "qwen3_5_moe": {"text_config": LINEAR},
    "qwen3_5_moe_text": LINEAR,
    "qwen3_5_text": LINEAR,
    "qwen3_next": LINEAR,
    "qwen4_exp": {"text_config": INDEXED},
    "qwen4_exp_text": INDEXED,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {
        "axial_pos_embds": False, "attn_layers": ["local", "lsh"], "hash_seed": 0,
        "local_attn_chunk_length": 4, "lsh_attn_chunk_length": 4,
    },
    "roc_bert": {
        "shape_vocab_size": 20, "shape_embed_dim": 8, "pronunciation_vocab_size": 20,
        "pronunciation_embed_dim": 8,
    },
    "switch_transformers": {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
    "ultrabert": SLIDING,
    "vibevoice_asr": {
        "acoustic_tokenizer_encoder_config": WAVES, "semantic_tokenizer_encoder_config": WAVES,
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": SHARED,
    "zamba2": SHARED,
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
FLOAT32 = {"canine", "hy_v4", "xglm", "xlnet", "fsmt", "mra", "inkling2_text", "inkling2_loop_text"}
"""Families whose code fixes this type somewhere."""
