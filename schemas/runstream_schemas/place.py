"""Whether a path means the same folder to two processes: a file in the folder holds a random word that both read.

A server tells its clients the word with the path. A client that finds another word, or none, at that path looks at
another machine's or container's file system and must not write there.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Final

__all__ = ["PROOF_FILE", "make_proof", "read_proof"]

PROOF_FILE: Final = ".place.runstream-part"
"""Has the form of an unfinished upload, so that listings of artifacts leave it out."""
_MAX_BYTES: Final = 200


def make_proof(folder: Path) -> str | None:
    """The word of `folder`, made if there is none; None where it can neither be read nor made."""
    file = folder / PROOF_FILE
    word = secrets.token_hex(16)
    draft = folder / f".place-{word}.runstream-part"
    try:
        found = read_proof(folder)
        if found is not None:
            return found
        draft.write_text(word, encoding="ascii")
        try:
            os.link(draft, file)  # the first of several servers wins, and nobody sees half a word
        except FileExistsError:
            return read_proof(folder)
        finally:
            draft.unlink(missing_ok=True)
    except OSError:
        return None
    return word


def read_proof(folder: Path) -> str | None:
    """The word of `folder`; None where there is none."""
    try:
        with open(folder / PROOF_FILE, encoding="ascii") as file:
            return file.read(_MAX_BYTES).strip() or None
    except (OSError, ValueError):
        return None
