"""The runs of the scoreboard in a file, one JSON object a line."""

from __future__ import annotations

import datetime
import fcntl
import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from training import Run


@dataclass(frozen=True)
class Setting:
    """What decides the losses of a run.

    Args:
        task: The task.
        entrant: The optimizer.
        settings: Its settings except for the next two.
        lr: The peak learning rate.
        momentum: The momentum.
        seed: The seed.
        steps: The number of steps.
    """

    task: str
    entrant: str
    settings: str
    lr: float
    momentum: float
    seed: int
    steps: int


def machine() -> dict[str, Any]:
    """Return what the times of a run depend on."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].partition(":")[2].strip() if names else cpu
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }


class Records:
    """The finished runs.

    Several processes may add to one file: each line is written at once, at the end.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.runs: dict[Setting, Run] = {}
        self.machines: dict[Setting, dict[str, Any]] = {}
        self.times: list[dict[str, Any]] = []
        self.read()

    def read(self) -> None:
        """Read what is in the file by now."""
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        self.times.clear()
        for line in lines:
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue  # a killed process left half a line: the run counts as missing
            if "times" in record:
                self.times.append(record)
            else:
                setting = Setting(**record["setting"])
                self.runs[setting] = Run(**record["run"])
                self.machines[setting] = record["machine"]

    def add(self, setting: Setting, run: Run) -> None:
        """Add a finished run."""
        self.runs[setting], self.machines[setting] = run, machine()
        self._write(
            {"setting": asdict(setting), "run": asdict(run), "machine": self.machines[setting]}
        )

    def add_times(self, times: dict[str, list[float]]) -> None:
        """Add the seconds of steps of each entrant, in the same rounds."""
        record = {"times": times, "machine": machine()}
        self.times.append(record)
        self._write(record)

    def _write(self, record: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(max(0, file.tell() - 1))
            cut_off = file.read(1) not in ("", "\n")
            file.write("\n" * cut_off + json.dumps(record) + "\n")


@contextmanager
def claimed(path: Path, what: str) -> Iterator[bool]:
    """Yield whether no other process works on something; a dead process works on nothing.

    Args:
        path: The file of the records.
        what: What is worked on.
    """
    name = hashlib.sha256(f"{path.resolve()} {what}".encode()).hexdigest()[:16]
    with (Path(tempfile.gettempdir()) / f"scoreboard-{name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
