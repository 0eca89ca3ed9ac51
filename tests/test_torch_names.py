"""Private names of PyTorch that the package uses exist in the installed version."""

import ast
import importlib
from functools import reduce
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import PipelineStage

PACKAGE = Path(__file__).parent.parent / "manifold_hc"


def private_names():
    """(dotted name, file) of every private name of torch's that a source file spells out."""
    for file in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(file.read_text())
        aliases = {"torch": "torch"}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
                for alias in node.names:
                    aliases[alias.asname or alias.name] = f"{node.module}.{alias.name}"
        chains = {dotted(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        chains |= {(name,) for name in aliases}
        for root, *rest in filter(None, chains):
            name = ".".join([aliases.get(root, ""), *rest])
            parts = name.split(".")
            if parts[0] == "torch" and any(p.startswith("_") and p[:2] != "__" for p in parts):
                yield name, str(file.relative_to(PACKAGE.parent))


def dotted(node):
    """Return ("torch", "_C", "name") for an attribute chain; None if its root is not a name."""
    if isinstance(node, ast.Name):
        return (node.id,)
    if isinstance(node, ast.Attribute) and (start := dotted(node.value)):
        return (*start, node.attr)
    return None


def resolve(name):
    """The object: the longest importable module, then attributes."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            module = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        return reduce(getattr, parts[length:], module)
    raise ModuleNotFoundError(name)


FOUND = sorted(set(private_names()))


def test_the_search_finds_known_private_names():
    assert ("torch._C._functorch.get_interpreter_stack", "manifold_hc/kernels/__init__.py") in FOUND


@pytest.mark.parametrize(("name", "file"), FOUND, ids=[f"{n} in {f}" for n, f in FOUND])
def test_torch_has_the_name(name, file):
    try:
        resolve(name)
    except (AttributeError, ModuleNotFoundError):
        pytest.fail(f"torch {torch.__version__} has no {name}, which {file} uses")


@pytest.mark.parametrize(
    ("owner", "name", "file"),
    [
        (torch.zeros(1), "_version", "recompute.py"),
        (torch.zeros(1), "_is_view", "stack.py"),
        (nn.Module(), "_apply", "precision.py"),
        (nn.Module(), "_buffers", "precision.py"),
        (nn.Module(), "_parameters", "precision.py"),
        (nn.Module(), "_modules", "known_forwards.py"),
        (nn.Module(), "_compiled_call_impl", "known_forwards.py"),
        (nn.Module(), "_forward_hooks", "known_forwards.py"),
        (nn.Module(), "_forward_pre_hooks", "known_forwards.py"),
        (nn.Module(), "_backward_hooks", "known_forwards.py"),
        (nn.Module(), "_backward_pre_hooks", "known_forwards.py"),
        (nn.modules.module, "_global_forward_hooks", "known_forwards.py"),
        (nn.modules.module, "_global_forward_pre_hooks", "known_forwards.py"),
        (nn.modules.module, "_global_backward_hooks", "known_forwards.py"),
        (nn.modules.module, "_global_backward_pre_hooks", "known_forwards.py"),
        (DeviceMesh, "_unflatten", "parallel/processes.py"),
        (PipelineStage, "_prepare_forward_infra", "parallel/schedule.py"),
        (PipelineStage, "_prepare_backward_infra", "parallel/schedule.py"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_torchs_objects_have_the_name(owner, name, file):
    if not hasattr(owner, name):
        kind = owner.__name__ if isinstance(owner, type) else type(owner).__name__
        pytest.fail(f"torch {torch.__version__}: {kind} has no {name}, which {file} uses")
