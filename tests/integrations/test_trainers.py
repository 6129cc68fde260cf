"""Sparse training by the callbacks of transformers and Lightning: their own loops, checkpoints and ends."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models
import torch
from sparse_training import batches, network, train
from torch import nn
from torch.utils.data import DataLoader

import nmsolve
from nmsolve.train import SparseTraining

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate", reason="Trainer asks for it")

from nmsolve.integrations.transformers import STATE_FILE, SparseTrainingCallback  # noqa: E402

OPTIONS = {"refresh": 3, "decay": 1e-3, "backend": "torch"}
TOKENS = torch.randint(3, tiny_models.VOCABULARY, (32, 12), generator=torch.Generator().manual_seed(0))


# --- transformers -------------------------------------------------------------------------------------------


def trainer(
    folder: Path, callback: object, steps: int = 8, model: nn.Module | None = None, **changes: object
) -> transformers.Trainer:
    arguments = transformers.TrainingArguments(
        **{
            "output_dir": str(folder),
            "max_steps": steps,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "save_steps": 4,
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            **changes,
        }
    )
    return transformers.Trainer(
        model=tiny_models.make("llama") if model is None else model,
        args=arguments,
        train_dataset=[{"input_ids": row, "labels": row} for row in TOKENS],
        eval_dataset=[{"input_ids": row, "labels": row} for row in TOKENS[:4]],
        callbacks=[callback],
    )


def losses(run: transformers.Trainer) -> dict[int, float]:
    return {entry["step"]: entry["loss"] for entry in run.state.log_history if "loss" in entry}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[transformers.Trainer, Path]:
    """A run of 8 steps with a checkpoint at step 4, between two refreshes."""
    folder = tmp_path_factory.mktemp("whole")
    run = trainer(folder, SparseTrainingCallback("2:4", **OPTIONS))
    run.train()
    return run, folder


def test_trainer_trains_under_masks(whole):
    run, _ = whole
    sparse = next(c for c in run.callback_handler.callbacks if isinstance(c, SparseTrainingCallback))
    assert (sparse.sparse.step, sparse.sparse.phase) == (8, "finished")  # steps, not batches
    assert len(sparse.masks) == 14
    for name, mask in sparse.masks.items():
        nmsolve.check_mask(mask, 2, 4)
        assert torch.equal(run.model.get_parameter(name) != 0, mask)
    found = losses(run)
    assert found[8] < found[1]
    logged = [entry for entry in run.state.log_history if "loss" in entry]
    assert [entry["sparse/refreshes"] for entry in logged] == [0, 0, 1, 1, 1, 2, 2, 2]
    assert 0 < logged[-1]["sparse/kept_share"] < 1


def test_trainer_resumes_to_the_bit(whole, tmp_path):
    run, folder = whole
    callback = SparseTrainingCallback("2:4", resume_from=folder / "checkpoint-4", **OPTIONS)
    again = trainer(tmp_path, callback)
    again.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    assert losses(again) == losses(run)
    for name, value in run.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value)


def test_a_checkpoint_of_trainer_is_found_where_trainer_puts_it(whole):
    run, folder = whole
    again = trainer(folder, SparseTrainingCallback("2:4", **OPTIONS), steps=9, save_strategy="no")
    again.train(resume_from_checkpoint=True)
    assert {step: loss for step, loss in losses(again).items() if step <= 8} == losses(run)
    assert 9 in losses(again)


def test_a_checkpoint_without_masks_or_of_another_run_is_refused(whole, tmp_path):
    _, folder = whole
    plain = trainer(tmp_path, transformers.PrinterCallback(), steps=4)
    plain.train()
    own, other = tmp_path / "checkpoint-4", folder / "checkpoint-4"
    for options, resume, message in [
        ({}, own, f"expected {STATE_FILE} of step 4 .* found none"),
        ({}, other, "the checkpoint of step 4 .* another or none"),
        ({"resume_from": other}, own, "the checkpoint of step 4 .*checkpoint-4, found another"),
        ({"resume_from": other, "pattern": "4:8"}, other, "state: expected patterns="),
    ]:
        run = trainer(tmp_path, SparseTrainingCallback(**OPTIONS, **options))
        with pytest.raises(nmsolve.NMSolveError, match=message):
            run.train(resume_from_checkpoint=str(resume))
        assert type(run.model.model.layers[0].mlp.up_proj) is nn.Linear


def test_the_best_model_ends_with_the_masks_of_its_checkpoint(tmp_path):
    callback = SparseTrainingCallback("2:4", **{**OPTIONS, "refresh": 1})
    run = trainer(
        tmp_path,
        callback,
        4,
        save_steps=2,
        eval_steps=2,
        eval_strategy="steps",
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,  # so that it is an earlier one
    )
    run.train()
    assert run.state.best_global_step == 2
    saved = torch.load(tmp_path / "checkpoint-2" / STATE_FILE, weights_only=True)["sparse"]
    reference = SparseTraining(tiny_models.make("llama"), "2:4", **{**OPTIONS, "refresh": 1})
    reference.load_state_dict(saved)
    for name, mask in reference.masks.items():
        assert torch.equal(callback.masks[name], mask)
        assert torch.equal(run.model.get_parameter(name) != 0, mask)


def test_what_the_callback_cannot_do_is_refused(tmp_path, monkeypatch):
    with pytest.raises(nmsolve.NMSolveError, match=r"options: SparseTraining got an unexpected .*'refrsh'"):
        SparseTrainingCallback(refrsh=3)
    run = trainer(tmp_path, SparseTrainingCallback(**OPTIONS))
    monkeypatch.setattr(run.args, "deepspeed_plugin", object(), raising=False)
    with pytest.raises(nmsolve.NMSolveError, match="trainer: DeepSpeed steps flat partitions"):
        run.callback_handler.on_train_begin(run.args, run.state, run.control)
    run = trainer(tmp_path, SparseTrainingCallback(**OPTIONS))
    run.state.is_hyper_param_search = True
    with pytest.raises(nmsolve.NMSolveError, match="a search for hyperparameters"):
        run.callback_handler.on_train_begin(run.args, run.state, run.control)


def test_training_again_after_an_interruption(tmp_path):
    class Interrupting(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                raise KeyboardInterrupt

    callback = SparseTrainingCallback("2:4", **OPTIONS)
    run = trainer(tmp_path, callback, 3, save_strategy="no")
    run.add_callback(stop := Interrupting())
    with pytest.raises(KeyboardInterrupt):
        run.train()
    run.remove_callback(stop)
    run.train()
    assert callback.sparse.step == 3


# --- Lightning ----------------------------------------------------------------------------------------------


@pytest.fixture(params=["lightning.pytorch", "pytorch_lightning"])
def lightning(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> object:
    """One of Lightning's two packages, and the callback made anew for it."""
    found = pytest.importorskip(request.param)
    other = {"lightning.pytorch", "pytorch_lightning"} - {request.param}
    monkeypatch.delitem(sys.modules, other.pop(), raising=False)
    monkeypatch.delitem(sys.modules, "nmsolve.integrations.lightning", raising=False)
    found.own = importlib.import_module("nmsolve.integrations.lightning").SparseTrainingCallback
    return found


