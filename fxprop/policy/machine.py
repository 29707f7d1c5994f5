"""How fast this machine is at what backwards are made of, as the cost model counts it.

Makes of CPU differ in how long memory and the several kernels take beside a large product of matrices.
`fxprop.calibrate` measures and writes the four numbers; until then those of one x86 CPU stand.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from fxprop.errors import InputError

# a file in place of the one in the cache folder; empty: none
VARIABLE = "FXPROP_MACHINE"


@dataclass(frozen=True)
class Machine:
    """Times, each in that of one FLOP of a large product of matrices in float32."""

    name: str
    # an entry of a tensor that is moved between memory and core
    entry: float = 70.0
    # a FLOP of a convolution: with a larger kernel, with a 1x1 kernel, depthwise
    convolution: float = 1.0
    pointwise: float = 1.0
    depthwise: float = 25.0


# fitted to the guide's eight models: see examples/benchmarks/predictions.py
USUAL = Machine("2-core x86 CPU, float32")


def machine() -> Machine:
    """What was measured of this machine with as many threads, or `USUAL`.

    Raises InputError for a file that is none of `calibrate`.
    """
    file = machines_file()
    return USUAL if file is None else _read(file).get(this_machine(), USUAL)


def remember(measured: Machine) -> Path | None:
    """Write the numbers of this machine into the file, beside those of others; None where there is none."""
    file = machines_file()
    if file is None:
        return None
    machines = {**_read(file), measured.name: measured}
    file.parent.mkdir(parents=True, exist_ok=True)
    # whole or not at all: others may be reading
    part = file.with_name(f"{file.name}.{os.getpid()}")
    part.write_text(json.dumps([asdict(of) for of in machines.values()], indent=1), encoding="utf-8")
    part.replace(file)
    _read.cache_clear()
    return file


def machines_file() -> Path | None:
    """Where numbers are kept, whether it exists or not."""
    given = os.environ.get(VARIABLE)
    if given is not None:
        return Path(given) if given else None
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "fxprop" / "machines.json"


def this_machine() -> str:
    """The processor and the threads that torch uses of it."""
    threads = torch.get_num_threads()
    return f"{_processor()}, {threads} thread{'s' * (threads > 1)}, float32"


@functools.cache
def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    # virtual machines often say no more than "AMD EPYC"
    names = ("model name", "cpu family", "model")
    found = [re.search(rf"^{name}\s*: (.+)$", text, re.MULTILINE) for name in names]
    if not all(found):
        return platform.processor() or platform.machine()
    name, family, model = (match[1] for match in found if match)
    return f"{name} (family {family}, model {model})"


@functools.cache
def _read(file: Path) -> Mapping[str, Machine]:
    try:
        text = file.read_text(encoding="utf-8")
    except OSError:
        return {}
    try:
        machines = [Machine(**entry) for entry in json.loads(text)]
    except (ValueError, TypeError) as error:
        raise InputError(
            f"{file} does not hold what `fxprop calibrate` measures ({error}); delete it, and calibrate"
        ) from error
    return {of.name: of for of in machines}
