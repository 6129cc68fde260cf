"""Reordering a model's channels without changing what it computes.

:func:`apply_permutations` folds an order into the producers where the model's structure allows it, and puts a
run-time gather before the consumers where it does not: in each of them (:class:`PermutedLinear`), or in the
norm that they read (:class:`PermutedRMSNorm`). Either way the dense model gives the outputs that it gave
before; what changes is which weights share a group of an N:M mask.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nmsolve.checkpoint.format import read_shard
from nmsolve.checkpoint.roles import is_conv1d
from nmsolve.errors import NMSolveError
from nmsolve.files import replacing
from nmsolve.ops.columns import permute_columns
from nmsolve.permute.couplings import Coupling, Site
from nmsolve.permute.model_couplings import find_couplings
from nmsolve.permute.norm import PermutedRMSNorm
from nmsolve.permute.orders import check_permutation
from nmsolve.prune.arguments import check_in_memory, check_plain

__all__ = [
    "Applied",
    "PermutedLinear",
    "apply_permutations",
    "load_permutations",
    "load_permuted",
    "save_permutations",
]

_FORMAT = {"format": "nmsolve permutations 1"}


class Applied(NamedTuple):
    """What became of one order: ``how`` is "fold", "norm" or "gather", ``tensors`` are the reordered ones."""

    name: str
    how: str
    tensors: tuple[str, ...]


class PermutedLinear(nn.Module):
    """A linear layer whose weight is stored in another order of its channels.

    It gathers its input before the product and its output after it, so that it computes what the layer in its
    old order did. ``permutation`` and ``output_permutation`` are buffers: they are saved and loaded with the
    weight (see :func:`load_permuted`).

    Parameters
    ----------
    weight : Tensor
        ``(out, in)``, already reordered: column k belongs to input channel ``permutation[k]``, row k to
        output channel ``output_permutation[k]``.
    bias : Tensor or None
        ``(out,)``, in the order of the rows.
    permutation, output_permutation : Tensor or None
        int64 ``(in,)`` and ``(out,)``; None where the order is the natural one.

    Examples
    --------
    >>> linear = torch.nn.Linear(3, 2)
    >>> x = torch.randn(5, 3)
    >>> permuted = PermutedLinear.from_linear(linear, torch.tensor([2, 0, 1]))
    >>> torch.allclose(permuted(x), linear(x), atol=1e-6)
    True
    """

    permutation: Tensor | None
    output_permutation: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        permutation: Tensor | None = None,
        output_permutation: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight, requires_grad=weight.requires_grad)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=bias.requires_grad)
        self.register_buffer("permutation", permutation)
        self.register_buffer("output_permutation", output_permutation)

    @classmethod
    def from_linear(
        cls, linear: nn.Module, permutation: Tensor | None = None, output_permutation: Tensor | None = None
    ) -> PermutedLinear:
        """The layer ``linear`` (``nn.Linear`` or transformers' ``Conv1D``) with its weight reordered.

        Raises
        ------
        NMSolveError
            If the layer is neither, or an order does not fit it.
        """
        weight, bias = _linear_tensors(linear)
        if permutation is not None:
            check_permutation(permutation, weight.shape[1])
            weight = weight[:, permutation]
        if output_permutation is not None:
            check_permutation(output_permutation, weight.shape[0], "output_permutation")
            weight = weight[output_permutation]
            bias = None if bias is None else bias[output_permutation]
        return cls(weight.detach().clone(), bias, permutation, output_permutation).train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in)`` to ``(..., out)``, both in the natural order of their channels."""
        if self.permutation is not None:
            x = permute_columns(x, self.permutation)
        y = F.linear(x, self.weight, self.bias)
        if self.output_permutation is not None:
            y = permute_columns(y, self.output_permutation.argsort())
        return y

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        )


