"""The runtimes' own pipelines read a written folder, and say what torch says."""

import json
import sys

import numpy as np
import onnxruntime
import onnxruntime_genai
import openvino as runtime
import openvino_genai
import pytest
import torch
from transformers import AutoTokenizer

from elastic.formats import onnx, openvino, pipelines
from elastic.models import loading
from elastic.models.kinds import classes_of
from tests.helpers import tiny
from tests.helpers.classification import classifier_config
from tests.helpers.families import model_of
from tests.helpers.graphs import sliced_llama
from tests.helpers.pipelines import EXACT, NEW, by_onnxruntime, by_torch

PROMPTS = ["Tom has 3", "ab", "what is it?"]
SETTINGS = {"max_new_tokens": NEW, "do_sample": False, "apply_chat_template": False}
TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def linear(inputs: int, outputs: int) -> torch.nn.Linear:
    layer = torch.nn.Linear(inputs, outputs, bias=False).requires_grad_(False)
    torch.nn.init.normal_(layer.weight, std=0.3)
    return layer


@pytest.fixture(scope="module")
def widths():
    """MLP widths 96 and 48."""
    model = tiny.llama(dtype=torch.float32, intermediate_size=96)
    torch.manual_seed(0)
    mlp = model.model.layers[1].mlp
    mlp.gate_proj, mlp.up_proj, mlp.down_proj = linear(32, 48), linear(32, 48), linear(48, 32)
    return model


@pytest.fixture(scope="module")
def heads():
    """Key-value heads 2 and 1."""
    model = sliced_llama(tied=True, vocab=tiny.VOCABULARY)
    for config in (model.config, model.generation_config):
        config.bos_token_id, config.eos_token_id, config.pad_token_id = 1, 2, 0
    return model


def tokenizer():
    found = tiny.tokenizer()
    found.chat_template = TEMPLATE
    return found


@pytest.fixture(scope="module")
def folders(widths, heads, tmp_path_factory):
    """By model, the folder of its OpenVINO graph, with what `companions` returned."""
    found = {}
    for name, model in (("widths", widths), ("heads", heads)):
        folder = tmp_path_factory.mktemp(name)
        openvino.write(onnx.write(model, folder / "onnx"), folder / "openvino")
        said = {kind: pipelines.companions(model, tokenizer(), folder / kind, kind)
                for kind in ("onnx", "openvino")}  # fmt: skip
        found[name] = folder, said
    return found


def ids_of(prompt: str) -> list[int]:
    return tiny.tokenizer()(prompt)["input_ids"]


def greedy(model, prompt: str) -> list[int]:
    return by_torch(model, ids_of(prompt))


def text(model, prompt: str) -> str:
    return tiny.tokenizer().decode(greedy(model, prompt), skip_special_tokens=True)


def test_onnxruntime_genai_generates_what_torch_generates(widths, folders):
    folder, said = folders["widths"]
    assert said["onnx"] == {"onnxruntime-genai": pipelines.EQUAL_LENGTHS}
    answers = [by_onnxruntime(folder / "onnx", [ids_of(p)])[0] for p in PROMPTS]
    assert answers == [greedy(widths, prompt) for prompt in PROMPTS]
    assert len(set(map(tuple, answers))) == len(PROMPTS)


def test_with_all_logits_prompts_of_a_batch_may_differ_in_length(widths, tmp_path):
    onnx.write(widths, tmp_path, logits="all")
    assert pipelines.companions(widths, tokenizer(), tmp_path, "onnx", logits="all") == {}
    answers = by_onnxruntime(tmp_path, [ids_of(prompt) for prompt in PROMPTS])
    assert answers == [greedy(widths, prompt) for prompt in PROMPTS]


def test_a_model_without_positions_has_no_input_for_them(tmp_path):
    model = model_of("bloom", torch.float32)
    model.config.use_cache = True
    onnx.write(model, tmp_path)
    pipelines.companions(model, tokenizer(), tmp_path, "onnx")
    assert by_onnxruntime(tmp_path, [ids_of(PROMPTS[0])]) == [greedy(model, PROMPTS[0])]


def test_key_value_heads_that_differ_are_refused_with_the_reason(folders):
    folder, said = folders["heads"]
    assert "these have 2 of 16, 1 of 16" in said["onnx"]["onnxruntime-genai"]
    assert not (folder / "onnx" / pipelines.CONFIG).exists()


@pytest.mark.parametrize("family", ["t5", "bert, classes", "rwkv"])
def test_what_is_no_decoder_is_refused_with_the_reason(family):
    words = {"t5": "encoder-decoder", "bert, classes": "class", "rwkv": "state"}
    assert words[family] in pipelines.why_not(model_of(family, torch.float32))


@pytest.mark.parametrize("backend", ["PA", "SDPA"])
@pytest.mark.parametrize("name", ["widths", "heads"])
def test_openvino_genai_generates_what_torch_generates(request, folders, name, backend):
    """One by one and as a batch of prompts of different lengths."""
    model, (folder, said) = request.getfixturevalue(name), folders[name]
    assert said["openvino"] == {}
    pipeline = openvino_genai.LLMPipeline(
        str(folder / "openvino"), "CPU", ATTENTION_BACKEND=backend, **EXACT
    )
    expected = [text(model, prompt) for prompt in PROMPTS]
    assert [pipeline.generate(prompt, **SETTINGS) for prompt in PROMPTS] == expected
    assert pipeline.generate(PROMPTS, **SETTINGS).texts == expected


