"""What all op benchmarks compare alike: the frozen layers twice, our op by each route, our GEMM without adapters."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from baselines import Layer
from timing import Arm, compare, fastest, figures, input_sets
from torch import Tensor

FROZEN, AGAIN, PLAIN = "frozen", "frozen again", "lora_fast GEMM without adapters"
SCALING = 2.0


def random_layer(K: int, N: int, R: int, dtype: torch.dtype, device: torch.device, seed: int) -> Layer:
    """A weight of `dtype` and fp32 masters, none of them zero: products of zeros are faster than others."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device) * shape[-1] ** -0.5

    return Layer(draw(N, K).to(dtype), draw(R, K).requires_grad_(), draw(N, R).requires_grad_(), SCALING)


def trained(layers: Sequence[Layer]) -> list[Tensor]:
    """Every lora_A, then every lora_B."""
    return [*(layer.lora_A for layer in layers), *(layer.lora_B for layer in layers)]


def op_arms(forward: Callable[[Tensor], Any], factors: Sequence[Tensor], exact: Arm | None) -> dict[str, Arm]:
    """Our op as the tuner runs it, and held to each route."""
    return {
        "lora_fast op": Arm(forward, factors, exact=exact),
        "lora_fast op, cublas route": Arm(forward, factors, "cublas", exact),
        "lora_fast op, triton route": Arm(forward, factors, "triton", exact),
    }


def frozen_arms(forward: Callable[[Tensor], Any]) -> dict[str, Arm]:
    return {FROZEN: Arm(forward), AGAIN: Arm(forward)}


class _PlainGemm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.weight = weight
        return _product(x, weight.t())

    @staticmethod
    def backward(ctx, dy):
        return _product(dy, ctx.weight), None


def plain_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x Wᵀ and its dX by our GEMM with an update of rank 0, in its fastest tile: how our loop compares with cuBLAS."""
    return _PlainGemm.apply(x, weight)


_tiles: dict[tuple, Any] = {}


def _product(x: Tensor, w: Tensor) -> Tensor:
    """x (M, K) @ w (K, N)."""
    if not x.is_cuda:
        return x @ w
    from lora_fast.kernels.gemm_lora import gemm_lora
    from lora_fast.kernels.gemm_tiles import candidates

    def call(tile):
        return gemm_lora(x, w, x.new_empty(x.shape[0], 0), x.new_empty(0, w.shape[1]), tile=tile)

    key = (*x.shape, w.shape[1], w.stride(), x.dtype)
    if key not in _tiles:
        tiles = candidates(x.dtype, torch.cuda.get_device_capability(x.device), rank=0)
        _tiles[key] = fastest({tile: lambda tile=tile: call(tile) for tile in tiles})
    return call(_tiles[key])


def rows_of(
    arms: Mapping[str, Arm], sizes: Mapping[str, Any], Ns: Sequence[int], frozen: Sequence[Tensor], args: Any
) -> Iterator[dict[str, Any]]:
    """Times the arms on x (M, K) with outputs (M, N_g); yields a row for each. sizes: M, K and what else rows say."""
    sets = input_sets(sizes["M"], sizes["K"], Ns, args.dtype, args.device)
    measured = compare(arms, sets, frozen, args.rounds, out_of_time=lambda: args.deadline.left() < 0)
    for provider, row in figures(measured, FROZEN, PLAIN).items():
        yield {"provider": provider, **sizes, **row}
