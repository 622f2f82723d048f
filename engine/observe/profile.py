"""Where the loop's time goes: by stage of the hot path, by function, by stack.

    off ──the first recording begins──> sampling, every 10 ms or so ──the last one ends──> off

    with recording() as noted:
        ...
    noted.profile()

A timer of the kernel interrupts the loop's thread, whose own stack is then noted. A thread that looks from outside
would have to wait until the loop lets go of the interpreter, which it does in SQLite and when it is idle: that is where
such a thread finds it. Of equal times in Python and in SQLite it saw 24 and 76 %, the interrupt 54 and 46.

Invariants
  1. Nothing is done while nobody records: no timer, no thread, no line in the hot path.
  2. A sample weighs the time since the one before, so a long call in C counts in full.
  3. The samples are spread at random around their interval: work with a rhythm of its own is not met in step.
  4. A recording is bounded: past `_STACK_COUNT_MAX` different stacks, what is new goes by its innermost frame.

Only the main thread can be interrupted: an engine whose loop is elsewhere cannot be profiled from inside.
"""

import asyncio
import dis
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import CodeType, FrameType

import msgspec

from engine.clock import cpu_clock, seeded_random
from engine.errors import Overloaded
from engine.functions.outcomes import Call
from engine.live.live_query import LiveQuery
from engine.observe.stages import DISK, IDLE, STAGES, is_idle, is_in, is_library, is_own, label_of, stage_of

_INTERVAL_SECONDS = 0.01  # costs a busy loop 1 % (CPU in pairs); what takes 1 % of 10 s is met ten times
_LATE_SECONDS = 0.0002  # more than reading a socket takes, which has no frame of its own
_LOST_SECONDS = 0.1  # after which the timer starts anew, if an exception has hit the sampler itself
_STACK_COUNT_MAX = 10_000
_STACK_DEPTH_MAX = 128  # frames, the innermost
_RECORDING_COUNT_MAX = 16  # at once: each is one more entry per sample
_RUNNER, _CONNECTIONS, _PUBLISHER = "functions/runner.py", "storage/connections.py", "live/publisher.py"

_RESUME = dis.opmap["RESUME"]
_now = cpu_clock()


class Stage(msgspec.Struct, frozen=True, rename="camel"):
    """One stage's part of the time."""

    name: str
    seconds: float
    sample_count: int


class Ran(msgspec.Struct, frozen=True, rename="camel"):
    """One function's part of the time, with all that was done for it on the loop inside of its runs."""

    path: str
    kind: str  # query, re-run, mutation, action
    seconds: float
    own_seconds: float  # of them in the app's code
    sql_seconds: float
    sample_count: int


class Profile(msgspec.Struct, frozen=True, rename="camel"):
    """Where the time of a loop went."""

    seconds: float
    sample_count: int
    sampler_seconds: float  # what the sampler took of it, by its own watch
    stages: list[Stage]  # in the order of the hot path; together all of the time
    functions: list[Ran]  # the one that took most first
    longest_ms: float  # that the loop was held: whatever came meanwhile waited so long
    longest_in: str  # where most of that was spent; empty: it was never held for as long as two samples are apart
    stacks: dict[str, float]  # `outermost;…;innermost` → seconds


class Sample(msgspec.Struct, frozen=True):
    """What the loop was at. Equal samples are counted together."""

    codes: tuple[CodeType, ...]  # innermost first
    path: str = ""  # of the function whose run it was; empty: of none
    kind: str = ""  # as in `Ran`
    waits_for: str = ""  # IDLE or DISK; empty: it was busy


class Weight:
    """How often and how long."""

    __slots__ = ("sample_count", "seconds")

    def __init__(self) -> None:
        self.seconds, self.sample_count = 0.0, 0

    def add(self, seconds: float, sample_count: int = 1) -> None:
        self.seconds += seconds
        self.sample_count += sample_count


