"""The Triton backend of `meta_linear_attention` against float64, for every kernel configuration."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch

from tests.gpu.operator_sweep import CASES, Case, Errors, measure_group

# Limits of medians over random draws: in bfloat16, and in all dtypes as a multiple of the error of
# chunked PyTorch whose products take operands of the same dtype.
BFLOAT16_LIMIT, RATIO_LIMIT = 1e-2, 1.5
PROCESSES = min(8, os.cpu_count() or 1)


@pytest.fixture(scope="module")
def measured(request) -> Callable[[Case], Errors]:
    """Function: the errors of a case.

    Several processes measure all selected cases in parallel. One process takes all cases of a
    kernel configuration, to compile it once. Under pytest-xdist, its workers do this instead.
    """
    if "PYTEST_XDIST_WORKER" in os.environ:
        yield lambda case: measure_group([case])[0]
        return
    groups: dict[tuple, list[Case]] = {}
    for item in request.session.items:
        case = getattr(item, "callspec", None) and item.callspec.params.get("case")
        if isinstance(case, Case):
            groups.setdefault(case[:3], []).append(case)
    with ProcessPoolExecutor(PROCESSES, mp_context=get_context("spawn")) as pool:
        futures = {key: pool.submit(measure_group, cases) for key, cases in groups.items()}
        yield lambda case: futures[case[:3]].result()[groups[case[:3]].index(case)]
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.usefixtures("nan_in_new_memory")
def test_equals_float64(case, measured):
    found = measured(case)
    if found.failure:
        pytest.fail(found.failure, pytrace=False)
    print(
        f"error {found.median:.1e} (worst draw {found.worst:.1e}), "
        f"{found.ratio:4.2f} times chunked PyTorch's at most"
    )
    assert found.bits_equal
    assert found.ratio <= RATIO_LIMIT  # false if there is a NaN in any draw
    if case.dtype == torch.bfloat16:
        assert found.median <= BFLOAT16_LIMIT
