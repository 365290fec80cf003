"""The pictures that are kept."""

import httpx
from PIL import Image

from tests.support import Studio
from tests.web.conftest import Server


def test_pictures_are_listed_newest_first_shown_and_deleted(server: Server) -> None:
    asked = {"prompt": "a dog", "steps": 2, "seed": 77, "n": 2}
    made = httpx.post(f"{server.url}/v1/images/generations", json=asked).json()["data"]
    listed = httpx.get(f"{server.url}/pictures").json()["pictures"]
    newest = [each["file"] for each in listed[:2]]
    assert sorted(newest) == sorted(datum["file"] for datum in made)
    assert listed[0]["recipe"]["request"]["denoising_steps"] == 2
    shown = httpx.get(f"{server.url}/pictures/{newest[0]}")
    assert shown.headers["content-type"] == "image/png"
    assert shown.content == (server.output / newest[0]).read_bytes()
    older = httpx.get(f"{server.url}/pictures", params={"before": listed[0]["time"]}).json()["pictures"]
    assert newest[0] not in [each["file"] for each in older]
    assert httpx.delete(f"{server.url}/pictures/{newest[0]}").status_code == 200
    assert not (server.output / newest[0]).exists()
    assert httpx.get(f"{server.url}/pictures/{newest[0]}").status_code == 404


def test_what_is_no_picture_of_ours_is_neither_shown_nor_deleted(server: Server, studio: Studio) -> None:
    """Nor anything outside of the folder."""
    server.output.mkdir(exist_ok=True)
    Image.new("RGB", (8, 8)).save(server.output / "holiday.png")
    (server.output / "notes.txt").write_text("mine")
    (server.output / "cut.png").write_bytes(b"\x89PNG\r\n")
    outside = studio.draw("a red apple").result["images"][0]["path"]
    (server.output / "link.png").symlink_to(outside)
    names = ["holiday.png", "notes.txt", "cut.png", "link.png", "..%2Fserve.log", "%2Fetc%2Fpasswd", ".hidden.png"]
    for name in names:
        assert httpx.get(f"{server.url}/pictures/{name}").status_code == 404, name
        assert httpx.delete(f"{server.url}/pictures/{name}").status_code == 404, name
    listed = [each["file"] for each in httpx.get(f"{server.url}/pictures").json()["pictures"]]
    assert not set(names) & set(listed)
    assert (server.output / "holiday.png").exists() and (server.output / "link.png").is_symlink()
    for name in names[:4]:
        (server.output / name).unlink()
