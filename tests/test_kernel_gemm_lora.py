"""gemm_lora against float64: forward, backward with masks, sums over q, k, v, every layout, both ways to memory."""

import weakref
from unittest import mock

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kernel_support import DEVICE, DTYPES, assert_as_exact_as, assert_rounded_once, error, nan_filled, random
from torch import Tensor

from lora_fast.kernels import gemm_lora as module
from lora_fast.kernels.devices import AMD
from lora_fast.kernels.gemm_lora import are_aligned, gemm_lora, gemm_lora_sum
from lora_fast.kernels.gemm_tiles import SMS, TILES, Tile, architecture, candidates, pick_tile, uses_descriptors

# (8, 0) takes pointers on any device; the interpreter knows descriptors too, a GPU says what it can.
POINTERS = (8, 0)
NEWEST = torch.cuda.get_device_capability() if DEVICE.type == "cuda" else (9, 0)
CAPABILITIES = (POINTERS, NEWEST)
SMALL = Tile(16, 16, 16, 4, 2)
RANKS = (1, 5, 8, 16, 48, 70)


def pack(mask: Tensor) -> Tensor:
    """Booleans (M, N) → uint8 (M, ⌈N / 8⌉), bit i of byte j for column 8 j + i."""
    padded = torch.nn.functional.pad(mask.to(torch.uint8), (0, -mask.shape[1] % 8))
    return (padded.view(mask.shape[0], -1, 8) << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(
        -1, dtype=torch.uint8
    )


def draw_mask(M: int, N: int, seed: int = 0) -> Tensor:
    return random(M, N, seed=1000 + seed) > -0.5


def formula(xs, ws, pairs, masks=(), bias=None, accumulate=None, dtype=torch.float64) -> Tensor:
    """Σ x w + Σ mask ∘ (s b) + bias + accumulate in PyTorch, one operation after the other, all in `dtype`."""
    terms = [x.to(dtype) @ w.to(dtype) for x, w in zip(xs, ws)]
    for i, (s, b) in enumerate(pairs):
        update = s.to(dtype) @ b.to(dtype)
        terms.append(update * masks[i].to(dtype) if masks else update)
    terms += [term.to(dtype) for term in (bias, accumulate) if term is not None]
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def check(xs, ws, pairs, masks=(), bias=None, accumulate=None, *, few_numbers=False, **launch) -> Tensor:
    """Runs the launcher that fits, and holds the result to the rule of kernel_support.

    few_numbers: y may be a single number, that its terms cancel in and that PyTorch happens to hit exactly. Then a
    quarter of fp32's unit in ‖Σ |terms|‖ is allowed too: what fp32 sums in another order differ by."""
    inputs = [t for t in (*xs, *ws, *(f for pair in pairs for f in pair), bias, accumulate) if t is not None]
    copies = [t.clone() for t in inputs]
    packed = [pack(mask) for mask in masks]
    with nan_filled():
        if len(xs) == len(pairs) == 1 or (not xs and len(pairs) == 1):
            (s, b), (x, w) = pairs[0], (xs[0], ws[0]) if xs else (None, None)
            mask = packed[0] if packed else None
            y = gemm_lora(x, w, s, b, bias=bias, mask=mask, accumulate=accumulate, **launch)
        else:
            s, b = torch.cat([s for s, _ in pairs], 1), torch.cat([b for _, b in pairs])
            ranks = [s.shape[1] for s, _ in pairs]
            y = gemm_lora_sum(
                xs, ws, s, b, ranks=ranks if masks else None, masks=packed, bias=bias, accumulate=accumulate, **launch
            )
    dtype = pairs[0][0].dtype
    assert y.dtype == dtype and y.is_contiguous()
    exact = formula(xs, ws, pairs, masks, bias, accumulate)
    eager = formula(xs, ws, pairs, masks, bias, accumulate, dtype)
    if few_numbers:
        sizes = formula([x.abs() for x in xs], [w.abs() for w in ws], [(s.abs(), b.abs()) for s, b in pairs], masks)
        order = torch.finfo(torch.float32).eps / 8 * float(sizes.norm() / exact.norm())
        assert error(y, exact) <= 2 * max(error(eager, exact), torch.finfo(dtype).eps / 4, order)
    else:
        assert_as_exact_as(y, eager, exact)
    # Each update by itself: beside a large product an error of it would not show.
    without = formula(xs, ws, [(torch.zeros_like(s), b) for s, b in pairs], masks, bias, accumulate)
    assert error(y.double() - without, exact - without) < 0.1
    assert all(torch.equal(a, b) for a, b in zip(inputs, copies)), "an input was overwritten"
    return y


def pair(M: int, N: int, K: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    """x (M, K) and w = weight.t() (K, N)."""
    return random(M, K, dtype=dtype, seed=seed), random(N, K, dtype=dtype, seed=seed + 1).t()


def factors(M: int, N: int, R: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    """s (M, R) and b = lora_B.t() (R, N), of the size of a product."""
    return random(M, R, dtype=dtype, seed=seed + 2), random(N, R, dtype=dtype, seed=seed + 3).t()


@pytest.fixture
def descriptors():
    """How many tensor descriptors were made."""
    with mock.patch.object(module, "_described", side_effect=module._described) as made:
        yield made


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("R", RANKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward(dtype, R, capability, descriptors):
    """y = x Wᵀ + bias + S Bᵀ; K = 48 and N = 72 allow descriptors."""
    x, w = pair(33, 72, 48, dtype)
    check([x], [w], [factors(33, 72, R, dtype)], bias=random(72, dtype=dtype, seed=9), capability=capability)
    assert descriptors.call_count == (3 if capability >= (9, 0) else 0)


def test_a_prepared_call_keeps_no_memory_and_serves_other_numbers():
    (x, w), (s, b) = pair(33, 72, 48, torch.float16), factors(33, 72, 5, torch.float16)
    prepared = module.prepare([x], [w], s, b, capability=NEWEST)
    assert len(prepared.described) == (3 if uses_descriptors(NEWEST) else 0)
    watched = [weakref.ref(tensor) for tensor in (x, s)]
    del x, s
    assert all(tensor() is None for tensor in watched)
    x, s = random(33, 48, dtype=torch.float16, seed=7), random(33, 5, dtype=torch.float16, seed=8)
    expected = gemm_lora(x, w, s, b, capability=NEWEST, tile=prepared.tile)
    for matrices in ((w, b), (w.t(), b.t())):  # of which only the memory counts
        assert torch.equal(prepared.run([x], matrices[:1], s, matrices[1]), expected) and expected.any()


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("R", RANKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward_under_dropout(dtype, R, capability, descriptors):
    """dx = dy W + m ∘ (dS A): w is the weight as it lies, b is lora_A as it lies."""
    dy, weight = random(33, 48, dtype=dtype), random(48, 72, dtype=dtype, seed=1)
    ds, lora_A = random(33, R, dtype=dtype, seed=2), random(R, 72, dtype=dtype, seed=3)
    check([dy], [weight], [(ds, lora_A)], [draw_mask(33, 72)], capability=capability)
    assert descriptors.call_count == (3 if capability >= (9, 0) else 0)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes_that_divide_nothing(dtype, masked, descriptors):
    x, w = pair(33, 70, 12, dtype)
    masks = [draw_mask(33, 70)] if masked else []
    check([x], [w], [factors(33, 70, 5, dtype)], masks, bias=random(70, dtype=dtype), capability=NEWEST)
    assert descriptors.call_count == 0


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("pairs", [2, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_sum_over_projections(masked, pairs, capability, descriptors):
    """dx of q, k, v in one launch: widths and ranks differ (grouped-query attention), masks too."""
    dtype = torch.float16
    products = [pair(33, 72, K, dtype, seed=10 * K) for K in (64, 24, 40)[:pairs]]
    xs, ws = zip(*[(x, w.contiguous()) for x, w in products])
    updates = [factors(33, 72, R, dtype, seed=R) for R in (16, 5, 33)]
    masks = [draw_mask(33, 72, seed) for seed in range(3)] if masked else []
    check(xs, ws, updates, masks, capability=capability)
    assert descriptors.call_count == (2 * pairs + 1 if capability >= (9, 0) else 0)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("added", [False, True])
def test_update_alone(added, masked, descriptors):
    """Without x and w, for what cuBLAS has computed already."""
    for dtype in DTYPES:
        accumulate = random(33, 70, dtype=dtype, seed=7) if added else None
        masks = [draw_mask(33, 70)] if masked else []
        check([], [], [factors(33, 70, 12, dtype)], masks, accumulate=accumulate, capability=NEWEST)
    assert descriptors.call_count == 0


def test_several_updates_alone():
    dtype = torch.float16
    updates = [factors(33, 70, R, dtype, seed=R) for R in (1, 8, 48)]
    check([], [], updates, [draw_mask(33, 70, seed) for seed in range(3)], accumulate=random(33, 70, dtype=dtype))


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_many_tiles(capability, persistent):
    """Ten by three tiles, in groups of eight rows and two; seven programs share them where one does several."""
    dtype = torch.float16
    x, w = pair(150, 40, 48, dtype)
    tile = SMALL._replace(persistent=persistent)
    with mock.patch.object(module, "_sms", lambda device: 7):
        check([x], [w], [factors(150, 40, 20, dtype)], capability=capability, tile=tile)
        check([x], [w], [factors(150, 40, 20, dtype)], [draw_mask(150, 40)], capability=capability, tile=tile)
        x, w = pair(150, 24, 48, dtype)  # the second part of y ends half way, or lies beyond N
        for N in (24, 16):
            check(
                [x],
                [w[:, :N]],
                [factors(150, N, 20, dtype)],
                capability=capability,
                tile=tile._replace(block_n=32, parts=2),
            )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", ["pointers", "descriptors", "flat"])
def test_rounded_once(dtype, masked, kind):
    if kind != "pointers" and not uses_descriptors(NEWEST):
        pytest.skip("takes descriptors")
    tile = Tile(32, 64, 32, 4, 3, persistent=True, parts=2, flat=kind == "flat")
    M, N, K, R = 70, 136, 512, 24
    x, w = pair(M, N, K, dtype)
    s, b = (factor * (K / R) ** 0.25 for factor in factors(M, N, R, dtype))  # an update of the product's size
    masks, bias = [draw_mask(M, N)] if masked else [], random(N, dtype=dtype, seed=9, scale=K**0.5)
    y = check([x], [w], [(s, b)], masks, bias=bias, tile=tile, capability=POINTERS if kind == "pointers" else NEWEST)
    assert_rounded_once(y, formula([x], [w], [(s, b)], masks, bias))


@pytest.mark.skipif(not uses_descriptors(NEWEST), reason="flat tiles take descriptors")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("R", [0, 1, 16, 40, 64])
def test_flat_tiles_one_after_another(dtype, R):
    """Each of three programs ends a tile while the next one's loads are on their way, and again."""
    tile = Tile(32, 64, 32, 4, 3, persistent=True, parts=4, flat=True)
    if DEVICE.type == "cuda":
        tile = tile._replace(block_m=64, block_n=128, block_k=64, parts=2)
    with mock.patch.object(module, "_sms", lambda device: 3):
        for M, N, K in ((170, 136, 72), (33, 520, 24)):
            x, w = pair(M, N, K, dtype)
            bias = random(N, dtype=dtype, seed=9)
            for by_rows in (w, w.contiguous()):
                if R:
                    check([x], [by_rows], [factors(M, N, R, dtype)], bias=bias, capability=NEWEST, tile=tile)
                else:  # no update at all
                    y = gemm_lora(x, by_rows, *factors(M, N, 0, dtype), bias=bias, capability=NEWEST, tile=tile)
                    assert_rounded_once(y, formula([x], [by_rows], [], bias=bias))
            if R == 0:
                continue
            two = [factors(M, N, rank, dtype, seed=rank) for rank in (R, 12)]
            for masked in (two[:1], two):  # two: q, k, v of which one has a weight
                masks = [draw_mask(M, N, seed) for seed in range(len(masked))]
                check([x], [w], masked, masks, bias=bias, capability=NEWEST, tile=tile)


def test_a_product_is_added_to_nothing():
    x, w = pair(33, 72, 48, torch.float16)
    with pytest.raises(ValueError, match="accumulate is for an update alone"):
        gemm_lora(x, w, *factors(33, 72, 8, torch.float16), accumulate=random(33, 72, dtype=torch.float16))


def test_what_a_flat_tile_can_not_do():
    dtype, tile = torch.float16, Tile(64, 64, 64, 4, 3, persistent=True, flat=True)
    x, w = pair(33, 72, 48, dtype)
    for refused in (
        {"s": random(33, 65, dtype=dtype), "b": random(65, 72, dtype=dtype)},
        {"capability": POINTERS},
    ):
        call = dict(zip("sb", factors(33, 72, 8, dtype))) | {"capability": (9, 0)} | refused
        with pytest.raises(ValueError, match="a flat tile takes"):
            gemm_lora(x, w, **call, tile=tile)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("layout", ["linear", "conv1d", "mixed", "sliced"])
def test_layouts(layout, capability, descriptors):
    """Weights of nn.Linear and of Conv1D; s and x as views with longer rows; a w without unit stride."""
    dtype, M, N, K, R = torch.float16, 33, 72, 48, 8
    x = random(M, 2 * K, dtype=dtype)[:, K:]
    linear, conv1d = random(N, K, dtype=dtype, seed=1).t(), random(K, N, dtype=dtype, seed=2)
    sliced = random(K, 2 * N, dtype=dtype, seed=3)[:, ::2]
    s = random(M, 3 * R + 1, dtype=dtype, seed=4)[:, R : 2 * R]
    b = random(R, N, dtype=dtype, seed=5)
    xs, ws = {
        "linear": ([x], [linear]),
        "conv1d": ([x], [conv1d]),
        "mixed": ([x, x], [linear, conv1d]),
        "sliced": ([x], [sliced]),
    }[layout]
    check(xs, ws, [(s, b)], capability=capability)
    check(xs, ws, [(s, b.t().contiguous().t())], capability=capability)
    assert bool(descriptors.call_count) == (layout in ("linear", "conv1d") and capability >= (9, 0))


def test_base_address_off_by_one_element(descriptors):
    """Rows are multiples of 16 bytes, the first one does not begin at one."""
    dtype, M, N, K = torch.float16, 33, 72, 48
    x = random(M * K + 1, dtype=dtype)[1:].view(M, K)
    check([x], [random(K, N, dtype=dtype, seed=1)], [factors(M, N, 8, dtype)], capability=NEWEST)
    assert descriptors.call_count == 0


def test_rows_that_overlap(descriptors):
    """As dy is where every row has the same gradient: no tensor descriptor has strides of 0."""
    dtype, M, N, K = torch.float16, 33, 72, 48
    x = random(1, K, dtype=dtype).expand(M, K)
    check([x], [random(K, N, dtype=dtype, seed=1)], [factors(M, N, 8, dtype)], capability=NEWEST)
    assert descriptors.call_count == 0


@pytest.mark.parametrize("M, N", [(0, 72), (33, 0)])
def test_nothing_to_compute(M, N):
    with mock.patch.object(module, "gemm_lora_kernel", None):
        x, w = pair(M, N, 48, torch.float16)
        assert gemm_lora(x, w, *factors(M, N, 8, torch.float16), capability=NEWEST).shape == (M, N)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_same_bits_twice(capability):
    x, w = pair(33, 72, 48, torch.float16)
    masks = [draw_mask(33, 72)]
    first, second = (check([x], [w], [factors(33, 72, 8, x.dtype)], masks, capability=capability) for _ in "ab")
    assert torch.equal(first, second)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_what_is_not_finite_stays_in_its_row(capability):
    x, w = pair(33, 72, 48, torch.float32)
    s, b = factors(33, 72, 5, torch.float32)
    x[3, 47], s[7, 4] = float("nan"), float("inf")
    y = gemm_lora(x, w, s, b, capability=capability)
    assert y[3].isnan().all() and y[7].isinf().all()
    assert y.isfinite().all(1).sum() == 31


def test_offsets_beyond_int32():
    """Row 2 begins 2³¹ + 16 elements after row 0, at a stride that fits into int32; only what is used is touched."""
    M, N, K, stride = 3, 16, 16, 2**30 + 8
    storage = torch.empty(2 * stride + K, dtype=torch.float16, device=DEVICE)
    x = storage.as_strided((M, K), (stride, 1))
    x.copy_(random(M, K))
    w, (s, b) = random(K, N, dtype=torch.float16, seed=1), factors(M, N, 8, torch.float16)
    exact = formula([x], [w], [(s, b)])
    assert_as_exact_as(
        gemm_lora(x, w, s, b, capability=POINTERS, tile=SMALL), formula([x], [w], [(s, b)], dtype=x.dtype), exact
    )
    # The same for s, for accumulate and for b's columns.
    y = gemm_lora(None, None, x, b := random(K, N, dtype=torch.float16, seed=2), accumulate=x, tile=SMALL)
    assert_as_exact_as(
        y, formula([], [], [(x, b)], accumulate=x, dtype=x.dtype), formula([], [], [(x, b)], accumulate=x)
    )
    y = gemm_lora(None, None, s[:, :3], x.t()[:, :3].t()[:, :N], tile=SMALL)
    assert_as_exact_as(y, s[:, :3] @ x, s[:, :3].double() @ x.double())


@pytest.mark.skipif(DEVICE.type == "cuda", reason="takes memory that only a CPU hands out page by page")
def test_outputs_beyond_32_bits():
    """Rows of y and of the mask 2²⁶ elements long, of which one tile is computed: the last rows start beyond 2³¹."""
    M, N, K, R, columns = 40, 1 << 26, 24, 8, 64
    x, w = pair(M, columns, K, torch.float16)
    s, b = factors(M, columns, R, torch.float16)
    kept = random(M, columns, seed=7) > 0
    masks = torch.empty(M * N, dtype=torch.uint8).as_strided((M, columns // 8), (N, 1))
    masks.copy_(pack(kept))
    y = torch.empty(M * N, dtype=torch.float16)
    module.gemm_lora_kernel[(1,)](
        x, None, None, w, None, None, s, b, (masks,), None, None, y,
        ((K, x.stride(0), *w.stride()),), (R,), (s.stride(0), *b.stride()), N, 0, M, N,
        BLOCK_M=64, BLOCK_N=columns, BLOCK_K=32, BLOCK_R=16, GROUP_M=8,
        DESCRIPTORS=False, W_IS_NK=w.stride(0) == 1, PERSISTENT=False, PARTS=1, FLAT=False,
    )  # fmt: skip
    found, expected = y.view(M, N)[:, :columns], formula([x], [w], [(s, b)], [kept], dtype=x.dtype)
    assert_as_exact_as(found, expected, formula([x], [w], [(s, b)], [kept]))


@settings(max_examples=20)
@given(
    M=st.integers(1, 40),
    N=st.integers(1, 40),
    K=st.integers(1, 40),
    R=st.integers(1, 80),
    eights=st.booleans(),
    masked=st.booleans(),
    capability=st.sampled_from(CAPABILITIES),
    dtype=st.sampled_from(DTYPES),
)
@example(M=1, N=1, K=1, R=74, eights=False, masked=False, capability=POINTERS, dtype=torch.float32)
@example(M=1, N=1, K=1, R=1, eights=False, masked=True, capability=NEWEST, dtype=torch.float32)
def test_any_shape(M, N, K, R, eights, masked, capability, dtype):
    if eights:  # such as descriptors take
        N, K = 8 * N, 8 * K
    x, w = pair(M, N, K, dtype)
    masks = [torch.ones(M, N, dtype=torch.bool, device=DEVICE)] if masked else []
    if masked:
        masks[0][::2, ::3] = False
        masks[0][0, 0] = True
    tile = Tile(32, 32, 32, 4, 2, persistent=True)
    check([x], [w], [factors(M, N, R, dtype)], masks, capability=capability, tile=tile, few_numbers=True)


@pytest.mark.parametrize("name", TILES)
def test_every_tile(name):
    """What offline compilation shows to fit also computes the right thing."""
    dtype = torch.float32 if name == "fp32" else torch.float16
    capability = {"sm_80": POINTERS, "sm_89": POINTERS, "gfx942": POINTERS, "unaligned": POINTERS}.get(name, NEWEST)
    M, N, K = 70, 136, 72
    if DEVICE.type == "cuda":
        if name in SMS and name != architecture(NEWEST):
            pytest.skip(f"the tiles of {name} may need more shared memory than this GPU has")
        M, N, K = 2070, 4232, 1096  # more than two tiles for a program, and many steps of their loops
        dtype = torch.float32 if name == "fp32" else torch.bfloat16
    for tile in TILES[name]:
        xs, ws = ((), ()) if name == "update" else zip(pair(M, N, K, dtype))
        check(xs, ws, [factors(M, N, 24, dtype)], capability=capability, tile=tile)


def test_tiles_fit_the_problem():
    bf16 = torch.bfloat16
    assert pick_tile(8192, 4096, bf16, (9, 0))[:3] == (128, 256, 64)
    assert pick_tile(512, 4096, bf16, (9, 0))[:2] == (128, 128)
    assert pick_tile(16, 4096, bf16, (9, 0))[:2] == (64, 32)
    assert pick_tile(8192, 4096, bf16, (9, 0), masks=3)[:2] == (128, 128)
    assert pick_tile(8192, 4096, bf16, (8, 0))[:2] == (128, 256)
    assert pick_tile(8192, 4096, bf16, (8, 0), masks=1)[:2] == (128, 128)
    assert pick_tile(8192, 4096, bf16, (9, 0), aligned=False) in TILES["unaligned"]
    assert pick_tile(8192, 4096, bf16, AMD) in TILES["gfx942"]
    assert pick_tile(8192, 4096, bf16, (0, 0)) in TILES["sm_89"]
    of_rank = {rank: pick_tile(8192, 4096, bf16, (9, 0), rank=rank) for rank in (1, 16, 17, 64, 65, None)}
    assert [tile.flat for tile in of_rank.values()] == [True, True, True, True, False, False]
    assert set(SMS) == set(TILES) - {"fp32", "unaligned", "update"}
    for capability in ((0, 0), (7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0), AMD):
        for dtype in (bf16, torch.float32):
            for pairs in range(4):
                for masks in range(4):
                    for rank in (16, 64, None):
                        tiles = candidates(dtype, capability, pairs=pairs, masks=masks, rank=rank)
                        assert tiles and len({tile.name for tile in tiles}) == len(tiles)


def test_rows_are_aligned_to_what_reads_them():
    """A descriptor wants rows of 16 bytes, a pointer sizes and strides that 16 divides; both a base of 16 bytes, and no
    row over another."""

    def aligned(x, w, dtype=torch.float16):
        x, w = x.to(dtype), w.to(dtype)
        return are_aligned([x], [w], (8, 0)), are_aligned([x], [w], (9, 0))

    def wide(*shape):
        return torch.empty(*shape)

    assert aligned(wide(9, 32), wide(32, 48)) == (True, True)
    assert aligned(wide(9, 32), wide(48, 32).t()) == (True, True)
    assert aligned(wide(9, 24), wide(24, 48)) == aligned(wide(9, 32), wide(32, 40)) == (False, True)
    assert aligned(wide(9, 20), wide(20, 48), torch.float32) == (False, True)
    assert aligned(wide(9, 20), wide(20, 48)) == aligned(wide(9, 1), wide(1, 48)) == (False, False)
    assert aligned(wide(9, 32), wide(32, 1)) == aligned(wide(0, 32), wide(32, 48)) == (False, False)
    x, w = torch.empty(9, 48, dtype=torch.float16), torch.empty(32, 48, dtype=torch.float16)
    assert are_aligned([x[:, 8:40]], [w], (8, 0)) and not are_aligned([x[:, 4:36]], [w], (9, 0))
    assert not are_aligned([x[:, :24]], [w[:24]], (8, 0)) and are_aligned([x[:, :24]], [w[:24]], (9, 0))
    assert not are_aligned([x[:1, :32].expand(9, 32)], [w], (9, 0))
    both = [x[:, :32]] * 2, [w, torch.empty(48, 32, dtype=torch.float16).t()]
    assert not are_aligned(*both, (8, 0)) and not are_aligned(*both, (9, 0))  # one w this way, one that way
