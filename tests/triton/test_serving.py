"""Models served by the real Triton: pictures, refusals, faults, and what is left when it is over."""

import contextlib
import functools
import io
import json
import os
import queue
import random
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from PIL import Image

from darkroom.pipeline.pictures import read_recipe
from darkroom.triton.environment import Installed
from darkroom.triton.server import SHARED, STUB, Address, Triton
from tests import support
from tests.support import ROOT, Studio, children_inline, flags, free_ports, psnr
from tests.triton import malformed

SAME_AS_ALONE = 50.0
VISIBLE = 30.0
WAIT = 600.0
until = functools.partial(support.until, within=WAIT)
STEPS = 6
BACK_OFF = 0.2
"""Seconds that a client waits when the server is full or starting again, before it asks again."""
SECONDS_BETWEEN_REPORTS = 0.2
"""As darkroom.triton.model has it, which can be imported inside Triton alone."""

KINDS = {
    "prompt": ("BYTES", np.object_),
    "negative_prompt": ("BYTES", np.object_),
    "scheduler": ("BYTES", np.object_),
    "seed": ("UINT64", np.uint64),
    "steps": ("INT32", np.int32),
    "guidance_scale": ("FP32", np.float32),
    "height": ("INT32", np.int32),
    "width": ("INT32", np.int32),
    "num_images": ("INT32", np.int32),
}


def build(*arguments: str, **values: Any) -> tuple[int, str, str]:
    """Runs build_triton_repository.py in this process."""
    from darkroom.cli.triton_repository import run

    out, err = io.StringIO(), io.StringIO()
    with children_inline(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("darkroom.serving.planning.run_in_child", lambda function, *args, verbose: function(*args))
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = run([*arguments, *flags(**values)])
    return code, out.getvalue(), err.getvalue()


@dataclass
class Served:
    """A server with `tiny`, `tiny_xl`, and an ensemble around the first."""

    repository: Path
    address: Address
    server: Triton
    log: list[str] = field(default_factory=list)
    told: list[str] = field(default_factory=list)

    def client(self, protocol: str) -> Any:
        if protocol == "grpc":
            return tritonclient.grpc.InferenceServerClient(f"127.0.0.1:{self.address.grpc}")
        return tritonclient.http.InferenceServerClient(
            f"127.0.0.1:{self.address.http}", network_timeout=WAIT, connection_timeout=WAIT
        )

    def ask(self, protocol: str = "http", model: str = "tiny", **fields: Any) -> dict[str, np.ndarray]:
        """What a model answers; a list for a field is a row each."""
        client = self.client(protocol)
        try:
            answer = client.infer(model, inputs(protocol, **fields))
            response = answer.get_response()
            names = [
                each["name"] if protocol == "http" else each.name
                for each in (response["outputs"] if protocol == "http" else response.outputs)
            ]
            return {name: answer.as_numpy(name) for name in names}
        finally:
            client.close()

    def metric(self, name: str, model: str = "tiny") -> float:
        """A metric, as it was reported last: see `until`."""
        url = f"http://127.0.0.1:{self.address.metrics}/metrics"
        lines = urllib.request.urlopen(url, timeout=WAIT).read().decode().splitlines()
        found = [line for line in lines if line.startswith(f"{name}{{") and f'model="{model}"' in line]
        return sum(float(line.split()[-1]) for line in found)

    def settled(self, name: str) -> float:
        """A metric when it has been the same for a second. Where a model is late to report, that is too early: whoever
        compares two of them tries again."""
        value, since = self.metric(name), time.monotonic()
        while time.monotonic() - since < 1:
            time.sleep(SECONDS_BETWEEN_REPORTS)
            if (now := self.metric(name)) != value:
                value, since = now, time.monotonic()
        return value

    def stub(self, model: str = "tiny") -> int:
        """The process of a model: of two, while it is being loaded again, the one that began last."""
        pids = [pid for pid, name in self.server._running_stubs().items() if name == model]
        return max(pids, key=lambda pid: int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]))


