"""Images join and leave a running batch, and each is the one that it would be alone."""

import contextlib
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from darkroom.checkpoint.folder import open_checkpoint
from darkroom.engines import find_runtime
from darkroom.errors import Failed, InvalidRequest
from darkroom.families.family import Traits
from darkroom.pipeline.pipeline import TextEncoder
from darkroom.prepare import Preparer
from darkroom.request import Request
from darkroom.schedule.bundle import Schedule
from darkroom.schedule.table import OUTPUT_WINDOW, SAMPLE_WINDOW, Table
from darkroom.serving.batching import Busy, Lane, Late, Made, StepBatcher, Unwanted, all_of
from darkroom.serving.planning import planned
from darkroom.serving.service import Limits, Plan, Service
from darkroom.store.store import Store
from tests.support import SIZE, Diffusers, Studio, children_inline, psnr, until

SAME_AS_ALONE = 50.0
SAME_AS_DIFFUSERS = 45.0
VISIBLE = 30.0
WAIT = 600.0

STEPS = [(None, 2), (None, 5), ("EulerA", 3), ("EulerA", 7), ("DPM++", 4), ("Heun", 3), ("LCM", 2), ("DDIM", 6)]
SCHEDULES = [Schedule(*each) for each in STEPS]
WIDE = (SIZE, SIZE + 32)

REQUEST = Request(
    model=None,
    prompts=("a red apple",),
    negative_prompt=None,
    batch_size=1,
    batch_count=1,
    height=SIZE,
    width=SIZE,
    denoising_steps=2,
    guidance_scale=7.5,
    clip_skip=0,
    scheduler=None,
    seed=0,
    engine="openvino",
    precision="fp32",
    build="static-batch",
    onnx_opset=17,
)


def plan_of(model: Path, stores: Path, **changes: Any) -> Plan:
    """Engines of the tiny model for two sizes and batches of 1 and 3, with guidance and without."""
    (stores / "engines").mkdir(exist_ok=True)
    engines = Store(stores / "engines")
    request = replace(REQUEST, **changes)
    preparer = Preparer(
        open_checkpoint(model, engines.fingerprints), find_runtime(request.engine), Store(stores / "onnx"), engines
    )
    sizes = [(SIZE, SIZE), WIDE]
    with children_inline():
        limits = Limits(steps=10, images=4, prompt_bytes=200)
        return planned(preparer, request, "demo_txt2img.py", sizes, [1, 3], (True, False), SCHEDULES, limits)


@pytest.fixture(scope="module")
def service(tiny_model: Path, stores: Path) -> Service:
    return Service(plan_of(tiny_model, stores))


@pytest.fixture
def batcher(service: Service) -> Iterator[StepBatcher]:
    made = service.batcher(slots=4, queue=32)
    yield made
    made.close()


def alone(studio: Studio, fields: dict[str, Any]) -> np.ndarray:
    """The picture that the script makes of the same request."""
    names = {"steps": "denoising_steps"}
    values = {names.get(name, name): value for name, value in fields.items() if name != "prompt"}
    return studio.draw(fields["prompt"], **{"denoising_steps": 2} | values).pictures[0]


def random_fields(chance: random.Random) -> dict[str, Any]:
    scheduler, steps = chance.choice(STEPS)
    guidance = chance.choice([0.0, 1.5, 7.5])
    fields = {
        "prompt": chance.choice(["a red apple", "the green cat on the house", "blue dog, noto style"]),
        "seed": chance.choice([0, 7, 2**40 + 3]) + chance.randrange(100),
        "steps": steps,
        "scheduler": scheduler,
        "guidance_scale": guidance,
        "negative_prompt": chance.choice([None, "red"]) if guidance > 1 else None,
        "height": SIZE,
        "width": chance.choice([SIZE, WIDE[1]]),
    }
    return {name: value for name, value in fields.items() if value is not None}


@pytest.mark.parametrize("mix", range(3))
def test_whatever_shares_its_batch_a_picture_is_the_one_made_alone(
    mix: int, batcher: StepBatcher, service: Service, studio: Studio
) -> None:
    chance = random.Random(mix)
    asked, futures = [random_fields(chance) for _ in range(10)], []
    for fields in asked:
        futures += batcher.submit(service.requests(fields))
        time.sleep(chance.choice([0, 0, 0.01, 0.05]))
    made = [future.result(WAIT).pixels for future in futures]
    for picture, fields in zip(made, asked, strict=True):
        assert psnr(picture, alone(studio, fields)) >= SAME_AS_ALONE, fields


