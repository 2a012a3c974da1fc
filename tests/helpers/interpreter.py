"""Triton's interpreter, made quicker for the tests."""

from __future__ import annotations

from typing import Any

import triton.language as tl
from triton.runtime import interpreter


class _NothingToRestore:
    def restore(self) -> None:
        pass


def patch_the_language_once() -> None:
    """Leave Triton's language patched for the interpreter.

    The interpreter patches the language's functions anew in each call of a kernel and of each
    function that a kernel calls, which takes a third of the time, and undoes some of it after each
    launch. No test in its process needs the language as it was.
    """
    patch, patched = interpreter._patch_lang, set()

    def patch_once(function: Any) -> _NothingToRestore:
        found = {id(v) for v in function.__globals__.values() if v is tl or v is tl.core}
        if not found <= patched:
            patch(function)
            patched.update(found)
        return _NothingToRestore()

    interpreter._patch_lang = patch_once
