"""What a process holds beside its share of a model under FSDP2: parts that are gathered, and gradients not yet shared.

Meant is `torch.distributed.fsdp.fully_shard` on every decoder layer and on the model, whose group then is the rest
(embeddings, head, last norm), with its defaults: layers are given back after their forward, the rest after backward.
Parameters arrive in a buffer and are copied out of it.
- forward: a layer's buffer is freed once the next layer's parameters are copied. So there are three layers at that
  moment, two while a layer computes, and one from the last layer on, through the loss.
- backward: while a layer's backward runs, the one before it arrives in its buffer: two layers. Gradients are whole
  until their layer's are reduced, out of a buffer that lives until the next layer's are; the rest's are reduced last.
Read off PyTorch 2.11 and 2.13's source (`_fsdp_param_group.py`) and held against the allocations of the real thing by
tests/test_sharding.py."""

from collections.abc import Callable

from torch import Tensor, nn

from lora_fast.profiler.models import layer_count


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The model's decoder layers, which FSDP2 gathers one at a time."""
    depth = layer_count(model.config)
    return list(next((m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth), ()))


class Gathered:
    """Tells `reserve` the bytes that a process of `shards` takes and gives back in a step beyond its share of weights
    and gradients, which are counted elsewhere, whole."""

    def __init__(self, model: nn.Module, shards: int, reserve: Callable[[int], None]):
        self.layers = decoder_layers(model)
        self.shards, self.reserve = shards, reserve
        self.rest = len(self.layers)  # the rest's number among the groups
        self.group_of = {id(p): i for i, layer in enumerate(self.layers) for p in layer.parameters()}
        self.sizes, self.trained = ([0] * (self.rest + 1) for _ in range(2))
        for parameter in model.parameters():
            group = self.group_of.setdefault(id(parameter), self.rest)
            self.sizes[group] += parameter.nbytes
            self.trained[group] += parameter.nbytes * parameter.requires_grad
        self.unshared = [0] * (self.rest + 1)  # gradients that are whole, less their share
        self.seen: set[int] = set()
        self.buffer = self.reducing = 0
        self.waiting: list[int] = []  # layers whose backward is not over
        self.in_forward = False
        self.handles = []
        for i, layer in enumerate(self.layers):
            self.handles += [
                layer.register_forward_pre_hook(self._before(i), with_kwargs=True),
                layer.register_forward_hook(self._after(i)),
            ]

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def start_forward(self) -> None:
        self.in_forward = True
        self.reserve(2 * self.sizes[self.rest])
        self.buffer = self.sizes[self.rest]

    def _before(self, i: int) -> Callable:
        def hook(layer: nn.Module, args: tuple, kwargs: dict) -> None:
            if not self.in_forward:  # a checkpoint that is recomputed
                return
            self.reserve(2 * self.sizes[i])
            self.reserve(-self.buffer)
            self.buffer = self.sizes[i]
            x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
            if x is not None and x.requires_grad:
                x.register_hook(lambda gradient: self._pass_backward(i))

        return hook

    def _after(self, i: int) -> Callable:
        def hook(layer: nn.Module, args: tuple, output: object) -> None:
            if not self.in_forward:
                return
            self.reserve(-self.sizes[i])
            y = output[0] if isinstance(output, tuple) else output
            if i == self.rest - 1 and isinstance(y, Tensor) and y.requires_grad:
                y.register_hook(lambda gradient: self._start_layer(i))

        return hook

    def end_forward(self) -> None:
        self.in_forward = False
        self.reserve(-self.buffer)
        self.buffer = 0

    def start_backward(self) -> None:
        if self.layers:
            self.reserve(self.sizes[self.rest - 1])  # the last layer's buffer

    def _start_layer(self, i: int) -> None:
        self.reserve(self.sizes[i])  # its parameters, copied out of the buffer
        self.reserve(-self.sizes[i])
        self.waiting.append(i)
        if i > 0:
            self.reserve(self.sizes[i - 1])

    def _pass_backward(self, i: int) -> None:
        """The gradient of layer i's input is there: that layer is done, the one before it begins."""
        self._end_layer(i)
        if i > 0:
            self._start_layer(i - 1)

    def _end_layer(self, i: int) -> None:
        if i not in self.waiting:  # its output's gradient was not seen
            self._start_layer(i)
        self.waiting.remove(i)
        self.reserve(-self.sizes[i])
        self._reduce(i)

    def gradient(self, parameter: nn.Parameter) -> None:
        """A parameter's gradient is there, counted once, whole, however many passes add to it."""
        share = -(-parameter.nbytes // self.shards)
        # From the second pass on the share stays beside it.
        size = parameter.nbytes if id(parameter) in self.seen else parameter.nbytes - share
        self.seen.add(id(parameter))
        self.unshared[self.group_of[id(parameter)]] += size
        self.reserve(size)

    def _reduce(self, group: int) -> None:
        self.reserve(-self.reducing)
        self.reducing = self.trained[group]
        self.reserve(self.reducing)
        self.reserve(-self.unshared[group])
        self.unshared[group] = 0

    def end_backward(self) -> None:
        for i in list(self.waiting):  # whose input needs no gradient
            self._end_layer(i)
        self.reserve(-self.sizes[self.rest])
        self._reduce(self.rest)
        self.reserve(-self.reducing)
        self.reducing = 0
