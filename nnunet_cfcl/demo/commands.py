"""Runner of the demo's commands: their output goes to log files, their lines of progress to the screen."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunet_cfcl.errors import UserError

SHOWN = re.compile(r"retraining epoch|Epoch \d+ *$|Phase 3|Pseudo dice|Mean Validation Dice|WARNING: the")


@dataclass(frozen=True)
class Commands:
    """Runner of commands of this environment in the demo's nnU-Net folders.

    Attributes:
        folder: folder of the demo.
        environment: environment variables of the commands.
        name: name of the model whose commands these are; it marks the lines of progress and the log file.
    """

    folder: Path
    environment: Mapping[str, str]
    name: str = ""

    @property
    def log(self) -> Path:
        """File with the whole output."""
        return self.folder / (f"log_{self.name}.txt" if self.name else "log.txt")

    def run(self, name: str, *arguments: str, **variables: str) -> float:
        """Run a console script of this environment and print its lines of progress.

        Args:
            name: name of the script.
            arguments: its arguments.
            variables: further environment variables.

        Returns:
            Duration in seconds.

        Raises:
            UserError: the command failed; the message has its last line and the log file.
        """
        script = Path(sys.executable).with_name(name)
        command = [str(script) if script.exists() else name, *arguments]
        started = time.perf_counter()
        with open(self.log, "a") as file:
            file.write(f"\n$ {' '.join([name, *arguments])}\n")
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                env={**self.environment, **variables},
            )
            assert process.stdout is not None
            last = self._follow(process.stdout, file)
        if process.wait() != 0:
            raise UserError(f"{name} {' '.join(arguments)} failed ({last})", f"read the whole output in {self.log}")
        return time.perf_counter() - started

    def _follow(self, lines: Iterable[str], file: Any) -> str:
        last, mark = "", f"[{self.name}] " if self.name else ""
        for line in lines:
            file.write(line)
            file.flush()
            last = line.strip() or last
            if SHOWN.search(line):
                # without nnU-Net's time stamp
                print(f"      {mark}{re.sub(r'^[0-9-]+ [0-9:.]+ *: *', '', line.strip())}", flush=True)
        return last


@contextmanager
def step(title: str) -> Iterator[None]:
    """Print the title of a step, and its duration at the end."""
    print(f"==> {title}", flush=True)
    started = time.perf_counter()
    yield
    print(f"    {title.partition(' (')[0]}: done in {time.perf_counter() - started:.0f} s", flush=True)
