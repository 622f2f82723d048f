"""How long functions of the model test hold the loop: as long as they say, however slow the machine is.

What runs long is then a matter of what is asked, not of luck.
"""

_held_seconds = 0.0


def hold(seconds: float) -> None:
    """Hold the loop for so long."""
    global _held_seconds
    _held_seconds += seconds


def cpu() -> float:
    """Seconds, as `engine.clock.cpu_clock` measures them."""
    return _held_seconds
