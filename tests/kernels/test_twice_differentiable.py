"""Private parts of torch that the operators stand on. What another torch breaks is told in one line."""

from __future__ import annotations

import ast
import pkgutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conftest import REPOSITORY

FILES = sorted((REPOSITORY / "kernels").glob("*.py"))


def private_names(source: str) -> set[str]:
    """Names under torch with a part that begins with one underscore, as `module.name`."""
    return {name for name in _names(ast.parse(source)) if any(_is_private(part) for part in name.split("."))}


def _names(tree: ast.AST) -> Iterator[str]:
    """Imported names and whole chains of attributes that begin with torch."""
    within: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and node not in within:
            within.update(ast.walk(node))
            chain = ast.unparse(node)
            if chain.startswith("torch.") and chain.replace(".", "").replace("_", "").isalnum():
                yield chain


def _is_private(part: str) -> bool:
    # A foreach or fused operation is an operator of torch, whose names all begin so.
    return part.startswith("_") and not part.startswith(("__", "_foreach", "_fused"))


USED = [(file, name) for file in FILES for name in sorted(private_names(file.read_text()))]


def told(broken: str, file: Path) -> None:
    """Fail in one line."""
    pytest.fail(f"torch {torch.__version__}: {broken}, which kernels/{file.name} needs", pytrace=False)


def test_private_names_are_found() -> None:
    found = private_names(
        "from torch._a import b\nfrom torch.c import _d\ntorch.e._f.g()\ntorch.h.i\nfrom x import _y\n"
    )
    assert found == {"torch._a.b", "torch.c._d", "torch.e._f.g"}
    assert {"torch.autograd.function._SingleLevelFunction", "torch._C._AutoDispatchBelowAutograd"} <= {
        n for _, n in USED
    }


@pytest.mark.parametrize(("file", "name"), USED, ids=[name for _, name in USED])
def test_torch_has_the_private_parts_that_kernels_use(file: Path, name: str) -> None:
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        told(f"there is no {name}", file)


@pytest.fixture(scope="module")
def cube() -> Callable[[Tensor], Tensor]:
    """Operator x^3, whose gradient is an operator with a gradient."""
    from gen_dist.kernels.twice_differentiable import define_operator

    def cubed(x: Tensor) -> Tensor:
        return x**3

    def slope(gradient: Tensor, x: Tensor) -> Tensor:
        return gradient * 3 * x**2

    def curvature(cotangent: Tensor, gradient: Tensor, x: Tensor) -> Tensor:
        return cotangent * gradient * 6 * x

    def keep(ctx: Any, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    curved = define_operator("test_curvature", curvature, lambda *tensors: torch.empty_like(tensors[-1]))
    sloped = define_operator(
        "test_slope",
        slope,
        lambda _, x: torch.empty_like(x),
        keep,
        lambda ctx, cotangent: (cotangent * 3 * ctx.saved_tensors[1] ** 2, curved(cotangent, *ctx.saved_tensors)),
    )
    operator: Callable[[Tensor], Tensor] = define_operator(
        "test_cube", cubed, torch.empty_like, keep, lambda ctx, gradient: sloped(gradient, *ctx.saved_tensors)
    )
    return operator


def by_autograd(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.requires_grad_()
    (first,) = torch.autograd.grad(function(x).sum(), x, create_graph=True)
    return first, torch.autograd.grad(first.sum(), x)[0]


def by_func(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    first = torch.func.grad(lambda of: function(of).sum())
    return first(x), torch.func.grad(lambda of: first(of).sum())(x)


def by_func_within_autograd(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.requires_grad_()
    first = torch.func.grad(lambda of: function(of).sum())(x)
    return first, torch.autograd.grad(first.sum(), x)[0]


def by_compiler(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.requires_grad_()
    first = torch.compile(torch.func.grad(lambda of: function(of).sum()), backend="aot_eager", fullgraph=True)(x)
    return first, torch.autograd.grad(first.sum(), x)[0]


@pytest.mark.parametrize("way", [by_autograd, by_func, by_func_within_autograd, by_compiler], ids=lambda f: f.__name__)
def test_operators_have_gradients_of_gradients(cube: Callable[[Tensor], Tensor], way: Callable[..., Any]) -> None:
    x = torch.tensor([0.5, -2.0], dtype=torch.float64)
    file = REPOSITORY / "kernels/twice_differentiable.py"
    try:
        first, second = way(cube, x.clone())
    except Exception as error:
        first_line = (str(error).strip().splitlines() or [""])[0]
        told(f"gradients {way.__name__} fail ({type(error).__name__}: {first_line})", file)
    if not torch.allclose(first, 3 * x**2):
        told(f"first gradients {way.__name__} are wrong", file)
    if not torch.allclose(second, 6 * x):
        told(f"second gradients {way.__name__} are wrong", file)
