"""Checksums of a fixed set of calls, outputs and gradients: equal before and after a refactoring.

`python -m tests.checksums` prints one line a call. The bits depend on the machine, the compiler,
the number of threads and PyTorch: compare two states of the code on one machine.
"""

import hashlib
import itertools
import os
from collections.abc import Callable, Iterator

os.environ.setdefault("TRITON_INTERPRET", "1")

import torch
from torch import Tensor, nn

import manifold_hc as mhc
from manifold_hc import functional

TOKENS, C, L = (2, 9), 24, 5
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ROWS = {"sinkhorn": 16, "identity": 0, "permutation": 24, "kronecker": 4, "exact": 16, "none": 16}


def drawn(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).requires_grad_()


def digest(tensors: list[Tensor | None]) -> str:
    total = hashlib.sha256()
    for tensor in tensors:
        if tensor is None:
            total.update(b"none")
        else:
            whole = tensor.detach().contiguous()
            total.update(f"{whole.dtype} {list(whole.shape)}".encode())
            total.update(whole.flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:16]


def checksum(run: Callable[..., object], *leaves: Tensor) -> str:
    """Of all outputs and the gradient of every leaf, each output weighted by random numbers."""
    made = run(*leaves)
    outputs = [made] if isinstance(made, Tensor) else [t for t in made if isinstance(t, Tensor)]
    moving = [o for o in outputs if o.requires_grad]
    weights = [drawn(100 + k, *o.shape).detach().to(o.dtype) for k, o in enumerate(moving)]
    grads = torch.autograd.grad(moving, leaves, weights, allow_unused=True)
    return digest([*outputs, *grads])


def operators(backend: str, dtype: torch.dtype) -> Iterator[tuple[str, str]]:
    n = 4
    x, y = drawn(1, *TOKENS, n, C, dtype=dtype), drawn(2, *TOKENS, C, dtype=dtype)
    pre, post, res = drawn(3, *TOKENS, n), drawn(4, *TOKENS, n), drawn(5, *TOKENS, n, n)
    weight = drawn(9, C)
    use = {"backend": backend}
    yield "read", checksum(lambda x, pre: functional.read(x, pre, **use), x, pre)
    yield "collapse", checksum(lambda x: functional.collapse(x, **use), x)
    yield "collapse weighted", checksum(lambda *a: functional.collapse(*a, **use), x, pre)
    yield "write", checksum(lambda *a: functional.write(*a, **use), x, y, post, res)
    yield "write, one res", checksum(lambda *a: functional.write(*a, **use), x, y, post, res[0, 0])
    for numerics in ("paper", "deepseek_v4"):
        run = lambda res: functional.sinkhorn(res, numerics=numerics, **use)  # noqa: B023, E731
        yield f"sinkhorn {numerics}", checksum(run, res)
        exit_of = lambda *a: functional.exit_coefficients(*a, numerics=numerics, **use)  # noqa: B023, E731
        exits = (drawn(6, n, n * C), drawn(7, 1), drawn(8, n))
        yield f"exit {numerics}", checksum(exit_of, x, *exits)
        for constraint, k in ROWS.items():
            maps = (drawn(6, 2 * n + k, n * C), drawn(7, 3), drawn(8, 2 * n + k))
            named = {"constraint": constraint, "numerics": numerics, **use}
            name = f"{constraint} {numerics}"
            run = lambda *a: functional.coefficients(*a, **named)  # noqa: B023, E731
            yield f"coefficients {name}", checksum(run, x, *maps)
            static = lambda x, b: functional.coefficients(x, None, None, b, **named)  # noqa: B023, E731
            yield f"static {name}", checksum(static, x, maps[2])

            def linked(x, y, *maps, named=named):
                made = functional.coefficients_and_read(x, *maps, **named)
                link = {"backend": named["backend"], "link": made.link}
                return made.u, functional.write(x, y, made.post, made.res, **link)

            yield f"linked {name}", checksum(linked, x, y, *maps)
            for late, norm, linked_too in itertools.product((False, True), repeat=3):

                def crossed(x, y, pre, weight, *maps, named=named, c=(late, norm, linked_too)):
                    late, norm, linked_too = c
                    first = functional.coefficients_and_read(x, *maps, **named)
                    made = functional.boundary(
                        *(x, y, first.post, first.res, *maps),
                        pre=pre if late else None,
                        input_norm=functional.InputNorm(weight, 1e-6) if norm else None,
                        link=first.link if linked_too else None,
                        **named,
                    )
                    return first.u, made.pre, made.post, made.res, made.u, made.x

                case = "".join("01"[flag] for flag in (late, norm, linked_too))
                yield f"boundary {name} {case}", checksum(crossed, x, y, pre, weight, *maps)
    hc = (drawn(6, 2 + n, C), drawn(7, 3), drawn(8, 2 * n + n * n))
    yield "hc", checksum(lambda *a: functional.hc_coefficients(*a, **use), x, *hc)
    run = lambda x, b: functional.hc_coefficients(x, None, None, b, **use)  # noqa: E731
    yield "hc static", checksum(run, x, hc[2])
    writes = [(y.detach(), post.detach(), res.detach())] * 2
    with torch.no_grad():
        norms = [None, functional.InputNorm(weight, 1e-6), None]
        made = functional.rebuild(x, writes, [pre] * 3, norms, **use)
    yield "rebuild", digest([*made[0], *made[1]])


