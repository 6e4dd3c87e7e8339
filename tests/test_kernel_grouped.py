"""kernels/grouped.py: several adapters in one batch, against float64, PyTorch and each adapter alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_support import DEVICE, DTYPES, assert_as_exact_as, assert_rounded_once, nan_filled, random

from lora_fast.kernels import grouped
from lora_fast.kernels.shrink import shrink

RANKS = (1, 5, 16, 48, 80)
SCALES = (0.5, 2.0, 1.0, 0.25, 0.125)
K, N = 70, 44
# Segments of 0, 1, 7 and 33 rows; adapter 1 twice, adapter 2 unused, a segment without adapter, gaps inside and at the
# end.
MIXED = ((0, 1, 3), (1, 8, 1), (8, 8, 0), (8, 41, 4), (44, 77, 1), (77, 84, -1), (84, 85, 0))
MIXED_ROWS = 90


def owners(segments, rows):
    """The adapter of each row, −1 for none."""
    owner = torch.full((rows,), -1)
    for start, end, adapter in segments:
        owner[start:end] = adapter
    return owner.to(DEVICE)


def unpacked(mask, columns):
    """Bytes (1, M, ⌈C / 8⌉) → booleans (M, C), the least significant bit first."""
    bits = (mask[0, :, :, None] >> torch.arange(8, device=mask.device)) & 1
    return bits.flatten(1)[:, :columns].bool()


def oracle(x, weight, a, b, scales, dy, owner, keep, dtype):
    """The module's formulas row by row of adapters, in `dtype`: y, dx, then s, ds, dA, dB of each adapter.

    b is scaled already; scales are those of dB."""
    x, weight, dy = x.to(dtype), weight.to(dtype), dy.to(dtype)
    y, dx = x @ weight.t(), dy @ weight
    parts = []
    for adapter, scale in enumerate(scales):
        rows = owner == adapter
        a_g, b_g = a[adapter].to(dtype), b[adapter].to(dtype)
        dropped = x[rows] * keep[rows].to(dtype)
        s, ds = dropped @ a_g.t(), dy[rows] @ b_g
        y[rows] += s @ b_g.t()
        dx[rows] += keep[rows].to(dtype) * (ds @ a_g)
        parts.append((s, ds, ds.t() @ dropped, scale * (dy[rows].t() @ s)))
    return y, dx, parts


def assert_exact(results, eager, exact):
    """`assert_as_exact_as` of tensors joined. A few ones join them, so that one number that happens to be near zero, or
    a PyTorch that happens to round it well, isn't the measure."""
    dtype = eager[0].dtype

    def joined(tensors):
        return torch.cat([torch.ones(64, dtype=tensors[0].dtype, device=DEVICE), *(t.flatten() for t in tensors)])

    assert_as_exact_as(joined([t.to(dtype) for t in results]), joined(eager), joined(exact))


