"""A model made ready to be asked for pictures one by one: engines and schedules, built where they are not there."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from darkroom.checkpoint.catalog import Script, Version
from darkroom.cli.from_flags import PROVISIONAL_SIZE, make_request
from darkroom.cli.opening import Models, refuse_inpainting
from darkroom.request import Request
from darkroom.serving.planning import batches_for, every_schedule, planned
from darkroom.serving.service import Limits, Service


@dataclass(frozen=True)
class Wanted:
    """What requests may ask for: images at a time, steps at most, sizes (height, width) with the default first, empty
    for the model's own, and schedulers, None for all that fit. `values` are flags of the request by their names."""

    slots: int
    steps: int
    values: dict[str, Any]
    sizes: Sequence[tuple[int, int]] = ()
    schedulers: Sequence[str] | None = None

    def request(self, version: Version, engine: str, own: int = PROVISIONAL_SIZE) -> Request:
        """What a request is by default; `own` is the model's size. Raises `InvalidRequest`, as a script would."""
        return make_request(self.values, version, self.sizes[0] if self.sizes else (own, own), engine=engine)


def service_of(models: Models, script: Script, version: Version, wanted: Wanted, threads: int | None) -> Service:
    """The model's engines, loaded. Raises `InvalidRequest` and `Failed` as a script does."""
    preparer = models.preparer(version)
    refuse_inpainting(preparer, script)
    own = version.size or preparer.checkpoint.default_size
    request = wanted.request(version, models.runtime.name, own)
    sizes = list(dict.fromkeys([(request.height, request.width), *wanted.sizes]))
    plan = planned(
        preparer,
        request,
        script.program,
        sizes,
        batches_for(preparer, wanted.slots),
        (preparer.traits.guided(request),),
        every_schedule(preparer, request, sizes, wanted.steps, wanted.schedulers),
        Limits(steps=wanted.steps),
        from_image=True,
    )
    return Service(plan, threads, preparer.table)
