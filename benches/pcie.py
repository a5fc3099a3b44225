"""How fast one large copy between pinned host memory and the device is: what others are measured by."""

from __future__ import annotations

NBYTES = 1 << 30
REPEATS = 5


def pinned_copy_gb_per_s() -> dict[str, float]:
    """The better of a few copies in each direction."""
    import torch

    host = torch.empty(NBYTES, dtype=torch.uint8, pin_memory=True)
    device = torch.empty(NBYTES, dtype=torch.uint8, device="cuda")
    rates = {}
    for name, target, source in (("to_device", device, host), ("to_host", host, device)):
        times = []
        for _ in range(REPEATS):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            target.copy_(source, non_blocking=True)
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        rates[name] = NBYTES / min(times) / 1e6
    return rates
