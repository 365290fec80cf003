"""What --dry-run prints: what would be fetched, exported and built, the disk it takes, and the memory of each."""

import json
import os
from collections.abc import Iterable
from pathlib import Path

from darkroom.checkpoint.hub import LORA_FILES, NETWORK_FILES, is_offline, on_disk, repository_of, to_fetch
from darkroom.cli.artefacts import readable_size, table
from darkroom.cli.console import Console
from darkroom.cli.settings import Folders
from darkroom.forecast import MARGIN, Planned, existing, free_space, refuse_what_cannot_fit

LATER = "what it needs is known then"


def first_of_all(
    models: Iterable[str],
    folders: Folders,
    vae: str | None = None,
    loras: Iterable[str] = (),
    controlnets: Iterable[str] = (),
) -> list[Planned]:
    """What has to be fetched or unpacked before anything else can be known: the names of models that do not ship with
    Darkroom, of a VAE, of LoRAs and of ControlNets."""
    planned = []
    others: list[tuple[str, list[str] | None]] = [(vae, NETWORK_FILES)] if vae else []
    others += [(source, LORA_FILES) for source in loras]
    others += [(source, NETWORK_FILES) for source in controlnets]
    # What is on disk of these is found when they are opened, and offline mode reported.
    others = [(source, files) for source, files in others if repository_of(source) and not is_offline()]
    for source, files in [*((source, None) for source in models), *others]:
        if os.path.isfile(source):
            planned.append(Planned(source, None, remark=f"to be unpacked first; {LATER}"))
        elif repository_of(source) and (files or not on_disk(source, folders.framework_model_dir)):
            planned += _to_fetch(source, files, folders)
    return planned


def _to_fetch(repository: str, patterns: list[str] | None, folders: Folders) -> list[Planned]:
    if is_offline():
        remark = "to be fetched first, which offline mode (HF_HUB_OFFLINE) forbids"
        return [Planned(repository, None, remark=remark)]
    from huggingface_hub.constants import HF_HUB_CACHE

    place = folders.framework_model_dir or Path(HF_HUB_CACHE)
    files = to_fetch(repository, folders.hf_token, folders.framework_model_dir, patterns)
    remark = f"to be fetched first; {LATER}"
    return [Planned(f"{repository}/{name}", None, place, size, remark=remark) for name, size in files.items()]


def show_plan(planned: list[Planned], machine: bool, console: Console) -> None:
    """Prints the plan. Raises `InvalidRequest` where it cannot fit."""
    plan = list(dict.fromkeys(planned))
    if machine:
        console.result(json.dumps([each.as_json() for each in plan]))
    else:
        columns = {
            "what": [each.what for each in plan],
            "there": ["yes" if each.folder else "no" for each in plan],
            "disk": [_size(each.disk) for each in plan],
            "memory to make": [_size(each.make) for each in plan],
            "to run": [_size(each.run) for each in plan],
            "": [each.remark for each in plan],
        }
        columns = {title: cells for title, cells in columns.items() if any(cells)}
        table(columns, tuple(columns))
        missing = sum(each.folder is None for each in plan)
        console.say(f"{len(plan) - missing} are there, {missing} would be made. Nothing was changed.")
        for place in dict.fromkeys(existing(each.place) for each in plan if each.place and each.disk):
            taken = sum(each.disk or 0 for each in plan if each.place and existing(each.place) == place)
            console.say(
                f"disk: about {readable_size(taken)} more in {place}, where {readable_size(free_space(place))} are free"
            )
        if any(each.make or each.run for each in plan):
            console.say(f"memory is forecast to about {MARGIN:.0%}, of each process by itself")
    refuse_what_cannot_fit(plan)


def _size(count: int | None) -> str:
    return "" if count is None else readable_size(count)
