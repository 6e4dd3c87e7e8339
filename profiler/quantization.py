"""Base weights in 4 bits, as QLoRA has them (Dettmers et al. 2023, arXiv:2305.14314): layers of bitsandbytes in place
of a model's nn.Linear and Conv1D, all but its output head, as Transformers makes them when it loads such a model so.

Full fine-tuning can't train such weights, so that its arm keeps them as they were. What a kernel of bitsandbytes takes
and gives back inside itself, such as a weight that it unpacks for a moment, no prediction here knows."""

import copy
from collections.abc import Callable, Iterator
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from lora_fast import LoraFastError

KINDS = ("nf4", "fp4")


def check_kind(kind: str | None) -> None:
    """Raises LoraFastError where weights can't be quantized so here; None: they stay as they are."""
    if kind is None:
        return
    if kind not in KINDS:
        raise LoraFastError(f"quantize={kind!r}; expected one of {', '.join(KINDS)}")
    if find_spec("bitsandbytes") is None:
        raise LoraFastError(f"quantize={kind!r} needs bitsandbytes, which is not installed; pip install bitsandbytes")


def note_on(model: nn.Module, kind: str | None, dtype: str) -> list[str]:
    """What a run says of it; model: as it is before."""
    if kind is None:
        return []
    packed = sum(layer.weight.numel() for layer in _linears(model).values())
    total = sum(parameter.numel() for parameter in model.parameters())
    return [
        f"under adapters the linear layers but the head, {packed / total:.0%} of all parameters, are in {kind} (4 bits "
        "a weight, their scales in 8; QLoRA, arXiv:2305.14314); full fine-tuning, which can't train such weights, has "
        f"its in {dtype}. What bitsandbytes' kernels take for a moment is not in the predictions"
    ]


def _linears(model: nn.Module) -> dict[str, nn.Module]:
    """{dotted name: layer} of those that are packed: not stacked experts, which are parameters of their own."""
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return {name: m for name, m in model.named_modules() if type(m) in (nn.Linear, Conv1D) and m is not head}


def quantize(model: nn.Module, kind: str, device: str | torch.device) -> nn.Module:
    """Puts the model on `device` with its linear layers in 4 bits, one by one, their scales quantized too; they compute
    in the dtype that they were in. Works on the meta device. Returns `model`; parameters that other models share with
    it stay as they are. Raises LoraFastError where it has no linear layer besides its head."""
    linears = _linears(model)
    if not linears:
        raise LoraFastError(
            f"quantize packs nn.Linear and Conv1D, of which {type(model).__name__} has none besides its head"
        )
    for name, layer in linears.items():
        model.set_submodule(name, _quantized(layer, kind, torch.device(device)))
    model.is_loaded_in_4bit = True  # by which PEFT chooses its layers
    return model.to(device)


def _quantized(layer: nn.Module, kind: str, device: torch.device) -> nn.Linear:
    import bitsandbytes

    matrix = layer.weight.detach() if isinstance(layer, nn.Linear) else layer.weight.detach().t()  # (N, K)

    if device.type == "meta":  # it keeps its table where it is first used: there it would be without values for good
        bitsandbytes.functional.quantize_blockwise(torch.zeros(1))
    made = bitsandbytes.nn.Linear4bit(
        *matrix.shape[::-1],
        layer.bias is not None,
        compute_dtype=layer.weight.dtype,
        quant_type=kind,
        device="meta",
    )
    weight = bitsandbytes.nn.Params4bit(
        matrix.to(device), requires_grad=False, compress_statistics=True, quant_type=kind, module=made
    )
    made.weight = weight._quantize(device)  # what .to(device) does on every device but meta
    made.bias = layer.bias
    return made.train(layer.training)


def states_of(model: nn.Module) -> Iterator[Tensor]:
    """The tensors beside packed weights that say what they mean, scales for the most part, each once."""
    found: dict[int, Tensor] = {}
    for parameter in model.parameters():
        _with_tensors(getattr(parameter, "quant_state", None), lambda tensor: found.setdefault(id(tensor), tensor))
    yield from found.values()


def with_state_of(made: nn.Parameter, parameter: nn.Parameter, make: Callable[[Tensor], Tensor]) -> nn.Parameter:
    """`made` in place of `parameter`, with that one's state, if it has one, of tensors that `make` gives."""
    if hasattr(parameter, "quant_state"):
        made.quant_state = _with_tensors(parameter.quant_state, make)
    return made


def _with_tensors(state: object, make: Callable[[Tensor], Tensor]) -> object:
    """A copy of bitsandbytes' QuantState, which may hold another, with each tensor replaced."""
    if state is None:
        return None
    result = copy.copy(state)
    for name, value in vars(state).items():
        if isinstance(value, Tensor):
            setattr(result, name, make(value))
        elif isinstance(value, type(state)):
            setattr(result, name, _with_tensors(value, make))
    return result
