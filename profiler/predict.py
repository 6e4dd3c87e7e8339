"""Bytes and FLOPs of one training step of an arm, without its memory: traced on fake tensors, which have shapes alone.

The arm is put together as for a measurement (the same injection, operators, optimizer) on the meta device, its
parameters are replaced by fake ones, and a step runs under the memory tracker. Decoder layers that are all alike cost
the same each, so two depths are traced and every number is extended to the model's depth on a straight line: memory
moment by moment, since the highest moment of a deep model need not be that of a flat one (with checkpointing the
gradients, which grow by the layer, overtake the logits, which don't). A model with layers of several kinds is traced
whole.

What fake tensors can't show: memory that an operator takes and gives back inside itself, fragmentation, and what the
CUDA context holds. Attention is PyTorch's on a CPU, which keeps for backward what FlashAttention keeps on a GPU."""

import contextlib
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)

from lora_fast import LoraFastError, LoraFastWarning
from lora_fast.kernels import reference
from lora_fast.profiler.memory import CATEGORIES, CUDA_GRANULE, PHASES, track_step
from lora_fast.profiler.models import ModelSource, build, layer_count
from lora_fast.profiler.quantization import quantize, with_state_of
from lora_fast.profiler.roofline import Chip, Launch, LaunchCounter
from lora_fast.profiler.sharding import decoder_layers
from lora_fast.profiler.workload import FULL, LORA, PEFT, Workload, optimizer_of, train

# Categories that FSDP2 spreads over its processes; an optimizer works on its share, so its temporaries are shares too.
_STATES = ("weights", "adapters", "gradients", "optimizer")
SHARDED = {"forward": _STATES, "backward": _STATES, "optimizer": CATEGORIES}
# The first layer may differ in what is alive around it; from the second on each adds the same. Under FSDP2 a layer's
# backward meets the gathered layer before it and the gradients of the one after it: from the third on.
DEPTHS = (2, 3)
SHARDED_DEPTHS = (3, 4)


@dataclass(frozen=True)
class Prediction:
    """moments: for each stretch of a phase ("forward", "backward", perhaps again, "optimizer") that phase and bytes
    (moments, CATEGORIES), in the order of time unless they were extended from two depths. phases: {"forward":
    {category: bytes}, …}, what is held at each phase's peak; by_category: at the peak of all. trainable, parameters:
    numbers of them. forward_flops, backward_flops: of all passes of a step, a multiply-add being two. traced_layers:
    the depths that were traced. launches: how often each is made in a phase, of all passes; only of what was traced."""

    moments: tuple[tuple[str, np.ndarray], ...]
    after_step: dict[str, int]
    trainable: int
    parameters: int
    forward_flops: int
    backward_flops: int
    traced_layers: tuple[int, ...]
    launches: Mapping[str, Counter[Launch]] = field(default_factory=dict)

    @cached_property
    def phases(self) -> dict[str, dict[str, int]]:
        found = {}
        for phase in PHASES:
            held = _highest(np.concatenate([rows for name, rows in self.moments if name == phase]))
            found[phase] = dict(zip(CATEGORIES, held.tolist()))
        return found

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))

    @property
    def by_category(self) -> dict[str, int]:
        return self.phases[self.peak_phase]

    @property
    def peak(self) -> int:
        """Bytes."""
        return sum(self.by_category.values())

    @property
    def flops(self) -> int:
        return self.forward_flops + self.backward_flops


def predict(source: ModelSource, workload: Workload, rank: int | None, **how: Any) -> Prediction:
    """One arm's step; the arguments are those of `trace`."""
    return trace(source, workload, rank, **how).extended()


