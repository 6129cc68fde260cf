"""How calibration runs through a model: block by block where the blocks form a chain, as a whole elsewhere.

A *chain* is an ``nn.ModuleList`` or ``nn.Sequential`` whose members are called once each, in order, each on
what the one before returned: the layers of a transformer, a stage of a convolutional network. That is not
believed but observed, on the first batch. A chain needs only one block's inputs in memory and runs every
block a fixed number of times. Layers outside of any chain are reached by calling the whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nmsolve.errors import NMSolveError
from nmsolve.prune.calibration import Batch, call_model, describe_batch
from nmsolve.prune.experts import check_routing, watched
from nmsolve.prune.layers import Layer
from nmsolve.prune.peers import Peers

__all__ = ["Chain", "Group", "Loose", "Plan", "make_plan", "quiet_model"]


class Stop(Exception):
    """Ends a forward pass whose rest is not needed."""


@dataclass(eq=False)
class Group:
    """Layers that are called on the same tensor, so that they share a Hessian.

    ``once`` tells whether the first layer is called once in a forward pass, after which it may be stopped.
    """

    layers: list[Layer]
    once: bool = True

    @property
    def key(self) -> object:
        """The same for the layers that a mixture's experts have in the same place: none sees another."""
        return self.layers[0].expert_of or self


@dataclass
class Call:
    """The arguments of a block but its hidden states, whose place holds None."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def with_hidden(self, hidden: Tensor) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
        if self.args:
            return (hidden, *self.args[1:]), self.kwargs
        return (), {**self.kwargs, _HIDDEN: hidden}


_HIDDEN = "hidden_states"


def _split_call(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor | None, Call]:
    """The hidden states of a call (None if there are none) and the rest of it."""
    if args:
        hidden = args[0] if isinstance(args[0], Tensor) else None
        return hidden, Call((None, *args[1:]), kwargs)
    hidden = kwargs.get(_HIDDEN)
    return (hidden if isinstance(hidden, Tensor) else None), Call((), {**kwargs, _HIDDEN: None})


def _hidden_of(output: Any) -> Tensor | None:
    if isinstance(output, tuple) and output:
        output = output[0]
    return output if isinstance(output, Tensor) else None


@dataclass(frozen=True)
class _Seen:
    """A value as it was at some time: a tensor that has been written to since is not the same any more."""

    value: Any = None
    version: int = 0

    @classmethod
    def now(cls, value: Any) -> _Seen:
        told = isinstance(value, Tensor) and not value.is_inference()
        return cls(value, value._version if told else 0)

    def is_still(self, value: Any) -> bool:
        return value is self.value and self.now(value).version == self.version


@dataclass
class Loose:
    """Layers reached by calling the model."""

    groups: list[Group] = field(default_factory=list)


@dataclass
class Chain:
    """Blocks that hand their hidden states on, and where they stand.

    After :meth:`capture`, ``hidden`` has the inputs of the first block, one tensor for each batch, None for
    one that does not reach the chain, as the layers of an expert that gets no token;
    :meth:`advance` turns the inputs of a block into those of the next. ``to_the_end`` tells that no forward
    pass may be stopped: modules of ``fully_shard`` count on theirs.
    """

    name: str
    blocks: list[nn.Module]
    groups: list[list[Group]] = field(default_factory=list)
    hidden: list[Tensor | None] = field(default_factory=list)
    calls: list[list[Call]] = field(default_factory=list)
    to_the_end: bool = False

    def capture(self, model: nn.Module, batches: Sequence[Batch]) -> None:
        """Runs the model up to the chain for every batch and keeps what its blocks are called with.

        The first block runs, the others hand on what they get: what else they are called with (masks,
        position embeddings) does not depend on it, as :func:`make_plan` has made sure.
        """
        self.release()
        for batch in batches:
            hidden, calls = self._capture_one(model, batch)
            # The same masks and positions for all batches are kept once.
            known = next(filter(None, self.calls), None)
            if hidden is not None and known is not None:
                calls = [_shared(call, first) for call, first in zip(calls, known, strict=True)]
            self.hidden.append(hidden)
            self.calls.append(calls)

    def _capture_one(self, model: nn.Module, batch: Batch) -> tuple[Tensor | None, list[Call]]:
        first: list[Tensor] = []
        calls: list[Call] = []
        template: list[Any] = []

        def stand_in(block: nn.Module, index: int) -> Callable[..., Any]:
            run = block.forward

            def forward(*args: Any, **kwargs: Any) -> Any:
                hidden, call = _split_call(args, kwargs)
                assert hidden is not None
                calls.append(call)
                if index == 0:
                    first.append(hidden.clone())
                    template.append(run(*args, **kwargs))
                if index == len(self.blocks) - 1 and not self.to_the_end:
                    raise Stop
                given = template[0]
                return (hidden, *given[1:]) if isinstance(given, tuple) else hidden

            return forward

        with ExitStack() as undo:
            for index, block in enumerate(self.blocks):
                undo.callback(_restore_forward, block, block.__dict__.get("forward"))
                block.forward = stand_in(block, index)
            with suppress(Stop):
                call_model(model, batch)
        return (first[0] if first else None), calls

    def run(self, index: int, batch: int) -> Any:
        """Calls block ``index`` on a batch's hidden states, on a copy: blocks may work in place."""
        hidden = self.hidden[batch]
        if hidden is None:
            return None
        args, kwargs = self.calls[batch][index].with_hidden(hidden.clone())
        return self.blocks[index](*args, **kwargs)

    def advance(self, index: int, batch: int) -> None:
        """Replaces the hidden states of a batch by what block ``index`` makes of them."""
        self.hidden[batch] = _hidden_of(self.run(index, batch))

    def release(self) -> None:
        """Forgets the hidden states."""
        self.hidden, self.calls = [], []


