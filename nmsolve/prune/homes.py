"""Where a model's weights are while they are not at work: in the model, on the host, or in its checkpoint.

A model whose weights are away has parameters on the meta device. What is called gets its own for the call: a
*unit*, a member of the outermost list of modules that has it (a block of a transformer), for its forward
pass; what is in no unit (embeddings, norms, a head) for a forward pass of the whole model.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nmsolve.errors import NMSolveError
from nmsolve.prune.layers import Layer
from nmsolve.prune.methods import check_offload
from nmsolve.prune.peers import Peers
from nmsolve.prune.store import stored_part

if TYPE_CHECKING:
    from nmsolve.prune.unloaded import StoredWeights

__all__ = ["Home", "OnDisk", "OnHost", "home_of"]


class Home:
    """The weights are where the model has them; a context manager for a run.

    Attributes
    ----------
    away : bool
        Whether parameters are on the meta device between calls.
    most : int
        Bytes of the weights that were at work at a time, at most; 0 where all are there.
    """

    away = False
    most = 0

    def __init__(self, model: nn.Module, peers: Peers) -> None:
        self.model, self.peers = model, peers

    def __enter__(self) -> Home:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def device_of(self, layer: Layer) -> torch.device:
        """Where a layer is at work."""
        return layer.weight.device

    def there(self, *modules: nn.Module) -> AbstractContextManager[None]:
        """The weights of these modules are at work in the block."""
        return nullcontext()

    def outside(self) -> AbstractContextManager[None]:
        """The weights that are in no unit are at work in the block."""
        return nullcontext()

    def value(self, name: str, tensor: Tensor) -> Tensor:
        """What a parameter or buffer of this name holds."""
        return tensor

    def mask(self, layer: Layer, mask: Tensor) -> None:
        """Puts a weight to zero where a mask is False."""
        peers = self.peers
        peers.held(layer.weight).mul_(peers.part(mask.to(layer.weight.device), layer.weight))

    def keep(self, layer: Layer, weight: Tensor) -> None:
        """Replaces a weight."""
        self.peers.held(layer.weight).copy_(self.peers.part(weight, layer.weight))

    def keep_later(self, layer: Layer, weight: Tensor) -> Callable[[], object]:
        """What is to be called to replace a weight; until then it stays."""
        part = self.peers.part(weight, layer.weight).cpu()
        return lambda: self.peers.held(layer.weight).copy_(part)


class _Away(Home):
    """Parameters are on the meta device but where they are at work."""

    away = True

    def __init__(self, model: nn.Module, peers: Peers, device: torch.device) -> None:
        super().__init__(model, peers)
        self.device = device
        self._places: dict[str, list[tuple[nn.Module, str]]] = {}
        self._first: dict[str, str] = {}  # of the names that a parameter has
        self._absent: dict[str, nn.Parameter] = {}
        self._host: dict[str, nn.Parameter] = {}
        self._users: Counter[str] = Counter()
        self._buffers: list[tuple[nn.Module, str, Tensor]] = []
        self._undo = ExitStack()
        by_parameter: dict[int, str] = {}
        for prefix, module in model.named_modules():
            for own, parameter in module._parameters.items():
                if parameter is None:
                    continue
                name = f"{prefix}.{own}" if prefix else own
                first = self._first[name] = by_parameter.setdefault(id(parameter), name)
                self._places.setdefault(first, []).append((module, own))
                self._absent.setdefault(first, parameter)

    def __enter__(self) -> Home:
        units = list(_units(self.model))
        in_units = {module for unit in units for module in unit.modules()}
        self._outside = [
            name
            for name, places in self._places.items()
            if any(module not in in_units for module, _ in places)
        ]
        self._names = {unit: self._names_in(unit) for unit in units}
        self._take_away(
            {name: parameter for name, parameter in self._absent.items() if not parameter.is_meta}
        )
        for name, parameter in self._absent.items():
            self._set(name, parameter)
        for unit in units:
            self._undo.callback(_restore_forward, unit, unit.__dict__.get("forward"))
            unit.forward = self._at_work(unit.forward, self._names[unit])
        self._undo.callback(_restore_forward, self.model, self.model.__dict__.get("forward"))
        self.model.forward = self._at_work(self.model.forward, self._outside)
        for module in self.model.modules():
            for own, buffer in module._buffers.items():
                if buffer is not None and buffer.device != self.device:
                    self._buffers.append((module, own, buffer))
                    module._buffers[own] = buffer.to(self.device)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._undo.close()
        for module, own, buffer in self._buffers:
            module._buffers[own] = buffer
        for name, parameter in self._host.items():
            self._set(name, parameter)

    def _take_away(self, there: dict[str, nn.Parameter]) -> None:
        """Puts stand-ins in the place of parameters, which are kept."""
        self._host = there
        for name, parameter in there.items():
            stand_in = torch.empty_like(parameter, device="meta")
            self._absent[name] = nn.Parameter(stand_in, requires_grad=parameter.requires_grad)

    def _read(self, names: Collection[str]) -> dict[str, Tensor]:
        """What parameters hold, on the device."""
        raise NotImplementedError

    def _names_in(self, module: nn.Module) -> list[str]:
        return list(dict.fromkeys(self._first_of(module)))

    def _first_of(self, module: nn.Module) -> Iterator[str]:
        inside = set(module.modules())
        for first, places in self._places.items():
            if any(owner in inside for owner, _ in places):
                yield first

    def _set(self, name: str, parameter: nn.Parameter) -> None:
        for module, own in self._places[name]:
            module._parameters[own] = parameter

    def _at_work(self, run: Callable[..., Any], names: Collection[str]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            with self._held(names):
                moved = {name: self._moved(value) for name, value in kwargs.items()}
                return run(*(self._moved(value) for value in args), **moved)

        return forward

    def _moved(self, value: Any) -> Any:
        return value.to(self.device) if isinstance(value, Tensor) else value

    @contextmanager
    def _held(self, names: Collection[str]) -> Iterator[None]:
        new = [name for name in names if not self._users[name]]
        for name, value in self._read(new).items():
            stand_in = self._absent[name]
            self._set(name, nn.Parameter(value, requires_grad=stand_in.requires_grad))
        self._users.update(names)
        at_work = (x for name, x in self._absent.items() if self._users[name])
        self.most = max(self.most, sum(x.numel() * x.element_size() for x in at_work))
        try:
            yield
        finally:
            self._users.subtract(names)
            for name in names:
                if not self._users[name]:
                    self._set(name, self._absent[name])
            if new:
                _give_back_memory()

    def device_of(self, layer: Layer) -> torch.device:
        return self.device

    def there(self, *modules: nn.Module) -> AbstractContextManager[None]:
        names: dict[str, None] = {}
        for module in modules:
            names |= dict.fromkeys(self._names.get(module) or self._names_in(module))
        return self._held(list(names))

    def outside(self) -> AbstractContextManager[None]:
        return self._held(self._outside)

    def value(self, name: str, tensor: Tensor) -> Tensor:
        first = self._first.get(name)
        if first is None or not tensor.is_meta:
            return tensor
        return self._read([first])[first]

    def _weight(self, layer: Layer) -> str:
        return self._first[layer.weight_name]

    def _at_hand(self, name: str) -> Tensor | None:
        """The parameter where it is at work."""
        module, own = self._places[name][0]
        found = module._parameters[own]
        return None if found is None or found.is_meta else found.data


class OnHost(_Away):
    """Weights are on the host, and a unit's on the device while it is at work."""

    def _read(self, names: Collection[str]) -> dict[str, Tensor]:
        return {name: self._host[name].data.to(self.device) for name in names}

    def mask(self, layer: Layer, mask: Tensor) -> None:
        self._host[self._weight(layer)].data.mul_(mask.cpu())

    def keep(self, layer: Layer, weight: Tensor) -> None:
        name = self._weight(layer)
        self._host[name].data.copy_(weight)
        at_hand = self._at_hand(name)
        if at_hand is not None:
            at_hand.copy_(weight)

    def keep_later(self, layer: Layer, weight: Tensor) -> Callable[[], object]:
        held = weight.cpu()
        return lambda: self.keep(layer, held)


