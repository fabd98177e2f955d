"""Lets a consumer join its group although nobody waits just when the brokers answer.

kafka-python 3.0.12 throws an assignment away that arrives between two calls of `poll` and joins anew, which makes every
other member join anew too, three seconds later. A worker polls for milliseconds at a time; under load, or where a group
has many members, such a group was seen to rebalance for ever.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kafka import KafkaConsumer

__all__ = ["keep_assignments"]


def keep_assignments(consumer: KafkaConsumer) -> None:
    """From now on an assignment waits for the next `poll`. Before the consumer's first."""
    from kafka.coordinator.base import MemberState

    coordinator = consumer._coordinator
    join = coordinator._do_join_and_sync_async
    kept: tuple[object, bytes] | None = None
    """Generation and assignment of the last join."""

    async def join_or_keep() -> bytes:
        nonlocal kept
        taken = coordinator.state is not MemberState.REBALANCING
        if kept is None or taken or kept[0] is not coordinator._generation:
            kept = None
            assignment = await join()
            kept = coordinator._generation, assignment
        return kept[1]

    coordinator._do_join_and_sync_async = join_or_keep
