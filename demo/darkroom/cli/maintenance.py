"""`build_engines.py verify` and `clean`: what is in the stores is what it should be, and no more than is wanted."""

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from darkroom.checkpoint.folder import open_checkpoint
from darkroom.cli.artefacts import Row, Runtimes, readable_age, readable_size, rows_of, show, table, total
from darkroom.cli.console import Console
from darkroom.cli.flags import refuse_below
from darkroom.cli.settings import artefact_folders, stores_of
from darkroom.engines.parity import TOLERANCES, run_once
from darkroom.errors import DarkroomError, Failed, InvalidRequest
from darkroom.processes.child import run_in_child
from darkroom.store.manifest import read_manifest
from darkroom.store.store import ASIDE, Store

DAY = 86400.0


def add_maintenance_commands(commands: Any) -> list[argparse.ArgumentParser]:
    verify = commands.add_parser(
        "verify", help="hash every file again, load every engine and hold it against torch", allow_abbrev=False
    )
    verify.add_argument("--hashes-only", action="store_true", help="load nothing")
    clean = commands.add_parser("clean", help="show what is in the way; with --yes delete it", allow_abbrev=False)
    clean.add_argument(
        "--unusable", action="store_true", help="what is damaged, or was built for others than this machine"
    )
    clean.add_argument("--unused", type=float, metavar="DAYS", help="what no run has used for so long")
    clean.add_argument("--older-than", type=float, metavar="DAYS", help="what was made so long ago")
    clean.add_argument(
        "--keep-under", type=float, metavar="GB", help="what was not used for longest, until so much is left"
    )
    clean.add_argument("--all", action="store_true", help="everything")
    clean.add_argument("--yes", action="store_true", help="delete what is shown")
    for command in (verify, clean):
        command.add_argument("name", nargs="*", metavar="NAME", help="only what has this in its name; * stands for any")
    verify.set_defaults(work=_verify)
    clean.set_defaults(work=_clean)
    return [verify, clean]


@dataclass(frozen=True)
class Verdict:
    """What came of an artefact: whether it may be used, what was found, and its difference from torch."""

    name: str
    folder: str
    good: bool
    found: str
    error_against_torch: float | None = None
    damaged: bool = False


def _verify(flags: argparse.Namespace) -> None:
    console = Console(machine=flags.json)
    stores, runtimes = stores_of(artefact_folders(flags), console), Runtimes()
    rows = rows_of(stores, runtimes, flags.name)
    verdicts = []
    with console.job("verifying", len(rows) or None) as advance:
        for row in rows:
            verdicts.append(_verdict(row, _store_of(row, stores), flags.hashes_only))
            advance()
    for store in stores:
        store.fingerprints.remember()
    left = [verdict for verdict in verdicts if verdict.folder.endswith(ASIDE)]
    bad = [verdict for verdict in verdicts if not verdict.good and verdict not in left]
    if flags.json:
        console.result(json.dumps([asdict(verdict) for verdict in verdicts]), failing=bool(bad))
    elif not verdicts:
        console.say("nothing is there yet.")
    else:
        columns = {
            "what": [verdict.name for verdict in verdicts],
            "good": ["yes" if verdict.good else "NO" for verdict in verdicts],
            "found": [verdict.found for verdict in verdicts],
        }
        table(columns, tuple(columns))
    if left:
        console.say(f"{len(left)} of them were set aside as damaged: `clean --unusable --yes` removes them.")
    if bad:
        advice = []
        if any(verdict.damaged for verdict in bad):
            advice.append("a run makes what is damaged again, and `clean --unusable` removes it")
        if whole := [Path(verdict.folder).name for verdict in bad if not verdict.damaged]:
            advice.append(f"a run would use {whole[0]} as it is, until `clean --all {whole[0]} --yes` removes it")
        raise Failed(f"{len(bad)} of {len(verdicts)} are not good; {'; '.join(advice)}.")


