"""OpenVINO's devices: which are here, what each computes in, and which a name like AUTO:GPU,CPU stands for.

Only the CPU has been at hand, alone and through AUTO and HETERO: on GPUs and NPUs nothing has been run.
"""

import re
from typing import Any

from darkroom.engines.cpu import processor
from darkroom.engines.runtime import Place
from darkroom.errors import InvalidRequest, near_matches

CPU, GPU, NPU = "CPU", "GPU", "NPU"
OVER_ANY, OVER_NAMED = ("AUTO",), ("HETERO", "MULTI", "BATCH")
"""What runs a network on other devices: on those that it chooses, or on those that are named behind it."""

CAPABILITIES = {"fp32": "FP32", "bf16": "BF16", "fp16": "FP16"}
KEEPS_BLOBS = "EXPORT_IMPORT"

DRIVERS = {GPU: "apt-get install intel-opencl-icd", NPU: "https://github.com/intel/linux-npu-driver/releases"}
"""The command that brings a device's driver, or the address where it is."""


def is_single(device: str) -> bool:
    """Whether the name is that of one device, and not of what runs networks on others."""
    return device.partition(":")[0] not in OVER_ANY + OVER_NAMED


def members(core: Any, device: str) -> list[str]:
    """The devices that a name stands for. Raises `InvalidRequest` for one that is not here."""
    if is_single(device):
        return [_found(core, device, device)]
    kind, _, names = device.partition(":")
    named = [re.sub(r"\(\d+\)$", "", name.strip()) for name in names.split(",") if name.strip()]
    if not named and kind in OVER_NAMED:
        raise InvalidRequest(f"--device {device} needs the devices that it is over, as {kind}:{GPU},{CPU}.")
    left_out = [name[1:] for name in named if name.startswith("-")]
    chosen = [name for name in named if not name.startswith("-")] or core.available_devices
    return [_found(core, name, device) for name in chosen if name not in left_out]


def computes_in(core: Any, devices: list[str]) -> tuple[str, ...]:
    """The precisions that all of these devices have."""
    offered = [core.get_property(device, "OPTIMIZATION_CAPABILITIES") for device in devices]
    return tuple(name for name, capability in CAPABILITIES.items() if all(capability in each for each in offered))


def keeps_blobs(core: Any, device: str) -> bool:
    """Whether what is compiled for a device can be kept in a file."""
    return is_single(device) and KEEPS_BLOBS in core.get_property(device, "OPTIMIZATION_CAPABILITIES")


def described(core: Any, device: str) -> str:
    """A device by kind, name and driver: two that are the same take the same engines, whatever their numbers."""
    if device == CPU:
        return f"{CPU}: {processor()}"
    name = str(core.get_property(device, "FULL_DEVICE_NAME"))
    supported = core.get_property(device, "SUPPORTED_PROPERTIES")
    drivers = [str(core.get_property(device, each)) for each in supported if each.endswith("DRIVER_VERSION")]
    return " ".join([f"{device.partition('.')[0]}: {name}", *(f"(driver {driver})" for driver in drivers)])


def places(core: Any) -> list[Place]:
    """The devices that are here, and why those kinds are not that could be."""
    found = []
    for device in core.available_devices:
        about = f"{described(core, device).partition(': ')[2]}, {' '.join(computes_in(core, [device]))}"
        found.append(Place("--device", device, about))
    for kind in (GPU, NPU):
        if not any(device.partition(".")[0] == kind for device in core.available_devices):
            reason = _why_not(core, kind)
            found.append(Place("--device", kind, "", reason, DRIVERS[kind]))
    return found


def _found(core: Any, name: str, asked: str) -> str:
    """The name of a device that is here."""
    if name == CPU:  # asking for all loads every device's library
        return name
    here = core.available_devices
    # One GPU alone is called GPU, the first of several GPU.0; both names do for either.
    if name in here or f"{name}.0" in here or (name.endswith(".0") and name[:-2] in here):
        return name
    kind = name.partition(".")[0]
    known = [*here, GPU, NPU, *OVER_ANY, *OVER_NAMED]
    if kind not in known:
        raise InvalidRequest(
            f"--device {asked}: {name} is no device that OpenVINO knows.{near_matches(name, known)} "
            f"Here are {', '.join(here)}."
        )
    driver = f"; where the hardware is there, its driver may not be: {DRIVERS[kind]}" if kind in DRIVERS else ""
    reason = f"here are {', '.join(here)}{driver}"
    raise InvalidRequest(f"--device {asked}: OpenVINO finds no {name} on this machine; {reason}")


def _why_not(core: Any, kind: str) -> str:
    """Why there is no device of a kind, in half a sentence: what its plugin lacks, where that is known."""
    try:
        core.get_property(kind, "FULL_DEVICE_NAME")
    except Exception as error:  # RuntimeError, of many lines
        if lacks := re.search(r"(\S+\.(?:so|dll)[.\d]*): cannot open", str(error)):
            return f"OpenVINO finds none, for want of {lacks[1]}"
    return "OpenVINO finds none"
