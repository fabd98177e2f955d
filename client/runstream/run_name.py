"""Random readable run names, such as `calm-otter-417`."""

from __future__ import annotations

import hashlib
from typing import Final

__all__ = ["name_for"]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_ADJECTIVES: Final = _words(
    """
    able amber bold brave bright brisk calm candid clever cosmic crisp curious daring deft eager early fair fancy
    fast fleet fond frank fresh gentle glad golden grand handy happy hardy honest humble ideal jolly keen kind
    lively lucid lucky lunar mellow merry mighty mild neat nimble noble open patient placid polite proud quick
    quiet rapid ready robust royal rustic serene sharp silent silver sleek smart smooth solar solid spry steady
    stoic sturdy subtle sunny swift tidy tranquil trusty upbeat urban valiant vast vivid warm wise witty young
    zesty
    """
)
_NOUNS: Final = _words(
    """
    ant auk badger bat bear beaver bee bison boar bream carp cat colt conch coot cow crab crane crow cub deer dog
    dolphin doe dove duck eagle eel elk emu ewe falcon fawn finch fish flea fly foal fox frog gnat gnu goat goose
    grouse grub gull hare hawk hen heron horse hound ibis jay kit koala lamb lark lemur lion loon lynx mare marten
    mink mole moose moth mouse mule newt orca otter owl panda perch pig pony puma quail ram rat raven rook seal
    shad shark sheep shoat shrew shrike skunk slug smelt snail snake snipe sow sponge squid squirrel stag stoat
    stork swan tern toad trout turtle vole wasp whale wolf worm wren yak zebra
    """
)


def name_for(run_id: str) -> str:
    """The default name of a run. It follows from the id, so that every process of a run computes the same."""
    number = int.from_bytes(hashlib.blake2b(run_id.encode("utf-8", "replace"), digest_size=8).digest(), "big")
    number, adjective = divmod(number, len(_ADJECTIVES))
    number, noun = divmod(number, len(_NOUNS))
    return f"{_ADJECTIVES[adjective]}-{_NOUNS[noun]}-{number % 1000}"
