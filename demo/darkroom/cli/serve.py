"""The main of serve_triton.py: a server from the first request's readiness to a clean end."""

import argparse
import re
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

from darkroom.cli.console import Console
from darkroom.cli.exit import exit_code
from darkroom.cli.parser import Parser, named
from darkroom.cli.settings import home
from darkroom.cli.triton_repository import ENVIRONMENTS, REPOSITORY, environment
from darkroom.errors import Failed, InvalidRequest, near_matches
from darkroom.triton.repository import versions_in
from darkroom.triton.server import Address, Triton, command

PROGRAM = "serve_triton.py"


def parser() -> Parser:
    flags = Parser(
        prog=PROGRAM, allow_abbrev=False, description="Serves a model repository with Triton Inference Server."
    )
    flags.add_argument("--model-repository", type=named, metavar="DIR", help=f"default: {REPOSITORY}")
    flags.add_argument("--model", nargs="+", metavar="NAME", help="the models to load; default: all in the repository")
    flags.add_argument("--host", default=Address.host, metavar="ADDRESS", help=f"default: {Address.host}")
    for name, port in Address().ports().items():
        flags.add_argument(f"--{name}-port", type=int, default=port, metavar="PORT", help=f"default: {port}")
    flags.add_argument(
        "--timeout", type=float, default=600, metavar="SECONDS", help="what loading may take; default 600"
    )
    flags.add_argument(
        "--environment-dir", type=named, metavar="DIR", help=f"the server's environment; default: {ENVIRONMENTS}"
    )
    flags.add_argument("--print", action="store_true", help="print a line that starts the server by hand, and end")
    flags.add_argument("--verbose", action="store_true", help="all that the server prints")
    return flags


def run(arguments: list[str] | None = None) -> int:
    """Runs `serve_triton.py`. Returns the exit code: 0 done, 1 failed, 2 an invalid request."""
    return exit_code(PROGRAM, lambda: _serve(parser().parse_args(arguments)))


def _serve(flags: argparse.Namespace) -> None:
    console = Console(flags.verbose)
    repository = Path(flags.model_repository) if flags.model_repository else home() / REPOSITORY
    if not flags.timeout > 0:  # which a NaN is not either
        raise InvalidRequest(f"--timeout must be more than 0 seconds, not {flags.timeout:g}.")
    models = _models(repository, flags.model)
    address = Address(flags.host, flags.http_port, flags.grpc_port, flags.metrics_port)
    parts = environment(flags.environment_dir, repository, models, console)
    if flags.print:
        line = command(parts.server, parts.backends, repository.absolute(), models, address.flags(), flags.verbose)
        console.result(parts.line(line))
        return
    address.check_free()
    # Both end the server in the same way. What starts this in the background may have them ignored: set anew.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    try:
        show = partial(_show, models, flags.verbose)
        with Triton(parts, repository, models, address, show, flags.verbose, console.warn) as server:
            server.wait_until_ready(flags.timeout)
            console.say(f"serving {', '.join(models)} at http://{address.host}:{address.http}, ")
            console.say(f"gRPC at {address.host}:{address.grpc}, metrics at {address.host}:{address.metrics}/metrics")
            console.say(f'try: python demo/client.py --model {models[0]} --prompt "a red apple" --save-image')
            server.watch(flags.timeout)
    except _Stopped:
        console.say("stopped.")


def _show(models: list[str], everything: bool, line: str) -> None:
    """Prints what the models report of their batches, and Python of faults; everything where that is wanted."""
    words = line.partition("] ")[2]
    fault = line.startswith(("Traceback ", "  File ", "    ")) or re.match(r"[\w.]+(Error|Exception)\b", line)
    if everything or fault or any(words.startswith((f"{model}: ", f'"{model}: ')) for model in models):
        print(line, file=sys.stderr, flush=True)


class _Stopped(BaseException):
    """A signal ends this."""


def _stop(*_: Any) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    raise _Stopped


def _models(repository: Path, asked: list[str] | None) -> list[str]:
    known = versions_in(repository)
    for name in asked or ():
        if name not in known:
            there = f" It has {', '.join(known)}." if known else ""
            raise InvalidRequest(
                f"--model {name!r} is not in {repository}.{near_matches(name, known)}{there} "
                f"Build it: python demo/build_triton_repository.py --model {name}"
            )
    if not known:
        raise Failed(f"{repository} has no models: build_triton_repository.py makes one.")
    return asked or known