def test_the_chat_template_is_in_the_folder(folders):
    folder, _ = folders["widths"]
    messages = [{"role": "user", "content": "ab"}]
    expected = tokenizer().apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert expected == "[user]ab[assistant]"
    theirs = openvino_genai.Tokenizer(str(folder / "openvino"))
    assert theirs.apply_chat_template(messages, add_generation_prompt=True) == expected
    theirs = onnxruntime_genai.Tokenizer(onnxruntime_genai.Model(str(folder / "onnx")))
    found = theirs.apply_chat_template(json.dumps(messages), add_generation_prompt=True)
    assert found == expected


def test_what_paged_attention_does_not_do_is_said(tmp_path):
    """It reads past a sliding window, and may end the process where query heads share unevenly."""
    said = pipelines.companions(
        model_of("mistral", torch.float32), tokenizer(), tmp_path, "openvino"
    )
    assert "sliding window" in said["openvino-genai"]
    assert "ATTENTION_BACKEND='SDPA'" in said["openvino-genai"]
    uneven = tiny.llama(dtype=torch.float32)
    assert pipelines.unpaged(uneven) is None and pipelines.unpaged(tiny.t5()) is None
    attention = uneven.model.layers[1].self_attn
    attention.q_proj, attention.o_proj = linear(32, 16), linear(16, 32)
    attention.num_key_value_groups = 1
    assert "query heads for each key-value head (1, 2)" in pipelines.unpaged(uneven)
    openvino.write(onnx.write(uneven, tmp_path), tmp_path)
    pipelines.companions(uneven, tokenizer(), tmp_path, "onnx")
    assert by_onnxruntime(tmp_path, [ids_of(PROMPTS[0])]) == [greedy(uneven, PROMPTS[0])]
    pipelines.companions(uneven, tokenizer(), tmp_path, "openvino")
    pipeline = openvino_genai.LLMPipeline(str(tmp_path), "CPU", ATTENTION_BACKEND="SDPA", **EXACT)
    found = pipeline.generate(PROMPTS[0], **SETTINGS)
    assert found == text(uneven, PROMPTS[0])


def test_without_openvino_tokenizers_the_graph_stays_and_the_reason_is_given(
    widths, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "openvino_tokenizers", None)
    said = pipelines.companions(widths, tokenizer(), tmp_path, "openvino")
    assert "pip install 'elastic-adapters[genai]'" in said["openvino-genai"]
    assert AutoTokenizer.from_pretrained(tmp_path)("ab") == tokenizer()("ab")


def test_a_tokenizer_that_cannot_be_converted_is_a_reason(widths, tmp_path, monkeypatch):
    import openvino_tokenizers

    def fails(*_, **__):
        raise RuntimeError("no such step: Strange\nand more")

    monkeypatch.setattr(openvino_tokenizers, "convert_tokenizer", fails)
    said = pipelines.companions(widths, tokenizer(), tmp_path, "openvino")
    assert said["openvino-genai"].endswith("converted: RuntimeError: no such step: Strange")
    assert not list(tmp_path.glob("*.xml"))


def test_a_classifier_and_its_tokenizer_name_the_class(tmp_path):
    """A plain session, AutoTokenizer and the names in config.json; in OpenVINO the converted
    tokenizer as well."""
    base = loading.load(classifier_config(tmp_path, model={"classes": ["no", "yes"]}).model)
    texts = ["a b", "c c c"]
    openvino.write(onnx.write(base.model, tmp_path / "onnx"), tmp_path / "openvino")
    for kind in ("onnx", "openvino"):
        assert pipelines.companions(base.model, base.tokenizer, tmp_path / kind, kind) == {}
    loaded = AutoTokenizer.from_pretrained(tmp_path / "onnx")
    batch = loaded(texts, padding=True, return_tensors="pt")
    batch.setdefault("token_type_ids", torch.zeros_like(batch["input_ids"]))
    with torch.no_grad():
        logits = base.model(**batch).logits.numpy()
    expected = [classes_of(base.model)[row] for row in logits.argmax(-1)]
    feeds = {name: tensor.numpy() for name, tensor in batch.items()}

    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "model.onnx")
    names = json.loads((tmp_path / "onnx" / "config.json").read_text())["id2label"]
    found = session.run(["logits"], feeds)[0]
    np.testing.assert_allclose(found, logits, atol=1e-5)
    assert [names[str(row)] for row in found.argmax(-1)] == expected

    core = runtime.Core()
    convert = core.compile_model(tmp_path / "openvino" / pipelines.TOKENIZER, "CPU")
    compiled = core.compile_model(tmp_path / "openvino" / openvino.FILE, "CPU", EXACT)
    ids = convert(texts)
    np.testing.assert_array_equal(ids["input_ids"], feeds["input_ids"])
    np.testing.assert_array_equal(ids["attention_mask"], feeds["attention_mask"])
    np.testing.assert_allclose(compiled(feeds)["logits"], logits, atol=1e-5)
    assert not (tmp_path / "openvino" / pipelines.DETOKENIZER).exists()
