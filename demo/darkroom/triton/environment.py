"""The environment that Triton Inference Server lives in: its wheel, and the half of Darkroom that runs.

Triton's Python backend needs a NumPy before 2, which nothing else here does; so it has an environment of its own,
without torch, whose engines' runtimes are the very versions that the engines are built with.
"""

import configparser
import os
import re
import shlex
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from darkroom.engines import distribution_of
from darkroom.errors import Failed, InvalidRequest
from darkroom.files import write_whole, written
from darkroom.processes.environments import ensure

WHEEL = "nvidia-pytriton==0.7.0"
"""Holds Triton 2.51 with its Python backend, and brings `tritonclient[http,grpc]`, of which its door is made."""

NUMPY = "numpy>=1.26,<2"
PACKAGE = Path(__file__).resolve().parents[1]
ONNXRUNTIME = "onnxruntime"
RUNTIME_PACKAGES = {
    ONNXRUNTIME: (ONNXRUNTIME,),
    "tensorrt": ("tensorrt_rtx", "cuda-python"),
    "openvino": (),
}
"""What a runtime needs beside what every run does; openvino is among that."""


VARIABLES = re.compile(
    r"PATH|LD_LIBRARY_PATH|HOME|USER|LANG|LANGUAGE|LC_[A-Z]+|TZ|TMPDIR|GLIBC_TUNABLES|MALLOC_\w+|PYTHON(UTF8|HASHSEED)"
    r"|CUDA_(VISIBLE_DEVICES|DEVICE_ORDER|CACHE_\w+|MODULE_\w+|HOME|PATH|MPS_\w+)"
    r"|NVIDIA_(VISIBLE_DEVICES|DRIVER_CAPABILITIES|TF32_OVERRIDE)"
    r"|(OMP|GOMP|KMP|MKL|OPENBLAS|OV|OPENVINO|ONEDNN|DNNL|TBB)_\w+"
)
"""What the server's process takes over of this one's variables: what Triton and engines' runtimes heed. No token, no
key of a cloud is among them, and none that is thought of later."""


@dataclass(frozen=True)
class Server:
    """See `darkroom.processes.environments.Lodger`."""

    requirements: tuple[str, ...]
    name: str = "Triton"
    environment: str = "server"
    alone: tuple[str, ...] = ()


@dataclass(frozen=True)
class Installed:
    """Where Triton's parts are: its environment's python, the server and the folder of its backends."""

    python: Path
    server: Path
    backends: Path

    def variables(self) -> dict[str, str]:
        """All that the server's process has in its environment: this interpreter, its own library, and `VARIABLES`."""
        libraries = [sysconfig.get_config_var("LIBDIR"), os.environ.get("LD_LIBRARY_PATH")]
        kept = {name: value for name, value in os.environ.items() if VARIABLES.fullmatch(name)}
        return kept | {
            "PATH": f"{self.python.parent}{os.pathsep}{os.environ.get('PATH', '')}",
            "VIRTUAL_ENV": str(self.python.parent.parent),
            "LD_LIBRARY_PATH": os.pathsep.join(filter(None, libraries)),
        }

    def line(self, command: list[str]) -> str:
        """A command as it is typed in a shell, with the variables that it needs."""
        variables = self.variables()
        settings = (f"{name}={shlex.quote(variables[name])}" for name in ("PATH", "LD_LIBRARY_PATH"))
        return f"{' '.join(settings)} {shlex.join(command)}"


def requirements(runtimes: tuple[str, ...] = ("openvino",)) -> tuple[str, ...]:
    """What is installed: the run-time half's packages in the versions that are here, but for NumPy."""
    names = [re.match(r"[\w.-]+", line)[0] for line in _install_requires()]
    for runtime in runtimes:
        if runtime not in RUNTIME_PACKAGES:
            raise InvalidRequest(f"--engine {runtime} is not served by Triton here: {', '.join(RUNTIME_PACKAGES)} are.")
        names += RUNTIME_PACKAGES[runtime]
    names = [each for name in names for each in ((name,) if name != ONNXRUNTIME else _onnxruntime())]
    wanted = [f"{name}=={_version(name)}" for name in dict.fromkeys(names) if name.lower() != "numpy"]
    return (WHEEL, NUMPY, *wanted)


def _onnxruntime() -> tuple[str, ...]:
    """ONNX Runtime's builds are packages of one import: the one that is here, and what it needs for a GPU."""
    build = distribution_of(ONNXRUNTIME)
    return ("onnxruntime-gpu[cuda,cudnn]", "cuda-python") if build == "onnxruntime-gpu" else (build,)


def _version(requirement: str) -> str:
    """Of a package, as it is here. Raises `Failed` where it is not."""
    name = requirement.partition("[")[0]
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        raise Failed(f"the server needs the package {name}, in the version that is here: pip install {name}") from None


def _install_requires() -> list[str]:
    """The run-time half's requirements, from setup.cfg in a checkout or else from the installed package."""
    setup = PACKAGE.parents[1] / "setup.cfg"
    if setup.is_file():
        parser = configparser.ConfigParser()
        parser.read(setup, encoding="utf-8")
        return [line for line in parser["options"]["install_requires"].splitlines() if line.strip()]
    return [line for line in metadata.requires("darkroom") or () if "extra ==" not in line]


def installed(
    root: Path, runtimes: tuple[str, ...] = ("openvino",), show: Callable[[str], None] = lambda text: None
) -> Installed:
    """Triton in `root`/server, which is made if it is not there. Raises `Failed` in one line."""
    if sys.platform != "linux":
        raise Failed("Triton Inference Server comes for Linux alone.")
    python = ensure(Server(requirements(runtimes)), root, show)
    packages = python.parent.parent / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    triton = packages / "pytriton" / "tritonserver"
    stub = f"../../python_backend_stubs/{sys.version_info[0]}.{sys.version_info[1]}/triton_python_backend_stub"
    link = triton / "backends" / "python" / "triton_python_backend_stub"
    if not (link.parent / stub).exists():
        raise Failed(f"{WHEEL} has no Python backend for Python {sys.version_info[0]}.{sys.version_info[1]}.")
    # The backend gives its models a PYTHONPATH of its own: where this Darkroom is stands in a file.
    paths = packages / "darkroom.pth"
    if not link.exists():
        with written(link) as temporary:
            temporary.symlink_to(stub)
    if not paths.exists() or paths.read_text() != f"{PACKAGE.parent}\n":
        write_whole(paths, f"{PACKAGE.parent}\n".encode())
    return Installed(python, triton / "bin" / "tritonserver", triton / "backends")
