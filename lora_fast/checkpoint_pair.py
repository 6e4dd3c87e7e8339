"""Two safetensors checkpoints of one model, a base and what was fine-tuned from it, read side by side in panels."""

import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_fast.checkpoint_files import DTYPES, Stored, counting_order, shortened, stored_tensors
from lora_fast.config import LoraFastError

# Elements of one panel: 8 MB in float64; its 128 rows of 8192 still make a GEMM that memory does not hold up.
PANEL = 1 << 20


@dataclass(frozen=True)
class _Matrix:
    """One matrix (N, K): the tensor that holds it and, where that is a stack of experts, its place there."""

    tensor: str
    expert: int | None
    shape: tuple[int, int]


class CheckpointPair:
    """The matrices that base and tuned both hold, by the path of their module.

    A matrix is a floating-point weight of two dimensions or more: linear layers, embeddings, the head. That of a
    convolution, of four or more dimensions or of three with "conv" in its name, is flattened to (Cout, rest); another
    of three dimensions is a stack of experts (E, N, K), whose matrices are named name[0] … name[E − 1]. Shapes are as
    stored: GPT-2's Conv1D holds (in_features, out_features).
    exclude: modules to leave out, whole names ("model.embed_tokens") or their last parts ("embed_tokens").
    names: of the matrices, numbers in them in counting order. skipped: names and shapes of the other tensors in both.
    Raises LoraFastError where there is no such checkpoint, a shard is missing or damaged, or the matrices of the two
    differ in name or shape; it lists all of them. Only headers are read."""

    def __init__(self, base: str | os.PathLike, tuned: str | os.PathLike, *, exclude: Collection[str] = ()) -> None:
        if isinstance(exclude, str):
            raise LoraFastError(f"exclude={exclude!r}; expected a list of module names")
        self._base, self._tuned = stored_tensors(base, "base"), stored_tensors(tuned, "tuned")
        for entry in exclude:
            if not any(_is_named(tensor, [entry]) for tensor in (*self._base, *self._tuned)):
                raise LoraFastError(f"exclude names {entry!r}, which is no module of either checkpoint")
        kept = [
            {name: stored for name, stored in side.items() if _is_matrix(stored) and not _is_named(name, exclude)}
            for side in (self._base, self._tuned)
        ]
        _check_same(*kept, str(base), str(tuned))
        self._matrices: dict[str, _Matrix] = {}
        for tensor in sorted(kept[0], key=counting_order):
            for name, matrix in _matrices(tensor, kept[0][tensor].shape):
                self._matrices[name] = matrix
        if not self._matrices:
            raise LoraFastError(
                f"base={str(base)!r} and tuned={str(tuned)!r} hold no floating-point weight of two dimensions; "
                "expected the checkpoints of a model before and after fine-tuning, not quantized"
            )
        self.skipped: dict[str, tuple[int, ...]] = {
            name: stored.shape for name, stored in self._base.items() if name not in kept[0] and name in self._tuned
        }

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._matrices)

    def shape(self, name: str) -> tuple[int, int]:
        """(N, K), as stored."""
        return self._matrices[name].shape

    def tensor(self, name: str) -> str:
        """The name of the tensor that holds the matrix: "….weight", or that of a whole stack of experts."""
        return self._matrices[name].tensor

    def dtype(self, name: str) -> torch.dtype:
        """What the tuned weights are stored in."""
        return DTYPES[self._tuned[self._matrices[name].tensor].type]

    def base_dtype(self, name: str) -> torch.dtype:
        """What the base weights are stored in."""
        return DTYPES[self._base[self._matrices[name].tensor].type]

    def stored_bytes(self, name: str) -> int:
        """Of both matrices, as they lie on disk."""
        N, K = self.shape(name)
        return N * K * (self.base_dtype(name).itemsize + self.dtype(name).itemsize)

    def panels(
        self, name: str, device: torch.device | str | None = None, elements: int = PANEL
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Consecutive parts (c, n) of base and tuned, float64 on `device`, along the long side of the matrix.

        n = min(N, K): parts of the rows where N ≥ K, else of the columns, transposed. c · n is `elements` or, of a
        convolution's whole windows, less than one row more. The values are exact: float64 holds every stored type. The
        files are open only while the iteration lasts, so that no page of them stays in the memory of the process."""
        matrix = self._matrices[name]
        with ExitStack() as stack:
            sides = [side[matrix.tensor] for side in (self._base, self._tuned)]
            reads = [stack.enter_context(side.opened()) for side in sides]
            whole = sides[0].shape
            N, K = matrix.shape
            rows = N >= K
            lead = (matrix.expert,) if matrix.expert is not None else ()
            axis = len(lead) + (not rows)
            length = whole[axis]
            step = max(1, elements * length // (N * K))
            for start in range(0, length, step):
                long = slice(start, start + step)
                place = (*lead, long) if rows else (*lead, slice(None), long)
                # Not named, so that nothing here keeps them alive while the next ones are read.
                yield tuple(
                    part.reshape(-1, K).to(device).double() if rows else part.reshape(N, -1).to(device).double().T
                    for part in (read(place) for read in reads)
                )

    def delta(self, name: str, device: torch.device | str | None = None) -> Tensor:
        """ΔW = tuned − base (N, K), float64, whole."""
        whole = torch.cat([tuned - base for base, tuned in self.panels(name, device)])
        N, K = self.shape(name)
        return whole if N >= K else whole.T

    def differs(self, tensor: str) -> bool:
        """Whether a tensor of `skipped` has another type, shape or value in tuned than in base."""
        base, tuned = self._base[tensor], self._tuned[tensor]
        if (base.shape, base.type) != (tuned.shape, tuned.type):
            return True
        return not torch.equal(base.read(), tuned.read())

    def tuned(self, tensor: str) -> Tensor:
        """A whole tensor as tuned, of the matrices or of `skipped`."""
        return self._tuned[tensor].read()

    def non_finite(self, name: str) -> str | None:
        """Which of the two holds NaN or inf in this matrix, as a sentence; None where neither does."""
        for base, tuned in self.panels(name):
            for side, panel in ((self._base, base), (self._tuned, tuned)):
                if not torch.isfinite(panel).all():
                    tensor = self.tensor(name)
                    return f"{side[tensor].file}: {tensor} holds NaN or inf; the training run that wrote it diverged"
        return None


def _is_matrix(stored: Stored) -> bool:
    """Floating point (fp8 too, which is then refused by name), of two dimensions or more. (1, 1, n) is a vector."""
    shape = stored.shape
    dimensions = len(shape) if len(shape) == 2 else sum(size > 1 for size in shape)
    return stored.type.startswith(("F", "BF")) and dimensions >= 2 and 0 not in shape


def _is_named(tensor: str, names: Collection[str]) -> bool:
    module = tensor.removesuffix(".weight")
    return any(name in (tensor, module) or module.endswith("." + name) for name in names)


def _matrices(tensor: str, shape: Sequence[int]) -> Iterator[tuple[str, _Matrix]]:
    name = tensor.removesuffix(".weight")
    if len(shape) == 3 and "conv" not in name.lower():
        for expert in range(shape[0]):
            yield f"{name}[{expert}]", _Matrix(tensor, expert, (shape[1], shape[2]))
    else:
        yield name, _Matrix(tensor, None, (shape[0], torch.Size(shape[1:]).numel()))


def _check_same(base: dict[str, Stored], tuned: dict[str, Stored], base_path: str, tuned_path: str) -> None:
    complaints = []
    for side, other, words in ((base, tuned, "base"), (tuned, base, "tuned")):
        if alone := [name for name in side if name not in other]:
            complaints.append(f"{len(alone)} only in {words} ({shortened(alone)})")
    shapes: dict[str, list[str]] = {}
    for name in base.keys() & tuned.keys():
        if base[name].shape != tuned[name].shape:
            sizes = " against ".join("×".join(map(str, side[name].shape)) for side in (base, tuned))
            shapes.setdefault(sizes, []).append(name)
    for sizes, names in sorted(shapes.items()):
        complaints.append(f"{len(names)} of another shape, {sizes} ({shortened(names)})")
    if complaints:
        raise LoraFastError(
            f"base={base_path!r} and tuned={tuned_path!r} don't hold the same weights: {'; '.join(complaints)}. "
            "Expected a checkpoint and one fine-tuned from it; exclude leaves modules out by name"
        )
    stored = [*base.values(), *tuned.values()]
    if odd := sorted({f"{one.type} in {one.file}" for one in stored if one.type not in DTYPES}):
        raise LoraFastError(
            f"weights are stored as {', '.join(odd)}; expected {', '.join(DTYPES)}. Quantized weights have scales "
            "beside them: dequantize the checkpoint first"
        )
