"""How kafka-python says that something is amiss for now: brokers away, a group that rebalances, a topic that goes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kafka.structs import TopicPartition

__all__ = ["bounds", "is_transient"]


def bounds(ask: Callable[..., Any], partitions: Sequence[TopicPartition], timeout_ms: int) -> dict[TopicPartition, Any]:
    """What `beginning_offsets` or `end_offsets` answers.

    Raises:
        UnknownTopicOrPartitionError: the brokers say nothing of one of them, as of a topic that is just being deleted.
    """
    from kafka import errors

    try:
        found: dict[TopicPartition, Any] = ask(partitions, timeout_ms=timeout_ms)
    except KeyError as exc:  # kafka-python looks up what was not answered
        raise errors.UnknownTopicOrPartitionError(f"no offsets of {exc}") from exc
    return found


def is_transient(exc: BaseException) -> bool:
    """Whether the brokers are away, changing over or rebalancing."""
    from kafka import errors

    transient = (
        errors.RetriableError,
        errors.KafkaConnectionError,
        errors.KafkaTimeoutError,
        errors.NodeNotReadyError,
        errors.CommitFailedError,
        errors.RebalanceInProgressError,
        errors.IllegalGenerationError,
        errors.UnknownMemberIdError,
        errors.SaslAuthenticationFailedError,
        OSError,
    )
    # A corrupt record counts as retriable there, but asking again gives the same.
    return (isinstance(exc, transient) or bool(getattr(exc, "retriable", False))) and not isinstance(
        exc, errors.CorruptRecordError
    )
