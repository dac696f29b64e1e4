"""The contract tests as one process beside the other tests: of an environment of their own, and mostly on one core."""

from __future__ import annotations

import subprocess
import tempfile

import contract


class ContractRun:
    """Begun when it is made, so that other tests run meanwhile; with less of the processor where that is short."""

    def __init__(self):
        self.problem = contract.why_not()
        self._output = tempfile.TemporaryFile()
        command = ["nice", "-n", "5", contract.PYTHON, contract.RUN, "-rs"]
        if not self.problem:
            self._process = subprocess.Popen(command, stdout=self._output, stderr=subprocess.STDOUT)

    def result(self, timeout: float) -> tuple[int, str]:
        """Its exit code and what it printed, when it is done."""
        code = self._process.wait(timeout)
        self._output.seek(0)
        return code, self._output.read().decode()

    def end(self) -> None:
        """Ends it if it still runs."""
        if not self.problem and self._process.poll() is None:
            self._process.terminate()
            self._process.wait()
        self._output.close()
