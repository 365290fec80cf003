"""`build_engines.py doctor`: what this machine can run, what it cannot and why, and what would change that."""

import argparse
import json
import os
import shutil
from dataclasses import asdict, dataclass
from typing import Any

from darkroom.bench.machine import machine
from darkroom.cli.artefacts import readable_size, table
from darkroom.cli.console import Console
from darkroom.cli.settings import home
from darkroom.engines import NVIDIA_DEVICES, RUNTIMES, automatic, find_runtime
from darkroom.engines.runtime import Place
from darkroom.errors import DarkroomError
from darkroom.store.store import Store

BUILD_ELSEWHERE = "python demo/build_engines.py build --engine {name} builds here for a machine that has one"


@dataclass(frozen=True)
class Finding:
    """A runtime on this machine: whether it makes pictures here, in what precisions and at which places, or why not
    and what helps."""

    engine: str
    usable: bool
    version: str | None
    device: str | None
    precisions: tuple[str, ...]
    why_not: str | None
    command: str | None
    chosen: bool
    places: tuple[Place, ...] = ()
    tried: tuple[str, ...] = ()
    """The precisions that --precision auto holds against float32."""


def add_doctor_command(commands: Any) -> argparse.ArgumentParser:
    doctor = commands.add_parser("doctor", help="which engines this machine can use, and why not", allow_abbrev=False)
    doctor.add_argument("--json", action="store_true", help="for programs: one JSON value on stdout")
    doctor.set_defaults(work=_doctor)
    return doctor


def findings() -> list[Finding]:
    """Every runtime that Darkroom knows."""
    best = automatic()
    return [_finding(name, name == best) for name in RUNTIMES]


def _finding(name: str, chosen: bool) -> Finding:
    listed = RUNTIMES[name]
    try:
        runtime = find_runtime(name)
        version, device, precisions = runtime.version(), runtime.device(), runtime.precisions()
        places, tried = tuple(runtime.places()), runtime.native()
    except DarkroomError as error:
        return Finding(name, False, None, None, (), str(error).rstrip("."), listed.remedy(str(error)), False)
    except Exception as error:  # an install that is broken in whatever way is a finding, not the end of the list
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'it cannot be imported'}"
        return Finding(name, False, None, None, (), reason, listed.install, False)
    if reason := runtime.unusable():
        command = "; ".join(filter(None, [listed.tool(reason), BUILD_ELSEWHERE.format(name=name)]))
        return Finding(name, False, version, device, precisions, reason.split("; ")[-1], command, False)
    return Finding(name, True, version, device, precisions, None, None, chosen, places, tried)


def _taken(found: Finding) -> str:
    """What auto makes of a runtime's precisions."""
    if not found.usable or not found.precisions:
        return ""
    plain = [each for each in found.precisions if each not in found.tried] or [found.precisions[0]]
    return f"{plain[0]}, or {' or '.join(found.tried)} where measured to be faster" if found.tried else plain[0]


def _doctor(flags: argparse.Namespace) -> None:
    console = Console(machine=flags.json)
    found = findings()
    here = machine() | {
        "free_disk_bytes": shutil.disk_usage(home()).free,
        "nvidia_driver": any(os.path.exists(device) for device in NVIDIA_DEVICES),
    }
    if flags.json:
        console.result(json.dumps({"machine": here, "engines": [asdict(each) for each in found]}))
        return
    memory, disk = readable_size(here["memory_bytes"]), readable_size(here["free_disk_bytes"])
    driver = "an NVIDIA driver" if here["nvidia_driver"] else "no NVIDIA driver"
    console.say(f"{here['processor']}, {here['cores']} cores, {memory} of memory, {disk} of disk free, {driver}")
    console.say(f"{here['system']}, Python {here['python']}\n")
    columns = {
        "--engine": [each.engine for each in found],
        "here": ["yes, and what auto takes" if each.chosen else "yes" if each.usable else "no" for each in found],
        "version": [each.version or "" for each in found],
        "precisions": [" ".join(each.precisions) for each in found],
        "--precision auto": [_taken(each) for each in found],
    }
    table(columns, ("--engine", "here", "precisions", "--precision auto"))
    for _, manifest in Store(home() / "engines").manifests():
        if manifest["key"].get("kind") == "choice":
            made = manifest["made"]
            console.say(f"\n{manifest['label']}: {made['chosen']}\n    {made['why']}")
    for each in found:
        if not each.usable:
            console.say(f"\n{each.engine}: {each.why_not}.\n    {each.command}")
        if each.places:
            console.say(f"\n{each.engine}, by {each.places[0].flag}:")
        for place in each.places:
            console.say(f"    {place.name}: {f'no, {place.why_not}' if place.why_not else place.about or 'yes'}")
            if place.command:
                console.say(f"        {place.command}")