def test_pictures_equal_those_of_diffusers(batcher: StepBatcher, service: Service, diffusers_tiny: Diffusers) -> None:
    fields = [
        {"prompt": "a red apple", "seed": 5 + image, "steps": steps, "scheduler": scheduler}
        for image, (scheduler, steps) in enumerate(STEPS)
    ]
    futures = [batcher.submit(service.requests(each))[0] for each in fields]
    for future, each in zip(futures, fields, strict=True):
        (expected,) = diffusers_tiny.draw(
            each["prompt"], seed=each["seed"], scheduler=each["scheduler"], denoising_steps=each["steps"]
        )
        assert psnr(future.result(WAIT).pixels, expected) >= SAME_AS_DIFFUSERS, each


def test_images_of_one_request_have_seeds_that_count_up(batcher: StepBatcher, service: Service, studio: Studio) -> None:
    rows = service.requests({"prompt": "a red apple", "seed": 41}, images=3)
    assert [row.seed for row in rows] == [41, 42, 43]
    pictures = [future.result(WAIT).pixels for future in batcher.submit(rows)]
    assert psnr(pictures[0], pictures[1]) < VISIBLE
    assert psnr(pictures[2], alone(studio, {"prompt": "a red apple", "seed": 43})) >= SAME_AS_ALONE


def test_the_recipe_replays_the_picture(batcher: StepBatcher, service: Service, studio: Studio) -> None:
    from darkroom.pipeline.pictures import save

    (row,) = service.requests({"prompt": "a red apple", "seed": 9, "steps": 3, "scheduler": "EulerA"})
    (future,) = batcher.submit([row])
    studio.output.mkdir()
    path = save(future.result(WAIT).pixels, studio.output, "txt2img", service.recipe(row, future.result()))
    replayed = studio.draw(recipe=path)
    assert psnr(replayed.pictures[0], future.result().pixels) >= SAME_AS_ALONE


@pytest.mark.parametrize(
    "fields,said",
    [
        ({"prompt": ""}, "empty"),
        ({"prompt": 7}, "prompt must be a text, not 7"),
        ({"prompt": "a" * 201}, "201 bytes"),
        ({"prompt": "é" * 101}, "202 bytes"),
        ({"prompt": "a", "steps": 11}, "more than the 10"),
        ({"prompt": "a", "steps": 0}, "steps must be 1 or more"),
        ({"prompt": "a", "steps": 2.5}, "whole number"),
        ({"prompt": "a", "steps": True}, "whole number"),
        ({"prompt": "a", "steps": 9}, "not compiled"),
        ({"prompt": "a", "scheduler": "EulerB"}, "'EulerA'"),
        ({"prompt": "a", "guidance_scale": float("nan")}, "guidance_scale"),
        ({"prompt": "a", "guidance_scale": float("inf")}, "guidance_scale"),
        ({"prompt": "a", "guidance_scale": 1.0, "negative_prompt": "b"}, "negative_prompt"),
        ({"prompt": "a", "height": 32}, "32x64"),
        ({"prompt": "a", "height": -64}, "height"),
        ({"prompt": "a", "seed": -1}, "seed"),
        ({"prompt": "a", "seed": 2**64}, "seed"),
        ({"prompt": "a", "strength": 1}, "'strength'"),
    ],
    ids=str,
)
def test_what_cannot_be_made_is_refused_in_the_names_of_the_fields(
    fields: dict[str, Any], said: str, service: Service
) -> None:
    with pytest.raises(InvalidRequest) as raised:
        service.requests(fields)
    assert said in str(raised.value) and "--" not in str(raised.value)


@pytest.mark.parametrize("images", [0, 5])
def test_a_request_has_as_many_images_as_the_limits_say(images: int, service: Service) -> None:
    with pytest.raises(InvalidRequest, match="num_images must be from 1 to 4"):
        service.requests({"prompt": "a"}, images)


