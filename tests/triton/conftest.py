"""Triton as it is installed for users: once, in the checkout's own folder."""

import sys

import pytest

from darkroom.cli.settings import home
from darkroom.cli.triton_repository import ENVIRONMENTS
from darkroom.triton.environment import Installed, installed


@pytest.fixture(scope="session")
def triton() -> Installed:
    """The server and its environment, made where it is not there yet."""
    if sys.platform != "linux":
        pytest.skip("Triton Inference Server comes for Linux alone")
    return installed(home() / ENVIRONMENTS)
