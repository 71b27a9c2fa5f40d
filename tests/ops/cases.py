"""Random arguments of the operators, one call's results with their gradients, and their errors."""

from __future__ import annotations

from collections.abc import Callable

import torch

Tensors = dict[str, torch.Tensor]

NAMES = ("q", "gate_logits", "v", "aug", "out_gate", "out_gate_bias", "initial_state")
# Sets of arguments that callers leave out.
WITHOUT = [
    ("initial_state",),
    ("aug",),
    ("out_gate_bias",),
    ("out_gate", "out_gate_bias"),
    ("initial_state", "aug", "out_gate", "out_gate_bias"),
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make(
    B: int,
    T: int,
    H: int,
    K: int,
    V: int,
    *,
    N: int | None = None,
    dtype: torch.dtype = torch.float32,
    gates: float = 1.0,
    absent: tuple[str, ...] = (),
    generator: torch.Generator | None = None,
    device: str | None = None,
) -> Tensors:
    """Draws the tensor arguments of `meta_linear_attention` by name.

    Args:
        B, T, H, K, V: the sizes.
        N: how many initial states; `None` for B.
        dtype: the dtype of all but the state, which is float32, or float64 beside float64.
        gates: a factor for the gate logits.
        absent: the arguments to leave out.
        generator: the random numbers; `None` for one on the CPU with seed 0, so that all devices
            and dtypes see the same numbers.
        device: where the tensors lie; `None` for DEVICE.
    """
    shapes = (
        (B, T, H, K), (B, T, H, K), (B, T, H, V), (H, K), (B, T, H, V), (H, V),
        (B if N is None else N, H, K, V),
    )  # fmt: skip
    tensors = _draw(dict(zip(NAMES, shapes, strict=True)), generator, absent)
    if "gate_logits" in tensors:
        tensors["gate_logits"] *= gates
    state_dtype = torch.promote_types(dtype, torch.float32)
    return {
        name: x.to(device or DEVICE, state_dtype if name == "initial_state" else dtype)
        for name, x in tensors.items()
    }


def make_leaves(
    B: int = 2, T: int = 65, H: int = 2, K: int = 8, V: int = 12, *, seed: int = 0, **arguments
) -> Tensors:
    """Draws like `make`, on the CPU, in float64 unless told otherwise, and requires gradients."""
    arguments = {"dtype": torch.float64, "device": "cpu", **arguments}
    generator = torch.Generator().manual_seed(seed)
    tensors = make(B, T, H, K, V, generator=generator, **arguments)
    return {name: x.requires_grad_() for name, x in tensors.items()}


def make_convolution(
    B: int,
    T: int,
    D: int,
    W: int = 4,
    *,
    N: int | None = None,
    dtype: torch.dtype = torch.float32,
    time_major: bool = False,
    absent: tuple[str, ...] = (),
    generator: torch.Generator | None = None,
    device: str | None = None,
) -> Tensors:
    """Draws the tensor arguments of `short_convolution` by name, as `make`. With `time_major`, x is
    a transposed [T, B, D]."""
    shapes = {"x": (T, B, D) if time_major else (B, T, D), "weight": (D, 1, W)}
    shapes["initial_state"] = (B if N is None else N, D, W - 1)
    tensors = {
        n: x.to(device or DEVICE, dtype) for n, x in _draw(shapes, generator, absent).items()
    }
    return tensors | {"x": tensors["x"].transpose(0, 1)} if time_major else tensors


def _draw(shapes: dict, generator: torch.Generator | None, absent: tuple[str, ...]) -> Tensors:
    generator = generator or torch.Generator().manual_seed(0)
    # A GPU draws less, for its tensors can be as large as its memory.
    dtype = torch.float64 if generator.device.type == "cpu" else torch.float32
    drawn = {
        name: torch.randn(shape, generator=generator, dtype=dtype, device=generator.device)
        for name, shape in shapes.items()
    }
    return {name: x for name, x in drawn.items() if name not in absent}


def evaluate(
    operator: Callable[..., torch.Tensor | tuple[torch.Tensor, torch.Tensor | None]],
    tensors: Tensors,
    dtype: torch.dtype | None = None,
    weights: list[torch.Tensor] | None = None,
    **arguments: object,
) -> Tensors:
    """Calls an operator, and differentiates a fixed random functional of its results.

    Args:
        operator: returns one tensor, or an output and a final state or `None`.
        tensors: its tensor arguments by name.
        dtype: to call it in; `None` for each tensor's own.
        weights: the gradients of the results; `None` for random ones that every dtype holds
            exactly.
        arguments: its other arguments.

    Returns:
        "out", "final_state" if there is one, and "d NAME" for each tensor.
    """
    leaves = {name: x.detach().to(dtype or x.dtype).requires_grad_() for name, x in tensors.items()}
    results = operator(**leaves, **arguments)
    results = (results, None) if isinstance(results, torch.Tensor) else results
    names = ("out", "final_state")
    found = {name: x for name, x in zip(names, results, strict=True) if x is not None}
    if weights is None:
        generator = torch.Generator().manual_seed(1)
        weights = [torch.randn(x.shape, generator=generator).bfloat16() for x in found.values()]
    weights = [w.to(x) for w, x in zip(weights, found.values(), strict=True)]
    gradients = torch.autograd.grad(list(found.values()), list(leaves.values()), weights)
    found |= {f"d {name}": x for name, x in zip(leaves, gradients, strict=True)}
    return {name: x.detach() for name, x in found.items()}


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Returns the 2-norm of the difference, relative to that of `wanted`."""
    wanted = wanted.double()
    return ((found.double() - wanted).norm() / wanted.norm()).item()


def largest_errors(found: Tensors, wanted: Tensors) -> dict[str, float]:
    """Returns each tensor's largest difference, relative to the largest entry of `wanted`."""
    assert found.keys() == wanted.keys()
    errors = {}
    for name, want in wanted.items():
        assert found[name].shape == want.shape, name
        difference = (found[name].double() - want.double()).abs().max().item()
        errors[name] = difference / max(want.double().abs().max().item(), 1e-300)
    return errors


def assert_step_right(
    operator: Callable[..., tuple[torch.Tensor, torch.Tensor | None]],
    tensors: Tensors,
    oracle: str,
    tolerance: float,
    **arguments: object,
) -> None:
    """Asserts that the Triton kernels for one token agree with a backend in float64, and that the
    step in place gives the same bits and changes the state alone."""
    exact = {name: x.double() for name, x in tensors.items()}
    wanted = operator(**exact, output_final_state=True, backend=oracle, **arguments)
    kept = {name: x.clone() for name, x in tensors.items()}
    found = operator(**tensors, output_final_state=True, backend="triton", **arguments)
    assert all(torch.equal(kept[name], x) for name, x in tensors.items())
    for x, want in zip(found, wanted, strict=True):
        assert x.shape == want.shape
        assert (x.double() - want).norm() <= tolerance * want.norm()
    if "initial_state" in tensors:
        state = tensors["initial_state"]
        del kept["initial_state"]
        again = operator(**tensors, inplace_final_state=True, backend="triton", **arguments)
        assert again[1] is state
        assert torch.equal(again[0], found[0]) and torch.equal(state, found[1])
        assert all(torch.equal(kept[name], tensors[name]) for name in kept)
