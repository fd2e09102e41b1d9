"""What several test files share: hypothesis settings, and which tests a machine cannot run."""

from __future__ import annotations

import asyncio
import ctypes

import pytest
from hypothesis import HealthCheck, settings

# Without this the first to ask for a loop outside of one is given a new one, which nobody closes; LlamaIndex
# asks (`asyncio_run`). Told that there is none, it makes its own and closes it.
asyncio.set_event_loop(None)

# Machines that run the tests are often busy: time is no reason to fail, and runs must repeat.
settings.register_profile(
    "house", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], max_examples=60
)
settings.load_profile("house")

LEFT_OUT = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak-minutes", default="30", help="how long the tests marked soak run")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the tests marked `gpu` that this machine cannot run: `gpu("torch")` asks for that library.

    Those marked `soak` are deselected, too, unless `-m soak` asks for them.
    """
    if "soak" not in config.option.markexpr:
        soaking = [item for item in items if item.get_closest_marker("soak")]
        items[:] = [item for item in items if item not in soaking]
        config.hook.pytest_deselected(items=soaking)
    reasons: dict[str, str | None] = {}
    left_out: dict[str, list[pytest.Item]] = {}
    for item in items:
        if (mark := item.get_closest_marker("gpu")) is None:
            continue
        library = mark.args[0] if mark.args else "onnxruntime"
        if library not in reasons:
            reasons[library] = why_no_gpu(library)
        if (reason := reasons[library]) is not None:
            left_out.setdefault(reason, []).append(item)
    gone = [item for group in left_out.values() for item in group]
    if gone:
        items[:] = [item for item in items if item not in gone]
        config.hook.pytest_deselected(items=gone)
    config.stash[LEFT_OUT] = [
        f"{len(group)} gpu tests deselected: {reason}" for reason, group in left_out.items()
    ]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for line in terminalreporter.config.stash.get(LEFT_OUT, []):
        terminalreporter.write_line(line)


def why_no_gpu(library: str) -> str | None:
    """Why `library` cannot run on an NVIDIA GPU here; asked only when a test wants one."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "this machine has no NVIDIA driver"
    count = ctypes.c_int(0)
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        return "this machine has no NVIDIA GPU"
    if library == "torch":
        import torch

        return None if torch.cuda.is_available() else f"PyTorch {torch.__version__} cannot use the GPU"
    import onnxruntime

    listed = onnxruntime.get_available_providers()
    if "CUDAExecutionProvider" in listed:
        return None
    return f"this onnxruntime has only {', '.join(listed)}; install onnxruntime-gpu in its place"