def test_a_plan_that_was_written_down_makes_the_same_pictures(
    service: Service, batcher: StepBatcher, tmp_path: Path
) -> None:
    import json

    root = Path(service.plan.schedules.anchor)
    (tmp_path / "plan.json").write_text(json.dumps(service.plan.as_json(root)))
    read = Plan.read(tmp_path / "plan.json").moved(lambda folder: root / folder.relative_to(tmp_path))
    assert read == service.plan
    second = Service(read).batcher(slots=2, queue=2)
    rows = service.requests({"prompt": "a red apple", "seed": 3})
    (one,), (other,) = batcher.submit(rows), second.submit(rows)
    np.testing.assert_array_equal(one.result(WAIT).pixels, other.result(WAIT).pixels)
    second.close()


def test_damaged_artefacts_are_not_loaded(service: Service, tmp_path: Path) -> None:
    shutil.copytree(service.plan.schedules.parent, tmp_path / "engines")
    plan = service.plan.moved(
        lambda folder: tmp_path / "engines" / folder.name if "engines" in folder.parts else folder
    )
    Service(replace(plan, lanes=plan.lanes[:1]))
    blob = next(plan.lanes[0].denoisers[1].folder.glob("*.blob"))
    content = bytearray(blob.read_bytes())
    content[len(content) // 2] ^= 1
    blob.write_bytes(content)
    with pytest.raises(Failed, match="damaged"):
        Service(plan)


# What follows is about who is served when: engines that compute nothing show it.

TRAITS = Traits("sd", ("clip",), 4, 8)


class Fake:
    """An engine; `gate` holds its calls back, and `calls` are the timesteps it was shown."""

    milliseconds = None

    def __init__(self, answer: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]) -> None:
        self.answer = answer
        self.calls: list[list[float]] = []
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        assert self.gate.wait(WAIT)
        self.calls.append(list(inputs.get("timestep", ())))
        return self.answer(inputs)

    def forget(self) -> None: ...


class Tokens:
    def encode(self, prompts: list[str]) -> Any:
        return type("Encoded", (), {"ids": np.zeros((len(prompts), 77), np.int32)})


def table(steps: int, start: int = 0) -> Table:
    """Timesteps count up from `start`; the network's output changes nothing."""
    ones = np.ones(steps, np.float32)
    newest, none = np.zeros((steps, SAMPLE_WINDOW), np.float32), np.zeros((steps, OUTPUT_WINDOW), np.float32)
    newest[:, 0] = 1
    timesteps = np.arange(start, start + steps, dtype=np.float32)
    return Table(1.0, 0.0, timesteps, ones, newest, none, 0 * ones, ones > 2)


