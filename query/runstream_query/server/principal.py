"""Who sends a request, and what they may do: one role for everything, and permissions for single experiments.

The role is the upper bound (read: read, write: manage). A permission for an experiment, or the default for all others,
narrows it. A principal with neither is not restricted, and no request of theirs pays for this.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

Role = Literal["read", "write", "admin"]
ROLES: Final[tuple[Role, ...]] = ("read", "write", "admin")
"""Each may do what the ones before it may."""
Permission = Literal["none", "read", "edit", "manage"]
PERMISSIONS: Final[tuple[Permission, ...]] = ("none", "read", "edit", "manage")
"""Each includes the ones before it. edit: log, tag, rename, upload. manage: delete and restore too."""
_BOUND: Final[Mapping[Role, Permission]] = {"read": "read", "write": "manage", "admin": "manage"}


def includes(held: Permission, needed: Permission) -> bool:
    """Whether `held` allows what `needed` names."""
    return PERMISSIONS.index(held) >= PERMISSIONS.index(needed)


@dataclass(frozen=True, slots=True)
class Principal:
    """Who sends a request."""

    name: str
    role: Role
    default: Permission | None = None
    """What they may do with experiments that `experiments` does not name; None: what the role allows."""
    experiments: Mapping[str, Permission] = field(default_factory=dict)
    """By experiment id."""

    def may(self, role: Role) -> bool:
        """Whether this role includes `role`."""
        return ROLES.index(self.role) >= ROLES.index(role)

    @property
    def restricted(self) -> bool:
        """Whether there may be experiments with which this principal may do less than the role says."""
        return self.role != "admin" and (self.default is not None or bool(self.experiments))

    def permission(self, experiment_id: str) -> Permission:
        """What this principal may do with one experiment."""
        bound = _BOUND[self.role]
        if self.role == "admin":
            return bound
        held = self.experiments.get(experiment_id, self.default)
        return bound if held is None or includes(held, bound) else held

    def can(self, needed: Permission, experiment_id: str) -> bool:
        """Whether `needed` is allowed on one experiment."""
        return includes(self.permission(experiment_id), needed)


ANONYMOUS: Final = Principal("-", "admin")
"""Everybody, where authentication is off."""
