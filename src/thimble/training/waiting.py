"""Why a run should wait: because somebody asked for it, or because the battery is nearly empty."""

import time
from collections.abc import Callable

from thimble.events import EventLog, ShouldStop
from thimble.models.machine import Battery, battery, count_throttled

LOW_PERCENT, ENOUGH_PERCENT = 10, 15  # of the battery, while nothing charges it
LOOK_SECONDS = 1.0  # while it waits
HEAT_SECONDS = 60.0  # between looks at how often the processor has slowed itself down

ShouldWait = Callable[[], str]


def never_wait() -> str:
    """Go on."""
    return ""


class Waiting:
    """Asks between steps whether to wait, and waits.

    Args:
        should_wait: Says why to wait; empty to go on.
        should_stop: Ends the waiting too.
        log: Hears why it waits, and that it goes on.
        calibration: Says how full the battery is; None where there is none.
    """

    def __init__(
        self,
        should_wait: ShouldWait,
        should_stop: ShouldStop,
        log: EventLog,
        calibration: Callable[[], Battery | None] = battery,
    ) -> None:
        self._should_wait, self._should_stop, self._log, self._look = should_wait, should_stop, log, calibration
        self._throttled, self._looked_at = count_throttled(), time.monotonic()

    def why(self, enough_percent: int = LOW_PERCENT) -> str:
        """Why to wait now; empty if there is no reason."""
        asked = self._should_wait()
        if asked:
            return asked
        found = self._look()
        if found and found.is_discharging and found.percent < enough_percent:
            return f"the battery is at {found.percent} % and nothing charges it"
        return ""

    def wait(self) -> float:
        """Wait until there is no reason any more, or the user wants to leave; the seconds it took."""
        began = time.perf_counter()
        while not self._should_stop() and self.why(ENOUGH_PERCENT):
            time.sleep(LOOK_SECONDS)
        waited = time.perf_counter() - began
        if not self._should_stop():
            self._log.note(f"going on after a pause of {waited:.0f} s")
        return waited

    def watch_heat(self) -> None:
        """Warn once if the processor slows itself down because it is hot; looks once a minute."""
        if self._throttled is None or time.monotonic() - self._looked_at < HEAT_SECONDS:
            return
        self._looked_at = time.monotonic()
        now = count_throttled()
        if now is not None and now > self._throttled:
            self._log.warning("the processor is hot and slows itself down: steps take longer until it is cooler")
            self._throttled = None
