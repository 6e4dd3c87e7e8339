"""Every kernel and shipped tile compiles for GPUs that aren't here, and fits: registers, shared memory, instructions.

tests/offline.py compiles, in a process of its own without the interpreter; each test takes one kernel file."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import offline
import pytest

import lora_fast.kernels

# Exceptions: kernel, label [tile], target (regular expressions), bytes of stack allowed, reason. ptxas lowers registers
# to fit one more block on a multiprocessor (168 for 3 blocks of 128 threads, 128 for 4), and pays with a few spills.
SPILLS = [
    ("_sum_kernel", r".*", r"sm_90", 8, "two numbers, outside the loop of a kernel of microseconds"),
    ("_shrink_kernel", r"ranks \(16, 16, 16\), p=0.0.*", r"sm_120", 8, "for one more block on a multiprocessor"),
    (
        "_grad_a_kernel",
        r"dA, mask, r=16 .*",
        r"sm_100",
        112,
        "offsets, reloaded in the loop; no chip was at hand to tune on",
    ),
    (
        "_outer_kernel",
        r"dA, mask, r=16.*",
        r"sm_89",
        16,
        "six halves of registers, for four blocks on a multiprocessor",
    ),
]
# Where loads are less than 16 bytes wide: kernel, label, target, reason.
NARROW = [
    ("_sum_kernel|_add_chunks_kernel", r".*", r".*", "a thread sums one column; neighbours read neighbouring numbers"),
    ("_backward_kernel", r"backward.*", r"gfx942", "a tile of 16 × 64 for 256 threads: eight bytes a thread"),
    ("_shrink_kernel", r"ranks \(64, 64, 64\), p=0.1.*", r"gfx942", "64 × 32 for 512 threads: eight bytes a thread"),
    ("gemm_lora_kernel", r".*BLOCK_M=16,.*", r"sm_80|sm_89", "16 × 32 of s for 128 threads: eight bytes a thread"),
]


@pytest.fixture(scope="module")
def processes() -> int:
    """Workers of pytest-xdist share the cores already."""
    return 1 if "PYTEST_XDIST_WORKER_COUNT" in os.environ else 2


def exception(table: list[tuple], row: dict) -> tuple | None:
    told = (row["kernel"], f"{row['label']} [{row['tile']}]", row["target"])
    return next((entry for entry in table if all(map(re.fullmatch, entry[:3], told))), None)


def problems(row: dict) -> list[str]:
    """What is wrong with a compiled kernel, in words."""
    if "error" in row:
        return [row["error"]]
    found = []
    spilled = row["stack"] + row["local"]
    allowed = exception(SPILLS, row)
    if spilled > (allowed[3] if allowed else 0):
        found.append(f"spills {spilled} bytes")
    if row["shared"] > row["shared_limit"]:
        found.append(f"{row['shared']} bytes of shared memory, the chip has {row['shared_limit']}")
    amd = row["target"].startswith("gfx")
    narrow = exception(NARROW, row)
    wide_loads = row["ld_global_16"] + (0 if amd else row["cp_async_16"] + row["tma_loads"])
    if row["wide"] and not wide_loads and not narrow:
        found.append("no 16-byte load")
    if row["main_loops"] and amd and not row["mfma"]:
        found.append("no mfma")
    if row["main_loops"] and not amd:
        if row["async_mma_loops"] < row["main_loops"]:
            found.append(f"{row['async_mma_loops']} loops fetch ahead, of {row['main_loops']} main loops")
        if row["cp_async_less"] and not narrow:
            found.append(f"{row['cp_async_less']} asynchronous copies of less than 16 bytes")
        instruction = {"sm_90": "wgmma", "sm_100": "tcgen05"}.get(row["target"], "mma_sync")
        if not row[instruction]:
            found.append(f"no {instruction}")
    return found


@pytest.mark.parametrize("file", offline.CASES)
def test_kernels_fit(file, compile_environment, processes, tmp_path, pytestconfig):
    compile_environment["TRITON_CACHE_DIR"] = str(pytestconfig.cache.mkdir("triton"))
    script = Path(offline.__file__)
    command = [sys.executable, script, "--json", tmp_path / "rows.json", "--files", file, "--jobs", str(processes)]
    done = subprocess.run(list(map(str, command)), env=compile_environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert {row["target"] for row in rows} == set(offline.TARGETS)
    wrong = [f"{row['target']} {row['label']} [{row['tile']}]: {', '.join(p)}" for row in rows if (p := problems(row))]
    assert not wrong, "\n".join(wrong)


def test_every_file_with_kernels_is_compiled():
    """A launch is written kernel[grid](…)."""
    folder = Path(lora_fast.kernels.__file__).parent
    launching = {path.stem for path in folder.glob("*.py") if re.search(r"^\s*\w+\[.*\]\($", path.read_text(), re.M)}
    assert launching - set(offline.CASES) <= {"partials"}, "partials is launched by the others"


def row_of(**changed) -> dict:
    row = {
        "kernel": "k",
        "label": "l",
        "tile": "t",
        "target": "sm_90",
        "stack": 0,
        "local": 0,
        "shared": 100,
        "shared_limit": 100,
    }
    row |= {"wide": True, "main_loops": 1, "async_mma_loops": 1, "cp_async_less": 0, "cp_async_16": 1, "tma_loads": 0}
    return row | {"ld_global_16": 0, "wgmma": 4, "tcgen05": 0, "mma_sync": 0} | changed


@pytest.mark.parametrize(
    "changed, complaint",
    [
        ({}, None),
        ({"stack": 8}, "spills 8 bytes"),
        ({"local": 8}, "spills 8 bytes"),
        ({"shared": 101}, "shared memory"),
        ({"cp_async_16": 0}, "no 16-byte load"),
        ({"wgmma": 0, "mma_sync": 4}, "no wgmma"),
        ({"async_mma_loops": 0}, "fetch ahead"),
        ({"cp_async_less": 2}, "less than 16 bytes"),
        ({"error": "PTXASError"}, "PTXASError"),
    ],
)
def test_what_counts_as_a_problem(changed, complaint):
    found = problems(row_of(**changed))
    assert found == [] if complaint is None else len(found) == 1 and complaint in found[0]


def test_reading_ptx():
    ptx = """
$L__BB0_1:
    cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;
    wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {%f1}, %rd1, %rd2, p;
    @%p1 bra $L__BB0_1;
    ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [ %rd1 + 0 ];
    ld.global.b16 { %rs1 }, [ %rd2 + 0 ];
$L__BB0_2:
    @%p2 bra $L__BB0_2;
    mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%f1}, {%r1}, {%r2}, {%f1};
    cp.async.ca.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x4, %r2;
    @%p1 bra.uni $L__BB0_3;
    @%p1 bra $L__BB0_2;
$L__BB0_3:
    cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%rd1, {%r2, %r3}], [%r4];
    cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%rd1, {%r1, %r2}], [%r3];
"""
    counted = offline.instructions_nvidia(ptx)
    assert counted["wgmma"] == counted["mma_sync"] == counted["tma_loads"] == 1
    assert (counted["cp_async_16"], counted["cp_async_less"]) == (1, 1)
    assert (counted["ld_global_16"], counted["ld_global_less"]) == (1, 1)
    assert (counted["mma_loops"], counted["async_mma_loops"]) == (2, 2)
