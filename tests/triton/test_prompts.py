"""Files of prompts: what is in them, and what is refused by file and line."""

from pathlib import Path

import pytest

from darkroom.errors import InvalidRequest
from darkroom.triton.prompts import Prompt, read_prompts

BAD_LINES = {
    "no JSON": '{"prompt": "a"',
    "an array": '["a"]',
    "no prompt": '{"seed": 1}',
    "null prompt": '{"prompt": null}',
    "empty prompt": '{"prompt": " "}',
    "prompt is a number": '{"prompt": 3}',
    "half a character": '{"prompt": "\\ud800"}',
    "unknown field 'sede'": '{"prompt": "a", "sede": 1}',
    "seed": '{"prompt": "a", "seed": -1}',
    "seed too large": '{"prompt": "a", "seed": 18446744073709551616}',
    "last seed too large": '{"prompt": "a", "seed": 18446744073709551615, "num_images": 2}',
    "seed is a text": '{"prompt": "a", "seed": "1"}',
    "steps is a fraction": '{"prompt": "a", "steps": 2.5}',
    "steps is true": '{"prompt": "a", "steps": true}',
    "guidance_scale": '{"prompt": "a", "guidance_scale": NaN}',
    "guidance_scale is huge": '{"prompt": "a", "guidance_scale": 1' + "0" * 400 + "}",
    "scheduler": '{"prompt": "a", "scheduler": "euler"}',
    "height": '{"prompt": "a", "height": 100}',
    "num_images": '{"prompt": "a", "num_images": 0}',
}


@pytest.mark.parametrize("bad", BAD_LINES)
def test_bad_line_is_refused_by_file_and_number(bad: str, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(f'{{"prompt": "good"}}\n\n{BAD_LINES[bad]}\n{{"prompt": "good"}}\n')
    with pytest.raises(InvalidRequest) as refused:
        read_prompts(file, {})
    assert str(refused.value).startswith(f"{file}:3: ")
    assert "\n" not in str(refused.value)
    if "'sede'" in bad:
        assert "'seed'" in str(refused.value)


def test_line_that_is_no_text_is_refused_by_file_and_number(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"good\ncaf\xe9\n")
    with pytest.raises(InvalidRequest, match=f"{file}:2: "):
        read_prompts(file, {})


def test_file_without_prompts_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("\n \n")
    with pytest.raises(InvalidRequest, match=str(file)):
        read_prompts(file, {})


def test_lines_of_a_file_go_before_the_flags(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"prompt": "a", "steps": 5}\r\n\r\n{"prompt": "b\xe2\x80\xa8", "steps": null}\r\n')
    assert read_prompts(file, {"steps": 9, "height": 64, "seed": None}) == (
        Prompt({"prompt": "a", "steps": 5, "height": 64}, f"{file}:1"),
        Prompt({"prompt": "b\u2028", "steps": 9, "height": 64}, f"{file}:3"),
    )
