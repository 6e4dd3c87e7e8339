"""How many bytes a layer with LoRA moves beyond the frozen layer: counted in Triton's interpreter, not measured.

    .venv/bin/python benchmarks/bench_traffic.py

No GPU is needed and none is used. Every launch of a kernel counts the unique bytes that it loads and stores, every op
of PyTorch its inputs and outputs once (tests/traffic.py): what memory moves where operands outgrow the caches. Sizes
are small, since the interpreter is slow; what counts are the passes over X (M, K), Y (M, all N) and W, which depend on
no size. Of a SwiGLU MLP, Y is a matrix of the intermediate size.

extra_X and extra_Y are the passes beyond what the frozen products need, in units of X and Y in fp16: forward reads X
and W and writes Y of each layer, backward reads every dY and W and writes dX once. (PyTorch's own frozen q, k and v
move more: they write a dX each, and autograd adds them up.) Masks count in units of X or Y, whichever they cover.
rest_bytes are the adapters, S, dS and partial sums. An atomic addition counts as one read and one write of its target
per launch.

PEFT is PEFT itself, its dropout counted as the one kernel that it is on a GPU. The factorings of Unsloth and LoRAFusion
are written by us (baselines.py), with our SwiGLU kernel without adapters in their MLP, as in the frozen one."""

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

os.environ["TRITON_INTERPRET"] = "1"  # read as a kernel is decorated, before the first import
sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))

import baselines
import harness
import torch
from baselines import Layer
from modules import linear, peft_model, with_factors
from torch import Tensor, nn
from traffic import Traffic, count_traffic

from lora_fast import lora_linear, lora_linears, lora_swiglu_mlp, tuning
from lora_fast.kernels.swiglu import swiglu, swiglu_grad

# Unequal, so that a matrix's size tells what it is.
M, K, N, R = 256, 192, 320, 8
QKV = (320, 80, 80)
DTYPE, SCALING = torch.float16, 2.0
COLUMNS = (
    *("commit", "torch", "triton", "peft", "op", "provider", "M", "N", "K", "R", "dtype", "dropout", "pass"),
    *("loaded_bytes", "stored_bytes", "requested_loaded_bytes", "requested_stored_bytes"),
    *("passes_X", "passes_Y", "passes_W", "extra_X", "extra_Y", "rest_bytes", "triton_launches", "torch_ops"),
)


class Case(NamedTuple):
    op: str
    dropout: float
    widths: tuple[int, ...]  # N of each layer
    # Passes over X, Y and W that the frozen products need in forward and in backward.
    needed: dict[str, tuple[int, int, int]]


CASES = [
    *(Case("lora_linear", p, (N,), {"forward": (1, 1, 1), "backward": (1, 1, 1)}) for p in (0.0, 0.1)),
    *(Case("qkv", p, QKV, {"forward": (3, 1, 1), "backward": (1, 1, 1)}) for p in (0.0, 0.1)),
    # x read twice and y written; g and u written, read, h written, read. dy read, dx written; dh written; dh, g and u
    # read, dg and du written, and read.
    *(Case("swiglu_mlp", p, (N, N, K), {"forward": (3, 6, 1), "backward": (2, 8, 1)}) for p in (0.0, 0.1)),
]


def layer(k: int, n: int, seed: int) -> Layer:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * shape[-1] ** -0.5

    return Layer(draw(n, k).to(DTYPE), draw(R, k).requires_grad_(), draw(n, R).requires_grad_(), SCALING)


class SwiGLU(torch.autograd.Function):
    """Our kernel without adapters, for the frozen MLP and the factorings."""

    @staticmethod
    def forward(ctx, g, u):
        ctx.save_for_backward(g, u)
        return swiglu(g, u)

    @staticmethod
    def backward(ctx, dh):
        return swiglu_grad(dh, *ctx.saved_tensors)


