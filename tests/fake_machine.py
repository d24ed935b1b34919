"""A machine that holds nothing but what a test puts into it, and no network: namespaces of Linux, for any user.

The root folder is a new one in memory. Of the real one it has the system's programs and libraries, read-only, and
nothing else: no home, no repository, no settings of pip."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

# Arguments: the new root, then mode, source and target of each folder to mount, "--", the working folder, a command.
_ENTER = """
set -eu
root=$1; shift
mount -t tmpfs machine "$root"
for place in /usr /bin /sbin /lib /lib32 /lib64 /libx32 /etc /dev /proc /sys; do
    if [ -L "$place" ]; then cp -P "$place" "$root$place"
    elif [ -d "$place" ]; then mkdir "$root$place"; mount --rbind "$place" "$root$place"; fi
done
for place in /usr /bin /sbin /lib /lib32 /lib64 /libx32 /etc; do
    if [ ! -L "$place" ] && [ -d "$place" ]; then mount -o remount,bind,ro "$root$place"; fi
done
mkdir "$root/tmp" "$root/root"
while [ "$1" != -- ]; do
    mkdir -p "$root$3"
    mount --bind "$2" "$root$3"
    if [ "$1" = ro ]; then mount -o remount,bind,ro "$root$3"; fi
    shift 3
done
shift
mkdir -p "$root$1"
exec chroot "$root" /bin/sh -c 'cd "$0" && exec "$@"' "$@"
"""

PATH = "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"


def run_in_machine(
    command: Sequence[str | Path],
    mounts: Mapping[str | Path, tuple[str, Path]],
    environ: Mapping[str, str] | None = None,
    cwd: str = "/",
    timeout: float = 300,
) -> subprocess.CompletedProcess:
    """Run a command in such a machine and return what became of it, with its output as text.

    `mounts` are {place in the machine: ("ro" or "rw", folder)}; they are made in their order, and missing folders on
    the way to them are made in memory. `environ` is all that the command's environment holds beside PATH, HOME and
    LANG."""
    variables = {"PATH": PATH, "HOME": "/root", "LANG": "C.UTF-8", **(environ or {})}
    with tempfile.TemporaryDirectory() as root:
        enter = ["unshare", "--map-root-user", "--mount", "--net", "sh", "-c", _ENTER, "enter", root]
        for place, (mode, folder) in mounts.items():
            enter += [mode, str(folder), str(place)]
        process = subprocess.Popen(
            [*enter, "--", cwd, *map(str, command)],
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            out, err = process.communicate(timeout=timeout)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def why_not() -> str:
    """Why this system has no such machines; empty where it has them."""
    if sys.platform != "linux" or shutil.which("unshare") is None:
        return "a machine apart needs Linux and its command unshare"
    with tempfile.TemporaryDirectory() as folder:
        done = run_in_machine(["true"], {"/inside": ("ro", Path(folder))})
    return f"namespaces are not allowed here: {done.stderr.strip()}" if done.returncode else ""
