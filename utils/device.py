"""Devices, precision and seeds."""

import contextlib
import ctypes
import os
import platform
import sys
from pathlib import Path

import torch

from utils.cli import UserError, first_line


def select_device(name: str | None, cu_num: int) -> tuple[torch.device, str]:
    """The device to run on, and a line that says so; a CPU is tuned for the process (`tune_cpu`).

    `name` (cpu, cuda, cuda:1, mps, ...) wins; without it the device is cuda:<cu_num>, or the CPU if there is no GPU.
    Raises UserError for a device that this machine does not have.
    """
    kind = None
    if name is None:
        if torch.cuda.is_available():
            name = f"cuda:{cu_num}"
        else:
            name, kind = "cpu", "no CUDA GPU found"
    try:
        probe = torch.zeros(1, device=name)
        probe.item()  # some devices hold no values, such as meta
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r} cannot be used here: {first_line(error)}") from None
    device = probe.device  # with its number, even for a bare "cuda"
    if device.type == "cuda":
        torch.cuda.set_device(device)  # streams, graphs and libraries follow the current device
        torch.backends.cudnn.allow_tf32 = False  # float32 convolutions in float32, as in the published code
        kind = torch.cuda.get_device_name(device)
    elif device.type == "cpu":
        tune_cpu()
    return device, f"device: {device} ({kind or device.type})"


def machine(device: torch.device) -> str:
    """The hardware, for records: the GPU; or the processor, with the numbers of its generation, and the threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    first = cpuinfo.read_text().split("\n\n")[0].splitlines() if cpuinfo.exists() else []
    facts = {key.strip(): value.strip() for key, colon, value in (line.partition(":") for line in first) if colon}
    name = facts.get("model name") or platform.processor() or platform.machine()
    if {"cpu family", "model"} <= facts.keys():
        name += f" (family {facts['cpu family']}, model {facts['model']})"
    return f"{name}, {torch.get_num_threads()} threads"


def bf16_is_fast(device: torch.device) -> bool:
    """Whether the device computes in bfloat16 natively."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return False


def resolve_precision(precision: str, device: torch.device) -> str:
    """The precision to use, fp32 or bf16: "auto" becomes bf16 on a device where that is fast."""
    if precision == "auto":
        return "bf16" if bf16_is_fast(device) else "fp32"
    return precision


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """Context of the forward pass: bfloat16 autocast for "bf16" (parameters stay float32), no change for "fp32"."""
    if precision == "bf16":
        return torch.autocast(device.type, torch.bfloat16)
    return contextlib.nullcontext()


def set_deterministic() -> None:
    """Makes torch use deterministic algorithms only; ops without one raise RuntimeError."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def tune_cpu() -> None:
    """Settings of this process that make a CPU faster; the numbers stay the same to rounding.

    Denormal numbers are flushed to zero: PSG brings weights ever nearer to zero, and some CPUs then take twice as long
    for a convolution. glibc's allocator keeps large freed blocks for the next step and does not return them to the
    kernel: otherwise a training step faults thousands of pages in again (a tenth of its time for ResNet-32).
    """
    torch.set_flush_denormal(True)
    if sys.platform != "linux":
        return
    trim_threshold, mmap_threshold = -1, -3  # parameter numbers of mallopt(3)
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        if libc.mallopt(mmap_threshold, 1 << 30):  # some versions refuse it, and the other alone does harm
            libc.mallopt(trim_threshold, 2**31 - 1)
