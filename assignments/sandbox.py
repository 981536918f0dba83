"""Walls around a process that runs a student's code: another user, files, signals, limits. Linux.

    user       where we are root: an own user id for each blank, without any right over our files
    files      Landlock (Linux 5.13): Python and the blank's own folder are read, its tmp is written
    signals    Landlock 6 (Linux 6.12): to its own processes alone; else the user id has to do
    network    Landlock 4 (Linux 6.7): no TCP
    limits     memory, seconds of CPU, size of a file, number of processes

`confine` sets up what the system has and says in a sentence what that was; elsewhere (macOS) the
limits alone. What is behind these walls is left to audit.py, which reads a body before it runs, and
to probes.py, whose values are compared outside.
"""

import contextlib
import ctypes
import os
import resource
import signal
import struct
import sys
import time
from pathlib import Path

MAX_WRITTEN = 16_000_000  # bytes of any file that a test writes, its output included
MAX_PROCESSES = 256  # of a test, its threads included

# <linux/prctl.h>
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_KEEPCAPS = 1, 4, 8
PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 36, 38
# <linux/landlock.h>; these three calls have the same numbers on all architectures
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR, TRUNCATE = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 14
FILE_RIGHTS = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE
RIGHTS_OF_VERSION = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}  # number of rights over files
# <linux/capability.h>
CAPABILITY_VERSION_3 = 0x20080522
CAP_DAC_READ_SEARCH = 2

READABLE = """
/usr /lib /lib64 /bin /etc/ld.so.cache /etc/localtime /dev/urandom /dev/zero
/proc/self /proc/cpuinfo /proc/meminfo /proc/stat /sys/devices/system
"""

libc = ctypes.CDLL(None, use_errno=True)


def prctl(*args: int) -> None:
    if sys.platform == "linux":
        libc.prctl(*args, 0, 0, 0)


def die_with(parent: int, number: int) -> None:
    """This process gets a signal when its parent ends, also where that has ended already."""
    prctl(PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        os.kill(os.getpid(), number)


def confine(folder: Path, user: int, seconds: float, memory: int) -> str:
    """Confines this process to a folder, for good; its tmp alone can be written to.

    Returns what keeps it there, as a sentence.
    """
    set_limits(seconds, memory)
    walls = []
    scratch = folder / "tmp"
    version = landlock_version()
    is_root = os.getuid() == 0
    may_switch = is_root and (version > 0 or others_can_read(Path(os.__file__)))
    # some containers have no such user
    with contextlib.suppress(OSError):
        os.chown(scratch, user if may_switch else -1, -1)
    if version > 0 and restrict(folder, scratch, version):
        walls.append(f"Landlock {version}")
    with contextlib.suppress(OSError):
        if may_switch:
            switch_user(user, read_all=bool(walls))
            resource.setrlimit(resource.RLIMIT_NPROC, (MAX_PROCESSES, MAX_PROCESSES))
            walls.append(f"user id {user}")
    return " and ".join(walls) or "the grader's own user, without walls"


def set_limits(seconds: float, memory: int) -> None:
    # the memory that it may write to; torch maps far more than it uses
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    resource.setrlimit(resource.RLIMIT_FSIZE, (MAX_WRITTEN, MAX_WRITTEN))
    cpu = max(1, int(4 * seconds))
    resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def others_can_read(path: Path) -> bool:
    """Whether a user without rights reaches a file."""
    folders = [parent.stat().st_mode & 0o001 for parent in path.resolve().parents]
    return all(folders) and bool(path.stat().st_mode & 0o004)


def switch_user(user: int, read_all: bool) -> None:
    """Another user id. read_all: may read what Landlock leaves, also where Python is root's own."""
    prctl(PR_SET_KEEPCAPS, int(read_all))
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
    if read_all:
        header = struct.pack("Ii", CAPABILITY_VERSION_3, 0)
        kept = 1 << CAP_DAC_READ_SEARCH
        # effective, permitted, inheritable: 32 capabilities, then the others
        libc.capset(header, struct.pack("6I", kept, kept, 0, 0, 0, 0))


# ---------------------------------------------------------------- Landlock


def landlock_version() -> int:
    """Of this kernel; 0 if it has none."""
    if sys.platform != "linux":
        return 0
    return max(0, libc.syscall(CREATE_RULESET, None, ctypes.c_size_t(0), 1))


def restrict(folder: Path, scratch: Path, version: int) -> bool:
    """From here on this process reads Python and the folder, and writes to `scratch` alone."""
    every_right = (1 << RIGHTS_OF_VERSION.get(version, 16)) - 1
    no_tcp = 0b11 if version >= 4 else 0  # bind, connect
    own_signals = 0b11 if version >= 6 else 0  # abstract sockets, signals
    fields = [every_right, no_tcp, own_signals][: 1 + (version >= 4) + (version >= 6)]
    attributes = struct.pack(f"{len(fields)}Q", *fields)
    size = ctypes.c_size_t(len(attributes))
    ruleset = libc.syscall(CREATE_RULESET, attributes, size, 0)
    if ruleset < 0:
        return False
    python = [sys.prefix, sys.base_prefix, sys.exec_prefix]
    for path in {*python, *READABLE.split(), str(folder)}:
        allow(ruleset, Path(path), (EXECUTE | READ_FILE | READ_DIR) & every_right)
    allow(ruleset, Path("/dev/null"), (READ_FILE | WRITE_FILE) & every_right)
    allow(ruleset, scratch, every_right)
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    done = libc.syscall(RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)
    return done == 0


def allow(ruleset: int, path: Path, rights: int) -> None:
    with contextlib.suppress(OSError):
        file = os.open(path, os.O_PATH | os.O_CLOEXEC)
        if not path.is_dir():
            rights &= FILE_RIGHTS
        rule = struct.pack("=Qi", rights, file)
        libc.syscall(ADD_RULE, ruleset, 1, rule, 0)
        os.close(file)


# ---------------------------------------------------------------- its end


def descendants() -> list[int]:
    """All processes below this one. Linux; elsewhere there are none."""
    parents = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        # a process may end meanwhile
        with contextlib.suppress(OSError, ValueError, IndexError):
            _, _, after_name = entry.read_text(errors="replace").rpartition(")")
            parents[int(entry.parent.name)] = int(after_name.split()[1])
    found = set()
    generation = {os.getpid()}
    while generation:
        generation = {pid for pid, parent in parents.items() if parent in generation} - found
        found |= generation
    return sorted(found)


def kill_descendants(group: int) -> None:
    """Kills a process group, and then all that is left below this process, a subreaper."""
    for _ in range(100):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)
        left = descendants()
        if not left:
            return
        # all stop before the first dies, so that none can outrun it
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for pid in left:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, number)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG) != (0, 0):
                pass
        time.sleep(0.02)
