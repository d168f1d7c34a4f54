"""What `align selftest` measured in, the machine that `align plan` counts with out.

The measurements of this machine lie in the user's cache (`machine_file`); those of another may be named. Those of a CPU
are taken only where they are named, since plans are mostly made for GPUs, and on machines that have none.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from align.errors import UserError
from align.files import make_folder, write_text
from align.plan.speed import BANDWIDTH_GBS, LAYER_US, TFLOPS, Machine

DEFAULT_GIB = 80.0


@dataclass(frozen=True)
class Measured:
    """One device of a machine: `name` and `kind` (cuda, cpu, ...), how many there are, and the fields of `Machine`."""

    name: str
    kind: str
    date: str
    gpus: int
    gpu_gib: float
    tflops: float
    bandwidth_gbs: float
    arrays_gbs: float
    layer_us: float
    link_gbs: float = 0.0


def machine_file() -> Path:
    """Where the measurements of this machine are kept."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "valley-align" / "machine.json"


def keep(measured: Measured, path: Path) -> None:
    """Write measurements to a file. Raises UserError where it cannot be written."""
    make_folder(path.parent)
    write_text(path, json.dumps({"machine": asdict(measured)}, indent=2) + "\n")


def read_measured(path: Path) -> Measured:
    """The measurements in a file of `keep`, or in the JSON of a selftest.

    Raises:
        UserError: there is no such file, or nothing was measured.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["machine"]
        return Measured(**{field.name: found[field.name] for field in fields(Measured)})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"no measurements can be read there ({type(error).__name__}: {error})",
            where=str(path),
            fix="run align selftest on the machine that is planned for, and name its JSON",
        ) from None


def measured_here() -> Measured | None:
    """What was measured of this machine's accelerator; None where it has none, or nothing was measured."""
    path = machine_file()
    if not path.is_file():
        return None
    found = read_measured(path)
    return found if found.kind != "cpu" else None


def machine_of(
    measured: Measured | None,
    gpus: int,
    *,
    gpu_gib: float | None = None,
    tflops: float | None = None,
    bandwidth_gbs: float | None = None,
    layer_us: float | None = None,
) -> Machine:
    """A machine of so many GPUs: what is given, else what was measured, else what is assumed of an H100."""
    if measured is None:
        measured = Measured("", "", "", 0, DEFAULT_GIB, TFLOPS, BANDWIDTH_GBS, 0.0, LAYER_US)
    return Machine(
        gpus,
        gpu_gib=measured.gpu_gib if gpu_gib is None else gpu_gib,
        tflops=measured.tflops if tflops is None else tflops,
        bandwidth_gbs=measured.bandwidth_gbs if bandwidth_gbs is None else bandwidth_gbs,
        # What was measured of arrays holds beside what was measured of weights.
        arrays_gbs=measured.arrays_gbs if bandwidth_gbs is None else 0.0,
        layer_us=measured.layer_us if layer_us is None else layer_us,
        waits=measured.kind == "cpu",
        # A link inside of this machine says nothing about others.
        link_gbs=measured.link_gbs if gpus <= measured.gpus else 0.0,
        measured_on=f"{measured.name}, {measured.date}" if measured.name else "",
    )
