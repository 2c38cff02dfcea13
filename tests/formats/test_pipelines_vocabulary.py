"""The runtimes' own pipelines on graphs whose head knows some tokens alone: they answer as
`generate` of the compact model does, and never with a token that was cut."""

from __future__ import annotations

import copy

import pytest
import torch

from elastic.formats import onnx, onnx_compressed, openvino, pipelines
from elastic.formats.compression import compress
from elastic.formats.rounding import round_
from elastic.models.vocabulary import tokens_of
from elastic.spaces.bound import SubAdapter
from elastic.spaces.declared import SearchSpace
from elastic.supernet.compact import compact
from elastic.supernet.supernet import Supernet
from tests.helpers import tiny
from tests.helpers.pipelines import NEW, ByOpenvino, by_onnxruntime, by_torch

KEPT = 20
PROMPTS = [tiny.tokenizer()(text)["input_ids"] for text in ("Tom has 3", "ab", "what is it?")]
"""With tokens that are cut."""
SAMPLED = {"top_k": 0, "top_p": 1.0, "temperature": 50.0}
"""All tokens that can be drawn are about as likely."""
DRAWS = 40
BACKENDS = ["PA", "SDPA"]


class Cut:
    """A compact model with a cut head, and its graphs as an export writes them."""

    def __init__(self, folder, tied: bool) -> None:
        declared = tiny.space_dict()
        declared["groups"]["vocab"] = {"dim": "vocab", "choices": [1.0, KEPT]}
        base = tiny.llama(dtype=torch.float32, tie_word_embeddings=tied)
        net = Supernet(base, SearchSpace.from_dict(declared), tiny.ADAPTERS["lora"])
        group = net.space.vocabulary
        random = torch.randperm(tiny.VOCABULARY, generator=torch.Generator().manual_seed(1))
        order = torch.cat([torch.tensor([tiny.EOS]), random[random != tiny.EOS]])
        net.reorder(tiny.permutations(net) | {group.name: order})
        tiny.randomize_(net)
        sub = SubAdapter(tuple({**net.space.minimal().as_dict(), group.name: KEPT}.items()))
        self.model, self.folder = compact(net, sub), folder
        self.kept = set(net.vocabulary.tokens(KEPT).tolist())
        self.said = {}
        graphs = {"onnx": onnx.write(self.model, folder / "onnx")}
        graphs["openvino"] = openvino.write(graphs["onnx"], folder / "openvino")
        with pytest.MonkeyPatch.context() as patch:  # activations stay as they are
            patch.setattr(onnx_compressed, "ACCURACY_LEVEL", 0)
            for kind, graph in graphs.items():
                compress(graph, folder / f"{kind}-int8", "int8")
                for name in (kind, f"{kind}-int8"):
                    self.said[name] = pipelines.companions(
                        self.model, tiny.tokenizer(), folder / name, kind
                    )

    def in_torch(self, name: str):
        """What the folder of this name computes."""
        kind, _, mode = name.partition("-")
        return round_(copy.deepcopy(self.model), mode, kind) if mode else self.model


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def cut(request, tmp_path_factory):
    return Cut(tmp_path_factory.mktemp("cut"), request.param)


def test_nothing_is_said_against_it_and_the_vocabulary_is_whole(cut):
    assert cut.said["openvino"] == cut.said["openvino-int8"] == {}
    assert cut.said["onnx"] == {"onnxruntime-genai": pipelines.EQUAL_LENGTHS}, "as of any head"
    told = pipelines.described(cut.model, tiny.tokenizer())
    assert told["model"]["vocab_size"] == tokens_of(cut.model) == tiny.VOCABULARY
    assert any(set(row) - cut.kept for row in PROMPTS)


@pytest.mark.parametrize("name", ["onnx", "onnx-int8"])
def test_onnxruntime_genai_answers_as_torch(cut, name):
    model = cut.in_torch(name)
    expected = [by_torch(model, row) for row in PROMPTS]
    assert [by_onnxruntime(cut.folder / name, [row])[0] for row in PROMPTS] == expected
    assert len(set(map(tuple, expected))) > 1 and set().union(*expected) <= cut.kept


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["openvino", "openvino-int8"])
def test_openvino_genai_answers_as_torch(cut, name, backend):
    model, pipeline = cut.in_torch(name), ByOpenvino(cut.folder / name, backend)
    assert [pipeline(row) for row in PROMPTS] == [by_torch(model, row) for row in PROMPTS]


def test_beams_are_those_of_torch(cut):
    """More of them than tokens that can be said, so that some start with one that cannot."""
    beams, row = KEPT + 4, PROMPTS[0]
    expected = by_torch(cut.model, row, num_beams=beams)
    found = ByOpenvino(cut.folder / "openvino", "SDPA")(row, num_beams=beams)
    assert found == expected and set(found) <= cut.kept


def test_a_pattern_that_no_kept_token_meets_ends_the_answer(cut):
    import openvino_genai

    words = set("abcdefghijklmnopqrstuvwxyz")
    letters = {c for c in words if tiny.tokenizer().convert_tokens_to_ids(c) in cut.kept}
    pipeline = ByOpenvino(cut.folder / "openvino", "SDPA").pipeline
    for these, whole in ((letters, True), (words - letters, False)):
        pattern = f"[{''.join(sorted(these))}]{{3}}"
        settings = openvino_genai.GenerationConfig(max_new_tokens=NEW, apply_chat_template=False)
        settings.structured_output_config = openvino_genai.StructuredOutputConfig(regex=pattern)
        found = pipeline.generate("ab", settings)
        assert set(found) <= these and len(found) == 3 * whole


@pytest.mark.parametrize("name", ["onnx", "onnx-int8"])
def test_onnxruntime_genai_draws_no_token_that_was_cut(cut, name):
    drawn = [
        by_onnxruntime(cut.folder / name, [PROMPTS[1]], do_sample=True, random_seed=seed, **SAMPLED)
        for seed in range(DRAWS)
    ]
    spread(cut, [row for [row] in drawn])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["openvino", "openvino-int8"])
def test_openvino_genai_draws_no_token_that_was_cut(cut, name, backend):
    pipeline = ByOpenvino(cut.folder / name, backend)
    options = {"do_sample": True, "temperature": SAMPLED["temperature"]}
    spread(cut, [pipeline(PROMPTS[1], rng_seed=seed, **options) for seed in range(DRAWS)])


def spread(cut: Cut, rows: list[list[int]]) -> None:
    """Nearly every token that can be drawn was, and none that cannot."""
    assert any(len(row) == NEW for row in rows)
    drawn = set().union(*rows)
    assert drawn <= cut.kept and len(drawn) >= KEPT - 2  # without the end
