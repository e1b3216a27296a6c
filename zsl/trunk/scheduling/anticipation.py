"""Anticipatory scheduling: delay a pass for jobs that are expected soon and can merge. Pure.

Clients run in a cycle: forward, their own layers, backward, their own layers. Two clients out of phase never merge,
however much they would gain: while the forward of one runs, the other computes or waits with its backward. One short
delay brings them into phase.

The idea is anticipatory scheduling (Iyer and Druschel, SOSP 2001: a disk that idles briefly because the next request
will be near). The delay until a client's next job, and its kind, are estimated per client as TCP estimates round trips
(Jacobson, 1988): a mean and a mean deviation. A delay is worthwhile if, by the means, it is shorter than the time that
is saved by the passes that the expected jobs would otherwise need: clients in step have one such delay in each cycle.
It ends when they have arrived, or when one is overdue.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Hashable
from dataclasses import dataclass, field
from itertools import count

from zsl.trunk.costs import Costs
from zsl.trunk.scheduling.jobs import KINDS
from zsl.trunk.work import Kind

MEAN_GAIN, DEVIATION_GAIN = 1 / 8, 1 / 4  # Jacobson's
# A job is overdue so many mean deviations after its mean, but not before this share of what it saves: to give up early
# costs all of that. Nor later than all of it: then the wait and the loss together are at most twice the loss.
DEVIATIONS, LATE_SHARE = 2.0, 0.1
MOST_SLOWNESS = 4.0  # of a pass beside its cost as measured at start; a first pass may take far longer
MOST_EXPECTED = 16  # jobs considered in one decision

_Pass = tuple[Kind, Hashable]  # jobs of equal kind and merge key can share a pass


@dataclass(slots=True)
class _Estimate:
    """Estimate of a client's next job after an answer of one kind: pass, tokens and delay."""

    next_pass: _Pass
    tokens: int
    mean_seconds: float
    deviation_seconds: float

    def learn(self, next_pass: _Pass, tokens: int, seconds: float) -> None:
        error = seconds - self.mean_seconds
        self.mean_seconds += MEAN_GAIN * error
        self.deviation_seconds += DEVIATION_GAIN * (abs(error) - self.deviation_seconds)
        self.next_pass, self.tokens = next_pass, tokens


_Expected = tuple[float, int, float, int]  # expected time, tie-breaker, overdue time, tokens


@dataclass(slots=True)
class _Client:
    """Estimates of a client, and its expected job."""

    estimates: dict[Kind, _Estimate] = field(default_factory=dict)  # by the answered kind
    answered: tuple[Kind, float] | None = None  # kind and time of its last answer; None after its next job
    expected: tuple[_Pass, _Expected] | None = None


class Anticipation:
    """Estimates when clients send their next jobs, and for which of them a pass should wait."""

    def __init__(self, costs: Costs) -> None:
        self._costs = {kind: traits.cost(costs) for kind, traits in KINDS.items()}
        self._saved_seconds = {kind: traits.saved_seconds(costs) for kind, traits in KINDS.items()}
        self._slowness = dict.fromkeys(KINDS, 1.0)
        self._clients: defaultdict[Hashable, _Client] = defaultdict(_Client)
        self._expected: defaultdict[_Pass, list[_Expected]] = defaultdict(list)  # soonest first
        self._ties = count()

    def ran(self, kind: Kind, tokens: int, seconds: float) -> None:
        """Record the seconds of a pass, which takes longer where others compute on the same cores."""
        slowness = min(seconds / self._costs[kind].seconds(tokens), MOST_SLOWNESS)
        self._slowness[kind] += MEAN_GAIN * (slowness - self._slowness[kind])

    def answered(self, client_id: Hashable, kind: Kind, now: float) -> None:
        """Record an answer to a client with nothing queued."""
        client = self._clients[client_id]
        self._stop_expecting(client)
        client.answered = kind, now
        estimate = client.estimates.get(kind)
        if estimate is not None:
            saved = self._saved_seconds[estimate.next_pass[0]]
            late = min(max(DEVIATIONS * estimate.deviation_seconds, LATE_SHARE * saved), saved)
            when = now + estimate.mean_seconds
            expected = when, next(self._ties), when + late, estimate.tokens
            client.expected = estimate.next_pass, expected
            insort(self._expected[estimate.next_pass], expected)

    def arrived(self, client_id: Hashable, kind: Kind, merge_key: Hashable, tokens: int, now: float) -> None:
        """Record the arrival of a client's job."""
        client = self._clients[client_id]
        self._stop_expecting(client)
        if client.answered is None:
            return
        answered_kind, answered_at = client.answered
        client.answered = None
        seconds = now - answered_at
        estimate = client.estimates.get(answered_kind)
        if estimate is None:
            client.estimates[answered_kind] = _Estimate((kind, merge_key), tokens, seconds, seconds / 2)
        else:
            estimate.learn((kind, merge_key), tokens, seconds)

    def forget(self, client_id: Hashable) -> None:
        """Forget a closed client."""
        client = self._clients.pop(client_id, None)
        if client is not None:
            self._stop_expecting(client)

    def worth_waiting_until(
        self, kind: Kind, merge_key: Hashable, now: float, *, jobs: int, tokens: int, room_tokens: int, since: float
    ) -> float | None:
        """Return the time until which to delay a pass of `jobs` with `tokens`, and room for `room_tokens` more; None if
        it should run now. `since`: the time from which it has been delayed.

        The delay is for the first n expected jobs, with the n of the largest gain: the time that is saved by each pass
        that these would run in if this one ran now, less the delay. From `since` the delay is never longer than the
        time that merging all of the pass saves.
        """
        slowness, cost = self._slowness[kind], self._costs[kind]
        saved = slowness * self._saved_seconds[kind]
        free_at = now + slowness * cost.seconds(tokens)  # if the pass runs now,
        passes, begins = 0, now  # and the passes behind it: how many, and when the last of them begins
        best_gain, until, last = 0.0, None, now
        for number, (expected, _, latest, more) in enumerate(self._next_expected((kind, merge_key), now), start=1):
            room_tokens -= more
            if room_tokens < 0:
                break
            when = max(expected, now)
            if passes and when <= begins:
                free_at += slowness * cost.seconds_per_token * more
            else:
                passes, begins = passes + 1, max(when, free_at)
                free_at = begins + slowness * cost.seconds(more)
            last = max(last, latest)
            gain = passes * saved - (when - now)
            if gain > best_gain:
                best_gain, until = gain, min(last, since + (jobs + number - 1) * saved)
        return until if until is not None and until > now else None

    def _next_expected(self, where: _Pass, now: float) -> list[_Expected]:
        """Return the soonest expected jobs, and remove overdue ones."""
        expected = self._expected.get(where)
        if expected is None:
            return []
        found = 0
        while found < min(len(expected), MOST_EXPECTED):
            if expected[found][2] <= now:
                del expected[found]
            else:
                found += 1
        if not expected:
            del self._expected[where]
        return expected[:found]

    def _stop_expecting(self, client: _Client) -> None:
        if client.expected is None:
            return
        where, entry = client.expected
        client.expected = None
        expected = self._expected.get(where, [])
        place = bisect_left(expected, entry)
        if expected[place : place + 1] != [entry]:
            return  # removed as overdue
        del expected[place]
        if not expected:
            del self._expected[where]