class Recording:
    """What is noted from its start on."""

    def __init__(self) -> None:
        self._weights: dict[Sample, Weight] = {}
        self._sampler_seconds = 0.0
        self._longest_seconds, self._longest_in = 0.0, ""

    def add(self, sample: Sample, seconds: float, sampler_seconds: float) -> None:
        if len(self._weights) >= _STACK_COUNT_MAX and sample not in self._weights:  # 4
            sample = Sample(sample.codes[:1], sample.path, sample.kind, sample.waits_for)
        self._weights.setdefault(sample, Weight()).add(seconds)
        self._sampler_seconds += sampler_seconds

    def held(self, seconds: float, at: dict[Sample, Weight]) -> None:
        """The loop has turned again."""
        if seconds > self._longest_seconds:
            self._longest_seconds = seconds
            self._longest_in = _label_of(max(at, key=lambda sample: at[sample].seconds))

    def profile(self) -> Profile:
        """What was noted so far."""
        stages = {name: Weight() for name in STAGES}
        functions: dict[tuple[str, str], tuple[Weight, Weight, Weight]] = {}  # all, own, SQL
        stacks: dict[str, float] = {}
        for sample, weight in self._weights.items():
            stage = sample.waits_for or stage_of(sample.codes)
            stages[stage].add(weight.seconds, weight.sample_count)
            if sample.path:
                key = sample.path, sample.kind
                whole, own, sql = functions.setdefault(key, (Weight(), Weight(), Weight()))
                whole.add(weight.seconds, weight.sample_count)
                if is_own(sample.codes):
                    own.add(weight.seconds)
                elif stage == "SQL":
                    sql.add(weight.seconds)
            stack = ";".join(
                [*map(label_of, reversed(sample.codes)), *([sample.waits_for] if sample.waits_for else [])]
            )
            stacks[stack] = stacks.get(stack, 0.0) + weight.seconds
        ran = [
            Ran(path, kind, whole.seconds, own.seconds, sql.seconds, whole.sample_count)
            for (path, kind), (whole, own, sql) in functions.items()
        ]
        return Profile(
            seconds=sum(weight.seconds for weight in stages.values()),
            sample_count=sum(weight.sample_count for weight in stages.values()),
            sampler_seconds=self._sampler_seconds,
            stages=[Stage(name, weight.seconds, weight.sample_count) for name, weight in stages.items()],
            functions=sorted(ran, key=lambda function: -function.seconds),
            longest_ms=self._longest_seconds * 1_000,
            longest_in=self._longest_in,
            stacks=stacks,
        )


