"""Opens the runtime and the models that flags name."""

import argparse
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from darkroom.checkpoint.catalog import INPAINT, MOVED, Script, Version
from darkroom.checkpoint.combined import INDEX, combined
from darkroom.checkpoint.controlnet import KIND, check_controlnet, controlnet_folder
from darkroom.checkpoint.folder import open_checkpoint
from darkroom.checkpoint.hub import fetch, fetch_network, on_disk, repository_of
from darkroom.checkpoint.other_vae import check_vae, vae_folder
from darkroom.checkpoint.single_file import check_single_file, published_config, unpacked
from darkroom.cli.console import Console
from darkroom.cli.flags import given
from darkroom.cli.from_flags import refuse_build_flags
from darkroom.cli.settings import Folders, Settings
from darkroom.engines import automatic, find_runtime, options_for
from darkroom.engines.runtime import RECORDED, Options, Runtime, asked_as
from darkroom.errors import InvalidRequest
from darkroom.families import family_of
from darkroom.files import read_json
from darkroom.flags import option
from darkroom.prepare import BATCHES, Preparer, offers
from darkroom.store.store import Store


@dataclass(frozen=True, kw_only=True)
class Models:
    """Opens models of some `families`, or of all, each with the `vae` and the `controlnets` that go into all, for one
    runtime.

    `batches` and `pixels` bound what engines leave free. `stores` are those that are open already, by their folders.
    """

    folders: Folders
    runtime: Runtime
    console: Console
    families: tuple[str, ...] | None = None
    batches: tuple[int, int, int] = BATCHES
    pixels: tuple[int, int, int] | None = None
    threads: int | None = None
    vae: str | None = None
    controlnets: tuple[str, ...] = ()
    stores: dict[Path, Store] = field(default_factory=dict)

    def preparer(
        self,
        version: Version,
        onnx_dir: Path | None = None,
        engine_dir: Path | None = None,
        config: str | None = None,
    ) -> Preparer:
        """What compiles a model; it is fetched where it is not there, and checked."""
        folders, console = self.folders, self.console
        graphs, engines = (
            self.stores.setdefault(folder, Store(folder, console.warn))
            for folder in (onnx_dir or folders.onnx_dir, engine_dir or folders.engine_dir)
        )
        folder = open_model(version, config, folders, graphs, console, self.families, self.vae is not None)
        if self.vae is not None:
            vae = vae_folder(_open_vae(self.vae, folders, console), folder, graphs, console.verbose)
            folder = combined(folder, {"vae": vae}, {}, graphs, "other-vae")
        # A folder of no family is refused when it is opened.
        if self.controlnets and (family := family_of(read_json(folder / INDEX))):
            room = len(family.controlnets)
            if len(self.controlnets) > room:
                raise InvalidRequest(f"--controlnet: this model takes at most {room}, not {len(self.controlnets)}.")
            opened = [_open_controlnet(each, folders, console) for each in self.controlnets]
            unet = read_json(folder / family.denoiser / "config.json")
            found = [controlnet_folder(each, unet, graphs, console.verbose) for each in opened]
            parts = dict(zip(family.controlnets, found, strict=False))
            kinds = {part: ["diffusers", KIND] for part in parts}
            folder = combined(folder, parts, kinds, graphs, "controlled")
        return Preparer(
            open_checkpoint(folder, engines.fingerprints, self.families),
            self.runtime,
            graphs,
            engines,
            name=version.name,
            threads=self.threads,
            batches=self.batches,
            pixels=self.pixels,
            verbose=console.verbose,
            job=console.job,
            detail=console.detail,
        )


def models_of(
    script: Script,
    settings: Settings,
    runtime: Runtime,
    vae: str | None,
    console: Console,
    controlnets: tuple[str, ...] = (),
) -> Models:
    """What opens the models of a script that makes pictures."""
    return Models(
        families=script.families,
        folders=settings,
        runtime=runtime,
        console=console,
        batches=settings.dynamic_batches,
        pixels=settings.dynamic_sizes,
        threads=settings.threads,
        vae=vae,
        controlnets=controlnets,
    )


def runtime_of(
    flags: argparse.Namespace, recipe: dict[str, Any] | None, engine: str, settings: Settings, console: Console
) -> Runtime:
    """The runtime that is meant. Refuses flags that it has no use for."""
    options = settings.options
    if recipe:
        recorded = {name: recipe[name] for name in RECORDED if isinstance(recipe.get(name), str)}
        options = replace(options, quantization=recipe.get("quantization"), **recorded)
    runtime = _runtime(recipe["request"]["engine"] if recipe else engine, options, console)
    refuse_bounds(flags, [recipe["request"]["build"] if recipe else flags.build], runtime)
    if settings.threads and not runtime.threaded:
        raise InvalidRequest(f"--threads has no effect with {asked_as(runtime)}.")
    if recipe is None:
        refuse_build_flags(flags, runtime)
    return runtime


