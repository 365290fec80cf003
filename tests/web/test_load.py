"""Many clients at a time: each gets the right picture or an error, and nothing piles up."""

import asyncio
import base64
import io
import random
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.support import Studio, psnr, until
from tests.web.conftest import Server

CLIENTS = 32
KINDS = [
    {"prompt": prompt, "seed": seed, "steps": steps, "scheduler": scheduler, "guidance_scale": guidance}
    for prompt in ("a dog", "a cat")
    for seed, steps, scheduler, guidance in (
        (5, 3, None, 7.5),
        (6, 9, "Euler", 3.0),
        (7, 5, "EulerA", 7.5),
        (8, 4, None, 1.0),
    )
]
WRONG = ({"prompt": ""}, {"prompt": "a dog", "steps": 0}, {"prompt": "a dog", "scheduler": "None"})


@pytest.mark.parametrize("requests", [120, pytest.param(2000, marks=pytest.mark.slow)])
def test_mixed_requests_of_many_clients_end_in_the_right_pictures(
    requests: int, server: Server, studio: Studio
) -> None:
    def alone(asked: dict) -> np.ndarray:
        return studio.draw(asked["prompt"], **{"denoising_steps": asked["steps"]} | {
            name: asked[name] for name in ("seed", "scheduler", "guidance_scale")
        }).pictures[0]  # fmt: skip

    expected = [alone(asked) for asked in KINDS]
    before = memory(server)
    chance = random.Random(0)
    work = iter([chance.random() for _ in range(requests)])
    outcomes: dict[str, int] = {}

    async def one(client: httpx.AsyncClient, drawn: float) -> str:
        kind = int(drawn * 1e6) % len(KINDS)
        if drawn < 0.05:
            with pytest.raises(httpx.TimeoutException):
                await client.post(url, json=KINDS[kind] | {"n": 8, "steps": 50}, timeout=0.01)
            return "given up"
        if drawn > 0.97:
            answer = await client.post(url, json=WRONG[kind % len(WRONG)])
            assert answer.status_code == 400
            return "refused"
        while (answer := await client.post(url, json=KINDS[kind])).status_code == 429:
            await asyncio.sleep(0.05)
        assert answer.status_code == 200, answer.text
        made = np.array(Image.open(io.BytesIO(base64.b64decode(answer.json()["data"][0]["b64_json"]))))
        assert psnr(made, expected[kind]) >= 50
        return "made"

    async def worker(client: httpx.AsyncClient) -> None:
        for drawn in work:
            outcome = await one(client, drawn)
            outcomes[outcome] = outcomes.get(outcome, 0) + 1

    async def all_of_them() -> None:
        async with httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=CLIENTS)) as client:
            await asyncio.gather(*(worker(client) for _ in range(CLIENTS)))

    url = f"{server.url}/v1/images/generations"
    asyncio.run(all_of_them())
    assert sum(outcomes.values()) == requests and outcomes.keys() == {"made", "given up", "refused"}
    until(lambda: "darkroom_slots_occupied{" in (text := httpx.get(f"{server.url}/metrics").text) and idle(text))
    assert memory(server) - before < 150 * 2**20


def idle(metrics: str) -> bool:
    lines = [
        line for line in metrics.splitlines() if line.startswith(("darkroom_slots_occupied{", "darkroom_queue_images{"))
    ]
    return all(float(line.split()[-1]) == 0 for line in lines)


def memory(server: Server) -> int:
    """Bytes that the server's process has in memory."""
    fields = Path(f"/proc/{server.process.pid}/status").read_text().split("VmRSS:")[1].split()
    return int(fields[0]) * 1024