@dataclass(frozen=True)
class Traced:
    """One arm's step at the `depths` that were traced, of a model of `depth` layers; with one of them it is the whole
    model, of unknown depth where None."""

    found: tuple[Prediction, ...]
    depths: tuple[int | None, ...]
    depth: int | None
    shards: int

    def extended(self) -> Prediction:
        """The step at the model's depth, as one of the processes sees it."""
        if len(self.found) == 1:
            (step,) = self.found
        else:
            low, high = self.depths
            steps = (self.depth - low) // (high - low)
            step = _weighted(self.found, (1 - steps, steps), self._stretch)
        moments = tuple((phase, _share(phase, held, self.shards)) for phase, held in step.moments)
        traced_layers = tuple(depth for depth in self.depths if depth is not None)
        return replace(step, moments=moments, traced_layers=traced_layers)

    def seconds(self, chip: Chip) -> dict[str, float]:
        """{phase: the least time that its launches take one after the other}, on a GPU that has the model to itself."""
        return self._of_launches(chip.seconds)

    def launches(self) -> int:
        """How many the step makes."""
        return round(sum(self._of_launches(lambda launch: 1).values()))

    def _of_launches(self, cost: Callable[[Launch], float]) -> dict[str, float]:
        """{phase: Σ cost of its launches}, which is linear in the depth, as everything is."""
        found = [
            {
                phase: sum(count * cost(launch) for launch, count in made.items())
                for phase, made in step.launches.items()
            }
            for step in self.found
        ]
        if len(found) == 1:
            return found[0]
        low, high = self.depths
        steps = (self.depth - low) / (high - low)
        return {phase: found[0][phase] + steps * (found[1][phase] - found[0][phase]) for phase in PHASES}

    def _stretch(self, phase: str, held: Sequence[np.ndarray], line: Callable) -> np.ndarray:
        return _moments(*held, line, lambda moments: _highest(moments, _share(phase, moments, self.shards)))


def trace(
    source: ModelSource,
    workload: Workload,
    rank: int | None,
    *,
    peft: bool = False,
    whole: bool = False,
    shards: int = 1,
) -> Traced:
    """One arm's step, at two depths where the layers are alike; rank None is full fine-tuning. peft: the adapter is
    PEFT's. whole: trace every layer even where they are alike. shards: processes that FSDP2 spreads the model over, of
    which one is meant. Raises LoraFastError where the model can't be traced."""
    kind = PEFT if peft else FULL if rank is None else LORA
    if workload.backend == "triton":  # kernels read memory; what the operator keeps is the same without them
        workload = replace(workload, backend="auto")
    depth, alike = _layers(source, workload.torch_dtype)
    depths = DEPTHS if shards == 1 else SHARDED_DEPTHS
    if whole or not alike or depth <= depths[-1] or (shards > 1 and not _shortens(source, workload.torch_dtype)):
        return Traced((_trace(source, workload, kind, rank, None, shards),), (depth,), depth, shards)
    found = tuple(_trace(source, workload, kind, rank, layers, shards) for layers in depths)
    return Traced(found, depths, depth, shards)


def combined(parts: Sequence[Traced], weights: Sequence[float]) -> Traced | None:
    """Σ weight · part, number by number: of steps that differ in one size, the step at another size. None where they
    don't consist of the same moments.

    A storage has as many bytes as its sizes multiplied, so that each moment is linear in the rank and in the batch and
    quadratic in the length (a matrix of attention has length × length)."""
    first = parts[0]
    for other in parts[1:]:
        if other.depths != first.depths or any(_outline(a) != _outline(b) for a, b in zip(first.found, other.found)):
            return None
    found = tuple(_weighted(steps, weights) for steps in zip(*(part.found for part in parts)))
    return replace(first, found=found)


def _outline(step: Prediction) -> list[tuple[str, int]]:
    return [(phase, len(held)) for phase, held in step.moments]


@lru_cache(maxsize=8)
def _layers(source: ModelSource, dtype: torch.dtype) -> tuple[int | None, bool]:
    """Number of decoder layers, and whether all are alike, so that two depths tell what each costs."""
    model = build(source, device="meta", dtype=dtype)
    depth = layer_count(model.config)
    return depth, depth is not None and layers_are_alike(model, depth)


@lru_cache(maxsize=8)
def _shortens(source: ModelSource, dtype: torch.dtype) -> bool:
    """Whether a model of fewer layers has fewer decoder layers: not where those are counted under another name."""
    return bool(decoder_layers(build(source, device="meta", dtype=dtype, layers=SHARDED_DEPTHS[0])))


