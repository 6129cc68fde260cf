"""What the tests of whole-model pruning share."""

from __future__ import annotations

import torch
from torch import nn

from nmsolve.prune import prune_model
from nmsolve.prune.calibration import call_model

QUICK = {"backend": "torch", "progress": False}


def prune(model, data, pattern="4:8", **options):
    return prune_model(model, data, pattern, **{"method": "wanda", **QUICK, **options})


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def mlp(width: int = 16, depth: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    steps: list[nn.Module] = []
    for _ in range(depth):
        steps += [nn.Linear(width, width), nn.ReLU(inplace=True)]
    return nn.Sequential(*steps)


def inputs_of(model, name, batches):
    seen = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    with torch.no_grad():
        for batch in batches:
            call_model(model, batch)
    hook.remove()
    return torch.cat([x.reshape(-1, x.shape[-1]) for x in seen]).double()
