"""Named places at which a test may have the engine fail, wait or die; nothing happens there otherwise.

    if faults.plan is not None:
        await faults.plan.pause("commit.before_sync")

Invariants
  1. Without a plan a fault point is one truth test, 0.02 µs; there is none for each document or subscriber.
  2. At each point only that happens which could happen there by itself: the process may die at any; others may run
     first, and storage may fail, where the engine waits.

Tests set `plan`; see `tests/reliability/simulation/`.
"""

from typing import Literal, Protocol, get_args

# where the engine waits anyway: a plan may have others run first
PausePoint = Literal[
    "commit.begun",  # the transaction is open, nothing has run
    "commit.before_sync",  # the group has run; COMMIT comes next. Storage may be full, or fail for good
    "commit.after_sync",  # durable, and nobody has been told. What COMMIT says may be that it failed
    "commit.published",  # everybody has been told
    "checkpoint.begun",  # storage may be full
    "publish.passing",  # some of the live queries that a commit touches have run
    "round.running",  # before each long query
    "action.claimed",  # the job is `running`, and its action has not begun
    "action.ran",  # and that is not written down
    "action.recorded",
]
# in plain code
ReachPoint = Literal[
    "mutation.ran",  # its savepoint is open. Storage may undo the whole transaction
    "publish.begun",  # mutations are answered, no live query has run
    "job.due",  # found, not started
    "job.ran",  # its effects are there, its end is not recorded
    "session.received",  # a message, which has had no effect
    "session.answered",  # a mutation is settled, its answer is not in the outbox
    "session.transition",  # a Transition is in the outbox
]

Point = PausePoint | ReachPoint
POINTS: tuple[Point, ...] = (*get_args(PausePoint), *get_args(ReachPoint))


class FaultPlan(Protocol):
    """What is to go wrong, and where."""

    async def pause(self, point: PausePoint) -> None:
        """Return at once, or later, or raise what storage raises, or never return."""

    def reach(self, point: ReachPoint) -> None:
        """Return, or raise what ends the process."""


plan: FaultPlan | None = None  # None but in tests
