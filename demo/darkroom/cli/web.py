"""The main of serve.py: models made ready, and served over HTTP until a signal ends it."""

import argparse
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from darkroom.checkpoint.catalog import TXT2IMG, Script, Version, find_version, served
from darkroom.cli.console import Console
from darkroom.cli.exit import exit_code
from darkroom.cli.flags import add_flags, refuse_below, refuse_wrong
from darkroom.cli.from_flags import unnamed
from darkroom.cli.opening import Models as Opened
from darkroom.cli.parser import Parser
from darkroom.cli.served import Wanted, service_of
from darkroom.cli.settings import artefact_folders, bounds_of, make_folder, options_of, output_folder
from darkroom.engines import automatic, find_runtime
from darkroom.errors import Failed, InvalidRequest, check_known
from darkroom.flags import SLOTS, WEB
from darkroom.prepare import BATCHES
from darkroom.schedule import SCHEDULERS
from darkroom.serving.service import Limits

PROGRAM = "serve.py"
HOST, PORT = "127.0.0.1", 8188
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
KEY_VARIABLE = "DARKROOM_API_KEY"
QUEUE = 64
DRAIN = 30.0


def parser() -> Parser:
    flags = Parser(
        prog=PROGRAM,
        allow_abbrev=False,
        description="Serves pictures: a page to make them on, OpenAI's images API, and AUTOMATIC1111's.",
    )
    known = served()
    embedded = [name for name, (_, version) in known.items() if version.embedded]
    server = flags.add_argument_group("the server")
    server.add_argument("--host", default=HOST, metavar="ADDRESS", help=f"default: {HOST}, this machine alone")
    server.add_argument("--port", type=int, default=PORT, metavar="PORT", help=f"default: {PORT}")
    server.add_argument(
        "--api-key", metavar="KEY", help=f"what clients have to send; default: ${KEY_VARIABLE}; needed beyond {HOST}"
    )
    server.add_argument(
        "--allow-host", nargs="+", metavar="NAME", help="names that this machine may be called by, beside localhost"
    )
    asked = flags.add_argument_group("what requests may ask for")
    asked.add_argument("--schedulers", nargs="+", metavar="NAME", help="default: all that fit the model")
    asked.add_argument("--max-steps", type=int, default=Limits.steps, metavar="N", help=f"default {Limits.steps}")
    server.add_argument("--slots", type=int, default=SLOTS, metavar="N", help=f"images at a time; default {SLOTS}")
    server.add_argument("--queue", type=int, default=QUEUE, metavar="N", help=f"images that may wait; default {QUEUE}")
    server.add_argument(
        "--drain", type=float, default=DRAIN, metavar="SECONDS", help=f"that running pictures get at the end; {DRAIN:g}"
    )
    add_flags(flags, WEB, versions=", ".join(known), version=", ".join(embedded))
    flags.set_defaults(engine="auto", version=None, model=None)
    return flags


def run(arguments: list[str] | None = None) -> int:
    """Runs `serve.py`. Returns the exit code: 0 done, 1 failed, 2 an invalid request."""
    return exit_code(PROGRAM, lambda: _serve(parser().parse_args(arguments)))


def _serve(flags: argparse.Namespace) -> None:
    console = Console(flags.verbose)
    refuse_below(flags, slots=1, queue=1, drain=0, max_steps=1)
    refuse_wrong(flags, "threads", "precision", "onnx_opset")
    for name in flags.schedulers or ():
        check_known("--schedulers", name, SCHEDULERS)
    if not 0 < flags.port < 65536:
        raise InvalidRequest(f"--port must be from 1 to 65535, not {flags.port}.")
    key = flags.api_key if flags.api_key is not None else os.environ.get(KEY_VARIABLE) or None
    if key is not None and not (key.isascii() and key.isprintable() and key.strip() == key and key):
        raise InvalidRequest("--api-key must be letters, digits and signs, without spaces around.")
    if key is None and flags.host not in (*LOOPBACK, "::1"):
        raise InvalidRequest(
            f"--host {flags.host} is open to others: give them a key with --api-key or ${KEY_VARIABLE}."
        )
    folder = make_folder(output_folder(flags.output_dir))
    _check_free(flags)
    models = _models(flags, folder, console)
    _run_server(flags, models, key, console)


