"""What the Hugging Face Trainer is told of a run."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from transformers import TrainingArguments

from elastic import trackers
from elastic.config import TrainConfig
from elastic.run import Run
from elastic.supernet.supernet import Supernet
from elastic.training import checkpoints
from elastic.training.schedule import Schedule

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class OneDevice(TrainingArguments):
    """A process trains on one device, however many there are: several processes use several."""

    @property
    def n_gpu(self) -> int:
        return min(1, super().n_gpu)


def arguments_of(
    net: Supernet, config: TrainConfig, schedule: Schedule, run: Run, report_to: list[str]
) -> OneDevice:
    """The arguments of this run, whose metrics go to the trackers of the Trainer in `report_to`."""
    device = net.model.device
    return OneDevice(
        output_dir=str(run.checkpoints),
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulation,
        num_train_epochs=schedule.epochs,
        max_steps=schedule.steps if schedule.max_steps else -1,
        learning_rate=1.0,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        activation_checkpointing=config.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        # Blocks that are left out have no gradients.
        ddp_find_unused_parameters=bool(net.space.depths),
        ddp_broadcast_buffers=False,  # constants all of them, a quantised base among them
        fp16=config.model.dtype == "float16",
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_steps=config.save_steps,
        save_total_limit=checkpoints.KEPT,
        seed=config.seed,
        report_to=report_to,
        run_name=f"{run.path.resolve().name}-train",
        project=os.environ.get("TRACKIO_PROJECT", trackers.PROJECT),
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=device.type == "cuda",
    )


@contextlib.contextmanager
def as_before(model: PreTrainedModel) -> Iterator[None]:
    """What a Trainer turns on or off in a model for training alone is as it was behind the block:
    otherwise what is saved later says that it keeps no keys and values."""
    said, name = vars(model.config), "use_cache"
    before, checkpointing = {**said}, model.is_activation_checkpointing
    try:
        yield
    finally:
        if name in before:
            said[name] = before[name]
        else:
            said.pop(name, None)
        if model.is_activation_checkpointing and not checkpointing:
            model.activation_checkpointing_disable()
