"""From Python without a run directory: what the commands do, on a model in memory."""

import tempfile
from dataclasses import replace

import pytest
import torch
import transformers

import elastic
import elastic.attached.attach
from elastic.config import AdapterConfig, ScheduleConfig, StageConfig, TaskConfig, TrainConfig
from elastic.config.train import VocabConfig
from elastic.data import load_task
from elastic.errors import BaseMismatch, ConfigError, DataError, ModelError, RunError, TrainingError
from elastic.models import loading
from elastic.spaces.declared import SearchSpace
from elastic.supernet.compact import compact
from elastic.supernet.group_importance import group_importance
from elastic.supernet.store import load_run, read_order
from elastic.training.one_task import train_one
from tests.helpers import tiny
from tests.helpers.tiny_runs import factors, train_config

BY = TaskConfig(prompt="{q}", answer="a")
ROWS = [{"q": f"{a}+{b}=", "a": a + b} for a in range(6) for b in range(4)]
SHORT = TrainConfig(batch_size=8, max_steps=3, lr=ScheduleConfig(base_lr=0.01))


def attached(model=None, **settings):
    model = tiny.llama(dtype=torch.float32) if model is None else model
    known = dict(space=tiny.space_dict(heads=True), max_rank=tiny.RANK, task=BY)
    return elastic.attach(model, tiny.tokenizer(), **(known | settings))


@pytest.fixture(scope="module")
def net():
    """A trained one; what changes it belongs in a test of its own."""
    net = attached()
    net.fit(ROWS, SHORT)
    return net


def test_fit_is_elastic_train(tiny_folder, tmp_path):
    config = train_config(tiny_folder, tmp_path / "run", compensation_examples=16)
    run = train_one(config)
    base, task = loading.load(config.model), load_task(config.task, config.seed)
    own = attached(base.model, space=SearchSpace.load(config.space), adapter=config.adapter,
                   method="lora", max_rank=32, ranks="elastic")  # fmt: skip
    settings = replace(
        TrainConfig(), stages=config.stages, batch_size=config.batch_size, compensation_examples=16
    )
    log = own.fit(task.train, settings)
    assert len(log) == 8 and {row["stage"] for row in log} == {1, 2}
    trained = factors(run)
    assert any(tensor.abs().max() > 0 for name, tensor in trained.items() if name.endswith("B"))
    torch.testing.assert_close(own.supernet.factor_state(), trained, rtol=0, atol=0)
    order = read_order(run.super_adapter, own.space)
    torch.testing.assert_close(own.supernet.order, order, rtol=0, atol=0)
    # The file holds moments with ten bits of every correlation.
    _, _, commands = load_run(run)
    for site, moment in commands.compensation.moments.items():
        mine = own.supernet.compensation.moments[site]
        torch.testing.assert_close(mine, moment, rtol=0, atol=1e-3 * float(moment.diagonal().max()))