class Place:
    """A batcher over fake engines: each image's timesteps begin at its seed times 100."""

    def __init__(self, slots: int, queue: int = 100, batches: tuple[int, ...] = (1, 2, 4)) -> None:
        self.denoisers = {size: Fake(lambda inputs: {"output": inputs["latents"]}) for size in batches}
        self.text = Fake(lambda inputs: {"text_embeddings": np.zeros((1, 77, 8), np.float32)})
        self.vae = Fake(lambda inputs: {"images": np.random.default_rng(0).normal(size=(1, 3, 16, 16))})
        encoder = TextEncoder(Tokens(), self.text, self.text)
        self.lane = Lane(TRAITS, True, (encoder,), self.denoisers, self.vae)
        self.joined: list[tuple[int, int]] = []
        self.batcher = StepBatcher(
            lambda request: self.lane,
            lambda request: table(request.denoising_steps, 100 * request.seed),
            slots,
            queue,
            on_join=lambda groups, images: self.joined.append((groups, images)),
        )

    def submit(self, *seeds: int, steps: int = 3, **more: Any) -> list[Future[Made]]:
        requests = [replace(REQUEST, height=16, width=16, seed=seed, denoising_steps=steps) for seed in seeds]
        return self.batcher.submit(requests, **more)

    @property
    def turns(self) -> list[set[int]]:
        """The seeds that each call advanced, in order, over all engines."""
        return [{int(time) // 100 for time in call} for engine in self.denoisers.values() for call in engine.calls]


@pytest.fixture
def place() -> Iterator[Callable[..., Place]]:
    made: list[Place] = []

    def make(*arguments: Any, **more: Any) -> Place:
        made.append(Place(*arguments, **more))
        return made[-1]

    yield make
    for each in made:
        for engine in (*each.denoisers.values(), each.vae, each.text):
            engine.gate.set()
        each.batcher.close()


def test_an_image_joins_between_steps_and_leaves_before_the_others(place: Callable[..., Place]) -> None:
    here = place(slots=2, batches=(1, 2))
    here.denoisers[1].gate.clear()
    (long,) = here.submit(1, steps=3000)
    until(lambda: here.batcher.counts().occupied == 1)
    (short,) = here.submit(2, steps=3)
    until(lambda: here.batcher._waiting[0].ready)
    order: list[Future[Made]] = []
    for future in (long, short):
        future.add_done_callback(order.append)
    here.denoisers[1].gate.set()
    here.denoisers[2].gate.set()
    long.result(WAIT)
    assert order == [short, long]
    assert {1, 2} in here.turns and len(here.denoisers[2].calls) == 3
    assert here.batcher.counts().steps == 3003


def test_an_image_joins_as_soon_as_its_text_is_encoded(
    place: Callable[..., Place], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However late the executor calls that done: who is woken before would look again by the clock alone."""
    monkeypatch.setattr("darkroom.serving.batching.SECONDS_BETWEEN_LOOKS", WAIT)
    here = place(slots=1)
    submit = here.batcher._encoder.submit
    monkeypatch.setattr(
        here.batcher._encoder, "submit", lambda work, image: submit(lambda: (work(image), time.sleep(0.2)))
    )
    (future,) = here.submit(1)
    assert future.result(10).pixels.shape == (16, 16, 3)


def test_a_slot_is_filled_again_at_once(place: Callable[..., Place]) -> None:
    here = place(slots=2, batches=(2,))
    here.denoisers[2].gate.clear()
    futures = [future for seed in range(1, 5) for future in here.submit(seed, steps=seed)]
    until(lambda: here.batcher.counts().occupied >= 1 and all(each.ready for each in here.batcher._waiting[:2]))
    here.denoisers[2].gate.set()
    for future in futures:
        future.result(WAIT)
    # Ten steps: the first alone, then two together until only the last is left, with three or four of its own.
    assert here.batcher.counts().steps == 10 and here.batcher.counts().calls <= 8


def test_nobodys_second_image_goes_before_anothers_first(place: Callable[..., Place]) -> None:
    here = place(slots=2, batches=(1, 2))
    here.denoisers[2].gate.clear()
    here.denoisers[1].gate.clear()
    many = here.submit(1, 2, 3, 4, 5, 6, steps=3)
    (single,) = here.submit(9, steps=3)
    order: list[str] = []
    for future in (single, *many):
        future.add_done_callback(lambda done: order.append("single" if done is single else "one of many"))
    # Whose text is not encoded yet is passed by.
    until(lambda: here.batcher.counts().occupied >= 1 and here.batcher._in_turn()[0].ready)
    here.denoisers[2].gate.set()
    here.denoisers[1].gate.set()
    for future in (single, *many):
        future.result(WAIT)
    assert order.index("single") <= 3


def test_a_full_queue_is_said_and_takes_all_of_a_request_or_nothing(place: Callable[..., Place]) -> None:
    here = place(slots=1, queue=3, batches=(1,))
    here.denoisers[1].gate.clear()
    first = here.submit(1)
    until(lambda: here.batcher.counts().occupied == 1)
    waiting = here.submit(2, 3)
    with pytest.raises(Busy, match="2 of 3"):
        here.submit(4, 5)
    waiting += here.submit(6)
    here.denoisers[1].gate.set()
    for future in (*first, *waiting):
        future.result(WAIT)


def test_who_is_late_is_told_whether_waiting_or_running(place: Callable[..., Place]) -> None:
    here = place(slots=1, batches=(1,))
    here.denoisers[1].answer = lambda inputs: time.sleep(0.02) or {"output": inputs["latents"]}
    (running,) = here.submit(1, steps=1000, seconds=0.3)
    (waiting,) = here.submit(2, steps=1000, seconds=0.1)
    (patient,) = here.submit(3, steps=2)
    with pytest.raises(Late, match=r"0\.1 seconds"):
        waiting.result(WAIT)
    with pytest.raises(Late, match=r"0\.3 seconds"):
        running.result(WAIT)
    patient.result(WAIT)


def test_who_goes_away_leaves_the_slot(place: Callable[..., Place]) -> None:
    here = place(slots=1, batches=(1,))
    there = threading.Event()
    there.set()
    here.denoisers[1].gate.clear()
    (gone,) = here.submit(1, steps=10**5, wanted=there.is_set)
    (other,) = here.submit(2)
    until(lambda: here.batcher.counts().occupied == 1)
    there.clear()
    here.denoisers[1].gate.set()
    with pytest.raises(Unwanted):
        gone.result(WAIT)
    other.result(WAIT)


def test_a_picture_that_is_late_by_its_decoding_is_not_handed_out(
    place: Callable[..., Place], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However little: the clock stands still but for the decoder, which takes less than there is between two looks."""
    now = time.perf_counter()
    monkeypatch.setattr("darkroom.serving.batching.time.perf_counter", lambda: now)
    here = place(slots=1, batches=(1,))
    decoded = here.vae.answer

    def take(seconds: float) -> None:
        def answer(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            nonlocal now
            now += seconds
            return decoded(inputs)

        here.vae.answer = answer

    take(0.01)
    here.submit(1, seconds=0.02)[0].result(WAIT)
    take(0.03)
    with pytest.raises(Late, match=r"0\.02 seconds"):
        here.submit(2, seconds=0.02)[0].result(WAIT)


@pytest.mark.parametrize("why", [Late, Unwanted])
def test_what_nobody_waits_for_is_not_decoded(
    why: type[Failed], place: Callable[..., Place], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its time ends, or its client goes, while it waits for another to be decoded."""
    now, there = time.perf_counter(), threading.Event()
    there.set()
    monkeypatch.setattr("darkroom.serving.batching.time.perf_counter", lambda: now)
    here = place(slots=2, batches=(1,))
    here.vae.gate.clear()
    (other,) = here.submit(1)
    until(lambda: here.batcher._decoding == 1)
    (image,) = here.submit(2, seconds=0.02, wanted=there.is_set)
    until(lambda: here.batcher._decoding == 2)
    if why is Late:
        now += 0.03
    else:
        there.clear()
    here.vae.gate.set()
    with pytest.raises(why):
        image.result(WAIT)
    other.result(WAIT)
    until(lambda: here.batcher.counts().finished == 2)
    assert len(here.vae.calls) == 1


def test_a_fault_in_a_call_is_that_of_its_images_alone(place: Callable[..., Place]) -> None:
    here = place(slots=4, batches=(1,))

    def answer(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if 300 <= inputs["timestep"][0] < 400:
            raise RuntimeError("out of luck")
        return {"output": inputs["latents"]}

    here.denoisers[1].answer = answer
    futures = here.submit(1, 2, 3, 4)
    with pytest.raises(Failed, match="RuntimeError: out of luck"):
        futures[2].result(WAIT)
    for index in (0, 1, 3):
        futures[index].result(WAIT)


@pytest.mark.parametrize("picture,said", [(np.nan, "not numbers"), (0.5, "one constant colour")])
def test_a_picture_that_is_none_is_an_error(picture: float, said: str, place: Callable[..., Place]) -> None:
    here = place(slots=1, batches=(1,))
    here.vae.answer = lambda inputs: {"images": np.full((1, 3, 16, 16), picture)}
    with pytest.raises(Failed, match=said):
        here.submit(1)[0].result(WAIT)
    here.vae.answer = lambda inputs: {"images": np.random.default_rng(0).normal(size=(1, 3, 16, 16))}
    here.submit(2)[0].result(WAIT)


def test_a_text_that_cannot_be_encoded_harms_nobody_else(place: Callable[..., Place]) -> None:
    here = place(slots=1, batches=(1,))
    good, here.text.answer = here.text.answer, lambda inputs: 1 / 0
    with pytest.raises(Failed, match="ZeroDivisionError"):
        here.submit(1)[0].result(WAIT)
    here.text.answer = good
    here.submit(2)[0].result(WAIT)


def test_what_is_left_at_the_end_fails_and_nothing_more_is_taken(place: Callable[..., Place]) -> None:
    here = place(slots=1, batches=(1,))
    futures = here.submit(1, 2, 3, steps=10**6)
    until(lambda: here.batcher.counts().occupied == 1)
    here.batcher.close()
    for future in futures:
        with pytest.raises(Failed, match="stopping"):
            future.result(WAIT)
    with pytest.raises(Failed, match="stopping"):
        here.submit(4)


def test_whoever_joins_is_counted_with_the_others(place: Callable[..., Place]) -> None:
    here = place(slots=4)
    for unet in here.denoisers.values():
        unet.gate.clear()
    futures = [*here.submit(1, 2), *here.submit(3)]
    until(lambda: here.batcher.counts().occupied >= 1 and all(each.ready for each in here.batcher._waiting))
    for unet in here.denoisers.values():
        unet.gate.set()
    for future in futures:
        future.result(WAIT)
    assert here.joined[-1] == (2, 3)


@pytest.mark.parametrize(
    "costs,images,expected",
    [
        ({}, 3, [2, 1]),
        ({}, 4, [4]),
        ({}, 7, [4, 2, 1]),
        ({}, 9, [8, 1]),
        ({}, 20, [8, 8, 4]),
        ({1: 10, 2: 11, 4: 12, 8: 13}, 3, [4]),
        ({1: 10, 2: 11, 4: 12, 8: 13}, 5, [8]),
        ({1: 20, 2: 37, 4: 71, 8: 140}, 5, [4, 1]),
        ({1: 50, 2: 11, 4: 12, 8: 13}, 1, [1]),
        ({1: 10, 2: 11, 4: 50, 8: 13}, 3, [4]),
    ],
)
def test_images_are_parted_as_costs_least(costs: dict[int, float], images: int, expected: list[int]) -> None:
    lane = Lane(TRAITS, True, (), dict.fromkeys((1, 2, 4, 8)), None, costs)
    assert lane.parts(images) == expected


@pytest.mark.parametrize(
    "costs,slots,expected",
    [
        ({}, 8, 8),
        ({1: 10, 2: 11, 4: 12, 8: 13}, 8, 8),
        ({1: 10, 2: 11, 4: 12, 8: 13}, 6, 6),
        ({1: 22, 2: 43, 4: 75, 8: 146}, 8, 4),
        ({1: 20, 2: 39, 4: 78, 8: 155}, 8, 2),
        ({1: 20, 2: 39, 4: 78, 8: 155}, 1, 1),
    ],
)
def test_images_share_calls_only_where_that_gains(costs: dict[int, float], slots: int, expected: int) -> None:
    assert Lane(TRAITS, True, (), dict.fromkeys((1, 2, 4, 8)), None, costs).worthwhile(slots) == expected


def test_a_call_that_seemed_long_when_it_was_measured_is_measured_again(service: Service) -> None:
    (request,) = service.requests({"prompt": "red", "steps": 2})
    lane = service.lane_of(request)
    with contextlib.closing(service.batcher(slots=8, queue=8)) as batcher, pytest.MonkeyPatch.context() as patch:
        patch.setattr(lane, "costs", {1: 1e6, 3: 1e9})
        (future,) = batcher.submit([request])
        future.result(WAIT)
        assert lane.costs[1] < 1e6 and lane.costs[3] == 1e9
        assert batcher._worthwhile(lane) == lane.worthwhile(8) == 2
        can_admit = batcher._can_admit
        patch.setattr(batcher, "_can_admit", lambda: all(each.ready for each in batcher._waiting) and can_admit())
        for future in batcher.submit(service.requests({"prompt": "red", "steps": 2}, images=2)):
            future.result(WAIT)
        assert lane.costs[3] < 1e6
        assert batcher._worthwhile(lane) == lane.worthwhile(8)


def test_an_engine_for_any_batch_takes_all() -> None:
    assert Lane(TRAITS, True, (), {None: None}, None).parts(7) == [7]


def test_all_of_is_told_once() -> None:
    told: list[Any] = []
    futures: list[Future[Any]] = [Future() for _ in range(3)]
    all_of(futures, told.append)
    futures[1].set_result("b")
    futures[0].set_result("a")
    assert told == []
    futures[2].set_result("c")
    assert told == [["a", "b", "c"]]
    failing: list[Future[Any]] = [Future() for _ in range(3)]
    all_of(failing, told.append)
    failing[2].set_exception(Failed("no"))
    failing[0].set_result("a")
    failing[1].set_exception(Failed("nor this"))
    assert [str(each) for each in told[1:]] == ["no"]
