"""`python -m tests.bench.start`: from exec to READY=1 of a real `edge run`, with the files in memory and without.

Ready is what systemd hears: after the bundle was hashed, its sessions opened and its self-test passed. Cold is the
first start after a boot, as far as the kernel drops the pages of files that it is asked to drop.
"""

from __future__ import annotations

import os
import resource
import socket
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

ROOT = Path(__file__).parents[2]
WARM, COLD, TARGET = 9, 5, 3.0
DEADLINE = 120.0  # s
console = Console(width=110)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build = [sys.executable, "-m", "export", "build", "configs/models-mini.toml", "--engines", str(folder)]
        subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
        config = folder / "edge.toml"
        config.write_text(
            f'device = "bench"\nbundle = "{folder / "mini"}"\n[[camera]]\nname = "away"\nsource = "rtsp://127.0.0.1:1/"\n'
            f'[publish]\naddress = "tcp://127.0.0.1:1"\nlinger_ms = 0\n[health]\naddress = ""\n'
        )
        files = [folder, ROOT / "edge", *(Path(sysconfig.get_path(kind)) for kind in ("stdlib", "platlib"))]
        start_to_ready(config)  # compiles what was not yet compiled
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        warm = [start_to_ready(config) for _ in range(WARM)]
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cold = []
        for _ in range(COLD):
            forget(files)
            cold.append(start_to_ready(config))
    used = (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / WARM
    console.print("start to ready, mini bundle on the CPU", highlight=False)
    console.print(f"  warm: {told(warm)}, of it {used:.2f} s of a core (target: under {TARGET:.0f})", highlight=False)
    console.print(f"  cold: {told(cold)}", highlight=False)
    console.print(f"  on {os.cpu_count()} cores, {os.getloadavg()[0]:.1f} programs at work", highlight=False)


def start_to_ready(config: Path) -> float:
    """Seconds from exec to READY=1."""
    path = config.parent / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(path))
        systemd.settimeout(DEADLINE)
        words = [sys.executable, "-c", "from edge.cli import main; main()", "run", "--config", str(config)]
        env = {**os.environ, "NOTIFY_SOCKET": str(path)}
        start = time.perf_counter()
        with subprocess.Popen(words, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as box:
            try:
                while systemd.recv(4096) != b"READY=1":
                    pass
                return time.perf_counter() - start
            finally:
                box.kill()
                path.unlink()


def forget(folders: Sequence[Path]) -> None:
    """Have the kernel drop these files from its memory."""
    os.sync()
    for file in (file for folder in folders for file in folder.rglob("*") if file.is_file()):
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def told(seconds: Sequence[float]) -> str:
    return f"median {statistics.median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f})"


if __name__ == "__main__":
    main()
