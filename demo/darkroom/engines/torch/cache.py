"""What inductor compiled, from one process to the next.

Inductor trusts whatever lies in its folder: a library with a byte changed ends the process. So it works in a folder of
this process's own, which begins as a copy of an artefact that was hashed; what it adds is put there as it is compiled.
"""

import atexit
import contextlib
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from darkroom.errors import Failed
from darkroom.store.manifest import MANIFEST, USED
from darkroom.store.store import Key, Store

VARIABLE = "TORCHINDUCTOR_CACHE_DIR"

KIND = "compiled"

PASSING = (".lock", ".tmp")
"""How names end that mean nothing once the process that wrote them has ended."""

OF_TRITON = "triton"
"""Kernels, with the paths that they were written to: inductor keeps them with its graphs, and writes them anew."""


def keep_compiled(store: Store, facts: dict[str, Any]) -> None:
    """From now on inductor works in a copy of the store's artefact for these facts, and that is renewed with what it
    compiles.

    A folder that the user named is left alone, and so is torch's own where a store that cannot be written has nothing.
    """
    # Not above: what runs eager needs none of it.
    from torch._dynamo.callback import callback_handler
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    # torch itself sets the variable to its default, in the system's temporary folder, as soon as it is read.
    if os.environ.get(VARIABLE) not in (None, default_cache_dir()):
        return
    kept = _Kept(store, Key(f"inductor-{facts['version']}", {"kind": KIND, **facts}))
    if kept.begin():
        callback_handler.register_end_callback(kept.compiled)


class _Kept:
    def __init__(self, store: Store, key: Key) -> None:
        self._store = store
        self._key = key
        self._known: dict[str, tuple[int, int]] = {}
        self._broken = False

    def begin(self) -> bool:
        """Whether there is a folder that inductor may work in."""
        found = self._store.take(self._key)
        self._store.fingerprints.remember()
        try:
            self._folder = self._store.scratch(self._key.folder_name).absolute()
        except Failed:
            if not found:
                return False
            self._folder = Path(tempfile.mkdtemp(prefix="darkroom-"))
            atexit.register(shutil.rmtree, self._folder, ignore_errors=True)
        if found:
            try:
                shutil.copytree(found, self._folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(MANIFEST, USED))
            except OSError:  # another process renews it, or the disk is full: half a library is worse than none
                shutil.rmtree(self._folder, ignore_errors=True)
                self._folder.mkdir(exist_ok=True)
            self._store.note_use(found)
        self._known = self._files()
        os.environ[VARIABLE] = str(self._folder)
        atexit.register(self.renew)  # autotuning goes on when a graph is compiled
        return True

    def compiled(self, _: object) -> None:
        """Called when a graph was compiled or given up, and when something broke in, which may leave half a library."""
        error = sys.exc_info()[1]
        if error is None or isinstance(error, Exception):
            self.renew()
        else:
            self._broken = True

    def renew(self) -> None:
        """Puts into the store what is new. What cannot be kept is reported, and used all the same."""
        try:
            files = self._files()
            if self._broken or files.items() <= self._known.items():
                return
            self._known = files
            self._store.renew(self._key, self._fill)
        except (Failed, OSError) as error:
            self._store.tell(f"what was compiled is not kept: {error}")

    def _fill(self, folder: Path) -> None:
        for name, (_, modified) in self._files().items():
            target = folder / name
            if not target.exists() or target.stat().st_mtime_ns < modified:
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(self._folder / name, target)

    def _files(self) -> dict[str, tuple[int, int]]:
        """Their names within the folder, with size and time."""
        found = {}
        for within, folders, names in os.walk(self._folder):
            if Path(within) == self._folder and OF_TRITON in folders:
                folders.remove(OF_TRITON)
            for name in names:
                if not name.endswith(PASSING) and not name.startswith("."):
                    path = Path(within, name)
                    with contextlib.suppress(FileNotFoundError):  # inductor's own, for a moment
                        state = path.stat()
                        found[path.relative_to(self._folder).as_posix()] = (state.st_size, state.st_mtime_ns)
        return found
