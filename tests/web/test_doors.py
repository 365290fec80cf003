"""Who may use the server, and how it ends."""

import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest

from tests.support import ROOT, Ended, Studio, assert_refused, free_ports, until
from tests.web.conftest import Server, start

KEY = "a long and secret key"
ASKED = {"prompt": "a dog", "steps": 2}


def post(server: Server, body: object = ASKED, **more: object) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/images/generations", json=body, **more)


@pytest.fixture(scope="module")
def locked(stores: Path, tiny_model: Path) -> Server:
    """A server with a key, which is open to other machines."""
    started = start(stores, tiny_model, "--host", "0.0.0.0", DARKROOM_API_KEY=KEY)
    yield started
    started.process.kill()


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {KEY}"}])
@pytest.mark.parametrize("path", ["/v1/models", "/pictures", "/pictures/x.png", "/metrics", "/sdapi/v1/options"])
def test_nothing_is_shown_without_the_key(locked: Server, path: str, headers: dict[str, str]) -> None:
    refused = httpx.get(locked.url + path, headers=headers)
    assert refused.status_code == 401 and KEY not in refused.text


def test_key_opens_it_and_the_page_gets_a_cookie_for_it(locked: Server) -> None:
    right = {"Authorization": f"Bearer {KEY}"}
    assert post(locked, headers=right).status_code == 200
    with httpx.Client(base_url=locked.url) as browser:
        assert browser.get("/").status_code == 200
        assert browser.post("/login", headers={"Authorization": "Bearer wrong"}).status_code == 401
        assert browser.get("/pictures").status_code == 401
        given = browser.post("/login", headers=right).headers["set-cookie"]
        assert "HttpOnly" in given and "SameSite=strict" in given
        assert len(browser.get("/pictures").json()["pictures"]) > 0


def test_health_is_told_without_the_key(locked: Server) -> None:
    assert httpx.get(f"{locked.url}/health/live").json() == {"status": "live"}
    assert httpx.get(f"{locked.url}/health/ready").json() == {"status": "ready"}


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8188", "127.0.0.1.evil.example"])
def test_another_name_of_this_machine_is_refused(server: Server, host: str) -> None:
    """A site whose name leads here for a moment could read everything."""
    assert httpx.get(f"{server.url}/v1/models", headers={"Host": host}).status_code == 400


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Content-Type": "text/plain"},
        {"Content-Type": "application/x-www-form-urlencoded"},
    ],
)
def test_pages_of_other_sites_can_make_nothing(server: Server, headers: dict[str, str]) -> None:
    answer = httpx.post(
        f"{server.url}/v1/images/generations",
        content=b'{"prompt": "a dog"}',
        headers={"Content-Type": "application/json"} | headers,
    )
    assert answer.status_code in (403, 415)
    assert "access-control-allow-origin" not in answer.headers
    assert httpx.delete(f"{server.url}/pictures/x.png", headers={"Origin": "http://evil.example"}).status_code == 403


def test_large_bodies_are_refused(server: Server) -> None:
    large = b'{"prompt": "' + b"a" * 2**20 + b'"}'
    headers = {"Content-Type": "application/json"}
    assert httpx.post(f"{server.url}/v1/images/generations", content=large, headers=headers).status_code == 413
    chunks = (large[at : at + 65536] for at in range(0, len(large), 65536))
    assert httpx.post(f"{server.url}/v1/images/generations", content=chunks, headers=headers).status_code == 413


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'"a"', b"[" * 100_000, b"\xff\xfe", b'{"prompt": 1e999}'])
def test_bodies_that_are_no_request_are_refused(server: Server, body: bytes) -> None:
    for path in ("/v1/images/generations", "/sdapi/v1/txt2img"):
        answer = httpx.post(server.url + path, content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code in (400, 422), answer.text


def test_who_does_not_fit_into_the_queue_is_told_when_to_come_back(stores: Path, tiny_model: Path) -> None:
    small = start(stores, tiny_model, "--slots", "1", "--queue", "2")
    try:
        answers: list[httpx.Response] = []
        long = {"prompt": "a dog", "steps": 50}
        threads = [threading.Thread(target=lambda: answers.append(post(small, long, timeout=60))) for _ in range(24)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        turned_away = [answer for answer in answers if answer.status_code == 429]
        assert turned_away and all(answer.headers["retry-after"] == "1" for answer in turned_away)
        assert {answer.status_code for answer in answers} == {200, 429}
        assert turned_away[0].json()["error"]["type"] == "rate_limit_error"
    finally:
        small.process.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_running_pictures_are_finished_before_it_ends(number: int, stores: Path, tiny_model: Path) -> None:
    ending = start(stores, tiny_model)
    answers: list[httpx.Response] = []
    asked = {"prompt": "a dog", "n": 8, "steps": 50}
    waiting = threading.Thread(target=lambda: answers.append(post(ending, asked, timeout=60)))
    waiting.start()
    until(lambda: 'occupied{model="' in (text := httpx.get(f"{ending.url}/metrics").text) and "occupied 0" not in text)
    ending.process.send_signal(number)
    waiting.join()
    assert answers[0].status_code == 200 and len(answers[0].json()["data"]) == 8
    assert ending.process.wait(60) == 0


def test_what_is_not_done_in_time_is_told_so(stores: Path, tiny_model: Path) -> None:
    ending = start(stores, tiny_model, "--drain", "0", "--slots", "1")
    answers: list[httpx.Response] = []

    def ask() -> None:
        answers.append(post(ending, {"prompt": "a dog", "n": 8, "steps": 50}, timeout=60))

    waiting = [threading.Thread(target=ask) for _ in range(4)]
    for thread in waiting:
        thread.start()
    until(lambda: httpx.get(f"{ending.url}/metrics").text.count("queue_images{") == 1)
    ending.process.terminate()
    for thread in waiting:
        thread.join()
    said = {answer.status_code: answer.text for answer in answers}
    assert "the server is stopping" in said[500]
    assert ending.process.wait(60) == 0


class TestRefusals:
    """One line, and exit code 2."""

    def refused(self, studio: Studio, *arguments: str) -> Ended:
        command = [sys.executable, str(ROOT / "demo/serve.py"), *arguments, *studio.folders()]
        done = subprocess.run(command, env=studio.environment(), capture_output=True, text=True, timeout=600)
        return Ended(done.returncode, done.stdout, done.stderr)

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["--host", "0.0.0.0"], "--api-key"),
            (["--port", "0"], "--port"),
            (["--api-key", ""], "--api-key"),
            (["--slots", "0"], "--slots"),
            (["--version", "emojy"], "'emoji'"),
            (["--model", "nowhere/at/all"], "nowhere/at/all"),
            (["--schedulers", "Eular"], "'Euler'"),
            (["--size", "100"], "multiple of 8"),
        ],
    )
    def test_what_cannot_be_served_is_refused(self, arguments: list[str], said: str, studio: Studio) -> None:
        assert_refused(self.refused(studio, *arguments), said)

    def test_port_that_is_taken_is_said_before_anything_is_built(self, empty_studio: Studio) -> None:
        (port,) = free_ports(1)
        with socket.create_server(("127.0.0.1", port)):
            ended = self.refused(empty_studio, "--port", str(port), "--model", str(empty_studio.model))
        assert ended.code == 1 and f"127.0.0.1:{port}" in ended.err and ended.err.count("\n") == 1
        assert not empty_studio.engines.exists()