class Case:
    """One batch, run through every launcher."""

    def __init__(self, segments, rows, dtype, *, ranks=RANKS, scales=SCALES, k=K, n=N, p=0.0, block_rows=None, seed=0):
        self.segments, self.ranks, self.scales, self.p, self.dtype = segments, ranks, scales, p, dtype
        self.x = random(rows, k, dtype=dtype, seed=seed)
        self.dy = random(rows, n, dtype=dtype, seed=seed + 1)
        self.weight = random(n, k, dtype=dtype, seed=seed + 2, scale=k**-0.5)
        self.lora_A = [random(rank, k, seed=10 + g, scale=k**-0.5).to(dtype) for g, rank in enumerate(ranks)]
        self.lora_B = [random(n, rank, seed=90 + g, scale=rank**-0.5) for g, rank in enumerate(ranks)]
        self.table = grouped.block_table(segments, ranks, rows, DEVICE, block_rows=block_rows)
        self.owner = owners(segments, rows)
        self.a_all, self.b_all = grouped.stack_factors(self.lora_A, self.lora_B, scales, dtype)

    def rows_of(self, start, end):
        """The same case with nothing but these rows, all of one segment."""
        alone = object.__new__(Case)
        alone.__dict__ = dict(self.__dict__)
        adapter = int(self.owner[start])
        alone.x, alone.dy, alone.owner = self.x[start:end], self.dy[start:end], self.owner[start:end]
        alone.table = grouped.block_table(
            [(0, end - start, adapter)], self.ranks, end - start, DEVICE, block_rows=self.table.block_rows
        )
        return alone

    def run(self):
        table, seed = self.table, torch.tensor([1234], device=DEVICE)
        with nan_filled():
            dropout = {"seed": seed, "dropout_p": self.p} if self.p else {}
            self.s, self.mask = grouped.grouped_shrink(self.x, self.a_all, table, **dropout)
            base = self.x @ self.weight.t()
            self.y = grouped.grouped_expand(base, self.s, self.b_all, table)
            self.y_fused = grouped.grouped_gemm(self.x, self.weight, self.s, self.b_all, table)
            self.ds = grouped.grouped_grad_s(self.dy, self.b_all, table)
            base = self.dy @ self.weight
            self.dx = grouped.grouped_grad_x(self.ds, self.a_all, table, mask=self.mask, accumulate=base)
            self.dx_fused = grouped.grouped_gemm(
                self.dy, self.weight.t(), self.ds, self.a_all.t(), table, mask=self.mask
            )
            self.dA = grouped.grouped_grad_a(self.ds, self.x, table, mask=self.mask)
            scales = torch.tensor(self.scales, device=DEVICE)
            self.dB = grouped.grouped_grad_b(self.dy, self.s, table, scales)
        return self

    def outputs(self):
        names = ("s", "y", "y_fused", "ds", "dx", "dx_fused", "dA", "dB", "mask")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def factors(self, adapter):
        """Where adapter's rows of dA and columns of dB are."""
        return slice(self.table.offsets[adapter], self.table.offsets[adapter] + self.ranks[adapter])

    def check(self):
        keep = torch.ones_like(self.x, dtype=torch.bool) if self.mask is None else unpacked(self.mask, self.x.shape[1])
        b = [(b * scale).to(self.dtype) for b, scale in zip(self.lora_B, self.scales)]
        inputs = self.x, self.weight, self.lora_A, b, self.scales, self.dy, self.owner, keep
        y, dx, parts = oracle(*inputs, torch.float64)
        y_eager, dx_eager, eager_parts = oracle(*inputs, self.dtype)
        for result in (self.y, self.y_fused):
            assert_exact([result], [y_eager], [y])
        for result in (self.dx, self.dx_fused):
            assert_exact([result], [dx_eager], [dx])
        results = []
        for adapter, exact in enumerate(parts):
            rows, rank, ours = self.owner == adapter, self.ranks[adapter], self.factors(adapter)
            results.append((self.s[rows, :rank], self.ds[rows, :rank], self.dA[ours], self.dB[:, ours]))
            assert self.s[rows, rank:].eq(0).all() and self.ds[rows, rank:].eq(0).all()
            for result, exact_one in zip(results[-1], exact):
                assert result.shape == exact_one.shape
                assert result.ne(0).any() if exact_one.ne(0).any() else result.eq(0).all()
        for of_all_adapters in zip(zip(*results), zip(*eager_parts), zip(*parts)):
            assert_exact(*of_all_adapters)
        none = self.owner < 0
        assert self.s[none].eq(0).all() and self.ds[none].eq(0).all()
        return self


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients(dtype, p):
    case = Case(MIXED, MIXED_ROWS, dtype, p=p).run().check()
    assert case.table.width == 80
    if p:
        kept = unpacked(case.mask, K)
        covered = case.owner >= 0
        assert not kept[~covered].any()
        deviation = (p * (1 - p) / kept[covered].numel()) ** 0.5
        assert abs(float(kept[covered].double().mean()) - (1 - p)) < 5 * deviation


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounded_once(dtype):
    """Each launch by itself, of what the one before it left."""
    case = Case(MIXED, MIXED_ROWS, dtype, k=500, n=300).run()
    x, dy, weight, s, ds = (t.double() for t in (case.x, case.dy, case.weight, case.s, case.ds))
    y, dx = x @ weight.t(), dy @ weight
    found, exact = {"s": [], "ds": []}, {"s": [], "ds": []}
    for adapter, (rank, scale) in enumerate(zip(case.ranks, case.scales)):
        rows, ours = case.owner == adapter, case.factors(adapter)
        a, b = case.lora_A[adapter].double(), (case.lora_B[adapter] * scale).to(dtype).double()
        y[rows] += s[rows, :rank] @ b.t()
        dx[rows] += ds[rows, :rank] @ a
        found["s"].append(case.s[rows, :rank].flatten())
        found["ds"].append(case.ds[rows, :rank].flatten())
        exact["s"].append((x[rows] @ a.t()).flatten())
        exact["ds"].append((dy[rows] @ b).flatten())
        if rows.any():
            assert_rounded_once(case.dA[ours], ds[rows, :rank].t() @ x[rows])
            assert_rounded_once(case.dB[:, ours], scale * (dy[rows].t() @ s[rows, :rank]))
    for name in found:
        assert_rounded_once(torch.cat(found[name]), torch.cat(exact[name]))
    assert_rounded_once(case.y_fused, y)
    assert_rounded_once(case.dx_fused, dx)


