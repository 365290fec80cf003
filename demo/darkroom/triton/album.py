"""The folder that answered pictures are kept in."""

from itertools import count
from pathlib import Path

from darkroom.errors import Failed
from darkroom.files import write_whole
from darkroom.pipeline.pictures import encoded, file_name, save
from darkroom.triton.answers import ENCODED, Image, NoAnswer

SUFFIXES = {b"\x89PNG\r\n\x1a\n": ".png", b"\xff\xd8\xff": ".jpg"}
"""What the files of an `encoded_image` begin with, and what they are named."""


class Album:
    """Keeps a model's pictures in `folder`, which is there."""

    def __init__(self, folder: Path, model: str) -> None:
        self._folder = folder
        self._model = model
        self._numbers = count(1)

    def keep(self, image: Image) -> Path:
        """Writes a picture and returns its path.

        Pixels with a recipe are named and written as the scripts do it, so that --recipe remakes them; anything else
        is MODEL-N, under the next number that is free. Raises `NoAnswer` for a recipe or a file that is none, `Failed`
        where the picture cannot be written.
        """
        if image.pixels is not None and image.recipe is not None:
            return self._save(image)
        data = encoded(image.pixels, "png", None) if image.encoded is None else image.encoded
        suffix = next((suffix for begin, suffix in SUFFIXES.items() if data.startswith(begin)), None)
        if suffix is None:
            raise NoAnswer(f"the server answered an {ENCODED} that is no PNG or JPEG: it begins with {data[:8]!r}")
        path = self._taken(suffix)
        try:
            return write_whole(path, data)
        except Failed:
            path.unlink(missing_ok=True)
            raise

    def _save(self, image: Image) -> Path:
        try:
            name = file_name(self._model, image.recipe)
            if Path(name).name != name:  # a server does not decide where its pictures go
                raise ValueError(f"it names the file {name!r}")
            return save(image.pixels, self._folder, self._model, image.recipe)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            why = f"{type(error).__name__}: {error}"
        raise NoAnswer(f"the server answered a recipe that cannot be kept ({why})")

    def _taken(self, suffix: str) -> Path:
        """The path under the next number that is free: an empty file, so that no other process takes it."""
        while True:
            path = self._folder / f"{self._model}-{next(self._numbers)}{suffix}"
            if not any(path.with_suffix(each).exists() for each in SUFFIXES.values()):
                try:
                    path.touch(exist_ok=False)
                    return path
                except FileExistsError:
                    pass
                except OSError as error:
                    raise Failed(f"{path} cannot be written: {error.strerror or error}.") from None
