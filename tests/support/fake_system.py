"""A folder with the files that a Linux daemon measures memory by, as a test wants them: see the setting system_root."""

from __future__ import annotations

from pathlib import Path

MIB = 1024 * 1024
UNLIMITED = 9223372036854771712


class FakeSystem:
    """The files below `root`: a machine of 16 GiB with 8 of them free, unless said otherwise."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.memory(available=8192 * MIB)
        self.write("proc/self/cgroup", "0::/\n")
        self.stall()

    def write(self, path: str, text: str | bytes) -> None:
        """Whole or not at all, since somebody may be reading."""
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        aside = file.with_name(f".{file.name}.new")
        aside.write_bytes(text if isinstance(text, bytes) else text.encode())
        aside.replace(file)

    def remove(self, path: str) -> None:
        (self.root / path).unlink()

    def memory(self, *, available: int, total: int = 16384 * MIB) -> None:
        self.write(
            "proc/meminfo",
            f"MemTotal:       {total // 1024} kB\nMemFree:        1024 kB\nMemAvailable:   {available // 1024} kB\n"
            "HugePages_Total:       0\n",
        )

    def stall(self, some: float = 0.0, full: float = 0.0, path: str = "proc/pressure/memory") -> None:
        self.write(
            path,
            f"some avg10={some:.2f} avg60=0.00 avg300=0.00 total=3065597\n"
            f"full avg10={full:.2f} avg60=0.00 avg300=0.00 total=1652288\n",
        )

    def group(self, folder: str = "", *, most: int | str, used: int, cache: int = 0, kills: int = 0) -> None:
        """A control group of the second version."""
        place = f"sys/fs/cgroup/{folder}".rstrip("/")
        self.write(f"{place}/memory.max", f"{most}\n")
        self.write(f"{place}/memory.high", "max\n")
        self.write(f"{place}/memory.current", f"{used}\n")
        self.write(f"{place}/memory.stat", f"anon {used - cache}\ninactive_file {cache}\nactive_file 0\n")
        self.write(f"{place}/memory.events", f"low 0\nhigh 0\nmax 12\noom {kills}\noom_kill {kills}\n")

    def group_v1(self, folder: str = "", *, most: int, used: int, cache: int = 0, kills: int = 0) -> None:
        place = f"sys/fs/cgroup/memory/{folder}".rstrip("/")
        self.write(f"{place}/memory.limit_in_bytes", f"{most}\n")
        self.write(f"{place}/memory.usage_in_bytes", f"{used}\n")
        self.write(f"{place}/memory.stat", f"cache 1\ninactive_file 7\ntotal_inactive_file {cache}\n")
        self.write(f"{place}/memory.oom_control", f"oom_kill_disable 0\nunder_oom 0\noom_kill {kills}\n")

    def process(self, pid: int, *, own: int, files: int = 0, swapped: int = 0) -> None:
        self.write(
            f"proc/{pid}/status",
            f"Name:\tpython\nVmRSS:\t{(own + files) // 1024} kB\nRssAnon:\t{own // 1024} kB\n"
            f"RssFile:\t{files // 1024} kB\nRssShmem:\t0 kB\nVmSwap:\t{swapped // 1024} kB\nThreads:\t3\n",
        )
