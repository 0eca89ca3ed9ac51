"""Compiles the launches of a run ahead of time, for a target that need not be present.

    python triton_compiler.py WORKER WORKERS < jobs.json

Launches are recorded, on tensors without memory, from the very functions that a run calls; so
tiles, signatures and constants are a run's own. One line of JSON a kernel comes out: its name,
shape, target, registers a thread, and bytes of memory that stand in for registers.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import JITFunction

from manifold_hc.kernels.triton import (
    boundary,
    coefficients,
    coefficients_backward,
    plan,
    project,
    read,
    rebuild,
    sinkhorn,
    write,
)
from manifold_hc.kernels.values import (
    InputNorm,
    MapParameters,
    ReadingGradients,
    SavedBoundary,
    SavedMaps,
    Settings,
    WriteInputs,
)

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
OPTIONS = ("num_warps", "num_stages", "maxnreg")


def record(call):
    """The launches of `call()`: (kernel, arguments by name, options)."""
    launches = []

    def run(self, *arguments, grid, warmup, **named):
        options = {key: named.pop(key) for key in OPTIONS if key in named}
        bound = dict(zip(self.arg_names, arguments, strict=False)) | named
        assert set(bound) == set(self.arg_names), set(bound) ^ set(self.arg_names)
        launches.append((self, bound, options))

    plain, JITFunction.run = JITFunction.run, run
    try:
        call()
    finally:
        JITFunction.run = plain
    return launches


def launches_of(n, C, dtype, constraint, transposed, *, tokens=256, tiles=None):
    """Everything that a forward and a backward pass launch, and the operators on their own."""
    plain = {name: getattr(plan, name) for name in tiles or {}}
    for name, change in (tiles or {}).items():
        tile = plain[name]
        setattr(plan, name, lambda *a, t=tile, c=change: {**t(*a), **c})
    rows = 2 * n + (0 if constraint == "identity" else n * n)

    def new(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    x, y, matrix = new(tokens, n, C, dtype=dtype), new(tokens, C, dtype=dtype), new(tokens, n, n)
    gate, phi, bias, alpha = new(tokens, n), new(rows, n * C), new(rows), new(3)
    projected, inverse_rms = new(tokens, rows), new(tokens)
    epsilon = 1e-6 if transposed else 0.0
    learning = Settings(constraint, 20, transposed, 1e-6, epsilon, True)

    maps = MapParameters(phi, alpha, bias)

    def everything():
        coefficients.coefficients_and_read(x, maps, learning)
        coefficients.coefficients(x, maps, learning)
        write.write(x, y, gate, matrix)
        write.write_backward(x, x, y, gate, matrix)
        write.branch_backward(x, y, gate)
        rebuild.rebuild(x, [(y, gate, matrix)] * 5, [gate] * 6, [None] * 6)
        saved = SavedMaps(matrix, projected, inverse_rms)
        grads = ReadingGradients(u=y, pre=None, post=gate, res=matrix, link=x)
        for settings in (learning, learning._replace(learns=False)):
            coefficients_backward.coefficients_and_read_backward(grads, x, maps, saved, settings)
        norm = InputNorm(new(C), 1e-6)
        for pre, own in ((None, None), (None, norm), (gate, None), (gate, norm)):
            boundary.boundary(WriteInputs(x, y, gate, matrix), pre, maps, own, learning)
            coefficients_backward.boundary_backward(
                x, grads, SavedBoundary(x, y, gate, pre), maps, own, saved, learning
            )
        sinkhorn.sinkhorn(matrix, 20, transposed, epsilon)
        sinkhorn.sinkhorn_backward(matrix, matrix, 20, transposed, epsilon)
        read.read(x, gate)
        read.read_backward(y, x, gate)
        few = new(n + 2, C)
        v = x.view(tokens * n, C)
        project.project(v, few, 1e-6)
        project.project_backward(
            new(tokens * n, n + 2), v, few, new(tokens * n, n + 2), new(tokens * n)
        )

    try:
        return record(everything)
    finally:
        for name, function in plain.items():
            setattr(plan, name, function)


def source(kernel, bound):
    """The compiler's input, specialised as for a launch on aligned tensors."""
    signature, constants, attributes = {}, {}, {}
    short = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
    for place, parameter in enumerate(kernel.params):
        value = bound[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name] = "constexpr"
            constants[(place,)] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = short[value.dtype]
            attributes[(place,)] = [["tt.divisibility", 16]]
        elif isinstance(value, tuple):
            signature[parameter.name] = tuple(short[tensor.dtype] for tensor in value)
            attributes |= {(place, k): [["tt.divisibility", 16]] for k in range(len(value))}
        else:
            signature[parameter.name] = "i32" if isinstance(value, int) else "fp32"
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)


def usage(compiled, target):
    """Registers a thread and bytes of spilled ones, as the vendor's tools report them."""
    if target.backend == "hip":
        text = compiled.asm["amdgcn"]

        def metadata(key):
            return int(re.search(rf"\.{key}:\s*(\d+)", text)[1])

        spilled = metadata("vgpr_spill_count") + metadata("sgpr_spill_count")
        return metadata("vgpr_count"), max(spilled, metadata("private_segment_fixed_size"))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        report = subprocess.run(
            [TOOLS / "cuobjdump", "-res-usage", file.name],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", report)
    return int(found[1]), int(found[2]) + int(found[3])


def target_of(arch):
    return GPUTarget("cuda", arch, 32) if isinstance(arch, int) else GPUTarget("hip", arch, 64)


def main(worker, workers):
    """Compile this worker's share of the jobs on standard input."""
    seen, count = set(), 0
    for job in json.load(sys.stdin):
        arch, only = job.pop("arch"), job.pop("only")
        target = target_of(arch)
        # Which products a GPU makes fast depends on its maker, which torch's build tells a run.
        torch.version.hip = "7.0" if target.backend == "hip" else None
        job["dtype"] = getattr(torch, job["dtype"])
        for kernel, bound, options in launches_of(**job):
            if only not in (None, kernel.__name__):
                continue
            src = source(kernel, bound)
            key = (src.hash(), arch, tuple(options.items()))
            if key in seen:
                continue
            seen.add(key)
            count += 1
            if count % workers != worker:
                continue
            compiled = triton.compile(src, target=target, options=options)
            registers, spilled = usage(compiled, target)
            shape = f"n={job['n']} C={job['C']} {str(job['dtype'])[6:]} {job['constraint']}"
            line = {
                "kernel": kernel.__name__,
                "shape": shape,
                "arch": arch,
                "registers": registers,
                "spilled": spilled,
                "shared": compiled.metadata.shared,
                "warps": compiled.metadata.num_warps,
            }
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