@pytest.mark.parametrize("block_rows", grouped.BLOCK_ROWS)
def test_every_block_size_gives_the_same_values(block_rows):
    Case(MIXED, MIXED_ROWS, torch.float16, p=0.5, block_rows=block_rows).run().check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("segments", "rows", "ranks"),
    [
        ([(0, 33, 0)], 33, (5,)),  # one adapter alone
        ([(0, 33, -1)], 33, (5, 16)),  # none of the adapters used
        ([], 7, (5,)),  # no segment at all
        ([(row, row + 1, row % 3) for row in range(12)], 12, (16, 1, 8)),  # decoding: one row a user
        ([(0, 20, 0), (20, 33, 1)], 33, (200, 8)),  # ranks in several tiles, an adapter in the first only
    ],
)
def test_other_batches(segments, rows, ranks, dtype):
    Case(segments, rows, dtype, ranks=ranks, scales=SCALES[: len(ranks)], p=0.25).run().check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k, n", [(1, 1), (3, 9), (15, 1), (1, 15)])
def test_narrow_layers(k, n, dtype):
    Case(MIXED, MIXED_ROWS, dtype, k=k, n=n, p=0.3).run().check()


@settings(max_examples=6)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 20), st.integers(-1, 2)), max_size=5),
    gap=st.integers(0, 3),
    ranks=st.tuples(*[st.sampled_from((1, 3, 8, 17, 40))] * 3),
    k=st.integers(16, 70),
    n=st.integers(16, 70),
    p=st.sampled_from((0.0, 0.4)),
    dtype=st.sampled_from(DTYPES),
)
def test_any_segmentation(lengths, gap, ranks, k, n, p, dtype):
    segments, end = [], 0
    # From 16 rows and columns on: of a number or two, that PyTorch happens to hit, the error is a matter of luck.
    for length, adapter in (*lengths, (16, 0)):
        segments.append((end + gap, end + gap + length, adapter))
        end += gap + length
    case = Case(segments, end, dtype, ranks=ranks, scales=SCALES[:3], k=k, n=n, p=p).run()
    case.check()
    for name, output in case.outputs().items():
        assert output.isfinite().all(), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_adapter_computes_what_it_computes_alone(dtype):
    """Bit for bit: other rows in the batch don't change a tile's order of sums."""
    batch = Case(MIXED, MIXED_ROWS, dtype).run()
    for start, end, adapter in MIXED:
        if start == end:
            continue
        alone = batch.rows_of(start, end).run()
        for name in ("s", "y_fused", "ds", "dx_fused"):
            assert torch.equal(getattr(batch, name)[start:end], getattr(alone, name)), (name, start)
        # Onto the batch's own base: PyTorch's GEMM may order its sums by the number of rows.
        base_y, base_dx = (batch.x @ batch.weight.t())[start:end], (batch.dy @ batch.weight)[start:end]
        y = grouped.grouped_expand(base_y, alone.s, alone.b_all, alone.table)
        dx = grouped.grouped_grad_x(alone.ds, alone.a_all, alone.table, accumulate=base_dx)
        assert torch.equal(batch.y[start:end], y) and torch.equal(batch.dx[start:end], dx)
        if adapter in (0, 3, 4):  # one segment: its gradients too
            ours = batch.factors(adapter)
            assert torch.equal(batch.dA[ours], alone.dA[ours]) and torch.equal(batch.dB[:, ours], alone.dB[:, ours])