def layers_are_alike(model: nn.Module, depth: int) -> bool:
    """Whether the `depth` decoder layers of the model differ in nothing but values."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    if not lists:
        return False
    kinds = {
        (
            *((name, type(m).__qualname__) for name, m in layer.named_modules()),
            *((name, tuple(p.shape), p.dtype) for name, p in layer.named_parameters()),
        )
        for layer in lists[0]
    }
    entries = [v for v in vars(model.config.get_text_config()).values() if isinstance(v, list) and len(v) == depth]
    return len(kinds) == 1 and all(len(set(map(str, values))) == 1 for values in entries)


def _weighted(
    steps: Sequence[Prediction], weights: Sequence[float], stretch: Callable[..., np.ndarray] | None = None
) -> Prediction:
    """Σ weight · step of every number. stretch(phase, held, line): makes the moments of a stretch out of what the steps
    `held`, weighed by `line`; without it moment by moment."""

    def line(*values):
        if isinstance(values[0], dict):
            return {key: line(*(value[key] for value in values)) for key in values[0]}
        total = sum(weight * value for weight, value in zip(weights, values))
        return np.rint(total).astype(np.int64) if isinstance(total, np.ndarray) else round(total)

    moments = []
    for same in zip(*(step.moments for step in steps)):
        phase, held = same[0][0], [rows for _, rows in same]
        moments.append((phase, stretch(phase, held, line) if stretch else line(*held)))
    names = ("after_step", "trainable", "parameters", "forward_flops", "backward_flops")
    numbers = {name: line(*(getattr(step, name) for step in steps)) for name in names}
    return replace(steps[0], moments=tuple(moments), launches={}, **numbers)


def _moments(a: np.ndarray, b: np.ndarray, line: Callable, highest: Callable) -> np.ndarray:
    """Moments (m, CATEGORIES) of one stretch at two depths → those at the model's depth that may be its highest.

    The stretches agree, change by change, from their start until the flatter model has no further layer, and likewise
    backwards from their end. Moments of the one part lie before or in the first layers, those of the other in the last
    layers or behind them, and each grows with the depth on a line of its own; what lies between, on a line between
    those. The highest moments are a pair, too, for lists over all layers, as of a foreach optimizer."""
    changes = [np.diff(held, axis=0).sum(axis=1) for held in (a, b)]
    shorter = min(map(len, changes))

    def agree(one: np.ndarray, other: np.ndarray) -> int:
        differ = np.flatnonzero(one[:shorter] != other[:shorter])
        return 1 + (int(differ[0]) if len(differ) else shorter)

    start, end = agree(*changes), agree(*(change[::-1] for change in changes))
    top = line(highest(a), highest(b))
    return np.concatenate([line(a[:start], b[:start]), top[None], line(a[-end:], b[-end:])])


def _highest(held: np.ndarray, counted: np.ndarray | None = None) -> np.ndarray:
    """Of moments (m, CATEGORIES) the one of most bytes, or that for which `counted` has most; of several the last, as
    the tracker names a peak."""
    counted = held if counted is None else counted
    return held[len(held) - 1 - counted.sum(axis=1)[::-1].argmax()]


def _share(phase: str, held: np.ndarray, shards: int) -> np.ndarray:
    """What one process holds at moments that were traced whole."""
    divisors = np.array([shards if category in SHARDED[phase] else 1 for category in CATEGORIES])
    return -(-held // divisors)


def _trace(
    source: ModelSource,
    workload: Workload,
    kind: str,
    rank: int | None,
    layers: int | None,
    shards: int,
    idle: frozenset[str] = frozenset(),
) -> Prediction:
    """One step, after one that left the optimizer's states. idle: names of trained parameters that no gradient reaches,
    which have no state; where there are others than these, the step is traced again."""
    attention = workload.attn_implementation
    model = build(source, device="meta", dtype=workload.torch_dtype, attn_implementation=attention, layers=layers)
    parameters = sum(p.numel() for p in model.parameters())
    if packing := workload.packing(kind):
        quantize(model, packing, "meta")
    with warnings.catch_warnings():  # of ranks above min(N, K), which would count the traced layers alone
        warnings.simplefilter("ignore", LoraFastWarning)
        model, trained = train(model, workload, kind, rank)
    names = {id(p): name for name, p in model.named_parameters()}
    trained_names = {names[id(p)] for p in trained}
    on_cuda = torch.device(workload.device).type == "cuda"
    if workload.lora_dropout:  # a table that the first mask makes and that stays; among fake tensors it wouldn't
        reference.unpack_mask(torch.zeros(1, 1, dtype=torch.uint8), torch.empty(1, 8, dtype=workload.torch_dtype))
    with FakeTensorMode(allow_non_fake_inputs=True), _seen_as_real():
        _make_fake(model)
        by_name = {name: p for name, p in model.named_parameters() if name in trained_names}
        trained, reached = list(by_name.values()), set()
        for name, parameter in by_name.items():
            parameter.register_post_accumulate_grad_hook(lambda _, name=name: reached.add(name))
        optimizer = _of_any_value(optimizer_of(workload, trained))
        batch = replace(workload, device="cpu").batch(model)
        passes = min(workload.gradient_accumulation, 2)
        marks: list[tuple[int, int]] = []  # FLOPs and launches until then
        history: list[tuple[str, list]] = []
        try:
            with LaunchCounter() as counter, contextlib.ExitStack() as stack:
                if on_cuda:
                    stack.enter_context(mock.patch.object(nn.functional, "dropout", _dropout))
                if on_cuda and workload.backend != "torch":
                    stack.enter_context(counter.as_kernels())
                for name, parameter in by_name.items():
                    parameter.grad = None if name in idle else torch.empty_like(parameter)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                counter.flops = 0
                counter.launches.clear()
                tracked = track_step(
                    model,
                    optimizer,
                    batch,
                    adapters=() if kind == FULL else trained,
                    round_to=CUDA_GRANULE if on_cuda else 1,
                    micro_steps=passes,
                    mark=lambda: marks.append((counter.flops, len(counter.launches))),
                    history=history,
                    shards=shards,
                )
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise LoraFastError(
                f"{source.name}: what it computes depends on values, so that shapes don't tell its cost: {error}"
            ) from None
    if reached != trained_names - idle:
        return _trace(source, workload, kind, rank, layers, shards, frozenset(trained_names - reached))
    # Every pass computes the same.
    repeats = workload.gradient_accumulation
    (forward, turn), (both, end) = marks[:2]
    made = dict(zip(PHASES, (counter.launches[:turn], counter.launches[turn:end], counter.launches[marks[-1][1] :])))
    return Prediction(
        moments=tuple((phase, np.array(held, dtype=np.int64)) for phase, held in history),
        after_step=tracked["after_step"],
        trainable=sum(p.numel() for p in trained),
        parameters=parameters + (0 if kind == FULL else sum(p.numel() for p in trained)),
        forward_flops=repeats * forward,
        backward_flops=repeats * (both - forward),
        traced_layers=(),
        launches={phase: Counter((1 if phase == "optimizer" else repeats) * listed) for phase, listed in made.items()},
    )


def _make_fake(model: nn.Module) -> None:
    """Replaces parameters and buffers on the meta device by fake ones on the CPU, tied ones by one."""
    made: dict[int, nn.Parameter] = {}

    copies: dict[int, Tensor] = {}

    def like(tensor: Tensor) -> Tensor:
        if id(tensor) not in copies:
            copies[id(tensor)] = torch.empty(tensor.shape, dtype=tensor.dtype)
        return copies[id(tensor)]

    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:
                    fake = nn.Parameter(like(parameter), requires_grad=parameter.requires_grad)
                    made[id(parameter)] = with_state_of(fake, parameter, like)
                module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = like(buffer)


def _of_any_value(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Numbers that the optimizer reads off its tensors (Adafactor the norms of the weights) are 1: no size depends on
    them. A model that reads numbers is another matter, so only while the optimizer steps."""
    step = optimizer.step

    def step_of_any_value() -> None:
        with mock.patch.object(FakeTensor, "item", lambda tensor: 1.0):
            step()

    optimizer.step = step_of_any_value
    return optimizer


def _dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """A GPU's: one launch, and a byte an element is kept of the mask; a CPU keeps it in x's dtype."""
    return torch.native_dropout(x, p, training)[0] if training and p > 0 else x


@contextlib.contextmanager
def _seen_as_real() -> Iterator[None]:
    """Transformers takes fake tensors for those of a compiler, for whose sake it makes a causal mask and repeats keys
    and values of grouped attention; a run with one sequence per row does neither."""
    from transformers import masking_utils

    if not hasattr(masking_utils, "find_packed_sequence_indices"):
        yield
        return
    with mock.patch.object(masking_utils, "find_packed_sequence_indices", lambda position_ids: None):
        yield
