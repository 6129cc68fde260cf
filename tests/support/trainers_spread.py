"""What test_trainers.py runs in every process that torchrun starts: ``trainers_spread.py KIND FOLDER``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import accelerate
import pytorch_lightning
import tiny_models
import torch
import transformers
from pytorch_lightning.strategies import ModelParallelStrategy
from sparse_training import batches, network, train
from torch import distributed, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.utils.data import DataLoader

import nmsolve
from nmsolve.integrations import lightning as for_lightning
from nmsolve.integrations import transformers as for_transformers
from nmsolve.train import SparseTraining

OPTIONS = {"refresh": 3, "decay": 1e-3, "backend": "torch"}


class Module(pytorch_lightning.LightningModule):
    """Takes this process's part of every batch."""

    def __init__(self, sharded: bool) -> None:
        super().__init__()
        self.net, self.sharded, self.losses = network(), sharded, []

    def configure_model(self) -> None:
        if self.sharded and not isinstance(self.net.up.weight, torch.distributed.tensor.DTensor):
            for layer in (self.net.up, self.net.down, self.net):
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], index: int) -> torch.Tensor:
        x, y = (part.chunk(self.trainer.world_size)[self.trainer.global_rank] for part in batch)
        loss = (self.net(x) - y).square().mean()
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.02)


def fit(kind: str, folder: Path, resumed: bool) -> tuple[list[float], dict[str, torch.Tensor]]:
    seen = 5 if resumed else 0
    strategy = (
        ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1) if kind == "fsdp2" else "ddp"
    )
    callback, module = for_lightning.SparseTrainingCallback("2:4", **OPTIONS), Module(kind == "fsdp2")
    data = list(batches(10))
    saving = pytorch_lightning.callbacks.ModelCheckpoint(
        folder, "{step}", every_n_train_steps=5, save_top_k=-1
    )
    pytorch_lightning.Trainer(
        max_steps=8,
        accelerator="cpu",
        devices=2,
        strategy=strategy,
        logger=False,
        enable_progress_bar=False,
        use_distributed_sampler=False,
        callbacks=[callback, saving],
    ).fit(
        module,
        DataLoader(data[seen:] + data[:seen], batch_size=None),
        ckpt_path=str(folder / "step=5.ckpt") if resumed else None,
    )
    return module.losses, callback.masks


def with_lightning(kind: str, folder: Path) -> None:
    losses, masks = fit(kind, folder, False)
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    sparse = SparseTraining(model, "2:4", **OPTIONS)
    sparse.attach(optimizer)
    expected = torch.tensor(train(model, optimizer, batches(8)))
    averaged = torch.tensor(losses)
    distributed.all_reduce(averaged)
    torch.testing.assert_close(averaged / 2, expected, rtol=1e-6, atol=0)
    for name, mask in sparse.finish().items():
        found = masks[f"net.{name}"]
        assert torch.equal(found.full_tensor() if kind == "fsdp2" else found, mask)
    assert fit(kind, folder, True)[0] == losses[5:]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, torch.distributed.tensor.DTensor) else tensor


def trained(
    folder: Path, checkpoint: str | None, model: nn.Module | None = None, **changes: object
) -> tuple[list[float], nn.Module]:
    tokens = torch.randint(3, tiny_models.VOCABULARY, (32, 12), generator=torch.Generator().manual_seed(0))
    callback = for_transformers.SparseTrainingCallback("2:4", **OPTIONS)
    trainer = transformers.Trainer(
        model=tiny_models.make("llama") if model is None else model,
        args=transformers.TrainingArguments(
            str(folder),
            max_steps=6,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            logging_steps=1,
            save_steps=4,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            **changes,
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in tokens],
        callbacks=[callback],
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    assert len(callback.masks) == 14
    for name, mask in callback.masks.items():
        nmsolve.check_mask(whole(mask), 2, 4)
        assert torch.equal(whole(trainer.model.get_parameter(name)) != 0, whole(mask))
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], trainer.model


def with_trainer(folder: Path) -> None:
    losses, model = trained(folder, None)
    again, resumed = trained(folder, str(folder / "checkpoint-4"))
    assert (again, len(set(losses))) == (losses, 6)
    for name, value in model.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value)
        parts = [torch.empty_like(value) for _ in range(2)]
        distributed.all_gather(parts, value)
        assert torch.equal(*parts)


def let_accelerate_shard_on_cpus() -> None:
    """accelerate takes its FSDP plugin on GPUs alone, though nothing in it needs one."""
    state = accelerate.state.AcceleratorState
    begin = state.__init__

    def begin_with_plugin(self: Any, *args: Any, fsdp_plugin: Any = None, **options: Any) -> None:
        begin(self, *args, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None:
            self.fsdp_plugin = fsdp_plugin
            self.distributed_type = accelerate.DistributedType.FSDP
            accelerate.state.PartialState._shared_state["distributed_type"] = self.distributed_type

    state.__init__ = begin_with_plugin


def with_trainer_and_fsdp2(folder: Path) -> None:
    """accelerate's FSDP2, with either kind of checkpoint."""
    expected = trained(folder / "ddp", None, save_strategy="no")[0]
    let_accelerate_shard_on_cpus()
    for kind in ("SHARDED_STATE_DICT", "FULL_STATE_DICT"):
        config = {
            "version": 2,
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
            "state_dict_type": kind,
        }
        options = {"fsdp": True, "fsdp_config": config}
        losses, model = trained(folder / kind, None, **options)
        assert isinstance(model, FSDPModule)
        torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-6, atol=0)
        again, resumed = trained(folder / kind, str(folder / kind / "checkpoint-4"), **options)
        assert again == losses
        for name, value in model.state_dict().items():
            assert torch.equal(whole(resumed.state_dict()[name]), whole(value))


def with_trainer_and_sharded_loading(folder: Path) -> None:
    """A model that transformers itself shards while it loads it."""
    from transformers.distributed import DistributedConfig

    expected = trained(folder / "ddp", None, save_strategy="no")[0]
    if distributed.get_rank() == 0:
        tiny_models.make("llama").save_pretrained(folder / "model")
    distributed.barrier()
    model = transformers.LlamaForCausalLM.from_pretrained(
        folder / "model", distributed_config=DistributedConfig(fsdp_size=2)
    )
    assert isinstance(model, FSDPModule)
    losses, _ = trained(folder, None, model, save_strategy="no")  # which Trainer asks for
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-6, atol=0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    of_trainer = {
        "trainer": with_trainer,
        "trainer-fsdp2": with_trainer_and_fsdp2,
        "trainer-sharded": with_trainer_and_sharded_loading,
    }
    if sys.argv[1] in of_trainer:
        of_trainer[sys.argv[1]](Path(sys.argv[2]))
    else:
        with_lightning(sys.argv[1], Path(sys.argv[2]))
