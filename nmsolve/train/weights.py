"""One weight and its mask: in the layer's products, or in what FSDP2 gathers.

A sharded weight is worked on where it lies: :attr:`MaskedWeight.local` is this process's shard, and the mask
is one, too.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from nmsolve.errors import NMSolveError
from nmsolve.ops.distributed import from_shards, is_dtensor, shard_of, sharding_of
from nmsolve.train.arguments import Chosen
from nmsolve.train.masked_modules import MASK, mask_module, unmask_module

__all__ = ["GatheredWeight", "MaskedWeight", "ModuleWeight", "check_fsdp", "fsdp_parameters"]


class MaskedWeight:
    """What both kinds share."""

    def __init__(self, chosen: Chosen) -> None:
        self.chosen, self.pattern = chosen, chosen.pattern
        self.name = chosen.layer.weight_name

    @property
    def parameter(self) -> nn.Parameter:
        """As the optimizer has it; a DTensor if it is sharded."""
        raise NotImplementedError

    @property
    def mask(self) -> Tensor:
        """bool, in the shape of :attr:`local`: what this process holds of the mask."""
        raise NotImplementedError

    def write(self, mask: Tensor) -> None:
        """Takes a new mask, in place."""
        self.mask.copy_(mask)

    def switch(self, sparse: bool) -> None:
        """Sparse operands, where the layer is to have them, from now on; or dense ones."""

    def release(self) -> None:
        """Ends it: the products see the parameter again."""
        raise NotImplementedError

    @property
    def local(self) -> Tensor:
        """What this process holds of the weight; writing to it writes to the parameter."""
        return shard_of(self.parameter)

    @property
    def local_gradient(self) -> Tensor | None:
        parameter = self.parameter
        gradient = parameter.grad
        if gradient is None:
            return None
        if is_dtensor(gradient) and is_dtensor(parameter) and gradient.placements != parameter.placements:
            gradient = parameter.grad = gradient.redistribute(placements=parameter.placements)
        return shard_of(gradient)

    def matrices(self, tensor: Tensor) -> Tensor:
        """``(..., out, in)`` of a tensor in the shape of :attr:`local`: one for each group and position."""
        layer = self.chosen.layer
        if not layer.is_convolution:
            return tensor.T if layer.input_first else tensor
        groups = layer.groups
        grouped = tensor.reshape(groups, tensor.shape[0] // groups, tensor.shape[1], -1)
        return grouped.permute(0, 3, 1, 2)

    def from_matrices(self, matrices: Tensor) -> Tensor:
        """The inverse of :meth:`matrices`."""
        layer = self.chosen.layer
        if not layer.is_convolution:
            return matrices.T if layer.input_first else matrices
        return matrices.permute(0, 2, 3, 1).reshape(self.local.shape)

    def spread_mask(self) -> Tensor:
        """A copy of the mask, a DTensor like the weight where that is one."""
        parameter = self.parameter
        if not is_dtensor(parameter):
            return self.mask.clone()
        sharding = sharding_of(parameter, 1, [0])
        return from_shards(sharding, [self.mask.clone()], [parameter.shape])[0]

    def groups_that_share(self) -> list[Any]:
        """The process groups over which the weight is cut; not those over which it is replicated."""
        parameter = self.parameter
        if not is_dtensor(parameter):
            return []
        mesh = parameter.device_mesh
        return [mesh.get_group(k) for k, place in enumerate(parameter.placements) if not place.is_replicate()]


class ModuleWeight(MaskedWeight):
    """The layers multiply by the masked weight; see :mod:`nmsolve.train.masked_modules`."""

    def __init__(self, chosen: Chosen, straight_through: bool, asked: str | None) -> None:
        super().__init__(chosen)
        self._asked = asked
        parameter = self.parameter
        mask = torch.ones_like(shard_of(parameter), dtype=torch.bool)
        if is_dtensor(parameter):
            mask = from_shards(sharding_of(parameter, 1, [0]), [mask], [parameter.shape])[0]
        for owner in chosen.owners:
            mask_module(owner, mask, straight_through, chosen.bypassed)

    @property
    def parameter(self) -> nn.Parameter:
        parameter = self.chosen.owners[0]._parameters["weight"]
        assert parameter is not None
        return parameter

    @property
    def mask(self) -> Tensor:
        return shard_of(self._buffer(self.chosen.owners[0]))

    def _buffer(self, owner: nn.Module) -> Tensor:
        mask: Tensor = getattr(owner, MASK)
        if is_dtensor(mask) != is_dtensor(self.parameter):
            raise NMSolveError(
                f"model: {self.name} was distributed after SparseTraining was made; first fully_shard or "
                "parallelize_module, then SparseTraining"
            )
        return mask

    def write(self, mask: Tensor) -> None:
        for owner in self.chosen.owners:  # moving a model makes a buffer of its own for each
            shard_of(self._buffer(owner)).copy_(mask)

    def switch(self, sparse: bool) -> None:
        if self._asked is not None:
            for owner in self.chosen.owners:
                owner.nmsolve_sparse = self._asked if sparse else None  # type: ignore[assignment]

    def release(self) -> None:
        for owner in self.chosen.owners:
            unmask_module(owner)


class GatheredWeight(MaskedWeight):
    """FSDP2 gathers ``W * S``: each process masks its shard before it sends it.

    The gradient of what was gathered comes back to the shard, dense: that is the straight-through gradient,
    and for the masked one a hook clears it where the mask is False. Nothing but the all-gather communicates,
    and the model's code and its parameters stay as they are: torch looks for the two functions below on the
    local tensor.
    """

    def __init__(self, chosen: Chosen, fsdp_parameter: Any, straight_through: bool) -> None:
        super().__init__(chosen)
        self._fsdp = fsdp_parameter
        self._hooked: Any = None
        self._handle: Any = None
        self._straight_through = straight_through
        # With PyTorch 2.9 FSDP2 makes another local tensor of a smaller shard whenever it looks at it anew.
        self._reset = fsdp_parameter.reset_sharded_param
        fsdp_parameter.reset_sharded_param = self._reset_and_attach
        # Before it is bound, FSDP2 may still hold the parameter on "meta" that the loaded one has replaced.
        self.bind()
        self._mask = torch.ones_like(shard_of(self.parameter), dtype=torch.bool)

    @property
    def parameter(self) -> nn.Parameter:
        parameter: nn.Parameter = self._fsdp.sharded_param
        return parameter

    @property
    def mask(self) -> Tensor:
        if self._mask.device != self.local.device:
            self._mask = self._mask.to(self.local.device)
        return self._mask

    def bind(self) -> None:
        """Puts the functions on the local tensor, which another one may have replaced.

        ``load_state_dict(assign=True)`` and what moves a model replace it.
        """
        module, leaf = self._fsdp._module_info.module, self._fsdp._module_info.param_name
        if is_dtensor(module._parameters[leaf]):  # it is not gathered now
            self._fsdp.reset_sharded_param()
        else:
            self._attach()

    def _reset_and_attach(self) -> None:
        self._reset()
        self._attach()

    def _attach(self) -> None:
        local: Any = self.parameter._local_tensor  # type: ignore[attr-defined]
        if getattr(local, "fsdp_pre_all_gather", None) != self.fsdp_pre_all_gather:
            local.fsdp_pre_all_gather = self.fsdp_pre_all_gather
            local.fsdp_post_all_gather = self.fsdp_post_all_gather
            self._fsdp._init_extensions()
        if not self._straight_through and self._hooked is not self.parameter:
            if self._handle is not None:
                self._handle.remove()
            self._hooked = self.parameter
            self._handle = self._hooked.register_post_accumulate_grad_hook(self._clear)

    def fsdp_pre_all_gather(
        self, mesh: Any, outer_size: Any, outer_stride: Any, module: Any, mp_policy: Any
    ) -> tuple[tuple[Tensor, ...], None]:
        local = self.local
        masked = torch.where(self.mask, local, 0)
        if mp_policy.param_dtype is not None:
            masked = masked.to(mp_policy.param_dtype)
        rows = -(-outer_size[0] // mesh.size())
        if self._fsdp.fsdp_placement.dim == 0 and len(masked) < rows:  # the last shards are smaller
            masked = torch.cat([masked, masked.new_zeros(rows - len(masked), *masked.shape[1:])])
        return (masked,), None

    def fsdp_post_all_gather(
        self, outputs: tuple[Tensor, ...], metadata: Any, param_dtype: Any, *, out: Any = None
    ) -> Any:
        (gathered,) = outputs
        return None if out is not None else (gathered, (gathered,))

    def _clear(self, parameter: Any) -> None:
        gradient = self.local_gradient
        if gradient is not None:
            gradient.masked_fill_(~self.mask, 0)

    def release(self) -> None:
        if self._handle is not None:
            self._handle.remove()
        self._fsdp.reset_sharded_param = self._reset
        local: Any = self.parameter._local_tensor  # type: ignore[attr-defined]
        for name in ("fsdp_pre_all_gather", "fsdp_post_all_gather"):
            if hasattr(local, name):
                delattr(local, name)


def fsdp_parameters(model: nn.Module) -> dict[int, Any]:
    """Id of a module -> what FSDP2 knows of its parameter ``weight``.

    Raises
    ------
    NMSolveError
        If this version of torch keeps them elsewhere.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return {}
    found: dict[int, Any] = {}
    for module in model.modules():
        if isinstance(module, fsdp.FSDPModule):
            for parameter in _of_state(module):
                info = parameter._module_info
                pairs = [(info.module, info.param_name)]
                pairs += zip(info.shared_modules, info.shared_param_names, strict=True)
                found.update((id(owner), parameter) for owner, leaf in pairs if leaf == "weight")
    return found


def _of_state(module: Any) -> Iterator[Any]:
    try:
        state = module._get_fsdp_state()
        groups = getattr(state, "_fsdp_param_groups", None)
        if groups is None:
            groups = [state._fsdp_param_group] if state._fsdp_param_group is not None else []
        for group in groups:
            yield from group.fsdp_params
    except AttributeError as error:
        raise NMSolveError(
            f"model: this version of torch ({torch.__version__}) keeps FSDP2's parameters elsewhere ({error})"
        ) from None


def check_fsdp(parameter: Any, name: str) -> None:
    """Raises where FSDP2 does not let a tensor say what is gathered."""
    if parameter.offload_to_cpu:
        raise NMSolveError(
            f"model: {name}: FSDP2's CPUOffloadPolicy gathers a copy of the weight that knows no mask; shard "
            "without it"
        )
    after = parameter.post_forward_mesh_info
    if after is not None and after != parameter.mesh_info:
        raise NMSolveError(
            f"model: {name}: reshard_after_forward with a number of processes gathers twice, the second time "
            "without masks; use True or False"
        )