def _verdict(row: Row, store: Store, hashes_only: bool) -> Verdict:
    folder = Path(row.folder)
    if row.damaged:
        return Verdict(row.name, row.folder, False, row.unusable or "", damaged=True)
    if damage := store.damage(folder, anew=True):
        return Verdict(row.name, row.folder, False, f"damaged: {damage}", damaged=True)
    if row.kind != "engine" or hashes_only:
        return Verdict(row.name, row.folder, True, "every byte is as it was made")
    if row.unusable:
        return Verdict(row.name, row.folder, True, f"every byte is as it was made; not run: {row.unusable}")
    manifest = read_manifest(folder)
    made, key = manifest["made"], manifest["key"]
    model = _model(made, key, store)
    try:
        error = run_in_child(run_once, row.runtime, made.get("options", {}), made["job"], folder, model)
    except (DarkroomError, RuntimeError) as failure:
        return Verdict(row.name, row.folder, False, f"it does not run: {str(failure).strip().splitlines()[-1]}")
    if error is None:
        return Verdict(
            row.name, row.folder, True, f"it runs; nothing to compare with: {made['model_folder']} has other weights"
        )
    allowed = TOLERANCES[made["job"]["precision"]]
    verdict = "it agrees with torch" if error <= allowed else f"it differs from torch (allowed: {allowed:.0e})"
    return Verdict(row.name, row.folder, error <= allowed, f"{verdict}: {error:.1e}", error)


def _model(made: dict[str, Any], key: dict[str, Any], store: Store) -> Path | None:
    """The folder that an engine's weights came from, if they, its LoRAs and its embeddings are still there."""
    try:
        checkpoint = open_checkpoint(Path(made["model_folder"]), store.fingerprints)
        parts = [network["part"] for network in made["job"]["stage"]["networks"]]
        own = all(checkpoint.digests[part] == key["weights"][part] for part in parts)
        stage = made["job"]["stage"]
        files = (*stage["loras"], *stage.get("inversions", ()))
        there = all(store.fingerprints.sha256(Path(file["path"])) == file["sha256"] for file in files)
    except (DarkroomError, OSError, KeyError, TypeError):
        return None
    return checkpoint.folder if own and there else None


def _clean(flags: argparse.Namespace) -> None:
    console = Console(machine=flags.json)
    refuse_below(flags, unused=0, older_than=0, keep_under=0)
    if not any((flags.unusable, flags.all, flags.unused is not None, flags.older_than is not None)) and (
        flags.keep_under is None
    ):
        raise InvalidRequest(
            "say what is in the way: --unusable, --unused DAYS, --older-than DAYS, --keep-under GB or --all; "
            "nothing is deleted without --yes."
        )
    stores = stores_of(artefact_folders(flags), console)
    runtimes = Runtimes()
    rows = rows_of(stores, runtimes, flags.name)
    every = rows_of(stores, runtimes) if flags.name else rows
    reasons = _reasons(rows, flags)
    doomed = [row for row in rows if row.folder in reasons]
    if not doomed and not flags.json and not flags.yes:
        console.say(f"nothing of the {len(rows)} artefacts here is in the way ({readable_size(total(rows))}).")
        return
    show(doomed, flags, console, {"why": lambda row: reasons[row.folder]})
    if not flags.yes:
        console.say(f"{readable_size(total(doomed))} would be freed, {_left(every, doomed)}: add --yes to delete them.")
        return
    for store in stores:
        store.sweep()
    for row in doomed:
        _store_of(row, stores).remove(Path(row.folder))
    console.say(f"{readable_size(total(doomed))} freed, {_left(every, doomed)}.")


def _store_of(row: Row, stores: tuple[Store, Store]) -> Store:
    return next(store for store in stores if str(store.root) == row.store)


def _left(every: list[Row], doomed: list[Row]) -> str:
    """What all that is in the stores takes without what goes, whichever NAME was given."""
    return f"{readable_size(total(every) - total(doomed))} left"


def _reasons(rows: list[Row], flags: argparse.Namespace) -> dict[str, str]:
    """Why an artefact should go, by its folder."""
    reasons: dict[str, str] = {}
    for row in rows:
        if flags.all:
            reasons[row.folder] = "everything goes"
        elif flags.unusable and row.unusable:
            reasons[row.folder] = row.unusable
        elif flags.unused is not None and row.unused_seconds >= flags.unused * DAY:
            reasons[row.folder] = f"not used for {readable_age(row.unused_seconds)}"
        elif flags.older_than is not None and row.age_seconds >= flags.older_than * DAY:
            reasons[row.folder] = f"made {readable_age(row.age_seconds)} ago"
    if flags.keep_under is not None:
        kept = [row for row in rows if row.folder not in reasons]
        size = total(kept)
        for row in sorted(kept, key=lambda row: (not row.damaged, -row.unused_seconds)):
            if size <= flags.keep_under * 1e9:
                break
            size -= row.bytes
            reasons[row.folder] = f"more than {flags.keep_under:g} GB"
    return reasons