def _restore_forward(block: nn.Module, own: Any) -> None:
    if own is None:
        del block.forward
    else:
        block.forward = own


def _shared(value: Any, first: Any) -> Any:
    """``value`` with every tensor that equals its counterpart in ``first`` replaced by that one."""
    if isinstance(value, Call) and isinstance(first, Call):
        return Call(_shared(value.args, first.args), _shared(value.kwargs, first.kwargs))
    if isinstance(value, Tensor):
        return first if _same(value, first) else value
    if type(value) is tuple and isinstance(first, tuple) and len(value) == len(first):
        return tuple(_shared(a, b) for a, b in zip(value, first, strict=True))
    if type(value) is dict and isinstance(first, dict) and value.keys() == first.keys():
        return {name: _shared(value[name], first[name]) for name in value}
    return value


def _same(a: Any, b: Any) -> bool:
    """Whether two arguments are equal, tensors by their contents."""
    if a is b:
        return True
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return (
            isinstance(a, Tensor)
            and isinstance(b, Tensor)
            and (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
            and torch.equal(a, b)
        )
    if isinstance(a, Call) and isinstance(b, Call):
        return _same(a.args, b.args) and _same(a.kwargs, b.kwargs)
    if isinstance(a, tuple | list) and type(a) is type(b):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, Mapping) and type(a) is type(b):
        return a.keys() == b.keys() and all(_same(a[name], b[name]) for name in a)
    return type(a) is type(b) and isinstance(a, str | int | float | bool | None) and a == b


@dataclass
class Plan:
    """The stages of a model in the order of the forward pass, and the layers that it does not call."""

    stages: list[Chain | Loose]
    unreached: list[Layer]