def fit(lightning, folder: Path, callback, steps: int = 8, ckpt_path=None, seen: int = 0):
    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.losses = network(), []

        def training_step(self, batch, index):
            x, y = batch
            loss = (self.net(x) - y).square().mean()
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=0.02)

    module = Module()
    trainer = lightning.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        default_root_dir=folder,
        callbacks=[
            callback,
            lightning.callbacks.ModelCheckpoint(folder, "{step}", every_n_train_steps=5, save_top_k=-1),
        ],
    )
    data = list(batches(10))
    # Lightning begins with the first batch again where a loader does not say how to go on.
    loader = DataLoader(data[seen:] + data[:seen], batch_size=None)
    trainer.fit(module, loader, ckpt_path=ckpt_path)
    return trainer, module


def test_lightning_trains_and_resumes_to_the_bit(lightning, tmp_path):
    callback = lightning.own("2:4", **OPTIONS)
    trainer, module = fit(lightning, tmp_path, callback)
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    sparse = SparseTraining(model, "2:4", **OPTIONS)
    sparse.attach(optimizer)
    assert module.losses == train(model, optimizer, batches(8))
    assert trainer.callback_metrics["sparse/refreshes"] == 2
    masks = sparse.finish()
    for name, mask in masks.items():
        assert torch.equal(callback.masks[f"net.{name}"], mask)
        assert torch.equal(module.net.get_parameter(name) != 0, mask)

    again = lightning.own("2:4", **OPTIONS)
    _, resumed = fit(lightning, tmp_path, again, ckpt_path=tmp_path / "step=5.ckpt", seen=5)
    assert resumed.losses == module.losses[5:]
    for name, mask in masks.items():
        assert torch.equal(again.masks[f"net.{name}"], mask)


def test_a_checkpoint_of_lightning_after_the_end(lightning, tmp_path):
    callback = lightning.own("2:4", **OPTIONS)
    trainer, _ = fit(lightning, tmp_path, callback, steps=4)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    again = lightning.own("2:4", **OPTIONS)
    _, module = fit(lightning, tmp_path, again, steps=6, ckpt_path=tmp_path / "end.ckpt")
    assert again.sparse.step == 6
    assert len(module.losses) == 2


def test_lightning_leaves_plain_layers_after_an_exception(lightning, tmp_path):
    class Failing(lightning.Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == 2:
                raise RuntimeError("a disk is full")

    callback = lightning.own("2:4", **OPTIONS)
    _, module = fit(lightning, tmp_path, callback, steps=1)
    module.net.load_state_dict(network().state_dict())
    with pytest.raises(RuntimeError, match="a disk is full"):
        lightning.Trainer(
            max_steps=4,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[callback, Failing()],
        ).fit(module, DataLoader(list(batches(4)), batch_size=None))
    assert type(module.net.up) is nn.Linear
    assert (module.net.up.weight != 0).all()


# --- several processes --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "trainer", "trainer-fsdp2", "trainer-sharded"])
def test_two_processes_are_one_and_resume_to_the_bit(kind, tmp_path):
    """Lightning under DDP and FSDP2 against one process; transformers' Trainer under DDP and FSDP2."""
    pytest.importorskip("pytorch_lightning")
    support = Path(__file__).resolve().parents[1] / "support"
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    run = subprocess.run(
        [sys.executable, *command, str(support / "trainers_spread.py"), kind, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(support), *sys.path])},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr[-4000:]
