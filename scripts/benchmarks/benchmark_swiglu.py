"""Checks SwiGLU's kernels against float64 on a GPU, then times them beside PyTorch's.

    python scripts/benchmarks/benchmark_swiglu.py

Times are of a replayed CUDA graph, medians with a cold cache, bfloat16. The floor is the time to
read each input once and write each output once at the copy bandwidth of this run; memory is what
the backward pass needs beside input and output.
"""

from __future__ import annotations

import torch
from benchmark_ops import bandwidth, graph_ms, relative_error  # noqa: E402

from megatron_patch.commands.command_line import CommandError, Parser, need_gpu, run_script  # noqa: E402
from megatron_patch.ops import swiglu  # noqa: E402

LIMITS = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 1e-6}
TOKENS = 16 * 2048
WIDTHS = (2816, 5632, 8192)  # F of the configurations of 0.38B, 1B and 3B


def evaluate(x, d_y, backend):
    x = x.detach().requires_grad_()
    y = swiglu(x, backend=backend)
    return y, *torch.autograd.grad(y, x, d_y)


def check_all() -> bool:
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills new memory with NaN
    wrong = checks = 0
    for dtype, limit in LIMITS.items():
        for width in (*WIDTHS, 1408, 5, 1):
            for rows in (1, 1001):
                x = 3 * torch.randn(rows, 2 * width, device="cuda").to(dtype)
                d_y = torch.randn(rows, width, device="cuda").to(dtype)
                found, again = (evaluate(x, d_y, "triton") for _ in range(2))
                wanted = evaluate(x.double(), d_y.double(), "torch")
                error = max(relative_error(x, want) for x, want in zip(found, wanted, strict=True))
                checks += 1
                if not error <= limit or not all(map(torch.equal, found, again)):
                    wrong += 1
                    print(f"WRONG {dtype} F {width}, {rows} rows: {error}")
    torch.use_deterministic_algorithms(False)
    print(f"{checks} checks against float64, {wrong} wrong", flush=True)
    return wrong == 0


def kept_bytes(x: torch.Tensor, backend: str) -> int:
    """What the backward pass needs beside the input."""
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        swiglu(x, backend=backend)
    kept.pop(x.untyped_storage().data_ptr(), None)
    return sum(kept.values())


def time_all() -> None:
    speed = bandwidth()
    print(f"copy bandwidth {speed / 1e9:.2f} TB/s; times in ms, {TOKENS:,} tokens")
    print(f"{'':<20}{'forward':>9}{'floors':>8}{'fwd+bwd':>9}{'floors':>8}{'kept MiB':>10}")
    for width in WIDTHS:
        x = torch.randn(TOKENS, 2 * width, device="cuda").bfloat16().requires_grad_()
        d_y = torch.randn(TOKENS, width, device="cuda").bfloat16()
        half = 2 * TOKENS * width  # bytes of gate, up or y
        floors = 3 * half / speed, 8 * half / speed
        found = {}
        for backend in ("triton", "torch"):

            def forward(x=x, backend=backend):
                with torch.no_grad():
                    return swiglu(x, backend=backend)

            def both(x=x, d_y=d_y, backend=backend):
                return torch.autograd.grad(swiglu(x, backend=backend), x, d_y)

            times = found[backend] = graph_ms(forward), graph_ms(both)
            ratios = [time / floor for time, floor in zip(times, floors, strict=True)]
            print(
                f"{f'F {width}, {backend}':<20}{times[0]:>9.3f}{ratios[0]:>8.2f}"
                f"{times[1]:>9.3f}{ratios[1]:>8.2f}{kept_bytes(x, backend) / 2**20:>10.0f}"
            )
        ratios = [a / b for a, b in zip(found["torch"], found["triton"], strict=True)]
        print(f"{'ratio':<20}{ratios[0]:>9.2f}{ratios[1]:>17.2f}", flush=True)


def main() -> None:
    Parser(description=__doc__.split("\n")[0]).parse_args()
    need_gpu()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    if not check_all():
        raise CommandError("the kernels are wrong on this machine; not timed")
    time_all()


if __name__ == "__main__":
    run_script(main)
