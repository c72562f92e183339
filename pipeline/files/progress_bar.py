"""Progress of long work: a bar on a terminal, and a line a minute in pipes and logs."""

import sys
import time
from typing import Any

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 60


class ProgressBar(tqdm):
    """tqdm's bar on stderr, which without a terminal prints whole lines, one a minute.

    Work of less than a minute prints nothing there.
    """

    def __init__(self, **settings: Any):
        self.terminal = sys.stderr.isatty()
        self.printed = time.monotonic()
        super().__init__(file=sys.stderr, dynamic_ncols=True, **settings)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Show the bar, or print it as a line if the last one is a minute old."""
        if self.terminal:
            super().display(msg, pos)
        elif time.monotonic() - self.printed >= SECONDS_BETWEEN_LINES:
            self.printed = time.monotonic()
            print(str(self) if msg is None else msg, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Remove the bar, or leave it; without a terminal there is nothing to remove."""
        if not self.terminal:
            self.disable = True
        super().close()