STACKS = {
    "residual": {"kind": "residual"},
    "hc": {"kind": "hc"},
    "hc static": {"kind": "hc", "dynamic": False},
    "mhc": {"phi_std": 0.3},
    "static": {"dynamic": False},
    "v4": {"phi_std": 0.3, "numerics": "deepseek_v4"},
    "single pass": {"phi_std": 0.3, "single_pass": True},
    "kronecker": {"phi_std": 0.3, "constraint": "kronecker"},
    "without pre": {"phi_std": 0.3, "disable": ("pre",)},
    "without post": {"phi_std": 0.3, "disable": ("post",)},
    "without res": {"phi_std": 0.3, "disable": ("res",)},
}


def stacks(backend: str, dtype: torch.dtype) -> Iterator[tuple[str, str]]:
    for name, fields in STACKS.items():
        for recompute, norms in itertools.product((None, 2), (None, "torch", "hooked")):
            torch.manual_seed(0)
            config = mhc.ConnectionConfig(backend=backend, **fields)
            stack = mhc.Stack(C, config, L, recompute)
            branches = [nn.Linear(C, C, dtype=dtype) for _ in range(L)]
            given = None
            if norms:
                given = [nn.RMSNorm(C, eps=1e-6, dtype=dtype) for _ in range(L)]
            if norms == "hooked":
                given[2].register_forward_hook(lambda module, args, out: out * 1.5)
            own = [p for p in stack.parameters() if p.requires_grad]
            own += [p for b in (*branches, *(given or ())) for p in b.parameters()]
            h = drawn(1, *TOKENS, C, dtype=dtype)
            made = checksum(lambda h, *_: stack(h, branches, given), h, *own)  # noqa: B023
            yield f"stack {name}, recompute {recompute}, norms {norms}", made
        torch.manual_seed(0)
        if not fields.get("single_pass"):
            connection = mhc.Connection(C, mhc.ConnectionConfig(backend=backend, **fields), 2)
            branch = nn.Linear(C, C, dtype=dtype)
            x = drawn(1, *TOKENS, connection.config.n, C, dtype=dtype)
            run = lambda x, *_: connection(x, branch)  # noqa: B023, E731
            own = [p for p in connection.parameters() if p.requires_grad]
            yield f"connection {name}", checksum(run, x, *own, *branch.parameters())


def main() -> None:
    torch.set_num_threads(2)
    total = hashlib.sha256()
    for backend, (dtype_name, dtype) in itertools.product(
        ("reference", "cpu", "triton"), DTYPES.items()
    ):
        for make in (operators, stacks):
            if make is stacks and backend == "triton" and dtype_name == "bfloat16":
                continue  # interpreted, at minutes a dtype
            for name, found in make(backend, dtype):
                print(f"{found}  {backend} {dtype_name} {name}", flush=True)
                total.update(found.encode())
    print(f"{total.hexdigest()[:16]}  all")


if __name__ == "__main__":
    main()
