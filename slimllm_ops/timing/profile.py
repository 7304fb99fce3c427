"""Says where the time of a prompt's pass goes: matrix products with weights, the attention, and the rest."""

from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile

PRODUCTS, ATTENTION, REST = "products with weights", "attention", "the rest"
# Operators by a part of their name, as torch's profiler tells them.
KINDS = {
    "attention": ATTENTION,
    "bmm": ATTENTION,
    "softmax": ATTENTION,
    "addmm": PRODUCTS,
    "aten::mm": PRODUCTS,
    "mkldnn": PRODUCTS,
    "mkl_linear": PRODUCTS,
    "grouped_mm": PRODUCTS,
    "gemm": PRODUCTS,
}


def profile_call(call: Callable[[], Any], on_gpu: bool) -> dict[str, float]:
    """Return the seconds of a call's operators by kind; the profiler itself makes the rest slower."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        call()
    seconds = dict.fromkeys((PRODUCTS, ATTENTION, REST), 0.0)
    for event in profiler.key_averages():
        # The GPU's own rows repeat what the operators that started them have.
        if event.device_type.name != "CPU":
            continue
        spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        seconds[kind_of(event.key)] += spent / 1e6
    return seconds


def kind_of(operator: str) -> str:
    """Return the kind of an operator."""
    return next((kind for part, kind in KINDS.items() if part in operator), REST)
