"""Accelerators by name: peaks, memory and links of one GPU, from ``accelerators.yaml``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from megatron_chatflow.errors import ConfigError
from megatron_chatflow.utils.user_files import closest, load_yaml

_FILE = Path(__file__).with_name("accelerators.yaml")


@dataclass(frozen=True)
class Accelerator:
    """One GPU and its links; bandwidths in bytes/s and one direction."""

    name: str
    systems: tuple[str, ...]
    """Names of machines with this GPU, which are accepted in place of `name`."""
    peaks: Mapping[str, float]
    """{number format: FLOP/s of dense products}; the formats are fp32, bf16, fp8 and fp4."""
    memory_gib: float
    memory_bandwidth: float
    nvlink_bandwidth: float
    nvlink_gpus: int
    """GPUs of one NVLink domain."""
    network_bandwidth: float
    """To other domains, per GPU."""

    def group_bandwidth(self, size: int, stride: int) -> float:
        """Return the bytes/s of one member of a ring over `size` ranks that are `stride` apart.

        A group across several NVLink domains leaves each domain through the network ports of all
        its members there.
        """
        if size * stride <= self.nvlink_gpus:
            return self.nvlink_bandwidth
        inside = min(size, max(1, self.nvlink_gpus // stride))
        return min(self.nvlink_bandwidth, inside * self.network_bandwidth)


@cache
def accelerators() -> dict[str, Accelerator]:
    """Return {name: accelerator} of the data file."""
    return {
        name: Accelerator(
            name=name,
            systems=tuple(entry["systems"]),
            peaks={key: 1e12 * value for key, value in entry["peak_tflops"].items()},
            memory_gib=entry["memory_gib"],
            memory_bandwidth=1e9 * entry["memory_gb_per_s"],
            nvlink_bandwidth=1e9 * entry["nvlink_gb_per_s"],
            nvlink_gpus=entry["nvlink_gpus"],
            network_bandwidth=1e9 * entry["network_gb_per_s"],
        )
        for name, entry in load_yaml(_FILE.read_text(encoding="utf-8")).items()
    }


def find_accelerator(name: str) -> Accelerator:
    """Return the accelerator of that name, or of the machine of that name; case does not matter.

    Raises:
        ConfigError: it is not known; the message suggests the most similar name and lists all.
    """
    known = accelerators()
    names = {
        alias.lower(): accelerator
        for accelerator in known.values()
        for alias in (accelerator.name, *accelerator.systems)
    }
    if name.lower() in names:
        return names[name.lower()]
    near = closest(name.lower(), names, cutoff=0.5)
    meant = f"did you mean {names[near].name}? " if near else ""
    raise ConfigError(
        f"accelerator: {name!r} is unknown; {meant}the known ones are {', '.join(known)}"
    )
