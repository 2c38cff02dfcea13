"""The gradients of one training step, in this process or in several."""

from __future__ import annotations

from pytest import MonkeyPatch
from transformers import TrainerCallback

from elastic import data
from elastic.config import ModelConfig, StageConfig, TaskConfig
from elastic.data.encoding import encode_all
from elastic.models import loading
from elastic.run import Run
from elastic.training import trainer
from elastic.training.schedule import Schedule
from elastic.training.trainer import ElasticTrainer
from tests.helpers import tiny
from tests.helpers.tiny_runs import space_file, train_config


def step_gradients(
    tiny_folder, tmp_path, method, *, batch_size, accumulation, max_grad_norm=1e9, in_loss=False
):
    """The gradients that the optimiser sees in the first step of 16 examples; with the regulariser
    in the loss, as DeepSpeed wants it, if `in_loss`."""
    seen = {}

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
            if not seen:
                seen.update({n: p.grad.clone() for n, p in net.model.named_parameters()
                             if p.grad is not None})  # fmt: skip

    config = train_config(
        tiny_folder,
        tmp_path / f"{method}-{batch_size}-{accumulation}",
        adapter=tiny.ADAPTERS[method],
        space=space_file(tmp_path),
        model=ModelConfig(path=str(tiny_folder), dtype="float64", device="cpu"),
        batch_size=batch_size,
        accumulation=accumulation,
        max_grad_norm=max_grad_norm,
        stages=[StageConfig(epochs=1)],
        task=TaskConfig(train_examples=16, validation_examples=1, test_examples=1),
    )
    net = tiny.supernet(method)
    base = loading.load(config.model)
    examples = data.load_task(config.task, 0).train
    encoded = encode_all(base.tokenizer, examples, base.model)
    schedule = Schedule(config.stages, config.lr, 1)
    real = ElasticTrainer.__init__

    def init(self, *args, **kwargs):
        real(self, *args, **kwargs)
        self.add_callback(Watch())
        self.penalty_in_loss = in_loss

    with MonkeyPatch.context() as patch:
        patch.setattr(ElasticTrainer, "__init__", init)
        trainer.fit(net, config, schedule, encoded, Run(config.run), pad=tiny.PAD)
    return net, seen
