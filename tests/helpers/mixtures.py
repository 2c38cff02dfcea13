"""Small random mixtures of experts, of the real classes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from elastic.models.modules import linear_
from elastic.spaces.declared import SearchSpace
from elastic.spaces.mixtures import EXPERT_WIDTH
from elastic.supernet.supernet import Supernet
from tests.helpers import tiny
from tests.helpers.families import SMALL

HIDDEN, WIDTH, COUNT = 32, 24, 6
BODY = {"hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128,
        "num_experts_per_tok": 2, "tie_word_embeddings": False}  # fmt: skip
LATENT = {"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8,
          "qk_rope_head_dim": 8, "v_head_dim": 8, "head_dim": 8}  # fmt: skip
WIDE = {"intermediate_size": WIDTH}
APART = {"intermediate_size": 40, "moe_intermediate_size": WIDTH}
FAMILIES: dict[str, tuple[str, str, dict]] = {  # name: class, module of experts, settings
    "mixtral": ("MixtralForCausalLM", "mlp.experts", {**WIDE, "num_local_experts": COUNT}),
    "qwen3-moe": ("Qwen3MoeForCausalLM", "mlp.experts", {**APART, "num_experts": COUNT}),
    "qwen2-moe": ("Qwen2MoeForCausalLM", "mlp.experts", {**APART, "num_experts": COUNT,
                  "shared_expert_intermediate_size": 16}),
    "olmoe": ("OlmoeForCausalLM", "mlp.experts", {**WIDE, "num_experts": COUNT}),
    "gpt-oss": ("GptOssForCausalLM", "mlp.experts", {**WIDE, "num_local_experts": COUNT,
                "sliding_window": 4}),
    "granite-moe": ("GraniteMoeForCausalLM", "block_sparse_moe.experts",
                    {**WIDE, "num_local_experts": COUNT}),
    "phimoe": ("PhimoeForCausalLM", "mlp.experts", {**WIDE, "num_local_experts": COUNT}),
    "minimax-m2": ("MiniMaxM2ForCausalLM", "mlp.experts", {**WIDE, "num_local_experts": COUNT}),
    "deepseek-v3": ("DeepseekV3ForCausalLM", "mlp.experts",
                    {**APART, **LATENT, "n_routed_experts": 12, "n_group": 2, "topk_group": 1,
                     "first_k_dense_replace": 0, "n_shared_experts": 1}),
}  # fmt: skip
"""One half behind the other, taking turns, (in, out), with biases, a router that is a linear layer,
what corrects choices in the block itself, groups of experts."""
MATRICES = ("gate_up_proj", "down_proj")
ROUNDED = {"deepseek-v3", "gpt-oss"}


def model_of(
    family: str, dtype: torch.dtype = torch.float64, **overrides: object
) -> PreTrainedModel:
    """Biases and what corrects choices moved away from where they start; `overrides` are of its
    config."""
    name, _, settings = FAMILIES[family]
    kind = getattr(transformers, name)
    config = kind.config_class(**(SMALL | BODY | settings | overrides))
    config.use_cache = False
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind(config)
        for key, tensor in (*model.named_parameters(), *model.named_buffers()):
            if "bias" in key:
                nn.init.normal_(tensor, std=0.3)
            if tensor.dim() == 3 or key.endswith(("gate.weight", "router.weight")):
                nn.init.normal_(tensor, std=0.3)
    model.set_experts_implementation("eager")  # the kernels know no float64
    return linear_(model.to(dtype)).eval().requires_grad_(False)


def space_of(family: str, *dims: str) -> SearchSpace:
    """Both dimensions of experts, unless named, and ranks of the queries."""
    experts = FAMILIES[family][1]
    groups = {
        "rank": {"dim": "rank", "of": ["self_attn.o_proj"], "choices": [1.0, 0.5]},
        "experts": {"dim": "experts", "of": [experts], "choices": [1.0, 0.67, 0.5]},
        "expert_width": {"dim": EXPERT_WIDTH, "of": [experts], "choices": [1.0, 0.67, 0.34]},
    }  # fmt: skip
    groups = {name: group for name, group in groups.items() if name in (*dims, "rank") or not dims}
    return SearchSpace.from_dict(
        {"blocks": "model.layers.*", "adapt": ["self_attn.o_proj"], "groups": groups}
    )


def factors_of(family: str, *dims: str, matrices: Sequence[str] = MATRICES) -> SearchSpace:
    """The same with factors in matrices of all experts, each with ranks of its own."""
    space = space_of(family, *dims).as_dict()
    sites = {name: f"{FAMILIES[family][1]}.{name}" for name in matrices}
    choices = {"gate_up_proj": [1.0, 0.5, 1], "down_proj": [1.0, 3]}
    ranks = {
        name: {"dim": "rank", "of": [site], "choices": choices[name]}
        for name, site in sites.items()
    }
    return SearchSpace.from_dict(
        {**space, "adapt": [*space["adapt"], *sites.values()], "groups": space["groups"] | ranks}
    )


def adapted_net(family: str, *dims: str, dtype: torch.dtype = torch.float64) -> Supernet:
    net = Supernet(model_of(family, dtype), factors_of(family, *dims), tiny.ADAPTERS["lora"])
    net.reorder(tiny.permutations(net))
    return tiny.randomize_(net)


def net_of(family: str, *dims: str, dtype: torch.dtype = torch.float64) -> Supernet:
    net = Supernet(model_of(family, dtype), space_of(family, *dims), tiny.ADAPTERS["lora"])
    net.reorder(tiny.permutations(net))
    return tiny.randomize_(net)


def precision(family: str) -> float:
    return 1e-5 if family in ROUNDED else 1e-9


def down_of(experts):
    """(experts, channels, hidden)."""
    return experts.down_proj if experts.is_transposed else experts.down_proj.transpose(1, 2)


def experts_by_hand(model, hidden, layer=0):
    """(token, expert): weight by the router, and what its channels hold, of a Mixtral."""
    block = model.model.layers[layer].mlp
    weights = (hidden @ block.gate.weight.T).float().softmax(-1)
    weights, chosen = weights.topk(2)
    weights = (weights / weights.sum(-1, keepdim=True)).double()
    for token, (row, some) in enumerate(zip(weights, chosen, strict=True)):
        for weight, expert in zip(row, some, strict=True):
            gate, up = (block.experts.gate_up_proj[expert] @ hidden[token]).chunk(2)
            yield weight, int(expert), torch.nn.functional.silu(gate) * up
