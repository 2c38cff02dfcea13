"""What an adapter's configuration says, and what of it is refused before any weight is read."""

import json
import re

import pytest
from peft import (
    AdaLoraConfig,
    BeftConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    OFTConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    VBLoRAConfig,
    VeraConfig,
)
from peft.tuners import C3AConfig, LilyConfig, LNTuningConfig

from elastic.errors import RunError
from elastic.formats.peft_config import bias_missing, start_of, stock_config, why_not_merged
from tests.helpers import tiny
from tests.helpers.families import model_of

PROMPTS = [
    PromptTuningConfig(num_virtual_tokens=3),
    PrefixTuningConfig(num_virtual_tokens=3),
    PromptEncoderConfig(num_virtual_tokens=3),
]
MERGED = [
    LoraConfig(target_modules=["q_proj"], rank_pattern={"q_proj": 4}, modules_to_save=["lm_head"]),
    LoraConfig(target_modules="all-linear", init_lora_weights="pissa", lora_alpha=10.5),
    LoraConfig(init_lora_weights="eva"),
    AdaLoraConfig(total_step=10),
    IA3Config(),
    LoHaConfig(),
    OFTConfig(oft_block_size=8),
    VeraConfig(),
    VBLoRAConfig(),
    C3AConfig(init_weights="gaussian"),
    LNTuningConfig(),
]


def written(folder, config):
    config.save_pretrained(folder)
    return stock_config(folder, "merge:")


@pytest.mark.parametrize("config", MERGED, ids=lambda config: config.peft_type.value)
def test_what_peft_saves_is_read_and_names_no_base(tmp_path, config):
    config.base_model_name_or_path = "somebody/else"
    found = written(tmp_path, config)
    assert type(found) is type(config)
    assert found.base_model_name_or_path is None
    assert why_not_merged(found) is None


@pytest.mark.parametrize("config", PROMPTS, ids=lambda config: config.peft_type.value)
def test_vectors_beside_the_prompt_are_no_change_of_weights(tmp_path, config):
    assert "beside the prompt" in why_not_merged(written(tmp_path, config))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (LilyConfig(), "LILY adds depends on the input"),
        (LoraConfig(alora_invocation_tokens=[5, 6], task_type="CAUSAL_LM"), "alora_invocation"),
        (LoraConfig(layer_replication=[(0, 2), (0, 2)]), "layers of the base more than once"),
        (LoraConfig(init_lora_weights="pissa_niter_4"), "by pissa_niter_4, .* no load repeats"),
        (LoraConfig(init_lora_weights="lora_ga"), "by lora_ga, .* convert it first"),
    ],
)
def test_what_no_merge_repeats_or_holds_is_told(tmp_path, config, reason):
    found = why_not_merged(written(tmp_path, config))
    assert found is not None
    assert re.search(reason, found)


def test_a_bias_needs_a_place(tmp_path):
    config = written(tmp_path, LoraConfig(lora_bias=True, target_modules=["q_proj", "up_proj"]))
    assert bias_missing(config, tiny.llama()) == "model.layers.0.self_attn.q_proj"
    assert bias_missing(config, tiny.llama(attention_bias=True, mlp_bias=True)) is None
    bert = LoraConfig(lora_bias=True, target_modules=["query"])
    assert bias_missing(bert, model_of("bert, classes")) is None
    assert bias_missing(BeftConfig(target_modules=["v_proj"]), tiny.llama()) is not None
    assert bias_missing(LoraConfig(target_modules=["q_proj"]), tiny.llama()) is None


LORA = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"]}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"peft_type": None}, "unknown peft_type 'None'"),
        ({"peft_type": ["LORA"]}, "unknown peft_type"),
        ({"peft_type": "LROA"}, "did you mean 'ROAD'"),
        ({"r": "4"}, "r is '4'; it is to be a number"),
        ({"r": None}, "r is None; it is to be a number"),
        ({"lora_alpha": 10**400}, "lora_alpha is 1000.* a number"),
        ({"r": [4]}, r"r is \[4\]"),
        ({"r": 1e999}, "r is inf"),
        ({"lora_alpha": {"a": 1}}, "lora_alpha is .* a number"),
        ({"lora_dropout": "much"}, "lora_dropout is 'much'"),
        ({"use_dora": "yes"}, "use_dora is 'yes'; it is to be true or false"),
        ({"init_lora_weights": ["pissa"]}, "init_lora_weights is"),
        ({"bias": 3}, "bias is 3; it is to be text"),
        ({"target_modules": [["q_proj"]]}, "target_modules is .* names of modules"),
        ({"target_modules": {"q_proj": 1}}, "target_modules is"),
        ({"modules_to_save": 7}, "modules_to_save is 7"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern is .* numbers by name"),
        ({"alpha_pattern": {"q_proj": "8"}}, "alpha_pattern is"),
        ({"task_type": "POETRY"}, "PEFT refuses it: ValueError: Invalid task type"),
        ({"eva_config": 3}, "PEFT refuses it: TypeError"),
        ({"megatron_config": {"a": 1}, "megatron_core": "evil"}, "import a module that it names"),
    ],
)
def test_values_of_other_types_are_refused_on_one_line(tmp_path, change, match):
    (tmp_path / "adapter_config.json").write_text(json.dumps(LORA | change))
    with pytest.raises(RunError, match=match) as caught:
        stock_config(tmp_path, "merge:")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"merge: {tmp_path}/adapter_config.json: ")


@pytest.mark.parametrize("text", ["[]", "null", "3", '"LORA"'])
def test_a_configuration_is_an_object(tmp_path, text):
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(RunError, match="wants a JSON object, has"):
        stock_config(tmp_path, "merge:")


def test_what_newer_releases_add_is_left_to_peft(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps(LORA | {"of_the_future": [1]}))
    with pytest.warns(UserWarning, match="of_the_future"):
        assert start_of(stock_config(tmp_path, "merge:")) == ""