class OnDisk(_Away):
    """Weights are in the files of their checkpoint, those that were pruned in the store of the run.

    Those that are in no file, since the model computes them, are on the host.
    """

    pruned_in: Path
    """The folder of the store."""

    def __init__(self, model: nn.Module, peers: Peers, device: torch.device, weights: StoredWeights) -> None:
        super().__init__(model, peers, device)
        self._files = weights
        self._pruned: dict[str, str] = {}
        self._allowed: dict[str, Tensor] = {}

    def _read(self, names: Collection[str]) -> dict[str, Tensor]:
        stored = [name for name in names if name not in self._pruned and name not in self._host]
        found = self._files.read(stored)
        for name in names:
            if name in self._pruned:
                found[name] = stored_part(self.pruned_in, self._pruned[name])
            elif name in self._host:
                found[name] = self._host[name].data.clone()
            if name in self._allowed and name not in self._pruned:
                found[name].mul_(self._allowed[name])
        return {name: found[name].to(self.device) for name in names}

    def mask(self, layer: Layer, mask: Tensor) -> None:
        self._allowed[self._weight(layer)] = mask.cpu()

    def keep(self, layer: Layer, weight: Tensor) -> None:
        name = self._weight(layer)
        self._pruned[name] = layer.name
        at_hand = self._at_hand(name)
        if at_hand is not None:
            at_hand.copy_(weight)

    def keep_later(self, layer: Layer, weight: Tensor) -> Callable[[], object]:
        return lambda: self._pruned.update({self._weight(layer): layer.name})


