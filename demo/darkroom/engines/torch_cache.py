"""What inductor compiled, from one process to the next.

Inductor trusts whatever lies in its folder: a library with a byte changed ends the process. So it works in a folder of
this process's own, which begins as a copy of an artefact that was hashed; what it adds is put there as it is compiled.
"""

import atexit
import os
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

from darkroom.engines.manifest import MANIFEST, USED
from darkroom.engines.store import Key, Store
from darkroom.errors import Failed

VARIABLE = "TORCHINDUCTOR_CACHE_DIR"

KIND = "compiled"

PASSING = (".lock", ".tmp")
"""How names end that mean nothing once whoever wrote them has ended."""


def keep_compiled(store: Store, facts: dict[str, Any]) -> None:
    """From now on inductor works in a copy of the store's artefact for these facts, and that is renewed with what it
    compiles.

    A folder that the user named is left alone, and so is torch's own where the store cannot be written and has nothing.
    """
    # Not above: what runs eager needs none of it.
    from torch._dynamo.callback import callback_handler
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    # torch itself sets the variable to its default, in the system's temporary folder, as soon as anybody asks.
    if os.environ.get(VARIABLE) not in (None, default_cache_dir()):
        return
    kept = _Kept(store, Key(f"inductor-{facts['version']}", {"kind": KIND, **facts}))
    if kept.begin():
        callback_handler.register_end_callback(kept.compiled)


class _Kept:
    def __init__(self, store: Store, key: Key) -> None:
        self._store = store
        self._key = key
        self._known: set[str] = set()
        self._broken = False

    def begin(self) -> bool:
        """Whether there is a folder that inductor may work in."""
        found = self._store.take(self._key)
        try:
            self._folder = self._store.scratch(self._key.folder_name)
        except Failed:
            return False
        if found:
            shutil.copytree(found, self._folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(MANIFEST, USED))
            self._store.note_use(found)
        self._known = set(self._files())
        os.environ[VARIABLE] = str(self._folder)
        atexit.register(self.renew)  # autotuning goes on when a graph is compiled
        return True

    def compiled(self, _: object) -> None:
        """Told when a graph has been compiled, or when something broke in, which may have left half a library."""
        if sys.exc_info()[1] is None:
            self.renew()
        else:
            self._broken = True

    def renew(self) -> None:
        """Puts into the store what is new. What cannot be kept is told, and used all the same."""
        files = set(self._files())
        if self._broken or files <= self._known:
            return
        self._known = files
        try:
            self._store.renew(self._key, self._fill)
        except (Failed, OSError) as error:
            warnings.warn(f"what was compiled is not kept: {error}", stacklevel=2)

    def _fill(self, folder: Path) -> None:
        for name in self._files():
            target = folder / name
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(self._folder / name, target)

    def _files(self) -> list[str]:
        """Their names within the folder."""
        return [
            path.relative_to(self._folder).as_posix()
            for path in self._folder.rglob("*")
            if path.is_file() and not path.name.endswith(PASSING) and not path.name.startswith(".")
        ]