class Layers(nn.Module):
    """The frozen layers by name: side by side, or as an MLP as Transformers writes it."""

    def __init__(self, layers: list[Layer], mlp: bool):
        super().__init__()
        self.mlp = mlp
        self.names = [f"layer{i}" for i in range(len(layers))]
        for name, (weight, *_) in zip(self.names, layers):
            setattr(self, name, linear(weight))

    def forward(self, x: Tensor):
        layers = [getattr(self, name) for name in self.names]
        if not self.mlp:
            return [layer(x) for layer in layers]
        gate, up, down = layers
        return [down(nn.functional.silu(gate(x)) * up(x))]


class Arm(NamedTuple):
    name: str
    forward: Callable[[Tensor], Any]  # x → y, or the y of each layer
    factors: list[Tensor]  # the adapters' parameters
    route: str = ""  # of our op, in both directions


def arms_of(case: Case, layers: list[Layer]) -> Iterator[Arm]:
    p, is_mlp = case.dropout, case.op == "swiglu_mlp"
    weights, lora_As, lora_Bs, scalings = (list(column) for column in zip(*layers))
    factors = [*lora_As, *lora_Bs]

    def composed(together: Callable[[Tensor, list[Layer]], Any]) -> Callable[[Tensor], Any]:
        """A function of layers on one input, as a function of x; an MLP by two calls."""
        if not is_mlp:
            return lambda x: together(x, layers)
        return lambda x: together(SwiGLU.apply(*together(x, layers[:2])), layers[2:])

    def peft_arm(name: str, fp32_adapters: bool) -> Arm:
        names = [f"layer{i}" for i in range(len(layers))]
        model = peft_model(Layers(layers, is_mlp), names, R, p, fp32_adapters=fp32_adapters)
        return Arm(name, model, with_factors(model, dict(zip(names, layers))))

    def split(x: Tensor, some: list[Layer]) -> list[Tensor]:
        return [baselines.split(x, layer, p, seed) for seed, layer in enumerate(some)]

    def ours(x: Tensor) -> Any:
        if is_mlp:
            return lora_swiglu_mlp(x, *layers, dropout_p=p, backend="triton")
        if len(layers) == 1:
            return lora_linear(x, *layers[0], dropout_p=p, backend="triton")
        return lora_linears(x, weights, lora_As, lora_Bs, scalings, dropout_p=p, backend="triton")

    yield Arm("frozen", composed(lambda x, some: [baselines.frozen(x, layer.weight) for layer in some]), [])
    yield peft_arm("PEFT (fp32 adapters)", True)
    yield peft_arm("PEFT (fp16 adapters)", False)
    if p == 0:  # Unsloth's fast path takes no dropout
        yield Arm("factoring of Unsloth, written here", composed(baselines.accumulated), factors)
    yield Arm("factoring of LoRAFusion, written here", composed(split), factors)
    for route in ("cublas", "triton"):
        yield Arm(f"lora_fast, {route} route", ours, factors, route)


def native_dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return torch.native_dropout(x, p, training)[0]


def count(arm: Arm, x: Tensor) -> dict[str, Traffic]:
    with mock.patch.object(nn.functional, "dropout", native_dropout), tuning.only(arm.route):
        with count_traffic() as forward:
            ys = arm.forward(x)
        ys = [ys] if isinstance(ys, Tensor) else list(ys)
        dys = [torch.randn_like(y) for y in ys]
        with count_traffic() as backward:
            torch.autograd.grad(ys, [x, *arm.factors], dys)
    return {"forward": forward, "backward": backward}


