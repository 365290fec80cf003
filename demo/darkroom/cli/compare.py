"""`benchmark.py compare`: Darkroom beside what a user would take instead."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from darkroom.bench.architectures import ARCHITECTURES, MODELS, family_of, pixels_of, write_model
from darkroom.bench.cell import Cell
from darkroom.bench.peers import DEFAULT_PEERS, PEERS, REFERENCES, entrant_of, write_noise
from darkroom.bench.turns import Entrant, folder_of
from darkroom.bench.worker import preparer_of
from darkroom.checkpoint.catalog import SCRIPTS, TXT2IMG, Version
from darkroom.cli.console import Console
from darkroom.cli.parser import named
from darkroom.cli.settings import home
from darkroom.cli.sweep import Show, Sweep, check_baseline
from darkroom.errors import Failed, InvalidRequest, check_known

RESULTS = "comparison.jsonl"
TURBO = "turbo"
"""What is in the names of architectures that are run in one step without guidance."""


def add_compare_flags(compare: argparse.ArgumentParser) -> None:
    """The flags of a comparison alone."""
    those = f"whom to compare with: any of {', '.join(PEERS)}; default: all in float32"
    models = f"published architectures with random weights: any of {', '.join(MODELS)}"
    kept = "the peers' environments and models; default: .peers"
    here = "run peers in this environment, not in one of their own"
    loaded = "one process for all batch sizes and steps, of those that take them"
    compare.add_argument("--peer", nargs="+", metavar="NAME", help=those)
    compare.add_argument("--full-size", nargs="+", metavar="NAME", help=models)
    compare.add_argument("--peer-dir", type=named, metavar="DIR", help=kept)
    compare.add_argument("--peers-here", action="store_true", help=here)
    compare.add_argument("--keep-loaded", action="store_true", help=loaded)


class Comparison:
    """A race with peers. Pictures are kept in folders of `pictures`, and compared with the `reference`'s, if any.

    Raises `InvalidRequest` for what cannot be compared.
    """

    def __init__(self, flags: argparse.Namespace, console: Console) -> None:
        self.flags = flags
        for name in flags.peer or ():
            check_known("--peer", name, PEERS)
        self.peers = [PEERS[name] for name in flags.peer or DEFAULT_PEERS]
        self.folder = Path(flags.peer_dir).absolute() if flags.peer_dir else home() / ".peers"
        if flags.threads and len(flags.threads) > 1:
            raise InvalidRequest("--threads takes one number in a comparison: that of all who take part.")
        converts = any(peer.exporter for peer in self.peers)
        if flags.keep_loaded and converts:
            raise InvalidRequest("--keep-loaded has no effect with peers that convert models: take diffusers alone.")
        if flags.keep_loaded and flags.cold_starts:
            raise InvalidRequest("--keep-loaded needs --cold-starts 0: a cold start is of one batch size.")
        for name in flags.full_size or ():
            check_known("--full-size", name, ARCHITECTURES)
            if family_of(name) not in TXT2IMG.families and converts:
                raise InvalidRequest(f"--full-size {name}: SDXL's are compared with diffusers alone, by --peer.")
        self.sweep = Sweep(flags, console)
        names = [peer.name for peer in self.peers]
        ours = [f"Darkroom ({runtime.name} {precision})" for runtime, precision in self.sweep.pairs]
        check_baseline(flags.baseline, [*ours, *names])
        self.reference = next((name for name in REFERENCES if name in names), None)
        if self.reference is None:
            console.warn(f"no pictures are checked: {REFERENCES[0]}, whose they are compared with, takes no part.")
        self.pictures = flags.output.absolute().with_name(f"{flags.output.stem}-pictures")

    def run(self) -> None:
        """Measures all who take part, and says how they stand."""
        for name in self.flags.full_size or ():
            with self.sweep.console.job(f"writing {name} with random weights"):
                self.sweep.asked.append(self._full_size(name))
        self.sweep.measure(self)

    def _full_size(self, name: str) -> Version:
        """A requested architecture, written where it is not there yet."""
        from safetensors import SafetensorError

        folder = self.folder / "models" / name
        try:
            write_model(name, folder)
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            raise Failed(f"{folder} cannot be written ({reason}); --peer-dir names another.") from None
        unnamed = next(script for script in SCRIPTS.values() if family_of(name) in script.families).unnamed
        few = {"steps": 1, "guidance_scale": 0.0} if TURBO in name else {}
        return replace(unnamed, name=name, source=str(folder), size=pixels_of(name), embedded=True, **few)

    def others(self, cells: list[Cell], show: Show) -> list[Entrant]:
        """Those that take part in the work of these cells, which share a process."""
        cell = cells[0]
        factor = preparer_of(cell).checkpoint.vae_factor
        noise = write_noise(cell, factor, self.pictures / folder_of(cell.settings()) / "noise.npy")
        options: dict[str, Any] = {"compile": self.flags.torch_inference} if self.flags.torch_inference else {}
        here = self.flags.peers_here
        return [entrant_of(peer, cells, self.folder, noise, here, show, options) for peer in self.peers]
