"""LoRA on subclasses of nn.Linear (Falcon's linear layers, the out_proj of nn.MultiheadAttention, the 4-bit and 8-bit
layers of bitsandbytes) and of nn.Embedding (those that scale): classes made on demand.

A subclass that keeps nn.Linear's forward is adapted as nn.Linear is. One with a forward of its own is called as it is
and the update added to what it returns, as PEFT does. That of an embedding calls nn.Embedding's, which is adapted."""

from functools import cache
from typing import Any

from torch import Tensor, nn

from lora_fast.config import LoraFastError
from lora_fast.embedding import LoraEmbedding
from lora_fast.linear import NO_ADAPTER, LoraLayer
from lora_fast.quantized import is_four_bit, packed_weight, why_called
from lora_fast.shared_input import LinearCall, run_linear, update_called


class LoraSubclass(LoraLayer):
    """A LoRA layer over `base_class`, a subclass of nn.Linear with nn.Linear's own forward: base and update in one op;
    or of nn.Embedding.

    No module holds the classes that `lora_subclass` makes, so that copies and pickles name `base_class` instead."""

    def __reduce_ex__(self, protocol: int) -> tuple:
        _, _, *state = super().__reduce_ex__(max(protocol, 2))
        return _empty, (self.base_class,), *state


class LoraCalledBase(LoraSubclass):
    """A LoRA layer over a `base_class` with a forward of its own: y = forward(x) + scaling · drop(x) lora_Aᵀ lora_Bᵀ.
    Of a 4-bit layer of bitsandbytes it is known what that computes: its weight goes into the op, wherever it can.

    Raises LoraFastError where that forward returns anything but one tensor (..., N), as a router's does."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        call = None if args or kwargs else self.linear_call(x)
        if call is not None:
            return run_linear(self, x, call).to(x.dtype)  # as its own forward answers
        base = self.base_class.forward(self, x, *args, **kwargs)
        if not self.adapter_runs():
            self.count("base", NO_ADAPTER)
            return base
        if not isinstance(base, Tensor) or base.shape != (*x.shape[:-1], self.out_features):
            found = f"a tensor {tuple(base.shape)}" if isinstance(base, Tensor) else f"a {type(base).__name__}"
            raise LoraFastError(
                f"{self.base_class.__name__}.forward returned {found}; an update can be added only to one tensor "
                f"{(*x.shape[:-1], self.out_features)}: name its modules in exclude_modules"
            )
        self.count("lora_update", self._called_base())
        return update_called(x, base, self.call_with(self.weight))

    def linear_call(self, x: Tensor) -> LinearCall | None:
        """None where its own forward is called, which may compute anything, so that no op of several takes it in."""
        weight = packed_weight(self, x) if self.adapter_runs() else None
        return None if weight is None else self.call_with(weight)

    def fusion_path(self) -> tuple[str, str | None]:
        if not self.adapter_runs():
            return super().fusion_path()
        if is_four_bit(self):
            return super().fusion_path()
        triton = self.why_not_triton("lora_update")
        return "torch" if triton else "triton", "; ".join(filter(None, (self._called_base(), triton)))

    def _called_base(self) -> str:
        return why_called(self.base_class, four_bit=is_four_bit(self))


@cache
def lora_subclass(base: type[nn.Linear | nn.Embedding]) -> type[LoraSubclass]:
    """The one LoRA class over `base`."""
    if issubclass(base, nn.Embedding):
        kinds = (LoraSubclass, base, LoraEmbedding)  # base's forward comes first, and finds LoraEmbedding's above it
    else:
        kinds = (LoraSubclass if base.forward is nn.Linear.forward else LoraCalledBase, base)
    return type(f"Lora{base.__name__}", kinds, {"__module__": __name__, "base_class": base})


def _empty(base: type[nn.Linear | nn.Embedding]) -> LoraSubclass:
    """What a copy or a pickle of such a layer starts from."""
    kind = lora_subclass(base)
    return kind.__new__(kind)
