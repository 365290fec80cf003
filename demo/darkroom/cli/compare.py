"""`benchmark.py compare`: Darkroom beside what a user would take instead."""

import argparse
from pathlib import Path

from darkroom.bench.architectures import MODELS, write_model
from darkroom.bench.comparison import REFERENCE, add_likeness, other, ourselves, write_noise
from darkroom.bench.machine import machine
from darkroom.bench.peers import PEERS, Peer
from darkroom.bench.results import row_of
from darkroom.bench.sweep import append, check_writable, groups_of, line_of, take_turns
from darkroom.bench.worker import preparer_of
from darkroom.checkpoint.catalog import TXT2IMG, Version
from darkroom.cli.console import Console
from darkroom.cli.parser import named
from darkroom.cli.settings import home
from darkroom.cli.sweeping import Sweep, check_baseline, cold_command, say_line, say_results, title
from darkroom.errors import Failed, InvalidRequest, near_matches

RESULTS = "comparison.jsonl"
TURBO = ("turbo",)
"""What is in the names of architectures that are run in one step without guidance."""


def add_compare_flags(compare: argparse.ArgumentParser) -> None:
    """What only a comparison asks."""
    compare.add_argument(
        "--peer", nargs="+", metavar="NAME", help=f"whom to compare with: any of {', '.join(PEERS)}; default: all"
    )
    compare.add_argument(
        "--full-size",
        nargs="+",
        metavar="NAME",
        help=f"published architectures with random weights: any of {', '.join(MODELS)}",
    )
    compare.add_argument(
        "--peer-dir", type=named, metavar="DIR", help="the peers' environments and models; default: .peers"
    )
    compare.add_argument(
        "--output", type=named, metavar="FILE", help=f"results, a line each; default: output/{RESULTS}"
    )


def full_size_models(flags: argparse.Namespace, folder: Path, console: Console) -> list[Version]:
    """The architectures that are asked for, written where they are not there yet."""
    found = []
    for name in flags.full_size or ():
        if name not in MODELS:
            near = near_matches(name, list(MODELS))
            raise InvalidRequest(f"--full-size {name!r} is not known here.{near} Known: {', '.join(MODELS)}.")
        if "text_encoder_2" in MODELS[name]:
            raise InvalidRequest(f"--full-size {name}: comparisons are of Stable Diffusion's pipeline, not of SDXL's.")
    for name in flags.full_size or ():
        with console.job(f"writing {name} with random weights"):
            source = _written(name, folder / "models" / name)
        few = any(word in name for word in TURBO)
        size = MODELS[name]["unet"]["sample_size"] * 8
        steps, guidance = (1, 0.0) if few else (TXT2IMG.unnamed.steps, TXT2IMG.unnamed.guidance_scale)
        found.append(Version(name, str(source), size, steps=steps, guidance_scale=guidance, embedded=True))
    return found


def _written(name: str, folder: Path) -> Path:
    from safetensors import SafetensorError

    try:
        return write_model(name, folder)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise Failed(f"{folder} cannot be written ({reason}); --peer-dir names another.") from None


def compare(flags: argparse.Namespace, console: Console) -> None:
    """Measures Darkroom and its peers, group by group, and says how they stand."""
    peers = _peers(flags.peer)
    file = Path(flags.output) if flags.output else home() / "output" / RESULTS
    if flags.threads and len(flags.threads) > 1:
        raise InvalidRequest("--threads takes one number in a comparison: that of all who take part.")
    peer_dir = Path(flags.peer_dir).absolute() if flags.peer_dir else home() / ".peers"
    sweep = Sweep(flags, console)
    check_writable(file)
    ours = [f"Darkroom ({runtime.name} {precision})" for runtime, precision in sweep.pairs]
    check_baseline(flags.baseline, [*ours, *(peer.name for peer in peers)])
    if not any(peer.name == REFERENCE for peer in peers):
        console.warn(f"pictures are compared with those of {REFERENCE}, which takes no part: nobody's are checked.")
    sweep.asked += full_size_models(flags, peer_dir, console)
    place, here, lines = sweep.place, machine(), []
    for group in groups_of(sweep.cells()):
        cell = group[0]
        work = f"{cell.version}-b{cell.batch_size}-{cell.denoising_steps}-{cell.height}x{cell.width}"
        pictures = file.absolute().with_name(f"{file.stem}-pictures") / work
        entrants = []
        for own in group:
            preparer = preparer_of(own, place, job=console.job, detail=console.detail, verbose=flags.verbose)
            facts = sweep.built(own, preparer)
            cold = cold_command(own, preparer.checkpoint.family, place) if flags.cold_starts else None
            entrants.append(ourselves(own, place, cold, facts))
        noise = write_noise(cell, preparer.checkpoint.vae_factor, pictures / "noise.npy")
        sweep.release()
        with console.job(title(cell)) as line:
            for peer in peers:
                entrants.append(other(peer, cell, peer_dir, noise, bool(flags.cold_starts), line.show))
            # The reference goes first: the others' lines are written as they end, and say how like its pictures are.
            entrants.sort(key=lambda each: each.label != REFERENCE)
            expected: list[str] = []
            for each, found in take_turns(entrants, flags.cold_starts, line.show, pictures):
                if each.label == REFERENCE:
                    expected = found.get("pictures", [])
                else:
                    add_likeness(found, expected)
                lines.append(line_of(each, found, here, flags.price_per_hour))
                append(file, lines[-1])
                say_line(lines[-1], each.name, console)
    say_results([row_of(line) for line in lines], flags, console)
    console.result(str(file))
    if failed := dict.fromkeys(line["contender"] for line in lines if line["error"] is not None):
        raise Failed(f"not all could be measured: {', '.join(failed)}.")


def _peers(names: list[str] | None) -> list[Peer]:
    for name in names or ():
        if name not in PEERS:
            raise InvalidRequest(
                f"--peer {name!r} is not known here.{near_matches(name, list(PEERS))} Known: {', '.join(PEERS)}."
            )
    return [PEERS[name] for name in names or PEERS]
