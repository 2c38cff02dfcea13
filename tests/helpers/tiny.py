"""Models, tokenizers and spaces small enough to build in every test."""

from __future__ import annotations

import string
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, processors
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from elastic.config import AdapterConfig, OloraConfig, ProloraConfig, SosLoraConfig
from elastic.spaces.declared import SearchSpace
from elastic.spaces.uniform import kinds
from elastic.supernet.importance import blank
from elastic.supernet.supernet import Supernet

SPECIAL = ("<pad>", "<bos>", "<eos>")
PAD, BOS, EOS = range(3)
CHARACTERS = [chr(code) for code in range(32, 127)]
VOCABULARY = len(SPECIAL) + len(CHARACTERS)
RANK, ALPHA = 8, 24.0  # a scale of 3, so a forgotten or doubled scale shows
ATTENTION = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
GATE_UP = ["mlp.gate_proj", "mlp.up_proj"]


def space_dict(*, heads: bool = False) -> dict:
    """A space like the shipped llama one, for sizes of the tiny model; with `heads`, attention
    shrinks too."""
    groups = {
        "attention_rank": {"dim": "rank", "of": ATTENTION, "choices": [1.0, 0.5, 1]},
        "mlp_width": {
            "dim": "width",
            "outputs": GATE_UP,
            "inputs": ["mlp.down_proj"],
            "choices": [1.0, 0.75, 0.5, 0.25],
            "align": 8,
        },
        "mlp_rank": {"dim": "rank", "of": GATE_UP, "choices": [8, 5, 2]},
    }
    if heads:
        groups["attention_heads"] = {
            "dim": "heads",
            "outputs": ATTENTION,
            "inputs": ["self_attn.o_proj"],
            "choices": [2, 1],
        }
    return {
        "blocks": "model.layers.*",
        "adapt": [*ATTENTION, *GATE_UP, "mlp.down_proj"],
        "groups": groups,
    }


def space(*, heads: bool = False) -> SearchSpace:
    return SearchSpace.from_dict(space_dict(heads=heads))


def config(**overrides) -> LlamaConfig:
    settings = dict(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        initializer_range=0.3,  # with the usual 0.02 attention hardly moves the logits
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    return LlamaConfig(**(settings | overrides))


def llama(seed: int = 0, dtype: torch.dtype = torch.float64, **overrides) -> LlamaForCausalLM:
    """Two random layers. In float64 the norms are torch's: those of transformers round to float32,
    which would hide every law below 1e-7."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config(**overrides))
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                nn.init.normal_(parameter, mean=float("norm" in name), std=0.3)
    model = model.to(dtype).eval().requires_grad_(False)
    return wide_norms_(model) if dtype == torch.float64 else model


def wide_norms_(model: LlamaForCausalLM) -> LlamaForCausalLM:
    for name, norm in list(model.named_modules()):
        if type(norm).__name__ == "LlamaRMSNorm":
            wide = nn.RMSNorm(norm.weight.shape[0], norm.variance_epsilon, dtype=norm.weight.dtype)
            wide.weight = norm.weight
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, wide)
    return model


ADAPTERS = {
    "lora": AdapterConfig(method="lora", rank=RANK, alpha=ALPHA),
    "sorsa": AdapterConfig(method="sorsa", rank=RANK, alpha=ALPHA),
    "prolora": AdapterConfig(
        method="prolora", rank=RANK, alpha=ALPHA, prolora=ProloraConfig(share_in=3, share_out=5)
    ),
    "olora": AdapterConfig(method="olora", rank=RANK, alpha=ALPHA, olora=OloraConfig(lambda_2=0.1)),
    "olora-all": AdapterConfig(
        method="olora", rank=RANK, alpha=ALPHA, olora=OloraConfig(shrink="all")
    ),
    "soslora": AdapterConfig(
        method="soslora",
        rank=RANK,
        alpha=ALPHA,
        soslora=SosLoraConfig(experts=2, rank_mode="expert"),
    ),
}
"""Every method, and the second kind of cut where there is one that the tiny spaces allow."""


def randomize_(net: Supernet, seed: int = 0) -> Supernet:
    """Move every factor: some start at zero, and a test of those proves 0 == 0."""
    generator = torch.Generator().manual_seed(seed)
    for _, adapter in net.adapters():
        for parameter in adapter.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data.add_(0.1 * noise)
    return net


def supernet(
    method: str = "lora",
    *,
    heads: bool = False,
    seed: int = 0,
    order=None,
    dtype=torch.float64,
    base=None,
    **overrides,
) -> Supernet:
    """A randomized supernet on `base` or `llama(seed, **overrides)`; an O-LoRA one has two tasks
    behind it."""
    adapter = ADAPTERS[method]
    base = llama(seed, dtype, **overrides) if base is None else base
    net = Supernet(base, space(heads=heads), adapter, order=order, seed=seed)
    for task in range(2 if adapter.method == "olora" else 0):
        net.succeed(randomize_(net, seed + task + 1).factor_state())
    return randomize_(net, seed)


def permutations(net_or_space, seed: int = 0) -> dict[str, torch.Tensor]:
    """A random channel order for every group that cuts channels."""
    generator = torch.Generator().manual_seed(seed)
    bound = getattr(net_or_space, "space", net_or_space)
    return {
        group.name: torch.rand(blank(group).shape, generator=generator).argsort(-1)
        if group.mixtures
        else torch.randperm(group.choices[0], generator=generator)
        for group in bound
        if group.dim != "rank"
    }


def t5(
    seed: int = 0, dtype: torch.dtype = torch.float32, **overrides
) -> T5ForConditionalGeneration:
    """Two random layers in encoder and decoder."""
    settings = dict(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
        pad_token_id=PAD, eos_token_id=EOS, decoder_start_token_id=PAD,
        feed_forward_proj="gated-gelu", initializer_factor=1.0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = T5ForConditionalGeneration(T5Config(**(settings | overrides)))
    return model.to(dtype).eval().requires_grad_(False)


def save_t5(folder: Path | str, **overrides) -> Path:
    """A T5 folder as `ModelConfig(path=...)` takes it."""
    t5(**overrides).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return Path(folder)


def tokens(batch: int = 2, length: int = 7, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(len(SPECIAL), VOCABULARY, (batch, length), generator=generator)


def logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per printable ASCII character; a sequence starts with <bos>."""
    assert set(string.printable) - set(string.whitespace) <= set(CHARACTERS)
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *CHARACTERS])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.decoder = decoders.Fuse()
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A",
        pair="<bos> $A <eos> $B:1",
        special_tokens=[("<bos>", BOS), ("<eos>", EOS)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )


def save_tiny(folder: Path | str, *, seed: int = 0, dtype=torch.float32, **overrides) -> Path:
    """A model folder as `ModelConfig(path=...)` takes it; `overrides` are LlamaConfig's."""
    folder = Path(folder)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        LlamaForCausalLM(config(**overrides)).to(dtype).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def is_uniform(space, sub) -> bool:
    """Whether all layers that run have one size of every kind."""
    return all(
        len({sub[group.name] for group in groups} - {0}) <= 1 for groups in kinds(space).values()
    )
