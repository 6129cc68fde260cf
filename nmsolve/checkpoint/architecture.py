"""What config.json says about the tensors beside it: the modules of its architecture, built without weights.

transformers is imported where config.json names an architecture; the network is not used, and no code that
comes with a checkpoint is run.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nmsolve.checkpoint.format import Checkpoint
from nmsolve.checkpoint.roles import Role, roles_of, told
from nmsolve.checkpoint.stored_names import Destination, destinations
from nmsolve.errors import counted, one_line
from nmsolve.files import read_json

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Architecture", "architecture_of", "build", "read_config", "too_large"]

# A configuration that asks for more blocks than this for each tensor of the checkpoint is not its own.
_MOST_BLOCKS = 64
_COUNTS = re.compile(r"^(num|n|moe_num)_.*(layer|expert|block)|(layers|depth)$")


@dataclass(frozen=True)
class Architecture:
    """What is known of a checkpoint's tensors beside their names.

    Attributes
    ----------
    model : str
        Class and version, ``"LlamaForCausalLM of transformers 5.0.0"``; empty if there is no model to ask.
    why : str
        Why there is none.
    roles : mapping of str to Role
        By the names of the checkpoint. Tensors that are no part of the model are not there.
    types : frozenset of str
        Every ``model_type`` in config.json.
    """

    model: str = ""
    why: str = ""
    roles: Mapping[str, Role] = field(default_factory=dict)
    types: frozenset[str] = frozenset()


def architecture_of(checkpoint: Checkpoint) -> Architecture:
    """Asks the architecture that config.json names, in the checkpoint's folder or beside its file."""
    folder = checkpoint.root if checkpoint.is_folder else checkpoint.root.parent
    config, why = read_config(folder)
    types = frozenset(_types(config))
    shapes = {entry.name: entry.shape for _, entry in checkpoint.entries()}
    if not why:
        why = too_large(config, len(shapes))
    if why:
        return Architecture(why=why, types=types)
    named = config["architectures"][0]
    if importlib.util.find_spec("transformers") is None or importlib.util.find_spec("torch") is None:
        return Architecture(why="transformers is not installed", types=types)
    try:
        model, version = build(folder, named)
        found = destinations(model, shapes)
        roles = roles_of(model)
    except Exception as error:  # whatever a wrong configuration makes of the modules
        return Architecture(why=f"{named} cannot be built: {one_line(error)}", types=types)
    lost = [name for name, shape in shapes.items() if len(shape) > 1 and name not in found]
    if 2 * len(lost) > sum(len(shape) > 1 for shape in shapes.values()):
        return Architecture(
            why=f"{named} has no {lost[0]} ({len(lost)} of {len(shapes)} tensors are no part of it)",
            types=types,
        )
    held = {name: tuple(parameter.shape) for name, parameter in model.state_dict(keep_vars=True).items()}
    stored = {
        name: _stored(roles[place.parameter], place, shapes[name], held[place.parameter])
        for name, place in found.items()
        if place.parameter in roles
    }
    return Architecture(f"{named} of transformers {version}", "", stored, types)


def read_config(folder: Path) -> tuple[dict[str, Any], str]:
    """The folder's config.json, and why it names no architecture (empty if it does)."""
    path = folder / "config.json"
    if not path.is_file():
        return {}, "there is no config.json"
    try:
        config = read_json(path)
    except (OSError, ValueError):
        return {}, "config.json cannot be read"
    if not isinstance(config, dict):
        return {}, "config.json is no JSON object"
    named = config.get("architectures")
    if not isinstance(named, list) or not named or not isinstance(named[0], str):
        return config, "config.json names no architecture"
    return config, ""


def _parts(config: object) -> Iterator[dict[str, Any]]:
    """A configuration and the configurations inside it, however deep."""
    left = [config]
    while left:
        part = left.pop()
        if isinstance(part, dict):
            yield part
            left += part.values()


def _types(config: object) -> Iterator[str]:
    """Every ``model_type`` in a configuration and the configurations inside it."""
    for part in _parts(config):
        if isinstance(part.get("model_type"), str):
            yield part["model_type"]


def too_large(config: object, tensors: int) -> str:
    """Why a configuration is not to be built for so few tensors; empty if it may be."""
    for part in _parts(config):
        for key, value in part.items():
            if _COUNTS.search(key) and isinstance(value, int) and value > _MOST_BLOCKS * max(tensors, 16):
                return f"config.json says {key} {value} for {counted(tensors, 'tensor')}"
    return ""


def build(folder: Path, named: str) -> tuple[nn.Module, str]:
    """The modules of an architecture on the meta device, with their weights tied, and whose version."""
    import torch
    import transformers

    kind = getattr(transformers, named, None)
    if not isinstance(kind, type) or not issubclass(kind, transformers.PreTrainedModel):
        raise ValueError(f"transformers {transformers.__version__} has none")
    with _quiet(), _offline():
        config = transformers.AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        if getattr(config, "use_pretrained_backbone", False):
            config.use_pretrained_backbone = False
        with torch.device("meta"):
            model: nn.Module = kind._from_config(config)  # type: ignore[attr-defined]
        told(model, "tie_weights")
    return model, transformers.__version__


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers says nothing."""
    import warnings

    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)


@contextmanager
def _offline() -> Iterator[None]:
    """huggingface_hub looks nothing up: parts of some architectures are named by where they come from."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _stored(role: Role, place: Destination, shape: tuple[int, ...], held: tuple[int, ...]) -> Role:
    """The role of a tensor as it is in the file, of that of the parameter that it becomes."""
    if role.kind == "stack" and len(shape) == 2:
        role = replace(role, kind="linear", input_dim=1 if role.input_dim is None else role.input_dim)
    if role.input_dim is not None and place.transposes(shape, held):
        role = replace(role, input_dim=1 - role.input_dim)
    return role