def _asked_models(flags: argparse.Namespace) -> Iterator[tuple[str, Script, Version]]:
    """The name that each model is served by, the script that replays its pictures, and the model."""
    known = served()
    for name in flags.version or ():
        find_version(name, {each: version for each, (_, version) in known.items()})
        yield name, *known[name]
    for source in flags.model or ():
        version = unnamed(source, TXT2IMG.unnamed)
        yield version.name or Path(source).resolve().name, TXT2IMG, version
    if not flags.version and not flags.model:
        yield from ((name, *known[name]) for name in known if known[name][1].embedded)


def _models(flags: argparse.Namespace, folder: Path, console: Console) -> Any:
    """All of them with their engines, built where they are not there."""
    from darkroom.web.models import Model, Models

    options = options_of(flags)
    engine = automatic(options) if flags.engine == "auto" else flags.engine
    values = {name: getattr(flags, name) for name in ("precision", "onnx_opset")}
    wanted = Wanted(flags.slots, flags.max_steps, values, flags.size or (), flags.schedulers)
    asked: dict[str, tuple[Script, Version]] = {}
    for name, script, version in _asked_models(flags):
        if name in asked:
            raise InvalidRequest(f"two models are called {name}: rename one's folder, or serve one of them.")
        asked[name] = script, version
        wanted.request(version, engine)  # refused before a model is fetched
    opened = Opened(
        folders=artefact_folders(flags),
        runtime=find_runtime(engine, options),
        console=console,
        batches=bounds_of(flags, "dynamic_batches") or (BATCHES[0], BATCHES[1], max(flags.slots, BATCHES[1])),
        pixels=bounds_of(flags, "dynamic_sizes"),
    )
    made = []
    for name, (script, version) in asked.items():
        service = service_of(opened, script, version, wanted, flags.threads)
        made.append(Model(name, service, flags.slots, flags.queue, folder, script.pipeline))
    return Models(made)


def _check_free(flags: argparse.Namespace) -> None:
    """Raises `Failed` for an address that cannot be had, before anything is built."""
    import socket

    family = socket.AF_INET6 if ":" in flags.host else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((flags.host, flags.port))
    except OSError as error:
        raise Failed(
            f"{flags.host}:{flags.port} cannot be listened at ({error.strerror}): pass another --port."
        ) from None


def _run_server(flags: argparse.Namespace, models: Any, key: str | None, console: Console) -> None:
    """Serves until SIGINT or SIGTERM; pictures that are being made get some time, and what is not done then fails."""
    import uvicorn

    from darkroom.web.app import application

    hosts = ["*"] if key is not None and flags.host not in LOOPBACK else [*LOOPBACK, *(flags.allow_host or ())]
    app = application(models, hosts, key)
    config = uvicorn.Config(
        app,
        host=flags.host,
        port=flags.port,
        log_level="info" if flags.verbose else "warning",
        server_header=False,
        timeout_graceful_shutdown=int(flags.drain) + 5,
    )
    server = uvicorn.Server(config)
    app.state.stopping = lambda: server.should_exit

    def end_after_a_while() -> None:
        while not server.should_exit:
            ended.wait(0.1)
            if ended.is_set():
                return
        if not ended.wait(flags.drain):
            models.close()

    ended = threading.Event()
    watch = threading.Thread(target=end_after_a_while, daemon=True)
    watch.start()
    console.say(f"serving {', '.join(models)} at http://{flags.host}:{flags.port}")
    try:
        server.run()
    except KeyboardInterrupt:
        pass
    finally:
        ended.set()
        watch.join()
        models.close()
    console.say("stopped.")
