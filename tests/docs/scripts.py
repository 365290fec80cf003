"""Scripts and modules, run in the process of the tests, which has torch loaded."""

import contextlib
import io
import runpy
import sys
from unittest import mock

from tests.support import ROOT, Ended


def run_here(*words: str) -> Ended:
    """Does what `python WORDS...` does, but for what a script does with its process before its imports."""
    module = words[0] == "-m"
    arguments = list(words[1:] if module else words)
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch("darkroom.cli.start.Startup", contextlib.nullcontext),
        mock.patch.object(sys, "argv", arguments),
    ):
        try:
            if module:
                runpy.run_module(arguments[0], run_name="__main__")
            else:
                runpy.run_path(str(ROOT / arguments[0]), run_name="__main__")
        except SystemExit as ended:
            code = ended.code or 0
    return Ended(code, out.getvalue(), err.getvalue())
