"""The main of client.py: prompts for a Triton server, the pictures that it makes of them, and how long they took."""

import argparse
import asyncio
import json
from collections import Counter
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from darkroom.cli.console import Console
from darkroom.cli.exit import exit_code, interrupting
from darkroom.cli.flags import add_flags, refuse_below
from darkroom.cli.parser import Parser, named
from darkroom.cli.settings import make_folder, output_folder
from darkroom.errors import Failed, InvalidRequest
from darkroom.flags import CLIENT, OF_ROW, option
from darkroom.triton.album import Album
from darkroom.triton.client import HOST, PORTS, Address, Model, address_of, connected
from darkroom.triton.load import Load, Tally, send
from darkroom.triton.prompts import make_prompt, read_prompts

PROGRAM = "client.py"
MODEL = "stable_diffusion_xl"
PROMPT = "a red apple"
FIELDS = {name: flag.name for name, flag in OF_ROW.items() if name != "prompt"}
"""The inputs of a model that a flag sets, where a prompt does not set them itself, and the flags."""

LONGEST_TIMEOUT = 10**9
"""Seconds: microseconds of it are sent in 64 bits."""

REASONS_SHOWN = 3
PERCENTILES = (50, 95, 99)


def parser() -> Parser:
    parser = Parser(
        prog=PROGRAM,
        allow_abbrev=False,
        description="Asks a Triton server for pictures, with one client or many, and says how fast it answers.",
    )
    server = parser.add_argument_group("the server")
    server.add_argument(
        "--url",
        metavar="HOST:PORT",
        help=f"with or without http:// or grpc://; default: {HOST}:{PORTS['http']}, for gRPC {HOST}:{PORTS['grpc']}",
    )
    server.add_argument("--protocol", choices=tuple(PORTS), help="default: that of --url, or http")
    server.add_argument("--model", default=MODEL, metavar="NAME", help=f"default: {MODEL}")
    load = parser.add_argument_group("the load")
    load.add_argument("--clients", type=int, default=1, metavar="N", help="that send side by side; default 1")
    load.add_argument(
        "--requests",
        type=int,
        metavar="M",
        help="of each client, one after another; default 1, with --prompts-file as many as send every prompt once",
    )
    load.add_argument("--static-batch-size", type=int, default=1, metavar="B", help="prompts in a request; default 1")
    load.add_argument(
        "--timeout",
        type=float,
        metavar="SECONDS",
        help="a deadline for each request, sent to the server, too; default: none",
    )
    picture = parser.add_argument_group("the prompts")
    prompts = picture.add_mutually_exclusive_group()
    prompts.add_argument(
        "--prompt",
        nargs="+",
        action="extend",
        metavar="TEXT",
        help=f"what they should show; several are taken in turn; default: {PROMPT!r}",
    )
    prompts.add_argument(
        "--prompts-file",
        metavar="FILE",
        help="a prompt a line; with .jsonl a JSON object a line: prompt, and for this prompt alone any of "
        f"{', '.join(FIELDS)}",
    )
    add_flags(parser, CLIENT, seed="drawn there")
    picture.add_argument("--steps", dest="denoising_steps", type=int, metavar="N", help="short for --denoising-steps")
    output = parser.add_argument_group("what is kept and printed")
    output.add_argument("--save-image", action="store_true", help="keep the pictures, and print their paths")
    output.add_argument("--output-dir", type=named, metavar="DIR", help="where; default: output")
    talk = output.add_mutually_exclusive_group()
    talk.add_argument("--verbose", action="store_true", help="also each request as it ends")
    talk.add_argument("--quiet", action="store_true", help="only the paths of the pictures")
    output.add_argument("--json", action="store_true", help="one machine-readable result on stdout, the rest on stderr")
    return parser


def run(arguments: list[str] | None = None) -> int:
    """Runs `client.py`. Returns the exit code: 0 done, 1 failed, 2 an invalid request."""
    return exit_code(PROGRAM, lambda: _run(parser().parse_args(arguments)))


def _run(flags: argparse.Namespace) -> None:
    console = Console(flags.verbose, flags.quiet, flags.json)
    if not flags.model:
        raise InvalidRequest("--model is empty: name a model of the server.")
    if flags.output_dir is not None and not flags.save_image:
        raise InvalidRequest("--output-dir has no effect without --save-image.")
    if flags.timeout is not None and not 1e-6 <= flags.timeout <= LONGEST_TIMEOUT:
        raise InvalidRequest(f"--timeout must be above 0 and at most {LONGEST_TIMEOUT} seconds, not {flags.timeout:g}.")
    address, load = address_of(flags.url, flags.protocol), load_of(flags)
    with asyncio.Runner() as runner:
        loop = runner.get_loop()
        sending = loop.create_task(_send(address, load, flags, console))
        with interrupting(lambda: loop.call_soon_threadsafe(sending.cancel) and None):
            try:
                tally = loop.run_until_complete(sending)
            except asyncio.CancelledError:  # before anything was sent
                raise KeyboardInterrupt from None
            _report(tally, load, address, flags, console)
            if tally.stopped:
                raise KeyboardInterrupt
    if tally.unkept:
        raise tally.unkept
    if tally.failures:
        raise Failed(_failure(tally, load))