@dataclass
class _Watched:
    """A container that may be a chain, and what a forward pass has shown of it."""

    name: str
    blocks: list[nn.Module]
    calls: list[Call] = field(default_factory=list)
    last: _Seen = field(default_factory=_Seen)
    chained: bool = True
    first_call: int = -1

    def enter(self, index: int, time: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        hidden, call = _split_call(args, kwargs)
        in_turn = index == len(self.calls) and hidden is not None
        if not in_turn or (index > 0 and not self.last.is_still(hidden)):
            self.chained = False
        if index == 0:
            self.first_call = time
        self.calls.append(call)
        self.last = _Seen()

    def leave(self, output: Any) -> None:
        self.last = _Seen.now(_hidden_of(output))


class _Calls:
    """Which layers forward passes call, in what order, and which of them on the same tensor.

    ``times`` orders the layers: a layer that only a later pass calls has the time of the layer before it
    there.
    """

    def __init__(self, layers: Sequence[Layer], all_experts: bool) -> None:
        self.layers = layers
        self.all_experts = all_experts
        self.times: dict[Layer, int] = {}
        self.groups: list[Group] = []
        self.home: dict[Layer, Group] = {}
        self.clock = 0

    def missing(self) -> list[Layer]:
        return [layer for layer in self.layers if layer not in self.times]

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watches one forward pass."""
        late = bool(self.times)
        by_module = {layer.module: layer for layer in self.layers if not layer.is_stack}
        stacks: dict[nn.Module, list[Layer]] = {}
        for layer in self.layers:
            if layer.is_stack:
                stacks.setdefault(layer.module, []).append(layer)
        counts: dict[nn.Module, int] = {}
        met: set[Layer] = set()
        before: Layer | None = None
        given_before = _Seen()
        new: set[Layer] = set()

        def called(layer: Layer, given: Any) -> None:
            nonlocal before, given_before
            self.clock += 1
            if layer in met:
                return
            met.add(layer)
            if layer not in self.times:
                new.add(layer)
                self.times[layer] = self.times[before] if late and before is not None else self.clock
                if before in new and given_before.is_still(given) and _sees_alike(before, layer):
                    group = self.home[before]
                    group.layers.append(layer)
                else:
                    group = Group([layer])
                    place = len(self.groups)
                    if late:
                        place = 0 if before is None else self.groups.index(self.home[before]) + 1
                    self.groups.insert(place, group)
                self.home[layer] = group
            before, given_before = layer, _Seen.now(given)

        def linear(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            counts[module] = counts.get(module, 0) + 1
            called(by_module[module], input_of(args, kwargs))

        def entered(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            counts[module] = counts.get(module, 0) + 1

        with ExitStack() as hooks:
            for module in by_module:
                hooks.callback(module.register_forward_pre_hook(linear, with_kwargs=True).remove)
            for module in stacks:
                hooks.callback(module.register_forward_pre_hook(entered, with_kwargs=True).remove)
            calls = check_routing if self.all_experts else lambda *_: None
            hooks.enter_context(watched(stacks, lambda layer, *_: called(layer, None), calls, lambda: None))
            yield
        for layer in new:
            group = self.home[layer]
            if group.layers[0] is layer:
                group.once = counts[layer.module] == 1


def make_plan(
    model: nn.Module,
    layers: Sequence[Layer],
    first: Batch,
    others: Sequence[Batch] = (),
    all_experts: bool = False,
    peers: Peers | None = None,
) -> Plan:
    """Runs the model on its first batch and decides how to walk it.

    Layers that the first batch does not reach, such as an expert without a token in it, are looked for in
    the other batches. Peers take part in one another's passes, and so they must come to the same plan.

    Raises
    ------
    NMSolveError
        If the model does not take the batch, or calls none of the layers; if ``all_experts``, and experts
        are not called with a choice that can be another.
    """
    peers = peers or Peers()
    watched_chains = [_Watched(name, blocks) for name, blocks in _containers(model, layers)]
    seen = _Calls(layers, all_experts)

    def entered(w: _Watched, index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            seen.clock += 1
            w.enter(index, seen.clock, args, kwargs)

        return hook

    def left(w: _Watched) -> Callable[..., None]:
        return lambda module, args, output: w.leave(output)

    with seen.watching(), ExitStack() as hooks:
        for w in watched_chains:
            for index, block in enumerate(w.blocks):
                handle = block.register_forward_pre_hook(entered(w, index), with_kwargs=True)
                hooks.callback(handle.remove)
                hooks.callback(block.register_forward_hook(left(w)).remove)
        _call_first(model, first)
    for batch in others:
        if not any(peers.gather(bool(seen.missing()))):
            break
        with seen.watching():
            call_model(model, batch)
    order, groups = seen.times, seen.groups
    if not order:
        raise NMSolveError(
            f"model: its forward pass on the first batch calls none of the {len(layers)} layers to prune"
        )

    shape = (
        [[layer.name for layer in group.layers] for group in groups],
        [(w.chained, len(w.calls), w.first_call) for w in watched_chains],
    )
    peers.same(
        shape, "calibration: the batches of different ranks call different layers, or in another order"
    )
    stages: list[tuple[int, Chain | Loose]] = []
    home: dict[Layer, tuple[Chain, int]] = {}
    for w in watched_chains:
        inside = {layer: index for layer, index in _members(w.blocks, layers).items() if layer in order}
        if not inside or home.keys() & inside.keys() or not _is_chain(w, model, first, peers):
            continue
        chain = Chain(w.name, w.blocks, [[] for _ in w.blocks], to_the_end=peers.sharded)
        home.update({layer: (chain, index) for layer, index in inside.items()})
        stages.append((w.first_call, chain))
    for group in groups:
        place = home.get(group.layers[0])
        if place is not None:
            place[0].groups[place[1]].append(group)
        else:
            stages.append((order[group.layers[0]], Loose([group])))
    stages.sort(key=lambda stage: stage[0])
    merged: list[Chain | Loose] = []
    for _, stage in stages:
        if isinstance(stage, Loose) and merged and isinstance(merged[-1], Loose):
            merged[-1].groups += stage.groups
        else:
            merged.append(stage)
    return Plan(merged, seen.missing())


def _call_first(model: nn.Module, batch: Batch) -> None:
    try:
        call_model(model, batch)
    except NMSolveError:
        raise
    except Exception as error:
        raise NMSolveError(
            f"calibration: the model cannot be called on the first batch, {describe_batch(batch)}: "
            f"{type(error).__name__}: {error}"
        ) from error


def input_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What a layer is called on."""
    return args[0] if args else next(iter(kwargs.values()))


def _sees_alike(a: Layer, b: Layer) -> bool:
    """Whether two layers make the same input matrix of one tensor."""
    return not any(layer.is_convolution or layer.is_stack for layer in (a, b))


def _is_chain(w: _Watched, model: nn.Module, first: Batch, peers: Peers) -> bool:
    """Whether the blocks were called in turn, and are called alike when they only hand on what they get."""
    if not w.chained or len(w.calls) != len(w.blocks):
        return False
    try:
        _, calls = Chain(w.name, w.blocks, to_the_end=peers.sharded)._capture_one(model, first)
    except Exception:  # what stands between the blocks does not take what the stand-ins return
        calls = []
    alike = len(calls) == len(w.calls) and all(_same(a, b) for a, b in zip(calls, w.calls, strict=True))
    return all(peers.gather(alike))


def _containers(model: nn.Module, layers: Sequence[Layer]) -> Iterator[tuple[str, list[nn.Module]]]:
    """Containers of two blocks or more with layers to prune, the outer ones first."""
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList | nn.Sequential):
            blocks = list(module)
            if len(set(_members(blocks, layers).values())) >= 2 and len(set(blocks)) == len(blocks):
                yield name, blocks


def _members(blocks: Sequence[nn.Module], layers: Sequence[Layer]) -> dict[Layer, int]:
    """The layers inside of blocks, with the block's index."""
    owner = {module: index for index, block in enumerate(blocks) for module in block.modules()}
    return {layer: owner[layer.module] for layer in layers if layer.module in owner}


@contextmanager
def quiet_model(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients and no key-value cache; all as before afterwards."""
    training = [module for module in model.modules() if module.training]
    configs: Iterator[Any] = (getattr(module, "config", None) for module in model.modules())
    caching = [config for config in configs if getattr(config, "use_cache", False)]
    try:
        model.eval()
        for config in caching:
            config.use_cache = False
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
        for config in caching:
            config.use_cache = True