def sizes(case: Case) -> tuple[dict[tuple[int, int], str], dict[str, int]]:
    """(what a tensor is, by its elements and their bytes; bytes of X, Y and W in fp16)."""
    is_mlp = case.op == "swiglu_mlp"
    outputs = [N] if is_mlp else case.widths
    elements = {"X": M * K, "Y": M * sum(outputs), "W": K * sum(outputs) * (3 if is_mlp else 1)}
    named = [(M * K, "X"), *((M * n, "Y") for n in outputs), *((K * n, "W") for n in outputs)]
    kinds = {(numel, size): kind for numel, kind in named for size in (1, 2, 4)}  # copies in fp32, masks in bytes
    reads_x = 2 if is_mlp else len(case.widths)
    kinds |= {(reads_x * M * K // 8, 1): "X", (M * N // 8, 1): "Y"}  # masks in bits
    return kinds, {kind: DTYPE.itemsize * count for kind, count in elements.items()}


def rows_of(case: Case, start: dict[str, Any]) -> Iterator[dict[str, Any]]:
    shapes = [(K, n) for n in case.widths]
    if case.op == "swiglu_mlp":
        shapes[2] = (N, K)
    layers = [layer(k, n, seed) for seed, (k, n) in enumerate(shapes)]
    x = torch.randn(M, K, generator=torch.Generator().manual_seed(9)).to(DTYPE).requires_grad_()
    kinds, units = sizes(case)
    for arm in arms_of(case, layers):
        for direction, traffic in count(arm, x).items():
            found = traffic.by_size(kinds)
            needed = dict(zip("XYW", case.needed[direction]))
            assert all(found[kind] >= needed[kind] * units[kind] for kind in units), f"{arm.name}: not all was counted"
            passes = {kind: found[kind] / units[kind] for kind in units}
            yield start | {
                **{"op": case.op, "provider": arm.name, "dropout": case.dropout, "pass": direction},
                **{"M": M, "N": "+".join(map(str, case.widths)), "K": K, "R": R, "dtype": "fp16"},
                **{"loaded_bytes": traffic.loaded(), "stored_bytes": traffic.stored()},
                "requested_loaded_bytes": sum(step.requested_loaded for step in traffic.steps),
                "requested_stored_bytes": sum(step.requested_stored for step in traffic.steps),
                **{f"passes_{kind}": f"{number:.4f}" for kind, number in passes.items()},
                **{f"extra_{kind}": f"{passes[kind] - needed[kind]:.4f}" for kind in "XY"},
                "rest_bytes": found["rest"],
                **{"triton_launches": traffic.launches().total(), "torch_ops": traffic.ops().total()},
            }


def number(value: float) -> str:
    return f"{value:.3f}".rstrip("0").rstrip(".") or "0"


def line(forward: dict[str, Any], backward: dict[str, Any]) -> str:
    def words(*rows: dict[str, Any]) -> str:
        x, y = (sum(float(row[f"extra_{kind}"]) for row in rows) for kind in "XY")
        return f"{number(x)} X + {number(y)} Y"

    launches = sum(row["triton_launches"] + row["torch_ops"] for row in (forward, backward))
    rest = sum(row["rest_bytes"] for row in (forward, backward))
    return (
        f"{forward['op']:12} p={forward['dropout']:<4} {forward['provider']:38} {words(forward):>18} "
        f"{words(backward):>20} {words(forward, backward):>21} {rest / 2**10:>8.0f} KiB {launches:>4} launches"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=harness.RESULTS / "counted", metavar="DIR")
    parser.add_argument("--commit", help="what the rows call the commit, where there is no git")
    args = parser.parse_args()
    start = {"commit": args.commit or harness.commit(), "torch": torch.__version__}
    start |= {name: harness.installed(name) for name in ("triton", "peft")}
    print(f"{'':57} {'extra forward':>18} {'extra backward':>20} {'extra in all':>21} {'rest':>12}")
    with harness.RowWriter(args.out / "traffic.csv", COLUMNS) as writer:
        for case in CASES:
            rows = rows_of(case, start)
            for forward, backward in zip(rows, rows):
                writer.write(forward)
                writer.write(backward)
                print(line(forward, backward), flush=True)
    print(f"wrote {writer.path}")


if __name__ == "__main__":
    main()