def test_gradients_do_not_depend_on_how_rows_are_cut_into_segments():
    whole = Case([(0, 40, 1), (40, 70, 0)], 70, torch.float32, ranks=(8, 5), scales=(1.0, 2.0)).run()
    pieces = [(0, 3, 1), (3, 4, 1), (4, 40, 1), (40, 55, 0), (55, 70, 0)]
    table = grouped.block_table(pieces, (8, 5), 70, DEVICE)
    assert torch.equal(whole.dA, grouped.grouped_grad_a(whole.ds, whole.x, table))
    assert torch.equal(whole.dB, grouped.grouped_grad_b(whole.dy, whole.s, table, torch.tensor([1.0, 2.0]).to(DEVICE)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_long_adapters_are_summed_in_chunks(dtype, monkeypatch):
    monkeypatch.setattr(grouped, "CHUNK_ROWS", 16)
    case = Case(MIXED, MIXED_ROWS, dtype, p=0.3)
    assert len(case.table.chunks) > len(RANKS)
    case.run().check()
    # An adapter of one chunk has the same sum with and without the second launch.
    monkeypatch.undo()
    ours = case.factors(3)
    assert torch.equal(Case(MIXED, MIXED_ROWS, dtype, p=0.3).run().dB[:, ours], case.dB[:, ours])


def test_the_mask_depends_on_seed_and_place_alone():
    case = Case(MIXED, MIXED_ROWS, torch.float32)

    def mask(table, a_all, seed):
        return grouped.grouped_shrink(case.x, a_all, table, seed=torch.tensor([seed], device=DEVICE), dropout_p=0.5)[1]

    one = grouped.block_table([(0, MIXED_ROWS, 0)], (1,), MIXED_ROWS, DEVICE, block_rows=32)
    whole, covered = mask(one, case.lora_A[0], 1), case.owner >= 0
    assert torch.equal(mask(case.table, case.a_all, 1)[:, covered], whole[:, covered])
    # One adapter drops what the plain layer would drop.
    plain = shrink(case.x, case.lora_A[0], seed=torch.tensor([1], device=DEVICE), dropout_p=0.5)[1]
    assert torch.equal(whole, plain)
    assert not torch.equal(mask(one, case.lora_A[0], 2), whole)
    assert not torch.equal(mask(one, case.lora_A[0], 1 + 2**32), whole)


def test_twice_the_same_bits():
    first, second = (Case(MIXED, MIXED_ROWS, torch.float16, p=0.3).run().outputs() for _ in range(2))
    assert len(first) == 9
    for name, output in first.items():
        assert torch.equal(output, second[name]), name


def test_inputs_stay_and_out_is_written_in_place():
    case = Case(MIXED, MIXED_ROWS, torch.float32).run()
    base = random(MIXED_ROWS, N, seed=7)
    kept = base.clone()
    fresh = grouped.grouped_expand(base, case.s, case.b_all, case.table)
    assert torch.equal(base, kept)
    # In place a row without an adapter is not touched: −0 + 0 would be 0.
    none = case.owner < 0
    base[none] = -0.0
    assert grouped.grouped_expand(base, case.s, case.b_all, case.table, out=base) is base
    assert torch.equal(base[~none], fresh[~none])
    assert base[none].eq(0).all() and base[none].signbit().all()
    other = torch.empty_like(base)
    assert grouped.grouped_expand(kept, case.s, case.b_all, case.table, out=other) is other
    assert torch.equal(other, fresh)


def test_strides_bias_and_an_output_of_the_adapters_alone():
    case = Case(MIXED, MIXED_ROWS, torch.float32).run()
    wide = random(MIXED_ROWS, 2 * K, seed=3)
    x, bias = wide[:, :K], random(N, seed=4)
    s, _ = grouped.grouped_shrink(x, case.a_all, case.table)
    plain_b = case.b_all.contiguous()  # (N, ΣR) as it reads, without the transposed storage
    y = grouped.grouped_gemm(x, case.weight.t().contiguous().t(), s, plain_b, case.table, bias=bias)
    contiguous = grouped.grouped_gemm(x.contiguous(), case.weight, s, case.b_all, case.table)
    assert_as_exact_as(y, contiguous + bias, contiguous.double() + bias.double())
    alone = grouped.grouped_grad_x(case.ds, case.a_all, case.table)
    accumulated = grouped.grouped_grad_x(case.ds, case.a_all, case.table, accumulate=x)
    assert alone[case.owner < 0].eq(0).all()
    assert_as_exact_as(accumulated, alone + x, alone.double() + x.double())


def test_nothing_to_do():
    empty = Case([], 0, torch.float32, p=0.5).run()
    assert empty.y.shape == (0, N) and empty.dx.shape == (0, K) and empty.mask.shape == (1, 0, 9)
    assert empty.dA.shape == (150, K) and empty.dA.eq(0).all() and empty.dB.eq(0).all()
    # No adapters: y is the base.
    table = grouped.block_table([(0, 5, -1)], (), 9, DEVICE)
    x, base = random(9, K), random(9, N)
    a_all, b_all = x.new_empty(0, K), x.new_empty(N, 0)
    s, mask = grouped.grouped_shrink(x, a_all, table, seed=torch.tensor([1], device=DEVICE), dropout_p=0.5)
    assert s.shape == (9, 0) and mask.eq(0).all()
    assert torch.equal(grouped.grouped_expand(base, s, b_all, table), base)
    assert grouped.grouped_grad_a(s, x, table).shape == (0, K)


def test_the_table_covers_every_row_once():
    table = grouped.block_table(MIXED, RANKS, MIXED_ROWS, "cpu", block_rows=16)
    seen = torch.zeros(MIXED_ROWS, dtype=torch.int)
    owner = owners(MIXED, MIXED_ROWS).cpu()
    for start, end, offset, rank in table.blocks.tolist():
        assert 0 < end - start <= 16
        seen[start:end] += 1
        adapter = int(owner[start])
        assert owner[start:end].eq(adapter).all()
        assert (offset, rank) == ((0, 0) if adapter < 0 else (table.offsets[adapter], RANKS[adapter]))
    assert seen.eq(1).all()
    assert table.order.tolist() == [int(i) for g in range(5) for i in (owner == g).nonzero()]
    assert table.covered == len(table.order) == int((owner >= 0).sum())
    # The order of the segments does not matter.
    again = grouped.block_table(MIXED[::-1], RANKS, MIXED_ROWS, "cpu", block_rows=16)
    assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(table, again))


def test_block_rows_follow_the_segments():
    def pick(*lengths):
        return grouped.pick_block_rows([(0, length, 0) for length in lengths])

    assert pick(*[1] * 64) == 16
    assert pick(17) == 32
    assert pick(33, 33) == 64
    assert pick(1024, 2048) == 128


def test_offsets_beyond_two_to_the_31():
    """A row stride so large that the last rows lie beyond 2³¹ elements; 32-bit offsets would read elsewhere."""
    rows, stride = 40, 2**26
    if DEVICE.type == "cuda":
        pytest.skip("would take 5 GB of the GPU's memory")
    storage = torch.empty(rows * stride, dtype=torch.float16)  # pages never touched take no memory
    x = storage.as_strided((rows, 16), (stride, 1))
    x.copy_(random(rows, 16, dtype=torch.float16))
    table = grouped.block_table([(0, rows, 0)], (16,), rows, DEVICE)
    a_all = random(16, 16, dtype=torch.float16)
    compact = x.contiguous()
    s, _ = grouped.grouped_shrink(compact, a_all, table)
    assert torch.equal(grouped.grouped_shrink(x, a_all, table)[0], s)
    assert torch.equal(grouped.grouped_grad_a(s, x, table), grouped.grouped_grad_a(s, compact, table))
    y = grouped.grouped_gemm(compact, a_all, s, a_all, table)
    assert torch.equal(grouped.grouped_gemm(x, a_all, s, a_all, table), y)
    assert torch.equal(
        grouped.grouped_grad_x(s, a_all, table, accumulate=compact),
        grouped.grouped_grad_x(s, a_all, table, accumulate=x, out=x),
    )