def load_of(flags: argparse.Namespace) -> Load:
    """What is to be sent. Raises `InvalidRequest` for what cannot be."""
    refuse_below(flags, clients=1, requests=1, static_batch_size=1)
    common = {name: getattr(flags, flag) for name, flag in FIELDS.items() if name != "seed"}
    if flags.prompts_file is not None:
        prompts = read_prompts(Path(flags.prompts_file), common)
    else:
        prompts = tuple(make_prompt(common | {"prompt": text}) for text in flags.prompt or [PROMPT])
    requests = 1 if flags.requests is None and flags.prompts_file is None else flags.requests
    load = Load(prompts, flags.clients, requests, flags.static_batch_size, flags.seed)
    if flags.requests is None and load.rows < len(prompts):
        enough = -(-len(prompts) // (flags.clients * flags.static_batch_size))
        raise InvalidRequest(
            f"--prompt: {load.rows} of the {len(prompts)} would be sent; --requests {enough} sends all of them."
        )
    return load


async def _send(address: Address, load: Load, flags: argparse.Namespace, console: Console) -> Tally:
    output = output_folder(flags.output_dir) if flags.save_image else None
    async with connected(address) as server:
        model = await server.model(flags.model)
        _check_inputs(model, load, flags)
        album = None
        if output is not None:
            album = Album(make_folder(output), model.name)
        with console.job(f"asking {model.name} at {address}", load.total) as progress:

            def tell(index: int, tally: Tally) -> None:
                progress()
                name = f"request {index + 1}"
                if reason := tally.failures.get(index):
                    console.detail(f"{name}: {reason}")
                else:
                    console.detail(f"{name}: {tally.latencies[index]:.2f} ms")

            return await send(server, model, load, flags.timeout, album.keep if album else lambda image: None, tell)


def _check_inputs(model: Model, load: Load, flags: argparse.Namespace) -> None:
    """Raises `InvalidRequest` for what the model does not take."""
    asked = {option(flag): name for name, flag in FIELDS.items() if getattr(flags, flag) is not None}
    asked |= {f"{prompt.place}: {name}": name for prompt in load.prompts for name in prompt.fields}
    for what, name in asked.items():
        if name not in model.inputs:
            raise InvalidRequest(f"{what} has no effect: the model {model.name} has no such input.")


def _report(tally: Tally, load: Load, address: Address, flags: argparse.Namespace, console: Console) -> None:
    console.say(summary(tally, load))
    failing = bool(tally.unkept or tally.failures)
    if flags.json:
        console.result(json.dumps(as_json(tally, load) | {"url": str(address), "model": flags.model}), failing)
        return
    for image in tally.images:
        if image["path"] is not None:
            console.result(image["path"], failing)


def summary(tally: Tally, load: Load) -> str:
    """What people read: counts, how fast pictures came, and how long their requests took, seen from here."""
    made, seconds = len(tally.images), tally.seconds
    lines = [
        f"{tally.ended} of {load.total} requests ended, {len(tally.failures)} of them failed.",
        f"{made} images in {seconds:.2f} s: {made / seconds if seconds else 0:.2f} image/s",
    ]
    if latency := latency_of(tally):
        lines.append("Latency: " + ", ".join(f"{name} {value:.0f} ms" for name, value in latency.items()))
    return "\n".join(lines)


def latency_of(tally: Tally) -> dict[str, float]:
    """The mean of the requests' milliseconds, and percentiles; empty without answers."""
    if not tally.latencies:
        return {}
    values = list(tally.latencies.values())
    percentiles = np.percentile(values, PERCENTILES).tolist()
    return {"mean": fmean(values)} | {f"p{each}": value for each, value in zip(PERCENTILES, percentiles, strict=True)}


def as_json(tally: Tally, load: Load) -> dict[str, Any]:
    """The same for programs."""
    return {
        "clients": load.clients,
        "static_batch_size": load.batch_size,
        "requests": load.total,
        "answered": len(tally.latencies),
        "failed": len(tally.failures),
        "seconds": tally.seconds,
        "images_per_second": len(tally.images) / tally.seconds if tally.seconds else 0.0,
        "latency": latency_of(tally),
        "latencies": [tally.latencies[index] for index in sorted(tally.latencies)],
        "failures": [{"request": index + 1, "message": tally.failures[index]} for index in sorted(tally.failures)],
        "images": tally.images,
    }


def _failure(tally: Tally, load: Load) -> str:
    """How many requests failed and why: in one line where all failed alike, else in one for each of the first few."""
    reasons = Counter(reason.rstrip(".") for reason in tally.failures.values()).most_common()
    counted = f"{len(tally.failures)} of {load.total} requests failed"
    if len(reasons) == 1:
        return f"{counted}: {reasons[0][0]}."
    lines = [f"  {count} x {reason}" for reason, count in reasons[:REASONS_SHOWN]]
    if len(reasons) > REASONS_SHOWN:
        lines.append(f"  and {sum(count for _, count in reasons[REASONS_SHOWN:])} for other reasons")
    return "\n".join([f"{counted}:", *lines])