def apply_permutations(
    model: nn.Module,
    permutations: Mapping[str, Tensor],
    *,
    couplings: Sequence[Coupling] | None = None,
    how: Literal["auto", "fold", "gather"] = "auto",
    norms: Mapping[str, str] | None = None,
) -> list[Applied]:
    """Reorders channels of ``model`` in place; the dense model computes what it did before.

    Parameters
    ----------
    model : nn.Module
    permutations : mapping of str to Tensor
        For names of couplings (see :func:`~nmsolve.permute.find_couplings`) an int64 permutation of the
        coupling's shape: position k gets channel ``p[k]``. A permutation of all inputs of a layer whose
        channels move only inside heads needs a gather.
    couplings : sequence of Coupling, optional
        Those of the model, if they are at hand.
    how : {"auto", "fold", "gather"}
        "auto" folds where that is possible and gathers at run time where not; "fold" refuses to gather.
    norms : mapping of str to str, optional
        Coupling to the RMS normalisation that its channels come out of and that nothing but its consumers
        reads: ``{"model.layers.0.mlp.up_proj": "model.layers.0.post_attention_layernorm"}`` in a Llama. Where
        such an order would be gathered, the norm hands the channels on in it, once for all consumers.

    Returns
    -------
    list of Applied
        What was done, in the order of ``permutations``.

    Raises
    ------
    NMSolveError
        If a name is unknown, a permutation does not fit, or the structure forbids what was asked; the message
        has the reason. Nothing has been changed then.

    Examples
    --------
    >>> mlp = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
    >>> apply_permutations(mlp, {"2": torch.tensor([2, 0, 1])})
    [Applied(name='2', how='fold', tensors=('2.weight', '0.weight', '0.bias'))]
    """
    if how not in ("auto", "fold", "gather"):
        raise NMSolveError(f"how: expected 'auto', 'fold' or 'gather', got {how!r}")
    check_in_memory(model)
    known = {coupling.name: coupling for coupling in couplings or find_couplings(model)}
    planned = [(_coupling(name, known), order) for name, order in permutations.items()]
    norms = norms or {}
    plans = [(coupling, order, _plan(model, coupling, order, how, norms)) for coupling, order in planned]
    permuted = {
        norms[coupling.name]: PermutedRMSNorm.from_norm(model.get_submodule(norms[coupling.name]), order)
        for coupling, order, way in plans
        if way == "norm"
    }
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for coupling, _, way in plans:
        for site in (*coupling.consumers, *(coupling.producers if way == "fold" else ())):
            check_plain(site.tensor, tensors[site.tensor].data)
            if not tensors[site.tensor].is_floating_point():
                dtype = str(tensors[site.tensor].dtype).removeprefix("torch.")
                raise NMSolveError(f"model: {site.tensor} is {dtype}: reorder first, then quantise")
    for path, norm in permuted.items():
        model.set_submodule(path, norm)
    for coupling, order, way in plans:
        sites = {"fold": (*coupling.consumers, *coupling.producers), "norm": coupling.consumers}
        for site in sites.get(way, ()):
            fold_site(tensors[site.tensor].data, coupling, order, site)
    # A gather puts a layer of its own, with new tensors, in the place of the old one.
    for coupling, order, way in plans:
        for site in coupling.consumers if way == "gather" else ():
            path = site.tensor.removesuffix(".weight")
            layer = model.get_submodule(path)
            place = order.to(tensors[site.tensor].device)
            model.set_submodule(path, PermutedLinear.from_linear(layer, place))
    return [
        Applied(
            coupling.name,
            way,
            tuple(
                site.tensor for site in (*coupling.consumers, *(coupling.producers if way == "fold" else ()))
            ),
        )
        for coupling, _, way in plans
    ]


def fold_site(tensor: Tensor, coupling: Coupling, permutation: Tensor, site: Site) -> None:
    """Reorders a tensor's indices of the coupling's channels, in place."""
    index = coupling.index(permutation, site).to(tensor.device)
    places = coupling.places(site, tensor.device)
    if site.head_axis is None:
        tensor.index_copy_(site.axis, places, tensor.index_select(site.axis, index))
        return
    axis = site.axis - (site.head_axis < site.axis)
    for head in range(coupling.heads):
        part = tensor.select(site.head_axis, head)
        part.index_copy_(axis, places[head], part.index_select(axis, index[head]))


def save_permutations(path: Path | str, permutations: Mapping[str, Tensor]) -> None:
    """Writes permutations to a safetensors file, whole or not at all.

    Examples
    --------
    >>> save_permutations("orders.safetensors", {"2": torch.tensor([2, 0, 1])})
    >>> load_permutations("orders.safetensors")
    {'2': tensor([2, 0, 1])}
    """
    from safetensors.torch import save_file

    tensors = {name: order.cpu().to(torch.int64).contiguous() for name, order in permutations.items()}
    with replacing(Path(path)) as partial:
        save_file(tensors, partial, metadata=_FORMAT)


def load_permutations(path: Path | str) -> dict[str, Tensor]:
    """The permutations that :func:`save_permutations` wrote.

    Raises
    ------
    NMSolveError
        If the file is not one of those.
    """
    from safetensors import safe_open

    shard = read_shard(Path(path))
    if shard.metadata.get("format") != _FORMAT["format"]:
        raise NMSolveError(f"{path}: expected a file of permutations ({_FORMAT['format']})")
    for entry in shard.entries:
        if entry.dtype != "I64" or not entry.shape:
            raise NMSolveError(
                f"{path}: {entry.name}: expected an int64 permutation, got {entry.dtype} {list(entry.shape)}"
            )
    with safe_open(path, framework="pt") as file:
        found = {entry.name: file.get_tensor(entry.name) for entry in shard.entries}
    for name, order in found.items():
        check_permutation(order, order.shape[-1], f"{path}: {name}")
    return found