def home_of(
    model: nn.Module, peers: Peers, offload: str | StoredWeights | None, device: torch.device | None
) -> Home:
    """Where the weights of a model are to be while it is pruned.

    Raises
    ------
    NMSolveError
        If they cannot be there.
    """
    if offload is None:
        if device is not None:
            raise NMSolveError("device: only with offload; move the model there with model.to(device)")
        return Home(model, peers)
    if peers.sharded:
        raise NMSolveError("offload: the model is sharded by fully_shard; leave it out")
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not isinstance(offload, str):
        return OnDisk(model, peers, device, offload)
    check_offload(offload)
    if offload == "disk":
        raise NMSolveError(
            "offload: 'disk' is for a checkpoint, which nmsolve.prune.prune_checkpoint prunes; a model in "
            "memory can be offloaded to 'cpu'"
        )
    for name, parameter in model.named_parameters():
        if parameter.device.type != "cpu":
            raise NMSolveError(f"offload: expected the model on the cpu, got {name} on {parameter.device}")
    return OnHost(model, peers, device)


def _units(module: nn.Module) -> Iterator[nn.Module]:
    """Members of the outermost lists of modules, those of them that have parameters."""
    several = isinstance(module, nn.ModuleList | nn.Sequential) and len(module) > 1
    for child in dict.fromkeys(module.children()):
        if not several:
            yield from _units(child)
        elif next(child.parameters(), None) is not None:
            yield child


@cache
def _trim() -> Callable[[int], object] | None:
    trim: Callable[[int], object] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return trim


def _give_back_memory() -> None:
    """Returns what is free to the system: between what is kept, glibc leaves as much as a model's weights."""
    trim = _trim()
    if trim is not None:
        trim(0)


def _restore_forward(module: nn.Module, own: Any) -> None:
    if own is None:
        del module.forward
    else:
        module.forward = own
