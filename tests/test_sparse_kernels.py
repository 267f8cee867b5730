"""Triton's kernels without a GPU: what they compute, in its interpreter, and that they compile."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from networks import sparse_read

triton = pytest.importorskip("triton", reason="Triton comes with CUDA builds of PyTorch alone")
ROOT = Path(__file__).parents[1]
COUNTS = [0, 3, 17, 40, 1, 0, 16, 5, 0]  # survivors of each query
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def compare():
    """Compares the kernels with the CPU's form, spare entries included; runs in a process."""
    from networks import sparse_kernels

    gen = torch.Generator().manual_seed(0)
    rows = torch.repeat_interleave(torch.arange(len(COUNTS)), torch.tensor(COUNTS))
    rows = torch.cat([rows, torch.full((7,), len(COUNTS))]).int()
    columns = torch.randint(0, 37, rows.shape, generator=gen).int()
    columns[-7:] = 37
    offsets, weights = sparse_read.starts(rows, len(COUNTS)), torch.rand(rows.shape, generator=gen)
    for width in (130, 3):
        for dtype in DTYPES:
            queries, bank = (torch.randn(n, width, generator=gen).to(dtype) for n in (9, 37))
            pairs = [
                (form.weighted_sums(bank, columns, offsets, weights).float(), dtype)
                for form in (sparse_kernels, sparse_read)
            ]
            tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.1, torch.float16: 0.02}[dtype]
            torch.testing.assert_close(pairs[0][0], pairs[1][0], atol=tolerance, rtol=0.02)
            ours = sparse_kernels.products(queries, bank, columns, offsets)
            real = rows < len(COUNTS)
            exact = queries.float()[rows[real].long()] * bank.float()[columns[real].long()]
            torch.testing.assert_close(ours[real], exact.sum(1), atol=1e-4, rtol=1e-4)
            assert not ours[~real].any()


def test_the_kernels_compute_what_the_cpu_does():
    code = "import sys; sys.path += ['tests']; import test_sparse_kernels as t; t.compare()"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("capability", [75, 90])
def test_the_kernels_compile_for_a_card(capability, dtype):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from networks import sparse_kernels

    lists = {"indices": "*i32", "columns": "*i32", "offsets": "*i32", "weights": "*fp32"}
    sizes = {"WIDTH": 2048, "ENTRIES": sparse_kernels.ENTRIES, "CHANNELS": sparse_kernels.CHANNELS}
    for kernel in (sparse_kernels._weighted_sums, sparse_kernels._products):
        types = {name: lists.get(name, f"*{dtype}") for name in kernel.arg_names}
        types |= dict.fromkeys(sizes.keys() & types.keys(), "constexpr")
        constants = {name: sizes[name] for name in sizes if name in types}
        source = ASTSource(kernel, signature=types, constexprs=constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
        assert compiled.asm["cubin"]
