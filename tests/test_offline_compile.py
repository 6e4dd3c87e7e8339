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


@pytest.fixture(scope="module")
def processes() -> int:
    """Workers of pytest-xdist share the cores already."""
    return 1 if "PYTEST_XDIST_WORKER_COUNT" in os.environ else 2


@pytest.mark.parametrize("file", offline.CASES)
def test_kernels_fit(file, compile_environment, processes, tmp_path, pytestconfig):
    compile_environment["TRITON_CACHE_DIR"] = str(pytestconfig.cache.mkdir("triton"))
    script = Path(offline.__file__)
    command = [sys.executable, script, "--json", tmp_path / "rows.json", "--files", file, "--jobs", str(processes)]
    done = subprocess.run(list(map(str, command)), env=compile_environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert {row["target"] for row in rows} == set(offline.TARGETS)


def test_every_file_with_kernels_is_compiled():
    """What is launched is called …_kernel."""
    folder = Path(lora_fast.kernels.__file__).parent
    launching = {path.stem for path in folder.glob("*.py") if re.search(r"^def \w+_kernel\(", path.read_text(), re.M)}
    assert launching - set(offline.CASES) <= {"partials"}, "partials is launched by the others"
    assert set(offline.CASES) < launching | {"partials"}


def test_what_is_launched_is_what_triton_would_launch(compile_environment):
    """tests/launches.py, in a process of its own without the interpreter."""
    script = Path(offline.__file__).with_name("launches.py")
    done = subprocess.run([sys.executable, script], env=compile_environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert all(f"{file}: " in done.stdout for file in offline.CASES) and "random sizes" in done.stdout, done.stdout


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
    row |= {"wide": True, "main_loops": 1, "fp64_loops": 0, "async_mma_loops": 1, "overlapped_wgmma_loops": 1}
    row |= {"cp_async_less": 0, "cp_async_16": 1, "tma_loads": 0}
    return row | {"ld_global_16": 0, "wgmma": 4, "tcgen05": 0, "mma_sync": 0} | changed


@pytest.mark.parametrize(
    "changed, complaint",
    [
        ({}, None),
        ({"stack": 56}, "spills 56 bytes"),  # more than what is let pass under another version of triton
        ({"local": 56}, "spills 56 bytes"),
        ({"shared": 101}, "shared memory"),
        ({"cp_async_16": 0}, "no 16-byte load"),
        ({"wgmma": 0, "mma_sync": 4}, "no wgmma"),
        ({"async_mma_loops": 0}, "fetch ahead"),
        ({"overlapped_wgmma_loops": 0}, "multiply on"),
        ({"main_loops": 0, "fp64_loops": 2}, "fp64 loops"),
        ({"tile": "FLAT=True", "flat_loops": 1}, None),
        ({"tile": "FLAT=True", "flat_loops": 0}, "loops are two"),
        ({"cp_async_less": 2}, "less than 16 bytes"),
        ({"error": "PTXASError"}, "PTXASError"),
    ],
)
def test_what_counts_as_a_problem(changed, complaint):
    found = offline.problems(row_of(**changed))
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
$L__BB0_4:
    wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%f1}, %rd1, %rd2, p;
    wgmma.wait_group.sync.aligned 1;
    cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%rd1, {%r1, %r2}], [%r3];
    @%p1 bra $L__BB0_4;
"""
    counted = offline.instructions_nvidia(ptx)
    assert (
        counted["mma_sync"] == counted["tma_loads"] == counted["flat_loops"] == counted["overlapped_wgmma_loops"] == 1
    )
    assert counted["wgmma"] == 2
    assert (counted["cp_async_16"], counted["cp_async_less"]) == (1, 1)
    assert (counted["ld_global_16"], counted["ld_global_less"]) == (1, 1)
    assert (counted["mma_loops"], counted["async_mma_loops"]) == (3, 2)
