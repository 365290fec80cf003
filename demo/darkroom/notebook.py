"""Darkroom from Python: `Darkroom("emoji")("a red apple", seed=3)` is a picture.

It is what the server is made of: the same engines, the same batch, the same refusals.
"""

from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from PIL import Image

from darkroom.checkpoint.catalog import TXT2IMG, served
from darkroom.cli.console import Console
from darkroom.cli.from_flags import unnamed
from darkroom.cli.opening import Models
from darkroom.cli.served import Wanted, service_of
from darkroom.cli.settings import Folders, home
from darkroom.contract import AUTO
from darkroom.engines import automatic, find_runtime
from darkroom.engines.runtime import Options
from darkroom.flags import SLOTS
from darkroom.request import Request
from darkroom.schedule.table import Trajectory
from darkroom.serving.batching import Made
from darkroom.serving.service import Limits
from darkroom.web.previews import colours_for, preview


class Darkroom:
    """A model, ready to make pictures. Engines are built when it is made, where they are not there.

    `model` is a name of `--version`, a folder, a hub repository or a single file; `size` (height, width) in pixels and
    `schedulers` are what may be asked for beside the model's own. Raises `darkroom.errors.DarkroomError`, whose text is
    the line that a script would print. `close` ends it, and so does the end of a `with`.
    """

    def __init__(
        self,
        model: str = "emoji",
        *,
        engine: str = "auto",
        precision: str = AUTO,
        size: tuple[int, int] | None = None,
        schedulers: tuple[str, ...] = (),
        slots: int = SLOTS,
        threads: int | None = None,
        onnx_dir: str | Path | None = None,
        engine_dir: str | Path | None = None,
        hf_token: str | None = None,
    ) -> None:
        known = served()
        script, version = known[model] if model in known else (TXT2IMG, unnamed(str(model), TXT2IMG.unnamed))
        engine = automatic(Options()) if engine == "auto" else engine
        wanted = Wanted(slots, Limits.steps, {"precision": precision}, [size] if size else [], schedulers)
        wanted.request(version, engine)  # refused before a model is fetched
        folders = Folders(
            onnx_dir=Path(onnx_dir or home() / "onnx"),
            engine_dir=Path(engine_dir or home() / "engines"),
            framework_model_dir=None,
            hf_token=hf_token,
        )
        models = Models(folders=folders, runtime=find_runtime(engine, Options()), console=Console(quiet=True))
        self.service = service_of(models, script, version, wanted, threads)
        self._colours = colours_for(self.service)  # while nothing else calls its decoder
        self._batcher = self.service.batcher(slots, queue=max(slots, Limits.images))

    def __call__(self, prompt: str, *, images: int = 1, **fields: Any) -> Any:
        """A picture, or a list of them for more `images`: image k has the seed S+k.

        `fields` are those of a row in a file of prompts: seed, steps, guidance_scale, negative_prompt, scheduler,
        height, width. Each picture's `info` has its recipe, under "darkroom".
        """
        requests = self.service.requests({"prompt": prompt} | fields, images)
        futures = self._batcher.submit(requests)
        made = [self._image(future, request) for future, request in zip(futures, requests, strict=True)]
        return made[0] if images == 1 else made

    def stream(self, prompt: str, **fields: Any) -> Iterator[Image.Image]:
        """The picture as it comes up: what it looks like after each step, and at last the picture itself."""
        (request,) = self.service.requests({"prompt": prompt} | fields)
        shown: SimpleQueue[tuple[Trajectory, int] | None] = SimpleQueue()
        wanted = True
        (future,) = self._batcher.submit(
            [request], wanted=lambda: wanted, watches=[lambda trajectory, calls: shown.put((trajectory, calls))]
        )
        future.add_done_callback(lambda _: shown.put(None))
        calls = len(self.service.table_of(request))
        try:
            while (step := shown.get()) is not None:
                if step[1] < calls:
                    yield preview(self._colours, *step, (request.width, request.height))
            yield self._image(future, request)
        finally:
            wanted = False

    def _image(self, future: "Future[Made]", request: Request) -> Image.Image:
        made = future.result()
        image = Image.fromarray(made.pixels)
        image.info["darkroom"] = self.service.recipe(request, made)
        return image

    def close(self) -> None:
        """Ends it: what is being made is not finished."""
        self._batcher.close()

    def __enter__(self) -> "Darkroom":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