def load_permuted(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Loads the state of a model with :class:`PermutedLinear` and :class:`PermutedRMSNorm` into a fresh one.

    Parameters
    ----------
    model : nn.Module
        As it was before :func:`apply_permutations`; layers whose permutation is in the state are replaced.
    state : mapping of str to Tensor
        ``model.state_dict()`` of the permuted one.

    Raises
    ------
    NMSolveError
        If a permutation belongs to no linear layer or RMS normalisation of the model.
    """
    suffixes = (".permutation", ".output_permutation")
    for path in dict.fromkeys(key.rpartition(".")[0] for key in state if key.endswith(suffixes)):
        try:
            layer = model.get_submodule(path)
        except AttributeError:
            raise NMSolveError(f"state: {path} has a permutation, but the model has no such layer") from None
        if isinstance(layer, PermutedLinear | PermutedRMSNorm):
            continue
        orders = [state.get(path + suffix) for suffix in suffixes]
        weight = state.get(f"{path}.weight")
        if weight is not None and weight.ndim == 1 and orders[0] is not None:
            model.set_submodule(path, PermutedRMSNorm.from_norm(layer, orders[0]))
        else:
            model.set_submodule(path, PermutedLinear.from_linear(layer, *orders))
    model.load_state_dict(state)


def _coupling(name: str, known: Mapping[str, Coupling]) -> Coupling:
    if name not in known:
        some = ", ".join(list(known)[:4]) or "none"
        raise NMSolveError(f"permutations: {name!r} is no coupling of this model (it has {some}, ...)")
    return known[name]


def _plan(model: nn.Module, coupling: Coupling, order: Tensor, how: str, norms: Mapping[str, str]) -> str:
    """ "fold", "norm" or "gather"; raises with the reason if the order cannot be applied."""
    site = coupling.consumers[0]
    inputs = coupling.heads * site.repeats * coupling.size
    everything = isinstance(order, Tensor) and order.shape == (inputs,)
    fits = isinstance(order, Tensor) and order.shape == coupling.shape
    if not fits and not everything:
        raise NMSolveError(
            f"{coupling.name}: expected an int64 permutation of shape {coupling.shape}, got "
            f"{tuple(order.shape) if isinstance(order, Tensor) else order!r}"
        )
    check_permutation(order, order.shape[-1], coupling.name)
    for place in (*coupling.consumers, *coupling.producers):
        layer = model.get_submodule(place.tensor.rpartition(".")[0])
        side = "permutation" if place in coupling.consumers else "output_permutation"
        if isinstance(layer, PermutedLinear) and getattr(layer, side) is not None:
            raise NMSolveError(f"{coupling.name}: {place.tensor} was given a run-time gather already")
    if fits and coupling.folds and how != "gather":
        return "fold"
    if how == "fold":
        reason = coupling.reason or "channels of attention values move only inside their head"
        raise NMSolveError(f"{coupling.name}: this order cannot be folded: {reason}")
    if coupling.name in norms and fits and coupling.heads == 1:
        _check_norm(model, coupling, norms[coupling.name])
        return "norm"
    if not everything:
        raise NMSolveError(f"{coupling.name}: a gather needs the order of all {inputs} inputs")
    for consumer in coupling.consumers:
        path, _, own = consumer.tensor.rpartition(".")
        if own != "weight":
            raise NMSolveError(
                f"{coupling.name}: a run-time gather exists for linear layers, and {consumer.tensor} is a "
                f"parameter of {type(model.get_submodule(path)).__name__}"
            )
        _linear_tensors(model.get_submodule(path))
        _check_called(model, path, coupling)
    return "gather"


def _check_called(model: nn.Module, path: str, coupling: Coupling) -> None:
    """Refuses a gather in a layer whose weight torch takes without calling the layer."""
    while path:
        path = path.rpartition(".")[0]
        parent = model.get_submodule(path)
        if isinstance(parent, nn.MultiheadAttention | nn.TransformerEncoderLayer):
            raise NMSolveError(
                f"{coupling.name}: a run-time gather is not possible in a {type(parent).__name__}, which "
                "computes with the weights of its layers without calling them"
            )


def _check_norm(model: nn.Module, coupling: Coupling, path: str) -> None:
    try:
        norm = model.get_submodule(path)
    except AttributeError:
        raise NMSolveError(f"norms: {path!r} for {coupling.name} is no module of this model") from None
    if isinstance(norm, PermutedRMSNorm):
        raise NMSolveError(f"{coupling.name}: {path} was given an order already")


def _linear_tensors(layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight ``(out, in)`` and bias of a linear layer."""
    if isinstance(layer, nn.Linear):
        return layer.weight, layer.bias
    if is_conv1d(layer):
        weight, bias = layer.weight, layer.bias
        assert isinstance(weight, Tensor)
        assert isinstance(bias, Tensor)
        return weight.T, bias
    raise NMSolveError(
        f"a run-time gather exists for linear layers; this order does not fold and the layer is a "
        f"{type(layer).__name__}"
    )
