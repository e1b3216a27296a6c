"""Flow control: limits on the requests and bytes in flight, per session, per tenant and total. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from zsl.errors import OverloadedError
from zsl.trunk.access.tenants import Tenant


@dataclass(frozen=True, slots=True)
class InFlight:
    """Unanswered requests of a session, and the bytes of requests and unread answers: of the session, of its tenant,
    and of all sessions."""

    requests: int
    session_bytes: int
    tenant_bytes: int
    all_bytes: int


@dataclass(frozen=True, slots=True)
class Credit:
    """Limits: `max_requests` and `max_bytes` per session, `max_all_bytes` for all sessions together."""

    max_requests: int
    max_bytes: int
    max_all_bytes: int

    def check(self, nbytes: int, inflight: InFlight, tenant: Tenant | None, *, retry_after_ms: int) -> None:
        """Raise `OverloadedError` if `nbytes` more exceed a limit of the session, its tenant, or the total.

        A request with nothing else in flight is always accepted.
        """
        over_requests = inflight.requests >= self.max_requests
        if over_requests or _is_over(self.max_bytes, inflight.session_bytes, nbytes):
            raise OverloadedError(
                f"the session has {inflight.requests} requests and {inflight.session_bytes} bytes in flight or unread; "
                f"{self.max_requests} and {self.max_bytes} are granted",
                retry_after_ms=retry_after_ms,
            )
        if tenant is not None and _is_over(tenant.max_inflight_bytes, inflight.tenant_bytes, nbytes):
            raise OverloadedError(
                f"tenant {tenant.name} has {inflight.tenant_bytes} bytes in flight; "
                f"{tenant.max_inflight_bytes} are granted",
                retry_after_ms=retry_after_ms,
            )
        if _is_over(self.max_all_bytes, inflight.all_bytes, nbytes):
            raise OverloadedError(
                f"all sessions together have {inflight.all_bytes} bytes in flight or unread",
                retry_after_ms=retry_after_ms,
            )


def _is_over(most: int, inflight: int, more: int) -> bool:
    return inflight > 0 and inflight + more > most
