"""The Triton kernels: right under Triton's interpreter, compiled for GPUs that need not be here, and never needed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nnunet_cfcl.losses import triton_dispatch
from nnunet_cfcl.losses.ranks import Share
from nnunet_cfcl.losses.triton_launch import Launch, candidate_tiles

ROOT = Path(__file__).parents[2]


def test_kernels_and_guard_under_the_interpreter():
    pytest.importorskip("triton", reason="Triton is not installed")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    script = Path(__file__).with_name("triton_process.py")
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "kernels agree", "a loss agrees", "shares add up", "wrong kernels are not used",
    ]


@pytest.mark.parametrize("kernel", ["_row_sums", "_gradient"])
@pytest.mark.parametrize(("precision", "tile"), [("tf32", (128, 64, 8, 3)), ("tf32x3", (128, 32, 8, 3))])
def test_kernels_compile_for_hopper_and_fit_into_its_shared_memory(kernel, precision, tile, monkeypatch, tmp_path):
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    if "nvidia" not in triton.backends.backends:
        pytest.skip("this Triton has no compiler for NVIDIA's GPUs")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from nnunet_cfcl.losses import triton_kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    rows, columns, warps, stages = tile
    fixed = {"POOL": True, "ROWS": rows, "COLUMNS": columns, "WIDTH": 128, "PRECISION": precision}
    function = getattr(triton_kernels, kernel)
    integers = {"rows", "columns", "width", "rank", "count"}
    kinds = {name: "i32" if name in integers else "*fp32" for name in function.arg_names if name not in fixed}
    source = ASTSource(
        fn=function, signature={**kinds, **dict.fromkeys(fixed, "constexpr")}, constexprs=fixed,
        attrs={(n,): [["tt.divisibility", 16]] for n, kind in enumerate(kinds.values()) if kind == "*fp32"},
    )
    compiled = triton.compile(
        source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps, "num_stages": stages})
    assert "wgmma" in compiled.asm["ptx"]
    assert compiled.metadata.shared <= 227 * 1024


@pytest.mark.parametrize(
    ("capability", "precision", "expected"),
    [
        ((9, 0), "tf32x3", (128, 32, 8, 3)),
        ((9, 0), "tf32", (128, 64, 8, 3)),
        ((8, 6), "tf32", (64, 64, 4, 2)),
        ((8, 0), "tf32x3", None),
        ((7, 5), "tf32", None),
    ],
)
def test_the_tile_follows_the_gpu(monkeypatch, capability, precision, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    tiles = candidate_tiles(torch.device("cuda"), precision)
    assert (tiles[0] if tiles else None) == expected


def test_nothing_changes_where_triton_is_missing(monkeypatch, recwarn):
    def missing():
        raise ImportError("no module named triton")

    monkeypatch.setattr(triton_dispatch, "_supported", lambda x: True)
    monkeypatch.setattr(triton_dispatch, "_kernels", missing)
    triton_dispatch._agreed_launch.cache_clear()
    triton_dispatch._working_launch.cache_clear()
    assert triton_dispatch.launch_for(torch.ones(3, 4), Share()) is None
    assert not recwarn.list


@pytest.mark.parametrize("agreed", [True, False])
def test_processes_that_cut_tiles_differently_do_not_use_the_kernels(monkeypatch, agreed):
    launch = Launch(64, 64, 4, 2, "tf32")
    monkeypatch.setattr(triton_dispatch, "_supported", lambda x: True)
    monkeypatch.setattr(triton_dispatch, "_working_launch", lambda *_: launch)
    monkeypatch.setattr(Share, "all_have", lambda self, value, device: agreed)
    triton_dispatch._agreed_launch.cache_clear()
    assert triton_dispatch.launch_for(torch.ones(3, 4), Share(0, 2)) == (launch if agreed else None)
    triton_dispatch._agreed_launch.cache_clear()


@pytest.mark.parametrize("x", [torch.ones(3, 4), torch.ones(3, 4, dtype=torch.float64, device="meta")])
def test_other_devices_and_types_visit_the_blocks(x):
    assert triton_dispatch.launch_for(x, Share()) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["highest", "high"])
def test_both_paths_agree_on_this_gpu(monkeypatch, precision):
    from nnunet_cfcl.losses import pool_log_sum_exp, two_way_log_sum_exp

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        g = torch.Generator().manual_seed(0)
        x, y = (torch.randn(n, 100, generator=g) for n in (3000, 1700))
        x, y = (torch.nn.functional.normalize(z, dim=1).cuda().requires_grad_() for z in (x, y))
        found = []
        for supported in (triton_dispatch._supported, lambda x: False):
            monkeypatch.setattr(triton_dispatch, "_supported", supported)
            rows, columns = two_way_log_sum_exp(3 * x, y, 3.0)
            value = rows.mean() + columns.mean() + pool_log_sum_exp(x, 1.0).mean()
            found.append([value.detach(), *torch.autograd.grad(value, (x, y))])
    finally:
        torch.set_float32_matmul_precision(before)
    tolerance = 1e-5 if precision == "highest" else 3e-3
    for ours, blocks in zip(*found):
        torch.testing.assert_close(ours, blocks, rtol=0, atol=tolerance * float(blocks.abs().max()))
