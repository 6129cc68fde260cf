"""What test_resuming.py starts and kills: ``killed_training.py FOLDER STEPS [PLACE STEP]``.

Trains with a checkpoint in FOLDER after every step, from the last one that is there, and prints a line
``step loss`` for each, the loss to the last bit. With a PLACE it kills itself at it in that STEP:
"refresh", when masks are solved but not written; "step", when the optimizer has moved the weights;
"checkpoint", when half of the file is written.
"""

from __future__ import annotations

import io
import itertools
import os
import signal
import sys
from pathlib import Path

import torch
from sparse_training import adamw, batches, network, train

import nmsolve.train.training
from nmsolve.files import replacing
from nmsolve.train import SparseTraining


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def main(folder: Path, steps: int, place: str = "", last: int = 0) -> None:
    torch.set_num_threads(1)
    model = network()
    optimizer = adamw(model)
    sparse = SparseTraining(model, refresh=3, decay=0.01, backend="torch")
    file = folder / "checkpoint.pt"
    if file.exists():
        saved = torch.load(file, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        sparse.load_state_dict(saved["sparse"])
    sparse.attach(optimizer)
    for step in range(sparse.step + 1, steps + 1):
        if (place, step) == ("refresh", last):
            nmsolve.train.training.write_masks = die
        if (place, step) == ("step", last):
            optimizer.register_step_post_hook(die)
        (loss,) = train(model, optimizer, itertools.islice(batches(steps), step - 1, step))
        written = io.BytesIO()
        state = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "sparse": sparse.state_dict(),
        }
        torch.save(state, written)
        with replacing(file) as path, path.open("wb") as out:
            half = len(written.getbuffer()) // 2
            out.write(written.getbuffer()[:half])
            out.flush()
            if (place, step) == ("checkpoint", last):
                die()
            out.write(written.getbuffer()[half:])
        print(step, loss.hex(), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:4], *map(int, sys.argv[4:]))
