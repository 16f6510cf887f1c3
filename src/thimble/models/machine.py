"""What this machine can do, as measured, and kept for a while so that nothing is measured twice; and its memory.

Knows files and figures; what measures is given to it, since a product needs a framework.
"""

import contextlib
import functools
import json
import math
import os
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from thimble.files.atomic import write_atomic

CGROUP = Path("/sys/fs/cgroup")
CPUS = Path("/sys/devices/system/cpu")
# Of control groups, with what is used of them: v2, at which a process is ended or slowed down, and v1.
MEMORY_LIMITS = (
    ("memory.max", "memory.current"), ("memory.high", "memory.current"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes"),
)  # fmt: skip
STALE_AFTER_SECONDS = 7 * 24 * 3600
LOADED = 0.15  # share of the cores that others took: what was measured beside them is too low
STALE_AFTER_SECONDS_LOADED = 60  # so that it is not measured again within one command
MOST_REMEMBERED = 32  # sets of cores, quotas and versions
DISK_SAMPLE_BYTES = 1 << 26


def prepare_threads() -> None:
    """Keep torch's threads from spinning while they wait; to be called before torch is first imported.

    On a machine that does other work too spinning costs far more than it saves, and steals the cores of our own
    threads. A user's own setting is kept.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")


@dataclass(frozen=True)
class Machine:
    """Rates of this machine."""

    name: str  # of the processor
    cores: int  # that this process may use
    # operations per second of a large product on all cores, by `fp32`, `bf16` and, where there are instructions for it,
    # `int8`
    flops: Mapping[str, float]
    copy_bytes: float  # bytes per second read or written while memory is copied
    measured: float  # when, seconds since 1970
    load: float = 0.0  # share of the cores that other processes took meanwhile, 0 to 1

    @property
    def is_loaded(self) -> bool:
        """Whether other processes were in the way when it was measured."""
        return self.load > LOADED

    @property
    def stale_after_seconds(self) -> int:
        """How long the rates are worth remembering."""
        return STALE_AFTER_SECONDS_LOADED if self.is_loaded else STALE_AFTER_SECONDS

    def best_of(self, other: "Machine") -> "Machine":
        """The higher of two measurements of each rate, both taken under load, which only lowers what is measured."""
        flops = {name: max(rate, other.flops.get(name, 0.0)) for name, rate in {**other.flops, **self.flops}.items()}
        load, copy_bytes = min(self.load, other.load), max(self.copy_bytes, other.copy_bytes)
        return replace(self, flops=flops, copy_bytes=copy_bytes, load=load)


def processor() -> tuple[str, frozenset[str]]:
    """Name and instruction sets of the processor, as far as the system tells them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "unknown processor", frozenset()
    found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in reversed(lines))}
    return found.get("model name", "unknown processor"), frozenset(found.get("flags", "").split())


