"""Couplings of layers whose order only their forward pass tells, such as the blocks of a ResNet.

A module is traced by ``torch.fx`` on a copy of its structure that shares its tensors, and the channels are
followed from layer to layer: norms, activations and pooling hand them on, a sum makes two sets of channels
one, and whatever is not known to treat all channels alike fixes their order. Where the whole model cannot be
traced its parts are, and channels that leave a part keep their order.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import fx, nn
from torch.nn import functional as F

from nmsolve.permute.channelwise import CONVOLUTIONS, NORMS, POOLS, elementwise, is_plain, norm_sites
from nmsolve.permute.couplings import Coupling, Site

__all__ = ["Traced", "traced_couplings"]

# Functions and methods that hand every channel on as it is, of one tensor and of two.
_ALIKE: frozenset[object] = frozenset(
    (
        *(F.relu, F.relu6, F.gelu, F.silu, F.mish, F.elu, F.selu, F.celu, F.leaky_relu, F.hardswish),
        *(F.hardsigmoid, F.hardtanh, F.softplus, F.logsigmoid, F.dropout, torch.relu, torch.sigmoid),
        *(torch.tanh, torch.clone, operator.neg, "relu", "relu_", "sigmoid", "tanh", "contiguous", "clone"),
        *("to", "float", "double", "half", "bfloat16", "type_as", "detach", "neg", "clamp"),
    )
)
_SUMS: frozenset[object] = frozenset(
    (
        *(operator.add, operator.iadd, operator.sub, operator.mul, operator.imul, torch.add, torch.sub),
        *(torch.mul, "add", "add_", "sub", "mul", "mul_"),
    )
)
_POOLING: frozenset[object] = frozenset(
    (
        *(F.max_pool1d, F.max_pool2d, F.max_pool3d, F.avg_pool1d, F.avg_pool2d, F.avg_pool3d),
        *(F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d, F.interpolate),
    )
)
_OUTSIDE = "it is the first layer: its inputs come from outside"
# What asks for sizes and dtypes, and no values.
_ASKING = frozenset(("size", "dim", "numel", "shape", "dtype", "device", "ndim", "is_cuda"))


@dataclass(frozen=True)
class Traced:
    """A coupling that a forward pass shows.

    ``refuses`` tells that no rule by names is to fold it: a layer is known to mix the channels or to tell
    them apart, or the channels go another way in a module whose names nobody vouches for.
    """

    coupling: Coupling
    refuses: bool


def traced_couplings(model: nn.Module) -> list[Traced]:
    """What the traced modules of a model read; channels whose order is fixed are there with the reason."""
    return [
        traced
        for path, module, graph in _graphs("", model)
        for traced in _Follower(f"{path}." if path else "", module).follow(graph)
    ]


def _graphs(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module, fx.Graph]]:
    """The outermost modules that can be traced and hold several layers, with their graphs."""
    if not _worth_tracing(module):
        return
    graph = _trace(module, _Tracer)
    if graph is not None:
        yield path, module, graph
        return
    if isinstance(module, nn.Sequential):  # whose children follow each other, whatever is in them
        graph = _trace(module, _ShallowTracer)
        if graph is not None:
            yield path, module, graph
    for name, child in module.named_children():
        yield from _graphs(f"{path}.{name}" if path else name, child)


def _worth_tracing(module: nn.Module) -> bool:
    """Whether several layers are in it: convolutions, or any where names say nothing (transformers' do)."""
    kinds: tuple[type[nn.Module], ...] = (nn.Linear, *CONVOLUTIONS)
    if _of_transformers(module):
        inside = [layer for layer in module.modules() if isinstance(layer, CONVOLUTIONS)]
        chains = any(isinstance(part, nn.Sequential) and _worth_tracing(part) for part in module.modules())
        return len(inside) > 1 or chains
    return len([layer for layer in module.modules() if isinstance(layer, kinds)]) > 1


def _of_transformers(module: nn.Module) -> bool:
    return type(module).__module__.startswith("transformers.")


def _trace(module: nn.Module, kind: type[_Tracer]) -> fx.Graph | None:
    """The calls of a module's forward pass, None if it cannot be traced.

    It runs on a copy, which whatever the forward pass leaves behind stays in.
    """
    tensors = [*module.parameters(), *module.buffers()]
    try:
        twin = copy.deepcopy(module, {id(tensor): tensor for tensor in tensors}).eval()
        return kind(twin).trace(twin)
    except Exception:  # whatever a forward pass makes of tensors that are none
        return None


class _Tracer(fx.Tracer):
    """Follows calls into all modules but torch's, and those that act on every channel alike."""

    def __init__(self, root: nn.Module) -> None:
        super().__init__()
        # Tried before tracing, in which modules are called otherwise.
        self.alike = {id(part) for part in root.modules() if _is_bare(part) and elementwise(part)}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return super().is_leaf_module(m, module_qualified_name) or id(m) in self.alike


class _ShallowTracer(_Tracer):
    """Follows calls into chains alone."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not isinstance(m, nn.Sequential)


def _is_bare(module: nn.Module) -> bool:
    """Whether there is nothing in a module of its own kind."""
    own = next(module.parameters(), None) is None and next(module.children(), None) is None
    return own and not type(module).__module__.startswith("torch.nn.")


@dataclass(eq=False)
class _Group:
    """Channels that share an order: who writes and reads them, and why the order is fixed if it is."""

    count: int
    producers: list[Site] = field(default_factory=list)
    consumers: list[Site] = field(default_factory=list)
    fixed: str = ""
    mixed: bool = False


@dataclass(frozen=True)
class _Value:
    """A tensor in a graph: whose channels it has, along its last axis or its second.

    ``flat`` tells that there is one position for each channel.
    """

    group: _Group
    last: bool
    flat: bool = False


class _Follower:
    """Follows channels through the graph of one module, whose names begin with ``prefix``."""

    def __init__(self, prefix: str, module: nn.Module) -> None:
        self.prefix, self.module = prefix, module
        self.vouched = _of_transformers(module)
        self.groups: list[_Group] = []
        self.joined: dict[_Group, _Group] = {}
        self.calls: dict[str, tuple[_Group, _Group]] = {}
        self.values: dict[fx.Node, _Value] = {}
        self.lost: dict[fx.Node, tuple[str, bool]] = {}
        self.touched: set[str] = set()

    def follow(self, graph: fx.Graph) -> list[Traced]:
        """The couplings of all layers."""
        for node in graph.nodes:
            if node.op == "call_module":
                self._module(node)
            elif node.op in ("call_function", "call_method"):
                self._function(node)
            elif node.op == "get_attr":
                self.touched.add(f"{self.prefix}{node.target}")
            elif node.op == "output":
                self._fix(node, f"the channels leave {self.prefix[:-1] or 'the model'}")
        for group in self.groups:
            tensors = {site.tensor for site in (*group.producers, *group.consumers)}
            used = sorted(tensors & self.touched)
            group.fixed = group.fixed or (f"{used[0]} is used outside of its layer" if used else "")
        kept = [group for group in self.groups if group.consumers and group not in self.joined]
        return [Traced(_coupling(group), self._refuses(group)) for group in kept]

    def _refuses(self, group: _Group) -> bool:
        return group.mixed or (not self.vouched and group.fixed not in ("", _OUTSIDE))

    # Modules.

    def _module(self, node: fx.Node) -> None:
        name = f"{self.prefix}{node.target}"
        layer = self.module.get_submodule(str(node.target))
        value = self._only(node)
        if is_plain(layer):
            self._layer(node, name, layer, value)
        elif value is None:
            before = [self.lost[at] for at in node.all_input_nodes if at in self.lost]
            unknown = f"what {name} ({type(layer).__name__}) does to the channels is unknown"
            self._fix(node, *(before[0] if before else (unknown, False)))
        elif isinstance(layer, NORMS):
            sites = norm_sites(name, layer, value.group.count)
            fits = isinstance(layer, nn.LayerNorm | nn.RMSNorm) == value.last
            if sites is None or not fits:
                self._fix(node, f"{name} normalises over more than the channels", mixed=True)
            else:
                value.group.producers += [site for site in sites if site not in value.group.producers]
                self.values[node] = value
        elif isinstance(layer, POOLS) and not value.last:
            one = getattr(layer, "output_size", None) in (1, (1, 1), (1, 1, 1))
            self.values[node] = _Value(value.group, False, value.flat or one)
        elif isinstance(layer, nn.Flatten) and value.flat and layer.start_dim == 1:
            self.values[node] = _Value(value.group, True, True)
        elif isinstance(layer, nn.Dropout | nn.Identity | nn.Dropout1d | nn.Dropout2d) or (
            next(layer.parameters(), None) is None and elementwise(layer)
        ):
            self.values[node] = value
        else:
            why = f"{name} ({type(layer).__name__}) does not act on every channel alike"
            self._fix(node, why, mixed=True)

    def _layer(self, node: fx.Node, name: str, layer: nn.Module, value: _Value | None) -> None:
        """A linear layer or a convolution."""
        weight, groups = layer.get_parameter("weight"), int(getattr(layer, "groups", 1))
        last = isinstance(layer, nn.Linear)
        outputs, inputs = weight.shape[0], weight.shape[1] * groups
        own = [Site(f"{name}.weight", 0)]
        if isinstance(getattr(layer, "bias", None), nn.Parameter):
            own.append(Site(f"{name}.bias", 0))
        fits = value is not None and value.last == last and value.group.count == inputs
        if groups == inputs == outputs and fits:
            assert value is not None
            value.group.producers += [site for site in own if site not in value.group.producers]
            self.values[node] = _Value(value.group, last)
            return
        source = value.group if fits and value is not None else self._new(inputs)
        if not fits:
            before = self.lost.get(node.all_input_nodes[0]) if node.all_input_nodes else None
            source.fixed, source.mixed = before or (_OUTSIDE, False)
            self._fix(node, f"the channels are the inputs of {name} in another form")
        target = self._new(outputs, own)
        if groups != 1:
            source.fixed = source.fixed or f"{name} is a grouped convolution"
            target.fixed = f"{name} is a grouped convolution, whose outputs are tied to its groups"
        else:
            source.consumers.append(Site(f"{name}.weight", 1))
        if name in self.calls:  # a layer that is called again
            self._join(self.calls[name][0], source)
            target = self._join(self.calls[name][1], target)
        self.calls[name] = (self._of(source), target)
        self.values[node] = _Value(target, last)

    # Functions and methods.

    def _function(self, node: fx.Node) -> None:
        values = [value for value in map(self._value, node.all_input_nodes) if value is not None]
        asked = node.args[1] if node.target is getattr and len(node.args) > 1 else node.target
        if not values:
            before = [self.lost[at] for at in node.all_input_nodes if at in self.lost]
            self.lost.update({node: before[0]} if before else {})
        if not values or asked in _ASKING:
            return
        value = values[0]
        if len(values) == len(node.all_input_nodes) == 2 and node.target in _SUMS:
            other = values[1]
            if value.last == other.last and value.group.count == other.group.count:
                self.values[node] = _Value(self._join(value.group, other.group), value.last, value.flat)
                return
        elif len(node.all_input_nodes) == 1:
            found = self._single(node, value)
            if found is not None:
                self.values[node] = found
                return
        self._fix(node, f"what {_called(node)} does to the channels is unknown")

    def _single(self, node: fx.Node, value: _Value) -> _Value | None:
        """What a function of one tensor returns, None if it may not treat all channels alike."""
        if node.target in _ALIKE or node.target in _SUMS:
            return value
        if node.target in _POOLING and not value.last:
            size = node.kwargs.get("output_size", node.args[1] if len(node.args) > 1 else None)
            return _Value(value.group, False, value.flat or _is_adaptive_one(node, size))
        if node.target in (torch.flatten, "flatten") and value.flat and node.args[1:] == (1,):
            return _Value(value.group, True, True)
        if node.target in (torch.mean, "mean") and not value.last:
            axes = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
            if isinstance(axes, list | tuple) and sorted(map(int, axes)) in ([2, 3], [-2, -1]):
                kept = bool(node.kwargs.get("keepdim", len(node.args) > 2 and node.args[2]))
                return _Value(value.group, not kept, True)
        if node.target in (torch.permute, "permute"):
            axes = node.args[1] if isinstance(node.args[1], list | tuple) else node.args[1:]
            turns = {(0, 2, 3, 1): (False, True), (0, 3, 1, 2): (True, False)}.get(tuple(axes))
            if turns is not None and turns[0] == value.last:
                return _Value(value.group, turns[1], value.flat)
        return None

    # Groups.

    def _new(self, count: int, producers: list[Site] | None = None) -> _Group:
        self.groups.append(_Group(count, producers or []))
        return self.groups[-1]

    def _of(self, group: _Group) -> _Group:
        while group in self.joined:
            group = self.joined[group]
        return group

    def _value(self, node: fx.Node) -> _Value | None:
        value = self.values.get(node)
        return None if value is None else _Value(self._of(value.group), value.last, value.flat)

    def _only(self, node: fx.Node) -> _Value | None:
        """The value of a module's single input."""
        inputs = node.all_input_nodes
        return self._value(inputs[0]) if len(inputs) == 1 else None

    def _join(self, one: _Group, two: _Group) -> _Group:
        one, two = self._of(one), self._of(two)
        if one is two:
            return one
        one.producers += [site for site in two.producers if site not in one.producers]
        one.consumers += [site for site in two.consumers if site not in one.consumers]
        one.fixed, one.mixed = one.fixed or two.fixed, one.mixed or two.mixed
        self.joined[two] = one
        return one

    def _fix(self, node: fx.Node, why: str, mixed: bool = False) -> None:
        """The channels of a node's inputs keep their order; those of its output are not followed."""
        self.lost[node] = why, mixed
        for value in map(self._value, node.all_input_nodes):
            if value is not None:
                value.group.fixed = value.group.fixed or why
                value.group.mixed |= mixed


def _is_adaptive_one(node: fx.Node, size: object) -> bool:
    return "adaptive" in _called(node) and size in (1, (1, 1), [1, 1], (1, 1, 1))


def _called(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target))


def _coupling(group: _Group) -> Coupling:
    name = group.consumers[0].tensor.removesuffix(".weight")
    producers = () if group.fixed else tuple(group.producers)
    reason = "" if producers else group.fixed or _OUTSIDE
    return Coupling(name, 1, group.count, tuple(group.consumers), producers, reason)