def test_fitting_leaves_no_files_and_the_largest_one_active(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    net = attached()
    net.fit(ROWS, SHORT)
    assert list((tmp_path / "temporary").iterdir()) == []
    assert net.supernet.current == net.space.maximal()
    assert net.supernet.degree == 0


def test_a_folder_keeps_metrics_and_checkpoints_to_go_on_from(tmp_path):
    net = attached()
    net.fit(ROWS, SHORT, folder=tmp_path / "kept")
    assert len((tmp_path / "kept" / "train" / "metrics.jsonl").read_text().splitlines()) == 3
    again = attached()
    assert len(again.fit(ROWS, SHORT, folder=tmp_path / "kept")) == 3  # of the first one
    state, wanted = again.supernet.factor_state(), net.supernet.factor_state()
    torch.testing.assert_close(state, wanted, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("rows", "settings", "named"),
    [
        ([{**row, "a": row["a"] + 1} for row in ROWS], SHORT, "order, rows"),
        (ROWS, replace(SHORT, max_steps=4), "settings.max_steps"),
    ],
)
def test_a_folder_is_of_one_training(tmp_path, rows, settings, named):
    """Its checkpoint is no answer to other rows or settings."""
    attached().fit(ROWS, SHORT, folder=tmp_path)
    again = attached()
    with pytest.raises(RunError, match=rf"differs in {named}; give another folder"):
        again.fit(rows, settings, folder=tmp_path)
    after = again.supernet.factor_state()
    assert all((b == 0).all() for name, b in after.items() if name.endswith("B"))


def test_training_leaves_no_setting_of_the_model_behind():
    """What is saved later would say that it keeps no keys and values."""
    net = attached()
    before = net.model.config.to_dict()
    net.fit(ROWS, replace(SHORT, max_steps=1, gradient_checkpointing=True))
    assert net.model.config.to_dict() == before and before["use_cache"]
    assert not net.model.is_activation_checkpointing and not net.model.training


def test_what_no_step_opens_is_told(capsys):
    attached().fit(ROWS, SHORT)
    told = "no sub-adapter with less heads, width is trained, for the 3 steps (max_steps) end in st"
    assert told in " ".join(capsys.readouterr().err.split())
    attached().fit(ROWS, replace(SHORT, max_steps=4))
    assert "no sub-adapter with less" not in capsys.readouterr().err


def test_what_a_failure_names_is_still_there(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    net = attached()
    with pytest.raises(TrainingError) as caught:
        net.fit(ROWS, replace(SHORT, lr=ScheduleConfig(base_lr=1e30), max_grad_norm=1e30))
    [file] = tmp_path.glob("elastic-*/train/failed.json")
    assert str(file) in str(caught.value)


def test_order_and_moments_are_the_same_from_rows_and_from_batches():
    by_rows, by_batches = attached(), attached()
    batches = by_rows._batches(ROWS, "rows")
    assert len(batches) == 3
    for net, data in ((by_rows, ROWS), (by_batches, batches)):
        net.order_channels(iter(data))  # nothing of what can be looked at once is lost
        net.calibrate(iter(data), batch_size=8)
    mine, theirs = by_rows.supernet, by_batches.supernet
    assert mine.order.keys() == theirs.order.keys() and len(mine.order) == 4
    torch.testing.assert_close(mine.order, theirs.order, rtol=0, atol=0)
    assert any(not torch.equal(o, torch.arange(len(o))) for o in mine.order.values())
    moments, others = mine.compensation.moments, theirs.compensation.moments
    torch.testing.assert_close(moments, others)


def test_ordering_keeps_the_function_of_a_model_that_is_attached_already():
    net, ids = attached(), tiny.tokens()
    before = tiny.logits(net.model, ids)
    net.order_channels(ROWS)
    torch.testing.assert_close(tiny.logits(net.model, ids), before)


def test_compact_is_what_the_supernet_computes(net):
    sub, ids = net.space.uniform(0.5), tiny.tokens()
    with net.active(sub, 0.25) as model:
        wanted = tiny.logits(model, ids)
    torch.testing.assert_close(
        tiny.logits(net.compact(sub, 0.25), ids), wanted, atol=1e-4, rtol=1e-4
    )
    half = tiny.logits(net.compact("uniform-0.5"), ids)
    torch.testing.assert_close(half, tiny.logits(compact(net.supernet, sub, 0.5), ids))


def test_a_saved_super_adapter_comes_back(net, tmp_path):
    folder = net.save(tmp_path / "super")
    again = elastic.reattach(tiny.llama(dtype=torch.float32), folder, net.tokenizer, task=BY)
    ids, sub = tiny.tokens(), net.space.minimal()
    small, wanted = again.compact(sub, 0), net.compact(sub, 0)
    torch.testing.assert_close(tiny.logits(small, ids), tiny.logits(wanted, ids), rtol=0, atol=0)
    assert again.supernet.compensation is not None
    with pytest.raises(RunError, match="trained in the order that is"):
        again.order_channels(ROWS)
    with pytest.raises(BaseMismatch):
        elastic.reattach(tiny.llama(1, dtype=torch.float32), folder)
    # The type it is loaded in does not matter.
    elastic.reattach(tiny.llama(dtype=torch.bfloat16), folder)


def test_transformers_loads_a_compact_model_of_different_sizes(net, tmp_path):
    groups = {group.name: 0 for group in net.space}
    sub = net.space.at({**groups, "model.layers.1.mlp_width": 2})
    small, ids = net.compact(sub), tiny.tokens()
    folder = elastic.save_compact(small, tmp_path / "small", net.tokenizer)
    auto = transformers.AutoModelForCausalLM
    model = auto.from_pretrained(folder, trust_remote_code=True)
    torch.testing.assert_close(tiny.logits(model, ids), tiny.logits(small, ids), rtol=0, atol=0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    assert tokenizer("1+2=")["input_ids"] == net.tokenizer("1+2=")["input_ids"]


@pytest.mark.parametrize("kind", ["bert", "gpt2", pytest.param("t5", marks=pytest.mark.slow)])
def test_other_kinds_of_models(kind):
    """An encoder with classes, an encoder-decoder, one whose linear layers are none."""
    size = dict(vocab_size=tiny.VOCABULARY, pad_token_id=tiny.PAD, eos_token_id=tiny.EOS)
    rows = [{"q": row["q"], "a": ("odd", "even")[row["a"] % 2]} for row in ROWS]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "bert":
            config = transformers.BertConfig(
                hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
                id2label={0: "even", 1: "odd"}, **size,
            )  # fmt: skip
            model = transformers.BertForSequenceClassification(config)
        elif kind == "gpt2":
            config = transformers.GPT2Config(
                n_embd=32, n_layer=2, n_head=4, bos_token_id=tiny.BOS, **size
            )
            model = transformers.GPT2LMHeadModel(config)
        else:
            model = tiny.t5()
    net = attached(model, space="auto", max_rank=4)
    net.fit(rows, replace(SHORT, max_steps=1))
    assert net.supernet.order and net.supernet.compensation
    front = net.search(rows[:8], "params", trials=4, starts=2)
    assert front[0].params < front.full.params
    small = net.compact(front[0])
    assert sum(p.numel() for p in small.parameters()) == front[0].params


def test_dropout_is_off_whatever_mode_an_own_loop_left():
    """What is measured of the model does not depend on it, and the mode stays."""
    found = []
    for training in (False, True):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            config = transformers.GPT2Config(
                n_embd=32, n_layer=2, n_head=4, bos_token_id=tiny.BOS, eos_token_id=tiny.EOS,
                vocab_size=tiny.VOCABULARY, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5,
            )  # fmt: skip
            model = transformers.GPT2LMHeadModel(config)
        net = attached(model, space="auto")
        batches = net._batches(ROWS, "rows")
        net.model.train(training)
        net.order_channels(batches)
        net.calibrate(batches)
        importance = group_importance(net.supernet, batches[:1])
        assert net.model.training == training
        found.append((net.supernet.order, net.supernet.compensation.moments, importance))
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_number_to_be_learnt_is_never_one_to_be_ignored(batch_size):
    """A head of one label answers with a number; -100 is one as any other."""
    losses = []
    for number in (-100, -100.001):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            config = transformers.BertConfig(
                hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
                vocab_size=tiny.VOCABULARY, pad_token_id=tiny.PAD, num_labels=1,
            )  # fmt: skip
            model = transformers.BertForSequenceClassification(config)
        rows = [{"q": f"number {n}", "a": number if n % 2 else n} for n in range(8)]
        net = attached(model, space="auto", max_rank=4)
        log = net.fit(rows, replace(SHORT, batch_size=batch_size, max_steps=4))
        losses.append([row["loss"] for row in log])
    torch.testing.assert_close(*losses, rtol=1e-3, atol=0)
    assert net.compact("minimal").config.problem_type == "regression"


def test_channels_are_ordered_at_full_size_whatever_is_active():
    wanted, net = attached(), attached()
    wanted.order_channels(ROWS)
    with net.active(net.space.minimal()):
        net.order_channels(ROWS)
    torch.testing.assert_close(net.supernet.order, wanted.supernet.order)


# What is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"run": "runs/mine"}, "fit: run is a setting of elastic train"),
        ({"adapter": AdapterConfig(rank=4)}, "fit: adapter is a setting"),
        ({"task": TaskConfig(prompt="{q}")}, "fit: task is a setting .* give it to attach"),
        ({"vocab": VocabConfig(text="words.txt")}, "fit: vocab is a setting of elastic train"),
        ({"stages": [StageConfig(train_dims=["rank"])]}, "fit: a stage opens rank, and .*elastic"),
    ],
)
def test_settings_of_a_run_are_refused(net, settings, message):
    with pytest.raises(ConfigError, match=message):
        net.fit(ROWS, replace(SHORT, **settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "lroa"}, "attach: unknown method 'lroa'; did you mean 'lora'"),
        ({"adapter": AdapterConfig(), "max_rank": 8}, "leave out method and max_rank"),
        ({"space": {"blocks": "model.layers.*", "groups": {}}}, "no layer carries factors"),
        ({"space": "nowhere"}, "nowhere"),
        ({"seed": 2**70}, "seed is 1180591620717411303424; choose from 0 to"),
        ({"space": "llama-vocab"}, "cuts the vocabulary, .* elastic train alone"),
    ],
)
def test_what_does_not_fit_is_refused(settings, message):
    model = tiny.llama(dtype=torch.float32)
    known = {} if "adapter" in settings else {"max_rank": 8}
    with pytest.raises(ConfigError, match=message):
        elastic.attach(model, **({"space": tiny.space_dict()} | known | settings))
    assert elastic.attach(model, space=tiny.space_dict(), max_rank=8), "the model is as it was"