def precision_asked(flags: argparse.Namespace, engine: str, runtime: Runtime, console: Console) -> str | None:
    """What `--precision` says, or `--bf16` in its place; None without either. A line from a tutorial still makes its
    picture where the engine of this machine computes in no bfloat16."""
    if flags.precision is not None or not given(flags, "bf16"):
        return flags.precision
    if engine == "auto" and not offers(runtime, "bf16"):
        console.warn(f"--bf16 does nothing here: {runtime.name} computes in {' and '.join(runtime.precisions())}.")
        return None
    return "bf16"


def refuse_inpainting(preparer: Preparer, script: Script) -> None:
    """Raises `InvalidRequest` for a model that has to be given a mask, in a script without one."""
    if preparer.traits.inpaints and not script.inpaints:
        raise InvalidRequest(
            f"{preparer.name} is an inpainting model: its UNet takes a picture and a mask beside the latents. "
            f"{INPAINT.program} runs it, with --input-image and --mask-image."
        )


def say_what_ships(version: Version, flags: argparse.Namespace, script: Script, console: Console) -> None:
    """Reports that a small model runs, where flags name none."""
    if version.embedded and not (flags.version or flags.model):
        console.say(f"model: {version.name}, which ships with Darkroom; a real one: --version {script.real}")


def _runtime(engine: str, options: Options, console: Console) -> Runtime:
    """The runtime that is meant. A line from a tutorial still makes its picture where there is no NVIDIA GPU."""
    if engine == "auto":
        engine = automatic(options)
        others, whose = (["openvino"], "other engines") if engine == "tensorrt" else (["tensorrt"], "NVIDIA GPUs")
        fitting = options_for(engine, options, others)
        for name in options.asked():
            if name not in fitting.asked():
                console.warn(f"{option(name)} does nothing here: it is for {whose}, and the engine is {engine}.")
        options = fitting
    return find_runtime(engine, options)


def refuse_bounds(flags: argparse.Namespace, builds: list[str | None], runtime: Runtime) -> None:
    """Raises `InvalidRequest` for bounds of free sizes where nothing is free, or free means any."""
    for name, free in (("dynamic_batches", ("dynamic-batch", "dynamic-shape")), ("dynamic_sizes", ("dynamic-shape",))):
        if getattr(flags, name) is None:
            continue
        flag = option(name)
        if not runtime.bounded:
            raise InvalidRequest(f"{flag} has no effect with --engine {runtime.name}, whose free sizes are any.")
        if not set(builds) & set(free):
            raise InvalidRequest(f"{flag} has no effect without {' or '.join(f'--build-{each}' for each in free)}.")


def open_model(
    version: Version,
    config: str | None,
    settings: Folders,
    graphs: Store,
    console: Console,
    families: tuple[str, ...] | None = None,
    other_vae: bool = False,
) -> Path:
    """The model's folder: fetched from the hub, or unpacked from a single file, where it is not one already.

    `config` names the configuration of a single file, None for the published one; a file that is of none of the
    `families`, by their names, is refused before anything is fetched.
    """

    def fetched(repository: str, weights: bool, typed: bool) -> Path:
        there = MOVED.get(repository)
        if there and on_disk(repository, settings.framework_model_dir, weights) is None:
            console.say(f"{repository} is gone from the hub: the same model is {there}")
            repository = there
        with console.job(f"fetching {repository}"):
            return fetch(repository, settings.hf_token, settings.framework_model_dir, weights, typed)

    if not version.embedded:
        return fetched(version.source, weights=True, typed=version.name == version.source)
    if not os.path.isfile(version.source):
        return Path(version.source)
    file = Path(version.source)
    check_single_file(file)
    typed = config is not None
    if config is None:
        # Two models of one architecture may differ in their configurations alone.
        config = published_config(file, families)
        console.say(f"{file.name}: taken for a model like {config}; --config names another")
    described = fetched(config, weights=False, typed=typed) if repository_of(config) else Path(config)
    with console.job(f"unpacking {file.name}"):
        return unpacked(file, described, graphs, other_vae, verbose=console.verbose)


def _open_controlnet(source: str, settings: Folders, console: Console) -> Path:
    if repository := repository_of(source):
        with console.job(f"fetching {repository}"):
            folder = fetch_network(repository, settings.hf_token, settings.framework_model_dir, "--controlnet")
        return check_controlnet(folder)
    return check_controlnet(Path(source))


def _open_vae(source: str, settings: Folders, console: Console) -> Path:
    if repository := repository_of(source):
        with console.job(f"fetching {repository}"):
            return check_vae(fetch_network(repository, settings.hf_token, settings.framework_model_dir, "--vae"))
    return check_vae(Path(source))