def inputs(protocol: str, **fields: Any) -> list[Any]:
    module = tritonclient.grpc if protocol == "grpc" else tritonclient.http
    made = []
    for name, value in fields.items():
        kind, dtype = KINDS[name]
        rows = [
            each.encode() if isinstance(each, str) else each for each in (value if type(value) is list else [value])
        ]
        made.append(module.InferInput(name, [len(rows), 1], kind))
        made[-1].set_data_from_numpy(np.array(rows, dtype).reshape(-1, 1))
    return made


@pytest.fixture(scope="module")
def repository(tiny_model: Path, tiny_xl_model: Path, stores: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("triton") / "models"
    common = {
        "model_repository": folder,
        "onnx_dir": stores / "onnx",
        "engine_dir": stores / "engines",
        "engine": "openvino",
        "max_steps": STEPS,
        "max_batch_size": 4,
        "steps": 2,
        "threads": 1,
    }
    lists = ["--schedulers", "EulerA", "DPM++", "--batches", "1", "4"]
    for arguments, more in (
        (["--ensemble"], {"model": "tiny", "model_path": tiny_model, "upscale": 2, "max_images": 4, "queue": 24}),
        ([], {"model": "tiny_xl", "model_path": tiny_xl_model, "guidance_scale": 5.0}),
    ):
        code, out, err = build(*arguments, *lists, **common, **more)
        assert code == 0, err
        assert out.splitlines()[-1] == str(folder / more["model"])
    return folder


@pytest.fixture(scope="module")
def served(triton: Installed, repository: Path) -> Iterator[Served]:
    address = Address("127.0.0.1", *free_ports(3))
    log: list[str] = []
    told: list[str] = []
    models = ["tiny", "tiny_xl", "tiny_preprocess", "tiny_postprocess", "tiny_ensemble"]
    with Triton(triton, repository, models, address, log.append, tell=told.append) as server:
        server.wait_until_ready(WAIT)
        over = threading.Event()

        def watch() -> None:
            while not over.wait(0.1):
                server.look_after(WAIT)

        with ThreadPoolExecutor(1) as pool:
            watching = pool.submit(watch)
            yield Served(repository, address, server, log, told)
            over.set()
            watching.result()
    assert not list(SHARED.glob(f"{server._shared}*"))


def alone(studio: Studio, **fields: Any) -> np.ndarray:
    """The picture that the script makes of the same request."""
    names = {"steps": "denoising_steps"}
    values = {names.get(name, name): value for name, value in fields.items() if name != "prompt"}
    return studio.draw(fields["prompt"], **{"denoising_steps": 2} | values).pictures[0]


ASKED = {
    "defaults": {"prompt": "a red apple", "seed": 5},
    "everything": {
        "prompt": "the green cat",
        "negative_prompt": "blue",
        "seed": 2**64 - 9,
        "steps": 5,
        "guidance_scale": 3.3,
        "scheduler": "DPM++",
        "height": 64,
        "width": 64,
    },
    "no guidance": {"prompt": "a red apple", "seed": 0, "guidance_scale": 0.0, "steps": 3, "scheduler": "EulerA"},
}


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_a_picture_is_the_one_that_the_script_makes(protocol: str, asked: str, served: Served, studio: Studio) -> None:
    answer = served.ask(protocol, **ASKED[asked])
    assert answer["generated_image"].shape == (1, 64, 64, 3) and answer["generated_image"].dtype == np.uint8
    assert answer["used_seed"].tolist() == [[ASKED[asked]["seed"]]]
    assert psnr(answer["generated_image"][0], alone(studio, **ASKED[asked])) >= SAME_AS_ALONE
    recipe, times = (json.loads(answer[name][0, 0]) for name in ("recipe", "stage_times"))
    assert recipe["request"]["guidance_scale"] == ASKED[asked].get("guidance_scale", 7.5)
    assert times.keys() == {"Queue", "CLIP", "UNet", "VAE-Dec", "Pipeline"} and times["Pipeline"] > times["UNet"] > 0


def test_several_models_are_served_at_once(served: Served, xl_studio: Studio) -> None:
    answer = served.ask(model="tiny_xl", prompt="a red apple", seed=5)
    expected = xl_studio.draw("a red apple", seed=5, denoising_steps=2, guidance_scale=5.0).pictures[0]
    assert psnr(answer["generated_image"][0], expected) >= SAME_AS_ALONE


def test_rows_and_images_of_a_request_stand_in_order(served: Served, studio: Studio) -> None:
    answer = served.ask(
        prompt=["a red apple", "the green cat"],
        seed=[10, 20],
        steps=[3, 2],
        num_images=[2, 1],
        scheduler=["EulerA"] * 2,
    )
    assert answer["used_seed"].ravel().tolist() == [10, 11, 20]
    expected = [("a red apple", 10, 3), ("a red apple", 11, 3), ("the green cat", 20, 2)]
    for picture, (prompt, seed, steps) in zip(answer["generated_image"], expected, strict=True):
        made = alone(studio, prompt=prompt, seed=seed, steps=steps, scheduler="EulerA")
        assert psnr(picture, made) >= SAME_AS_ALONE


def test_a_seed_is_drawn_and_told_and_makes_the_same_picture_again(served: Served) -> None:
    first, second = served.ask(prompt="a red apple"), served.ask(prompt="a red apple")
    seeds = [int(answer["used_seed"][0, 0]) for answer in (first, second)]
    assert seeds[0] != seeds[1]
    again = served.ask(prompt="a red apple", seed=seeds[0])
    assert psnr(again["generated_image"], first["generated_image"]) >= SAME_AS_ALONE


WRONG = {
    "no prompt": ({"seed": 5}, "prompt"),
    "an empty prompt": ({"prompt": ""}, "empty"),
    "a long prompt": ({"prompt": "a" * 3000}, "3000 bytes"),
    "no UTF-8": ({"prompt": b"\xff\xfe"}, "UTF-8"),
    "too many steps": ({"prompt": "a", "steps": STEPS + 1}, f"the {STEPS} that are made here"),
    "no steps": ({"prompt": "a", "steps": 0}, "steps must be 1 or more"),
    "a number that is none": ({"prompt": "a", "guidance_scale": float("nan")}, "guidance_scale"),
    "an unknown scheduler": ({"prompt": "a", "scheduler": "EulerB"}, "'EulerA'"),
    "a scheduler that is not served": ({"prompt": "a", "scheduler": "DDIM"}, "DDIM"),
    "another size": ({"prompt": "a", "height": 128}, "128x64 are not made here, but 64x64"),
    "too many images": ({"prompt": "a", "num_images": 5}, "num_images must be from 1 to 4"),
    "too many together": ({"prompt": ["a"] * 3, "num_images": [2] * 3}, "6 images are more than the 4"),
    "no images": ({"prompt": "a", "num_images": 0}, "num_images"),
    "the last seed and one more": ({"prompt": "a", "seed": 2**64 - 1, "num_images": 2}, "seed"),
    "a negative prompt without guidance": (
        {"prompt": "a", "negative_prompt": "b", "guidance_scale": 1.0},
        "negative_prompt acts through guidance",
    ),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_what_is_wrong_is_said_to_who_asked_for_it(protocol: str, case: str, served: Served) -> None:
    fields, said = WRONG[case]
    with pytest.raises(tritonclient.utils.InferenceServerException) as raised:
        served.ask(protocol, **fields)
    assert raised.value.status() in ("400", "StatusCode.INVALID_ARGUMENT")
    assert said in str(raised.value) and "--" not in str(raised.value) and "Traceback" not in str(raised.value)


def test_an_ensemble_cleans_the_prompt_and_answers_files(served: Served, studio: Studio, tmp_path: Path) -> None:
    answer = served.ask(model="tiny_ensemble", prompt="  a\tred \u200b apple\n", seed=5)
    file = tmp_path / "picture.png"
    file.write_bytes(answer["encoded_image"][0, 0])
    assert read_recipe(file)["request"]["prompts"] == ["a red apple"]
    with Image.open(file) as image:
        assert image.size == (128, 128)
        small = np.array(image.resize((64, 64), Image.Resampling.BOX))
    assert psnr(small, alone(studio, prompt="a red apple", seed=5)) > 20
    assert psnr(small, alone(studio, prompt="a red apple", seed=6)) < 20


def test_what_is_wrong_in_an_ensemble_is_said_too(served: Served) -> None:
    with pytest.raises(tritonclient.utils.InferenceServerException, match="steps must be"):
        served.ask(model="tiny_ensemble", prompt="a", steps=0)


def test_the_log_and_the_metrics_say_what_is_in_the_batch(served: Served) -> None:
    def counted() -> tuple[float, float]:
        return served.settled("darkroom_steps_total"), served.settled("darkroom_images_total")

    def count_what_is_made() -> bool:
        steps, images = counted()
        served.ask(prompt=["a red apple", "a blue dog"], steps=[2, 2])
        return counted() == (steps + 2 * 3, images + 2)  # PNDM makes one call more

    until(count_what_is_made)
    until(lambda: served.metric("darkroom_requests_in_flight") == served.metric("darkroom_slots_occupied") == 0)
    until(lambda: any("tiny: Client Requests in Batch:1" in line for line in served.log))
    until(lambda: any("tiny: Prompts in Batch:2" in line for line in served.log))


def test_requests_share_the_batch(served: Served) -> None:
    """As soon as the second is there in time, which takes a machine that is not too busy."""

    def counted() -> tuple[float, float]:
        return served.settled("darkroom_steps_total"), served.settled("darkroom_unet_calls_total")

    def share() -> bool:
        steps, calls = counted()
        with ThreadPoolExecutor(2) as pool:
            asked = [pool.submit(served.ask, prompt=["a"] * 4, steps=[STEPS] * 4) for _ in range(2)]
        assert all(each.result() for each in asked)
        now_steps, now_calls = counted()
        return now_steps - steps == 8 * (STEPS + 1) > 1.5 * (now_calls - calls) > 0

    until(share)


def test_a_deadline_ends_a_request(served: Served) -> None:
    client = served.client("grpc")
    with pytest.raises(tritonclient.utils.InferenceServerException, match="seconds it was given"):
        client.infer("tiny", inputs("grpc", prompt=["a"] * 4, steps=[STEPS] * 4), timeout=1000)
    client.close()


def test_who_goes_away_frees_the_slot(served: Served) -> None:
    """As soon as they go before all is made, which a fast machine may do first."""
    client = served.client("grpc")
    many = inputs("grpc", prompt="a", steps=STEPS, num_images=4)

    def go_away() -> bool:
        before = served.settled("darkroom_images_total")
        ended: queue.Queue[Any] = queue.Queue()
        calls = [client.async_infer("tiny", many, callback=lambda result, error: ended.put(error)) for _ in range(4)]
        for call in calls:
            call.cancel()
        errors = [str(ended.get(timeout=WAIT)).lower() for _ in calls]
        until(lambda: served.metric("darkroom_requests_in_flight") == 0)
        return all("cancel" in error for error in errors) and served.settled("darkroom_images_total") - before < 16

    until(go_away)
    client.close()


def test_a_full_queue_is_said(served: Served) -> None:
    """As soon as more is asked for than is made meanwhile, which takes a client that is not too slow."""
    client = served.client("grpc")
    many = inputs("grpc", prompt="a", steps=STEPS, num_images=4)

    def fill() -> bool:
        ended: queue.Queue[Any] = queue.Queue()
        for _ in range(12):
            client.async_infer("tiny", many, callback=lambda result, error: ended.put((result, error)))
        answers = [ended.get(timeout=WAIT) for _ in range(12)]
        refused = [str(error) for _, error in answers if error]
        assert all("the queue is full" in each for each in refused)
        assert any(result for result, _ in answers)
        return bool(refused)

    until(fill)
    client.close()


@pytest.mark.parametrize("requests", [300, pytest.param(5000, marks=pytest.mark.slow)], ids=["short", "long"])
def test_malformed_requests_are_answered_or_closed_and_harm_nobody(requests: int, served: Served) -> None:
    told, logged, process = len(served.told), len(served.log), served.server.process
    wanted = served.ask(prompt="a red apple", seed=5)["generated_image"]
    over = threading.Event()

    def draw() -> int:
        """A neighbour's pictures, which are the same to the byte."""
        drawn = 0
        while not over.is_set() or not drawn:
            for protocol in ("http", "grpc"):
                np.testing.assert_array_equal(
                    served.ask(protocol, prompt="a red apple", seed=5)["generated_image"], wanted
                )
                drawn += 1
        return drawn

    dawdling = malformed.dawdle(served.address, "tiny")
    with ThreadPoolExecutor(5) as pool:
        neighbour = pool.submit(draw)
        try:
            attacks = [pool.submit(malformed.attack, number, served.address, "tiny") for number in range(requests)]
            assert [number for number, attack in enumerate(attacks) if attack.exception()] == []
        finally:
            over.set()
        assert neighbour.result() > 0
    for connection in dawdling:
        with contextlib.suppress(ConnectionError):
            while connection.recv(2**16):  # raises where it is not closed in time
                pass
        connection.close()
    assert served.server.process is process and served.told[told:] == []
    assert not [line for line in served.log[logged:] if "Traceback" in line]


def test_it_listens_at_one_address_alone(served: Served) -> None:
    ports = set(served.address.ports().values())
    found = set()
    for file in ("tcp", "tcp6"):
        for line in Path("/proc/net", file).read_text().splitlines()[1:]:
            address, state = line.split()[1], line.split()[3]
            host, port = address.rsplit(":", 1)
            if state == "0A" and int(port, 16) in ports:
                found.add((host, int(port, 16)))
    assert {port for _, port in found} == ports
    assert {host for host, _ in found} <= {"0100007F", "0000000000000000FFFF00000100007F"}  # 127.0.0.1, as IPv6 has it


class Reference:
    """Pictures made alone, each once."""

    def __init__(self, studio: Studio) -> None:
        self._studio = studio
        self._made: dict[str, np.ndarray] = {}

    def __call__(self, fields: dict[str, Any]) -> np.ndarray:
        key = repr(sorted(fields.items()))
        if key not in self._made:
            self._made[key] = alone(self._studio, **fields)
        return self._made[key]


def random_request(chance: random.Random) -> dict[str, Any]:
    fields: dict[str, Any] = {"prompt": chance.choice(["a red apple", "the green cat"]), "seed": chance.randrange(2)}
    for name, values in (("steps", [1, STEPS]), ("scheduler", ["EulerA", "DPM++"]), ("guidance_scale", [4.0])):
        if chance.random() < 0.7:
            fields[name] = chance.choice(values)
    return fields


PASSING = (
    "unavailable",
    "queue is full",
    "unknown model",
    "no available versions",
    "not ready",
    "not healthy",
    "connect",
    "socket closed",
    "reset",
    "eof",
)


def may_pass(error: Exception) -> bool:
    """Whether it is about the server's state, and not about what was asked."""
    return any(word in str(error).lower() for word in PASSING)


def storm(served: Served, clients: int, requests: int, disturb: dict[int, Callable[[], None]]) -> list[tuple]:
    """Random requests, valid and not, some cancelled; `disturb` happens when so many are sent. Returns what became of
    each: its fields, the picture or None, and the error or None."""
    chance, lock, sent = random.Random(11), threading.Lock(), iter(range(requests))
    became: list[tuple] = []

    def ask(client: Any, fields: dict[str, Any], cancelled: bool) -> tuple[np.ndarray | None, Exception | None]:
        ended: queue.Queue[Any] = queue.Queue()
        try:
            call = client.async_infer(
                "tiny", inputs("grpc", **fields), callback=lambda result, error: ended.put((result, error))
            )
            if cancelled:
                time.sleep(0.01)
                call.cancel()
            result, error = ended.get(timeout=WAIT)
        except queue.Empty:
            return None, None  # an answer was lost
        except Exception as failure:
            return None, failure
        return (None if result is None else result.as_numpy("generated_image")), error

    def one(client: Any) -> bool:
        with lock:
            number = next(sent, None)
            if number is None:
                return False
            fields = random_request(chance) if chance.random() < 0.85 else dict(chance.choice(list(WRONG.values()))[0])
            cancelled = chance.random() < 0.05
        if number in disturb:
            disturb[number]()
        patience = time.monotonic() + WAIT
        picture, error = ask(client, fields, cancelled)
        while error is not None and may_pass(error) and time.monotonic() < patience:
            time.sleep(BACK_OFF)
            picture, error = ask(client, fields, cancelled)
        with lock:
            became.append((fields, picture, error))
        return True

    def work() -> None:
        client = served.client("grpc")
        while one(client):
            pass
        client.close()

    threads = [threading.Thread(target=work) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return became


def check_storm(became: list[tuple], reference: Reference) -> int:
    """Every request ended in its picture or in an error. Returns how many pictures there were."""
    pictures = 0
    for fields, picture, error in became:
        assert (picture is None) != (error is None), f"no answer: {fields}"
        if picture is not None:
            pictures += 1
            assert psnr(picture[0], reference(fields)) >= SAME_AS_ALONE, fields
        elif fields not in [fields for fields, _ in WRONG.values()]:
            assert "cancel" in str(error).lower() or may_pass(error), error
    return pictures


def change(config: Path) -> None:
    """A queue that is longer by one: Triton loads no model again that has not changed."""
    config.write_text(re.sub(r'"(2\d)"', lambda found: f'"{int(found[1]) + 1}"', config.read_text()))


def resident(pid: int) -> int:
    """Bytes."""
    words = Path(f"/proc/{pid}/status").read_text().split()
    return 1024 * int(words[words.index("VmRSS:") + 1])


@pytest.mark.parametrize(
    "clients,requests", [(8, 160), pytest.param(32, 2000, marks=pytest.mark.slow)], ids=["short", "long"]
)
def test_under_load_and_faults_no_picture_is_wrong_and_no_answer_lost(
    clients: int, requests: int, served: Served, studio: Studio
) -> None:
    config = served.repository / "tiny" / "config.pbtxt"

    def load_again() -> None:
        change(config)
        served.server.call("/v2/repository/models/tiny/load", {})

    reload = threading.Thread(target=load_again)

    def kill() -> None:
        reload.join()
        os.kill(served.stub(), signal.SIGKILL)

    before = resident(served.stub())
    became = storm(served, clients, requests, {requests // 3: reload.start, 2 * requests // 3: kill})
    assert len(became) == requests
    reference = Reference(studio)
    made = check_storm(became, reference)
    assert made > 0.7 * requests
    until(
        lambda: any("the process of tiny has died" in each for each in served.told) and served.server.is_ready("tiny")
    )
    # Started, loaded again, and started again; what the server prints may be read late.
    until(lambda: sum("tiny: 4 slots" in line for line in served.log) == 3)
    after = storm(served, clients, requests // 2, {})
    assert check_storm(after, reference) > 0.7 * requests / 2
    until(lambda: served.metric("darkroom_requests_in_flight") == served.metric("darkroom_queue_images") == 0)
    assert resident(served.stub()) < before + 100 * 2**20


def test_a_model_in_use_can_be_loaded_again_and_again(served: Served, studio: Studio) -> None:
    config, told, process = served.repository / "tiny" / "config.pbtxt", len(served.told), served.server.process
    over, became = threading.Event(), []

    def work() -> None:
        while not over.is_set():
            became.extend(storm(served, 8, 16, {}))

    working = threading.Thread(target=work)
    working.start()
    try:
        for _ in range(4):
            loaded = len(served.log)
            change(config)
            served.server.call("/v2/repository/models/tiny/load", {})
            until(lambda: any("successfully unloaded 'tiny' version" in line for line in served.log[loaded:]))  # noqa: B023
    finally:
        over.set()
        working.join()
    assert check_storm(became, Reference(studio)) > 0
    assert served.server.process is process and served.told[told:] == []


def test_a_dead_model_process_is_said_at_once_and_the_next_one_answers(served: Served) -> None:
    def status() -> int:
        try:
            with urllib.request.urlopen(
                f"http://127.0.0.1:{served.address.http}/v2/health/ready", timeout=WAIT
            ) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            return error.code

    told = len(served.told)
    with ThreadPoolExecutor(8) as pool:
        # More than can be made while the process is found and killed.
        waiting = [pool.submit(served.ask, prompt=["a"] * 4, steps=[STEPS] * 4) for _ in range(32)]
        until(lambda: served.metric("darkroom_requests_in_flight") > 0)
        assert status() == 200
        os.kill(served.stub(), signal.SIGKILL)
        killed = time.monotonic()
        until(lambda: status() == 503)
        seconds = time.monotonic() - killed
        errors = [each.exception() for each in waiting]
    assert seconds < 2
    assert all(error is None or may_pass(error) for error in errors) and any(errors)
    until(lambda: served.server.is_ready("tiny") and status() == 200)
    assert served.ask(prompt="a red apple")["generated_image"].shape == (1, 64, 64, 3)
    # The death is said of the model's process, or of Triton, which may not outlive it.
    assert any(f"{who}: the server is started again" in served.told[told] for who in ("tiny has died", "has crashed"))


def test_a_server_that_crashed_is_started_again(served: Served) -> None:
    told, crashed = len(served.told), served.server.process
    crashed.send_signal(signal.SIGSEGV)
    # For a while the one that crashed may go on saying that it is ready.
    until(lambda: served.server.process is not crashed and served.server.is_ready("tiny"))
    assert "started again" in served.told[told]
    assert served.ask(prompt="a red apple")["generated_image"].shape == (1, 64, 64, 3)


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
def test_the_script_serves_and_ends_cleanly(ending: int, served: Served, tmp_path: Path) -> None:
    address = Address("127.0.0.1", *free_ports(3))
    ports = [f"--{name}-port={port}" for name, port in address.ports().items()]
    command = [sys.executable, str(ROOT / "demo" / "serve_triton.py"), f"--model-repository={served.repository}"]
    started = subprocess.Popen(
        [*command, "--model", "tiny", *ports], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        for line in started.stdout:
            if line.startswith("serving tiny"):
                break
        other = replace(served, address=address)
        assert other.ask(prompt="a red apple")["generated_image"].shape == (1, 64, 64, 3)
        started.send_signal(ending)
        rest = started.communicate(timeout=WAIT)[0]
    finally:
        started.kill()
    assert started.returncode == 0 and rest.splitlines()[-1] == "stopped."
    # With the port, for another process may have had the same id before.
    assert not list(SHARED.glob(f"darkroom_{started.pid}_{address.http}_*"))
    assert not [line for line in stubs() if f"darkroom_{started.pid}_{address.http}_" in line]


def stubs() -> list[str]:
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            line = (entry / "cmdline").read_bytes().decode(errors="replace")
            found += [line] if STUB in line else []
    return found
