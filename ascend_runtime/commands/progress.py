"""Progress output of commands: a bar on a terminal, else a line every ten seconds. Does not import torch.

Texts may contain names from files and servers, so control characters are escaped.
"""

from __future__ import annotations

import sys
import threading
import time
from contextlib import suppress
from typing import TextIO

from tqdm import tqdm

from ..checkpoints.faults import printable, printable_lines

EVERY = 10.0  # seconds between lines
REFRESH = 0.5  # seconds between updates


class ProgressDisplay:
    """Shows the stage of a command, its progress and its remaining time.

    As a context manager, it also updates between two slow steps, and while torch is imported.

    out: default stderr, to keep stdout for a command's result. every: seconds between lines if `out` is not a terminal.
    """

    def __init__(self, out: TextIO | None = None, every: float = EVERY):
        self._out = out or sys.stderr
        self._every = every
        self._terminal = self._out.isatty()
        self._lock = threading.RLock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="progress", daemon=True)
        self._title, self._stage, self._unit, self._note = "", "", "step", ""
        self._done, self._total, self._initial = 0, 0, 0
        self._began = self._printed = time.monotonic()
        self._bar: tqdm | None = None

    def __enter__(self) -> ProgressDisplay:
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._over.set()
        self._thread.join()
        self.end()

    def say(self, text: str) -> None:
        """Prints a line. A closed terminal or pipe is not an error."""
        with self._lock, suppress(OSError):
            self._printed = time.monotonic()
            if self._bar is None:
                print(printable_lines(text), file=self._out, flush=True)
            else:
                tqdm.write(printable_lines(text), file=self._out)

    def refuse(self, error: Exception) -> None:
        """Ends the stage and prints an error."""
        self.end()
        self.say(f"error: {error}")

    def title(self, title: str) -> None:
        """Sets a prefix for the following stages, such as one video of several."""
        with self._lock:
            self.end()
            self._title = title

    def begin(self, stage: str, total: int = 0, done: int = 0, unit: str = "step") -> None:
        """Begins a stage. total: its number of units; 0 if unknown. done: units finished in an earlier run."""
        with self._lock:
            self.end()
            self._stage, self._unit, self._note = stage, unit, ""
            self._total, self._done, self._initial = total, done, done
            self._began = time.monotonic()
            if self._terminal:
                self._bar = tqdm(
                    desc=self._named(), total=total or None, initial=done, unit=unit, unit_scale=unit == "B",
                    file=self._out, leave=False, dynamic_ncols=True,
                )  # fmt: skip

    def step(self, done: int, total: int | None = None) -> None:
        """Sets the number of finished units of this stage."""
        with self._lock:
            self._done, self._total = done, self._total if total is None else total
            if self._bar is not None:
                self._bar.total = self._total or None
                self._bar.update(done - self._bar.n)

    def advance(self, units: int) -> None:
        """Adds finished units."""
        self.step(self._done + units)

    def skip(self) -> None:
        """Adds a unit that was finished in an earlier run, which does not count for the remaining time."""
        with self._lock:
            self._initial += 1
            if self._bar is not None:
                self._bar.initial += 1
            self.advance(1)

    def note(self, text: str, now: bool = False) -> None:
        """Sets a text that describes the current unit, shown after the numbers. now: print a line immediately."""
        with self._lock:
            self._note = printable(text)
            if self._bar is not None:
                self._bar.set_postfix_str(self._note)
            elif now:
                self.say(self._line())

    def finish(self) -> None:
        """Ends the stage and prints a last line."""
        with self._lock:
            line = self._line()
            self.end()
            self.say(line)

    def on_progress(self, stage: str, step: int, total: int) -> None:
        """A hook for the runtime's jobs, which shows the progress of ranks."""
        if stage != self._stage or step < self._done:  # a new stage, or the same stage of the next video
            self.begin(stage, total, unit="B" if stage == "load" else "step")
        self.step(step, total)

    def end(self) -> None:
        """Ends the stage. Must be called before a result is printed."""
        with self._lock:
            if self._bar is not None:
                self._bar.close()
            self._bar, self._stage = None, ""

    def _named(self) -> str:
        return printable(": ".join(filter(None, (self._title, self._stage))))

    def _watch(self) -> None:
        while not self._over.wait(REFRESH):
            with self._lock:
                if self._bar is not None:
                    self._bar.refresh()
                elif self._stage and time.monotonic() - self._printed >= self._every:
                    self.say(self._line())

    def _line(self) -> str:
        """The bar as text: "plain: denoise:  35% 7/20 [00:14<00:26,  2.00s/step]"."""
        seconds = time.monotonic() - self._began
        if not self._total:
            return f"{self._named()}, {tqdm.format_interval(seconds)}"
        return tqdm.format_meter(
            self._done, self._total, seconds, ncols=0, prefix=self._named(), unit=self._unit,
            unit_scale=self._unit == "B", initial=self._initial, postfix=self._note,
        )  # fmt: skip