def cache_folder() -> Path:
    """Where measurements are kept between runs; there may be no such place."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(home):  # as the XDG specification has it
        home = os.path.join(os.path.expanduser("~"), ".cache")
    if not home.startswith("~"):
        return Path(home) / "thimble"
    # A user without a home. Anybody may have made a folder of a name that is known in a place for all.
    with contextlib.suppress(OSError):
        folder = Path(tempfile.gettempdir()) / f"thimble-{os.getuid() if hasattr(os, 'getuid') else 'cache'}"
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022:
            return folder
    return Path(os.devnull) / "thimble"


def remembered(key: str, measure: Callable[[], Machine], is_fresh: bool = False) -> Machine:
    """What was measured within the last week under the same key (processor, cores, quota, versions), else what is now.

    What was measured beside other work holds for a minute: then the higher rates of both measurements are kept. If
    `is_fresh`, what is remembered counts for nothing.
    """
    path, now = cache_folder() / "machine.json", time.time()
    saved = {} if is_fresh else {name: it for name, it in _read(path).items() if 0 <= now - it.measured}
    known = saved.get(key)
    if known and now - known.measured < known.stale_after_seconds:
        return known
    machine = measure()
    if known and known.is_loaded and machine.is_loaded and now - known.measured < STALE_AFTER_SECONDS:
        machine = machine.best_of(known)
    others = (item for item in (_read(path) if is_fresh else saved).items() if item[0] != key)
    latest = sorted(others, key=lambda item: item[1].measured)[1 - MOST_REMEMBERED :]
    _write(path, {**dict(latest), key: machine})
    return machine


def _read(path: Path) -> dict[str, Machine]:
    """What is remembered, by key; nothing that another version wrote otherwise."""
    found = {}
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        for key, values in json.loads(path.read_text())["machines"].items():
            with contextlib.suppress(KeyError, TypeError, AttributeError):
                machine = Machine(**{field.name: values[field.name] for field in fields(Machine)})
                if _is_sound(machine):
                    found[key] = machine
    return found


def _is_sound(machine: Machine) -> bool:
    """Whether rates can be reckoned with; a TypeError or an AttributeError if some are none."""
    rates = (machine.flops["fp32"], *machine.flops.values(), machine.copy_bytes)
    return all(0 < rate < math.inf for rate in rates) and 0 <= machine.load <= 1 and machine.measured < math.inf


def _write(path: Path, machines: Mapping[str, Machine]) -> None:
    with contextlib.suppress(OSError):  # a home that cannot be written: measured again next time
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = {key: asdict(machine) for key, machine in machines.items()}
        write_atomic(path, [json.dumps({"machines": kept}).encode()])


def core_set() -> str:
    """The cores this process may use, and its quota of their time: `0-3`, or `0,2 for 1.5 cores' time`."""
    if not hasattr(os, "sched_getaffinity"):
        return str(os.cpu_count())
    cores = sorted(os.sched_getaffinity(0))
    starts = [core for core in cores if core - 1 not in cores]
    ends = [core for core in cores if core + 1 not in cores]
    ranges = ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))
    return ranges + (f" for {quota_cores():g} cores' time" if math.isfinite(quota_cores()) else "")


class LoadMeter:
    """Measures which share of the cores other processes take, from when it is made."""

    def __init__(self) -> None:
        self._busy, self._own, self._began = busy_seconds(), time.process_time(), time.perf_counter()

    def share(self) -> float:
        """The share up to now, 0 to 1; where the system does not tell, that of the last minute."""
        busy, own = busy_seconds(), time.process_time() - self._own
        if busy is None or self._busy is None:
            load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
            return min(1.0, load / (os.cpu_count() or 1))
        seconds = (time.perf_counter() - self._began) * _count_cores()
        return min(1.0, max(0.0, busy - self._busy - own) / seconds) if seconds else 0.0


def _count_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def busy_seconds() -> float | None:
    """Seconds that the cores of this process were at work for anybody since the system began; None if untold."""
    try:
        lines = Path("/proc/stat").read_text().splitlines()
        cores = {f"cpu{core}" for core in os.sched_getaffinity(0)}
        ticks = os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError):  # not Linux
        return None
    counts = [list(map(int, line.split()[1:9])) for line in lines if line.split(" ", 1)[0] in cores]
    # user, nice, system, irq, softirq, and what a hypervisor gave to others
    return sum(sum(count[:3]) + sum(count[5:8]) for count in counts) / ticks if counts else None


def disk_bytes_per_second(path: Path) -> float:
    """How fast a file is read that is not in memory: a piece of it is dropped from memory first, where that works."""
    with path.open("rb", buffering=0) as file:
        size = min(DISK_SAMPLE_BYTES, path.stat().st_size)
        start = (path.stat().st_size - size) // 2
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), start, size, os.POSIX_FADV_DONTNEED)
        file.seek(start)
        began, left = time.perf_counter(), size
        while left > 0 and (piece := file.read(min(left, 1 << 22))):
            left -= len(piece)
        return (size - left) / max(time.perf_counter() - began, 1e-6)


def available_bytes() -> int:
    """Memory this process may still take: what the system has free, or less if a control group limits it."""
    free = _unlimited_bytes()
    for folder in _control_groups("memory"):
        for limit, used in MEMORY_LIMITS:
            try:
                allowed = int((folder / limit).read_text()) - int((folder / used).read_text()) + _cached_bytes(folder)
            except (OSError, ValueError):  # no such group, or its limit is "max"
                continue
            free = min(free, max(allowed, 0))
    return int(min(free, _address_bytes()))


def _address_bytes() -> float:
    """Addresses this process may still take, where `ulimit -v` limits them."""
    try:
        import resource

        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except (ImportError, OSError, ValueError):  # not Linux
        return math.inf
    return math.inf if limit == resource.RLIM_INFINITY else max(0, limit - taken)


def peak_memory_bytes() -> int:
    """Largest resident size of this process so far, memory-mapped pages included; 0 where the system does not say."""
    try:
        import resource
    except ImportError:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@functools.cache
def usable_cores() -> int:
    """Cores this process may use: those that it may run on, each once whatever threads it has, and as many whole ones
    of them as a quota of time allows; at least one.
    """
    if not hasattr(os, "sched_getaffinity"):
        return max(1, int(min(os.cpu_count() or 1, quota_cores())))
    cores = set()
    for cpu in os.sched_getaffinity(0):
        try:
            cores.add((CPUS / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text().strip())
        except OSError:  # not told
            cores.add(str(cpu))
    return max(1, int(min(len(cores), quota_cores())))


@functools.cache
def quota_cores() -> float:
    """Cores' worth of time that control groups let this process have, as a container gets; infinity without a quota."""
    found = math.inf
    for folder in _control_groups("cpu"):
        with contextlib.suppress(OSError, ValueError, ZeroDivisionError):  # no such group, or its quota is "max"
            quota, period = map(int, (folder / "cpu.max").read_text().split())
            found = min(found, quota / period)
        with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
            quota, period = (int((folder / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
            found = min(found, quota / period if quota > 0 else math.inf)
    return found


def _control_groups(controller: str) -> list[Path]:
    """Folders of the groups that may limit this process in `memory` or `cpu`: its own and all above, v1 and v2."""
    folders = [CGROUP, CGROUP / controller]
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, kinds, path = line.split(":", 2)
            if not kinds or controller in kinds.split(","):
                own = (CGROUP / controller if kinds else CGROUP) / path.lstrip("/")
                folders += [place for place in (own, *own.parents) if CGROUP in place.parents]
    return folders


def _cached_bytes(folder: Path) -> int:
    """Pages of files that a group is charged for and that the system drops when memory is needed."""
    for line in (folder / "memory.stat").read_text().splitlines():
        name, _, value = line.partition(" ")
        if name in ("inactive_file", "total_inactive_file"):
            return int(value)
    return 0


def _unlimited_bytes() -> int:
    with contextlib.suppress(OSError):  # not Linux
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