def test_what_cannot_be_calibrated_on_is_refused(net):
    for settings in ({"examples": -3}, {"batch_size": 0}):
        with pytest.raises(ConfigError, match=r"calibrate: examples or batch_size is .*at least 1"):
            net.calibrate(ROWS, **settings)
    declared = {"blocks": "encoder.block.*", "adapt": ["layer.0.SelfAttention.q"], "groups": {}}
    pair = attached(tiny.t5(), space=declared)
    with pytest.raises(ConfigError, match="calibrate: the decoder of this model reads labels"):
        pair.calibrate([{"input_ids": tiny.tokens()}])


def test_float16_is_not_trained_without_a_loss_scaler():
    with pytest.raises(ConfigError, match="fit: float16 on cpu: small gradients vanish"):
        attached(tiny.llama(dtype=torch.float16)).fit(ROWS, SHORT)


def test_a_model_with_an_adapter_is_refused(net):
    with pytest.raises(ModelError, match="a super-adapter already"):
        elastic.attach(net.model)
    from peft import LoraConfig, get_peft_model

    peft = get_peft_model(tiny.llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ModelError, match=r"carries an adapter of PEFT; merge it first"):
        elastic.attach(peft)


def test_rows_need_a_tokenizer_and_are_named(net, monkeypatch):
    with pytest.raises(DataError, match=r"^fit: row 2: field 'q' is missing"):
        net.fit([ROWS[0], {"a": 1}], SHORT)
    monkeypatch.setattr(net, "tokenizer", None)
    with pytest.raises(ConfigError, match=r"rows need a tokenizer: elastic\.attach\(model, tok"):
        net.fit(ROWS, SHORT)


def test_ranks_are_whole_unless_asked_for(net):
    assert {group.dim for group in net.space} == {"width", "heads"}
    assert "rank" in {group.dim for group in attached(ranks="elastic").space}


# Own loops


def test_visits_of_an_own_loop(net):
    visited = [net.visits(step, 12) for step in range(12)]
    assert all(len(subs) == 1 for subs in visited)
    assert {subs[0] for subs in visited[:4]} == {net.space.maximal()}
    assert len({subs[0] for subs in visited[4:]}) > 3
    assert visited == [net.visits(step, 12) for step in range(12)]
    settings = TrainConfig(sampling="sandwich", stages=[StageConfig(train_dims=["width", "heads"])],
                           progressivity=["width", "heads"])  # fmt: skip
    largest, _, smallest = net.visits(5, 12, settings)
    assert (largest, smallest) == (net.space.maximal(), net.space.minimal())
