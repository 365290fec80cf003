"""Tables of many schedules in one file, also of those that depend on a picture's size."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from darkroom.checkpoint.folder import open_checkpoint
from darkroom.engines import find_runtime
from darkroom.errors import InvalidRequest
from darkroom.prepare import Preparer
from darkroom.request import Request
from darkroom.schedule import Chosen, chosen, schedulers_for, shift_mu
from darkroom.schedule.bundle import Bundle, Schedule
from darkroom.serving.planning import compile_bundle, every_schedule
from darkroom.store.store import Store
from tests.schedule.test_flow_matching import EULER, FLUX, SD3
from tests.support import NOISE_SCHEDULERS, SCHEDULER_CONFIG
from tests.test_request import request

SMALL, LARGE = (512, 512), (1024, 768)


def preparer(own: str, config: dict[str, Any]) -> Any:
    """Of a model whose tokens are 16 pixels along each side."""

    def scheduler(request: Any) -> Chosen:
        tokens = request.height * request.width // 256
        return replace(chosen(request.scheduler, own, config), mu=shift_mu(config, tokens))

    checkpoint = SimpleNamespace(scheduler=lambda name: chosen(name, own, config))
    return SimpleNamespace(checkpoint=checkpoint, scheduler=scheduler)


def request_of(size: tuple[int, int]) -> Request:
    return request(height=size[0], width=size[1])


def test_table_is_that_of_the_pictures_size(tmp_path: Path) -> None:
    sized = [Schedule(None, 3, size) for size in (SMALL, LARGE)]
    model = preparer(EULER, FLUX)
    of = {
        each.group: {"scheduler": model.scheduler(request_of(each.size)).as_json(), "steps": [each.steps]}
        for each in sized
    }
    of["FlowMatchHeun"] = {"scheduler": chosen("FlowMatchHeun", EULER, SD3).as_json(), "steps": [3]}
    compile_bundle(of, tmp_path)
    bundle = Bundle(tmp_path)
    small, large = (bundle.table(each) for each in sized)
    assert not np.array_equal(small.timesteps, large.timesteps)
    assert len(bundle.table(Schedule("FlowMatchHeun", 3, SMALL))) == 5  # of any size
    for missing in (Schedule(None, 3, (768, 768)), Schedule(None, 4, SMALL), Schedule("Euler", 3)):
        with pytest.raises(InvalidRequest, match=f"{missing.steps} steps .* not compiled"):
            bundle.table(missing)


def test_all_schedules_are_those_that_fit_the_model() -> None:
    every = every_schedule(preparer("PNDMScheduler", SCHEDULER_CONFIG), request_of(SMALL), [SMALL, LARGE], 2)
    assert every == [Schedule(name, steps) for name in (None, *NOISE_SCHEDULERS) for steps in (1, 2)]
    flow = every_schedule(preparer(EULER, FLUX), request_of(SMALL), [SMALL, LARGE], 1)
    names = (None, *schedulers_for(EULER, FLUX))
    assert flow == [Schedule(name, 1, size) for name in names for size in (SMALL, LARGE)]


def test_schedulers_that_are_named_must_fit() -> None:
    with pytest.raises(InvalidRequest, match=r"--scheduler Euler .*FlowMatchEuler"):
        every_schedule(preparer(EULER, FLUX), request_of(SMALL), [SMALL], 1, ["Euler"])


def test_key_of_a_schedule_says_how_far_its_size_shifts_it(tiny_model: Path, tmp_path: Path) -> None:
    store = Store(tmp_path)
    model = Preparer(open_checkpoint(tiny_model, store.fingerprints), find_runtime("torch"), store, store)
    plain = model.schedule_key(request())[1].digest
    small, large = (replace(model.scheduler(request()), mu=mu) for mu in (0.5, 1.15))
    digests = {plain}
    for choice in (small, large):
        model.scheduler = lambda _, choice=choice: choice
        digests.add(model.schedule_key(request())[1].digest)
    assert len(digests) == 3
