"""The bounded memory of a reader."""

from __future__ import annotations

from runstream_query.remembering import Remembered


def test_what_was_not_used_for_longest_goes_first() -> None:
    """Asking for a value counts as using it."""
    memory: Remembered[str, int] = Remembered(100)
    for number in range(10):
        memory.put(f"{number}", number, 10)
    assert memory.get("0") == 0
    memory.put("10", 10, 10)
    assert [key for key in map(str, range(11)) if memory.get(key) is None] == ["1"]


def test_a_value_that_is_put_again_counts_once() -> None:
    """Its size is the new one."""
    memory: Remembered[str, int] = Remembered(100)
    for _ in range(50):
        memory.put("a", 1, 10)
        memory.put("b", 2, 10)
    assert (memory.get("a"), memory.get("b")) == (1, 2)


def test_a_large_value_pushes_nothing_out() -> None:
    """It is not kept."""
    memory: Remembered[str, int] = Remembered(100)
    memory.put("a", 1, 10)
    memory.put("large", 2, 11)
    assert (memory.get("a"), memory.get("large")) == (1, None)
