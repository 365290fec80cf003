"""`make picture` and its environment, with an interpreter that only writes down what it was asked to do."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="there is no make here")

INTERPRETER = f"""#!/bin/sh
# Answers `-c` as Python does, makes environments that hold a copy of itself, and logs everything else.
case "$1 $2" in
    "-c "*) exec {sys.executable} "$@" ;;
    "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && echo "venv" >> log ;;
    "-m pip") echo "pip $*" >> log; [ ! -e offline ] ;;
    *) printf '%s\\0' "$@" > arguments ;;
esac
"""


class Clone:
    """A fresh clone, as far as make can see."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("Makefile", "requirements.txt", "setup.cfg", "pyproject.toml"):
            shutil.copy(ROOT / name, folder)
        self.python = folder / "interpreter"
        self.python.write_text(INTERPRETER)
        self.python.chmod(0o755)

    def make(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        outer = ("MAKEFLAGS", "MFLAGS", "MAKEOVERRIDES", "MAKELEVEL", "PROMPT", "ARGS", "VENV", "PYTHON")
        clean = {name: value for name, value in os.environ.items() if name not in outer}
        return subprocess.run(
            ["make", *arguments],
            cwd=self.folder,
            env={**clean, "PYTHON": str(self.python), **environment},
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )

    def log(self) -> list[str]:
        """What was done to the environment since the last look: `venv` and `pip`, in order."""
        path = self.folder / "log"
        done = [line.split()[0] for line in path.read_text().splitlines()] if path.exists() else []
        path.unlink(missing_ok=True)
        return done

    def arguments(self) -> list[str]:
        return (self.folder / "arguments").read_text().split("\0")[:-1]


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    return Clone(tmp_path)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    clone = Clone(tmp_path_factory.mktemp("installed"))
    assert clone.make("picture", "PROMPT=a red apple").returncode == 0
    return clone


PROMPTS = [
    'a "b" $HOME `x`; c',
    "it's $(PROMPT) and $$ and ${PATH} and %s",
    "back\\slash \\n & | > /dev/null # not a comment",
    "  spaces, kept; (parentheses), commas  !",
    "two\nlines",
    "--help",
    "ein roter Apfel, 赤いりんご",
]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_prompt_arrives_as_it_was_typed(installed: Clone, prompt: str) -> None:
    # Make itself drops blanks between `PROMPT=` and the value, as it does in any assignment.
    assert installed.make("picture", f"PROMPT={prompt}").returncode == 0
    assert installed.arguments() == ["demo/demo_txt2img.py", "--", prompt.lstrip(" ")]


def test_prompt_may_come_from_the_environment(installed: Clone) -> None:
    assert installed.make("picture", PROMPT=PROMPTS[0]).returncode == 0
    assert installed.arguments()[-1] == PROMPTS[0]


def test_flags_are_read_as_the_shell_reads_them(installed: Clone) -> None:
    installed.make("picture", "PROMPT=x", "ARGS=--seed 3 --negative-prompt 'two words, $HOME'")
    expected = ["--seed", "3", "--negative-prompt", "two words, $HOME", "--", "x"]
    assert installed.arguments() == ["demo/demo_txt2img.py", *expected]


@pytest.mark.parametrize("arguments", [[], ["PROMPT="], ["PROMPT=  "]])
def test_missing_prompt_is_one_line_and_touches_nothing(clone: Clone, arguments: list[str]) -> None:
    result = clone.make("picture", *arguments)
    assert result.returncode == 2
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert "PROMPT is missing" in result.stderr
    assert clone.log() == []


def test_environment_is_made_once(clone: Clone) -> None:
    clone.make("picture", "PROMPT=x")
    assert clone.log() == ["venv", "pip"]
    clone.make("picture", "PROMPT=x")
    assert clone.log() == []


def test_install_for_tests_serves_pictures_too_but_not_the_reverse(clone: Clone) -> None:
    clone.make("picture", "PROMPT=x")
    clone.log()
    clone.make("test")
    assert clone.log() == ["pip"]
    clone.make("lint")
    clone.make("picture", "PROMPT=x")
    assert clone.log() == []


@pytest.mark.parametrize("name", ["requirements.txt", "setup.cfg", "pyproject.toml"])
def test_changed_requirements_are_installed(clone: Clone, name: str) -> None:
    clone.make("picture", "PROMPT=x")
    clone.log()
    with (clone.folder / name).open("a") as file:
        file.write("# changed\n")
    clone.make("picture", "PROMPT=x")
    assert clone.log() == ["pip"]


def test_failed_install_is_not_taken_for_a_finished_one(clone: Clone) -> None:
    (clone.folder / "offline").touch()
    assert clone.make("picture", "PROMPT=x").returncode != 0
    assert not (clone.folder / "arguments").exists()
    (clone.folder / "offline").unlink()
    clone.log()
    assert clone.make("picture", "PROMPT=x").returncode == 0
    assert clone.log() == ["venv", "pip"]


def test_interrupted_environment_is_made_again(clone: Clone) -> None:
    (clone.folder / ".venv/lib").mkdir(parents=True)
    assert clone.make("picture", "PROMPT=x").returncode == 0
    assert clone.log() == ["venv", "pip"]


def test_environment_whose_interpreter_is_gone_is_made_again(clone: Clone) -> None:
    clone.make("picture", "PROMPT=x")
    (clone.folder / ".venv/bin/python").unlink()
    clone.log()
    clone.make("picture", "PROMPT=x")
    assert clone.log() == ["venv", "pip"]


def test_environment_that_another_process_is_installing_is_left_alone(clone: Clone) -> None:
    clone.make("picture", "PROMPT=x")
    clone.log()
    (clone.folder / ".venv/.unfinished").write_text(str(os.getpid()))
    result = clone.make("picture", "PROMPT=x")
    assert result.returncode != 0
    assert f"Process {os.getpid()} is installing" in result.stderr
    assert clone.log() == []


def test_another_python_makes_the_environment_again(clone: Clone) -> None:
    clone.make("picture", "PROMPT=x")
    clone.log()
    other = clone.folder / "other"
    other.write_text(INTERPRETER.replace('"-c "*)', '"-c import sys; print"*) echo other ;;\n    "-c "*)'))
    other.chmod(0o755)
    clone.make("picture", "PROMPT=x", PYTHON=str(other))
    assert clone.log() == ["venv", "pip"]


def test_python_that_is_too_old_is_refused(clone: Clone) -> None:
    clone.python.write_text("#!/bin/sh\nexit 1\n")
    result = clone.make("picture", "PROMPT=x")
    assert result.returncode == 2
    assert "is not Python 3.11 or newer" in result.stderr


def test_help_is_the_default_and_lists_every_target(clone: Clone) -> None:
    result = clone.make()
    assert result.returncode == 0
    for target in ("picture", "test", "lint", "fix"):
        assert f"make {target} " in result.stdout
    assert clone.log() == []
