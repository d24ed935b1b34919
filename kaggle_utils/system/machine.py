"""The devices and the memory of this machine."""

import ctypes
import sys
import warnings
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4

# Where a container's control group tells its limit, what is used, and which statistic holds the cached files that make
# room when needed: cgroup v2, and v1.
_GROUPS = (
    ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def find_devices() -> tuple[str, ...]:
    """Return every CUDA device by its torch name, or ("cpu",). One that cannot compute is left out, with a warning."""
    found = []
    for device in _list_gpus():
        if fault := _find_fault(device):
            warnings.warn(f"{fault}; going on without it", stacklevel=2)
        else:
            found.append(device)
    return tuple(found) or ("cpu",)


def check_devices(devices: Iterable[str]) -> None:
    """Raise ValueError, naming the choices, for a device that this machine does not have, and saying why for a GPU that
    cannot compute."""
    known = ["cpu", *_list_gpus()]
    unknown = [device for device in devices if device not in known]
    if unknown:
        raise ValueError(f"unknown device {', '.join(unknown)}; this machine has {', '.join(known)}")
    if faults := [fault for device in devices if device != "cpu" and (fault := _find_fault(device))]:
        raise ValueError("; ".join(faults))


def _list_gpus() -> list[str]:
    import torch

    return [f"cuda:{index}" for index in range(torch.cuda.device_count())]


def _find_fault(device: str) -> str:
    """Return in words why a GPU cannot compute, empty where it can. Try one sum: torch reports an unsupported GPU only
    when it is used."""
    import torch

    try:
        torch.ones(1, device=device).add(1).item()
    except RuntimeError as error:
        name = torch.cuda.get_device_name(device)
        if "no kernel image" in str(error):
            kinds = ", ".join(torch.cuda.get_arch_list())
            return (
                f"{device} ({name}) cannot be used: this torch ({torch.__version__}) is made for GPUs of the kinds "
                f"{kinds}. On Kaggle choose the accelerator GPU T4 x2; elsewhere install a torch that is made for yours"
            )
        return f"{device} ({name}) cannot be used: {str(error).partition(chr(10))[0]}"
    return ""


def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory for the next allocation of this process. Without glibc nothing is done.

    By default glibc maps every block above 32 MB (at first 128 kB) anew, and unmaps it when it is freed. So each
    activation and gradient of a 3D network is mapped, zeroed page by page and unmapped again, and on the CPU a training
    step or a forward pass takes nearly twice as long."""
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def find_free_memory(device: str) -> int:
    """Return how many bytes a torch device has for this process: free ones, and freed ones that this process keeps.
    Where the system does not say, it is a cautious 4 GiB.

    A container may have less memory than its machine, which is read here from its control group."""
    if device.startswith("cuda"):
        import torch

        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    free, whole = [4 * 2**30], []
    with suppress(OSError, KeyError):
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        amounts = {name: int(amount) * 1024 for name, amount, *_ in map(str.split, lines)}
        free, whole = [amounts["MemAvailable:"]], [amounts["MemTotal:"]]
    for group, *names, cached_files in _GROUPS:
        with suppress(OSError, ValueError):  # where there is no limit, it is "max" (v2) or huge (v1)
            limit, used = (int(Path(group, name).read_text(encoding="utf-8")) for name in names)
            lines = Path(group, "memory.stat").read_text(encoding="utf-8").splitlines()
            free.append(limit - used + int(dict(line.split() for line in lines).get(cached_files, 0)))
            whole.append(limit)
    # What glibc keeps but never touched is free to the system, too: counted twice, it may pass the whole.
    return min([max(0, min(free)) + _count_held(), *whole])


def _count_held() -> int:
    """Return how many freed bytes glibc keeps: the eighth number of its mallinfo2. Without glibc it is 0."""

    class Information(ctypes.Structure):
        _fields_ = [(f"number_{index}", ctypes.c_size_t) for index in range(10)]

    mallinfo2 = getattr(ctypes.CDLL(None), "mallinfo2", None) if sys.platform == "linux" else None
    if mallinfo2 is None:
        return 0
    mallinfo2.restype = Information
    return mallinfo2().number_8
