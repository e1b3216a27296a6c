"""Anticipation of jobs: holds a pass back for one that is due and could share it. Pure: the clock is given.

Clients go in a circle: forward, their own layers, backward, their own layers. Two of them that are out of step never
meet, however much they would gain by it: while one's forward runs, the other computes or waits with its backward. A
short wait, once, brings them into step.

This is the idea of anticipatory scheduling (Iyer and Druschel, SOSP 2001: a disk that idles a moment because the next
request will be near). How long a client takes until it comes again, and with what, is learned for each client as TCP
learns round trips (Jacobson, 1988): a mean and a mean deviation. A wait is worth it if, by the means, half of the fixed
cost that the expected jobs share pays for it. It ends when they have come, or when one is later than it ever is.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Hashable
from dataclasses import dataclass, field
from itertools import count

from zsl.trunk.costs import Costs
from zsl.trunk.work import Kind

MEAN_GAIN, DEVIATION_GAIN = 1 / 8, 1 / 4  # Jacobson's
DEVIATIONS = 2.0  # so many mean deviations after its mean a job is given up
WORTHWHILE_SHARE = 0.5  # of the fixed cost that is shared may be spent on waiting
MOST_EXPECTED = 16  # jobs that are looked at for one decision

_Pass = tuple[Kind, Hashable]  # jobs of equal kind and merge key can share a pass


@dataclass(slots=True)
class _Habit:
    """A client's next job after an answer of one kind: its pass, its tokens, and its delay."""

    next_pass: _Pass
    tokens: int
    mean_seconds: float
    deviation_seconds: float

    def learn(self, next_pass: _Pass, tokens: int, seconds: float) -> None:
        error = seconds - self.mean_seconds
        self.mean_seconds += MEAN_GAIN * error
        self.deviation_seconds += DEVIATION_GAIN * (abs(error) - self.deviation_seconds)
        self.next_pass, self.tokens = next_pass, tokens

    @property
    def latest_seconds(self) -> float:
        return self.mean_seconds + DEVIATIONS * self.deviation_seconds


_Expected = tuple[float, int, float, int]  # when, tie, at the latest, tokens


@dataclass(slots=True)
class _Client:
    """A client's habits, and the job that is expected of it."""

    habits: dict[Kind, _Habit] = field(default_factory=dict)  # by the kind that was answered
    answered: tuple[Kind, float] | None = None  # until it comes again
    expected: tuple[_Pass, _Expected] | None = None


class Anticipation:
    """Learns when clients come again. Jobs that share a pass save the fixed part of its cost."""

    def __init__(self, costs: Costs) -> None:
        backward = min(costs.backward.fixed_seconds, costs.backward_from_linear_outputs.fixed_seconds)
        self._fixed_seconds = {Kind.FORWARD: costs.forward.fixed_seconds, Kind.BACKWARD: backward}
        self._clients: defaultdict[Hashable, _Client] = defaultdict(_Client)
        self._expected: defaultdict[_Pass, list[_Expected]] = defaultdict(list)  # the soonest first
        self._ties = count()

    def answered(self, client_id: Hashable, kind: Kind, now: float) -> None:
        """Note that a client with nothing queued is being answered."""
        client = self._clients[client_id]
        self._stop_expecting(client)
        client.answered = kind, now
        habit = client.habits.get(kind)
        if habit is not None:
            expected = now + habit.mean_seconds, next(self._ties), now + habit.latest_seconds, habit.tokens
            client.expected = habit.next_pass, expected
            insort(self._expected[habit.next_pass], expected)

    def arrived(self, client_id: Hashable, kind: Kind, merge_key: Hashable, tokens: int, now: float) -> None:
        """Note that a client's job has come."""
        client = self._clients[client_id]
        self._stop_expecting(client)
        if client.answered is None:
            return
        answered_kind, answered_at = client.answered
        client.answered = None
        seconds = now - answered_at
        habit = client.habits.get(answered_kind)
        if habit is None:
            client.habits[answered_kind] = _Habit((kind, merge_key), tokens, seconds, seconds / 2)
        else:
            habit.learn((kind, merge_key), tokens, seconds)

    def forget(self, client_id: Hashable) -> None:
        """Forget a client that is gone."""
        client = self._clients.pop(client_id, None)
        if client is not None:
            self._stop_expecting(client)

    def worth_waiting_until(self, kind: Kind, merge_key: Hashable, room_tokens: int, now: float) -> float | None:
        """Find the time until which a pass with room for so many more tokens should wait, or None.

        It waits for the first n jobs that are expected, for the n with which most is gained.
        """
        share = WORTHWHILE_SHARE * self._fixed_seconds[kind]
        best_gain, until, last = 0.0, None, now
        for number, (when, _, latest, tokens) in enumerate(self._next_expected((kind, merge_key), now), start=1):
            room_tokens -= tokens
            if room_tokens < 0:
                break
            last = max(last, latest)
            gain = number * share - max(when - now, 0.0)
            if gain > best_gain:
                best_gain, until = gain, last
        return until

    def longest_wait_seconds(self, kind: Kind) -> float:
        """Bound a wait: it is never longer than sharing a pass can save, however many jobs are expected in turn."""
        return self._fixed_seconds[kind]

    def _next_expected(self, where: _Pass, now: float) -> list[_Expected]:
        """List the soonest of the jobs that are expected. Those that are overdue are given up."""
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
            return  # given up
        del expected[place]
        if not expected:
            del self._expected[where]