class _Sampler:
    """One for the process, as it has one such timer and one main thread."""

    def __init__(self) -> None:
        self._recordings: list[Recording] = []
        self._random = seeded_random(b"profile")
        self._sampled_at = self._due_at = 0.0  # the last sample; the next one
        self._loop: asyncio.AbstractEventLoop  # set by `_start`
        self._held: dict[Sample, Weight] | None = None  # the samples since the loop turned last; None: it waits
        self._held_since = 0.0

    def begin(self) -> Recording:
        if len(self._recordings) >= _RECORDING_COUNT_MAX:
            raise Overloaded(f"profiles under way: {len(self._recordings)}, {_RECORDING_COUNT_MAX} allowed. Try again.")
        if not self._recordings:
            self._start()
        recording = Recording()
        self._recordings.append(recording)
        return recording

    def end(self, recording: Recording) -> None:
        self._recordings.remove(recording)
        if not self._recordings:
            signal.setitimer(signal.ITIMER_REAL, 0)

    def _start(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise Overloaded("only a loop in the main thread can be profiled.")
        if signal.getsignal(signal.SIGALRM) not in (signal.SIG_DFL, None, self._interrupt):
            raise Overloaded("SIGALRM is used by somebody else in this process: it cannot be profiled meanwhile.")
        self._loop, self._held = asyncio.get_running_loop(), None
        signal.signal(signal.SIGALRM, self._interrupt)  # for good: a late one would end the process
        signal.siginterrupt(signal.SIGALRM, False)  # calls in C that do not expect it go on
        self._sampled_at = _now()
        self._arm()

    def _arm(self) -> None:
        delay_seconds = _INTERVAL_SECONDS * (0.5 + self._random.random())  # 3
        self._due_at = self._sampled_at + delay_seconds
        signal.setitimer(signal.ITIMER_REAL, delay_seconds, _LOST_SECONDS)

    def _interrupt(self, signal_number: int, frame: FrameType | None) -> None:
        """Called between two steps of the interpreter, wherever the loop's thread is."""
        if not self._recordings:
            return
        began = _now()
        try:
            if frame is not None and began > self._due_at + _LATE_SECONDS and _ends_a_wait(frame):
                frame = frame.f_back
            sample, seconds = _sample_of(frame), began - self._sampled_at
            if sample.waits_for:
                self._held = None
            else:
                self._hold(sample, seconds, began)
            self._sampled_at = ended = _now()
            for recording in self._recordings:
                recording.add(sample, ended - began + seconds, ended - began)
        except RecursionError:
            pass  # the app's code is about to fail of it: not by this
        finally:
            self._arm()

    def _hold(self, sample: Sample, seconds: float, now: float) -> None:
        """Measure how long it takes until the loop turns."""
        if self._held is None:
            self._held, self._held_since = {}, min(self._due_at, now)  # it is late by a long call in C
            self._loop.call_soon(self._turned, self._held)
        self._held.setdefault(sample, Weight()).add(seconds)

    def _turned(self, held: dict[Sample, Weight]) -> None:
        if self._held is held:
            self._held = None
            for recording in self._recordings:
                recording.held(_now() - self._held_since, held)


def profile_text(profile: Profile) -> str:
    """For people: the stages, then the functions, those that take most first."""
    seconds = profile.seconds or 1.0

    def percent(part: float) -> str:
        return f"{100 * part / seconds:5.1f} %"

    rows = [("", "of the time", "samples")]
    rows += [(stage.name, percent(stage.seconds), f"{stage.sample_count:,}") for stage in profile.stages]
    lines = [
        f"{profile.seconds:.1f} s, {profile.sample_count:,} samples; taking them: {percent(profile.sampler_seconds)}",
        *(f"{name:20}{share:>12}{count:>10}" for name, share, count in rows),
    ]
    if profile.functions:
        width = max(len(f"{ran.kind:9}{ran.path}") for ran in profile.functions)
        lines += ["", f"{'':{width}}{'of the time':>12}{'own code':>12}{'SQL':>12}{'samples':>10}"]
        for ran in profile.functions:
            parts = "".join(f"{percent(part):>12}" for part in (ran.seconds, ran.own_seconds, ran.sql_seconds))
            lines.append(f"{f'{ran.kind:9}{ran.path}':{width}}{parts}{ran.sample_count:>10,}")
    lines += [
        "",
        f"The loop was held for {profile.longest_ms:.1f} ms at most: {profile.longest_in or 'nothing took long'}.",
    ]
    return "\n".join(lines)


def stacks_of(profile: Profile) -> str:
    """One stack a line with its microseconds, as the tools for flame graphs read them ("collapsed")."""
    return "".join(f"{stack} {round(seconds * 1e6)}\n" for stack, seconds in sorted(profile.stacks.items()))


_sampler = _Sampler()


@contextmanager
def recording() -> Iterator[Recording]:
    """Note what the loop does during this block, which runs on it. Raises Overloaded when that cannot be."""
    begun = _sampler.begin()
    try:
        yield begun
    finally:
        _sampler.end(begun)


def _sample_of(frame: FrameType | None) -> Sample:
    codes: list[CodeType] = []
    path = kind = ""
    while frame is not None and len(codes) < _STACK_DEPTH_MAX:
        codes.append(frame.f_code)
        if not path and is_in(frame.f_code, _RUNNER):
            call = frame.f_locals.get("call")
            if isinstance(call, Call):
                path, kind = call.function.path, call.function.kind
        elif kind == "query" and is_in(frame.f_code, _PUBLISHER):
            live_query = frame.f_locals.get("live_query")
            if isinstance(live_query, LiveQuery) and live_query.result is not None:
                kind = "re-run"
        frame = frame.f_back
    waits = not path and bool(codes) and is_idle(codes[0])  # a function may wait too: that holds the loop
    return Sample(tuple(codes), path, kind, "" if not waits else DISK if _is_storage_at_work() else IDLE)


def _ends_a_wait(frame: FrameType) -> bool:
    """Whether a callback is at its very first step: an interrupt that is late and meets it there came in the wait."""
    outside = frame.f_back
    has_begun = frame.f_code.co_code[frame.f_lasti] != _RESUME
    return outside is not None and is_idle(outside.f_code) and not has_begun


def _is_storage_at_work() -> bool:
    """Whether another thread is in a commit or a checkpoint."""
    me = threading.get_ident()
    return any(is_in(frame.f_code, _CONNECTIONS) for thread, frame in sys._current_frames().items() if thread != me)


def _label_of(sample: Sample) -> str:
    if sample.path:
        return f"{sample.kind} {sample.path}"
    return next((label_of(code) for code in sample.codes if not is_library(code)), "a library")
