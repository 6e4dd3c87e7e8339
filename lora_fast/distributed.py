"""Models spread over processes: what wraps them, tensors of which each process holds a part, and what only one may do.

DistributedDataParallel copies the model; `fully_shard` (FSDP2) makes its parameters DTensors; FullyShardedDataParallel
(FSDP1) has them in flat pieces between its calls."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from lora_fast.config import LoraFastError, plain_name


def is_sharded(tensor: Tensor) -> bool:
    """Whether other processes hold parts of it: a DTensor, as FSDP2's `fully_shard` and tensor parallelism make one."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor's whole, for which all of its processes have to ask; any other as it is.

    Wanted of a sum or a maximum too: float() and bool() give that over this process's part."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def spread_as(tensor: Tensor, value: Tensor) -> Tensor:
    """`value`, which is the same in all processes, spread over them as the tensor is where it isn't yet."""
    if is_sharded(tensor) and not is_sharded(value):
        from torch.distributed.tensor import distribute_tensor  # slow to import, and met already where one is sharded

        value = value.to(tensor.device)
        value = distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None)
    return value


def overwrite(tensor: Tensor, value: Tensor) -> None:
    """tensor ← value, spread as the tensor is."""
    tensor.copy_(spread_as(tensor, value))


def gathered(tensor: Tensor) -> Tensor:
    """The tensor to write; a sharded one's whole goes to the CPU at once, so that GPUs hold one at a time."""
    return whole(tensor.detach()).cpu() if is_sharded(tensor) else tensor


def once(model: nn.Module, action: Callable[[], None]) -> None:
    """Runs `action`, of a sharded model in the first process alone; every one returns after it, or raises where it
    did."""
    if not any(map(is_sharded, model.parameters())):
        action()
        return
    error = None
    if torch.distributed.get_rank() == 0:
        try:
            action()
        except Exception as e:  # whatever it is, the others wait to hear of it
            error = e
    told = [None if error is None else str(error)]
    torch.distributed.broadcast_object_list(told, src=0)
    if error is not None:
        raise error
    if told[0] is not None:
        raise LoraFastError(f"in the first process: {told[0]}")


def _is_fsdp2(module: nn.Module) -> bool:
    return hasattr(module, "reshard") and hasattr(module, "unshard")


def give_back(model: nn.Module) -> None:
    """Lets FSDP2 give back the parameters that it has gathered, as after an evaluation: what was written into them
    would be lost."""
    for module in model.modules():
        if _is_fsdp2(module):
            module.reshard()


def inside_wrapper(model: nn.Module) -> str | None:
    """The attribute that holds the model itself where `model` is a wrapper: compiled, data-parallel, or FSDP's."""
    names = {"_orig_mod": "_orig_mod", "module": "module", "_fsdp_wrapped_module": "module"}
    return next((attribute for name, attribute in names.items() if name in model._modules), None)


def distribution_of(model: nn.Module) -> str | None:
    """How a model is spread over processes already, None where it isn't."""
    kinds = {type(module).__name__ for module in model.modules()}
    for wrapper in ("DistributedDataParallel", "FullyShardedDataParallel"):
        if wrapper in kinds:
            return f"wrapped in {wrapper}"
    # FSDP1's own mark of a parameter, whose shape tells nothing inside summon_full_params.
    if any(hasattr(parameter, "_fsdp_flattened") for parameter in model.parameters()):
        return "in FullyShardedDataParallel's pieces already"
    sharded = any(map(is_sharded, model.parameters())) or any(map(_is_fsdp2, model.modules()))
    return "sharded over processes (its weights are DTensors)" if sharded else None


def check_matrices(layers: Mapping[str, nn.Module]) -> None:
    """Raises LoraFastError where FullyShardedDataParallel has the weights in flat pieces, as between its calls."""
    for name, layer in layers.items():
        for factors in (layer.lora_A, layer.lora_B):
            if any(factor.weight.dim() != 2 for factor in factors.values()):
                raise LoraFastError(
                    f"FullyShardedDataParallel holds {plain_name(name)} in pieces; do this in all processes, inside "
                    "`with FullyShardedDataParallel.summon_full_params(model):`"
                )
