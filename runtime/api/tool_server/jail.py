"""The inside of the sandbox: shuts the process in, then becomes a Python that reads its program from standard input.

Run as a script of its own, with nothing but the standard library: `python -I jail.py LIMITS ROOT...`, where LIMITS is a
JSON object of the fields of sandbox.Limits and each ROOT is a folder to show read-only. What the program finds:

    no network       a network namespace without an interface
    no files         an empty file system in memory, with the interpreter and its libraries read-only
    no neighbours    a process namespace of its own, /proc not mounted
    no offspring     a seccomp filter refuses new processes (threads are fine), so a fork bomb has no first child
    no rights        every capability dropped, no_new_privs
    limits           memory, CPU time, file size, open files

Exits with UNAVAILABLE and a reason on standard error where the system does not allow this.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import platform
import resource
import signal
import struct
import sys
from typing import Any

UNAVAILABLE = 97

NEW_USER, NEW_NAMES, NEW_HOST, NEW_IPC, NEW_PIDS, NEW_NETWORK = (
    0x10000000,
    0x00020000,
    0x04000000,
    0x08000000,
    0x20000000,
    0x40000000,
)
READ_ONLY, NO_SETUID, NO_DEVICES, REMOUNT, BIND, RECURSIVE, PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
DIE_WITH_PARENT, SECCOMP, DROP_CAPABILITY, NO_NEW_RIGHTS = 1, 22, 24, 38  # of prctl
# audit name of the architecture; numbers of clone, clone3, fork, vfork (0xFFFFFFFF: it has none)
ARCHITECTURES = {
    "x86_64": (0xC000003E, 56, 435, 57, 58),
    "aarch64": (0xC00000B7, 220, 435, 0xFFFFFFFF, 0xFFFFFFFF),
}
THREAD = 0x00010000  # the flag of clone that makes a thread

_libc = ctypes.CDLL(None, use_errno=True)


def refuse(reason: str) -> None:
    print(reason, file=sys.stderr, flush=True)
    os._exit(UNAVAILABLE)


def call(name: str, *arguments: Any) -> None:
    """A system call through the C library; where it fails the sandbox cannot be had."""
    if getattr(_libc, name)(*arguments) != 0:
        refuse(f"{name} is not allowed here: {os.strerror(ctypes.get_errno())}")


def main() -> None:
    limits, roots = json.loads(sys.argv[1]), sys.argv[2:]
    if platform.machine() not in ARCHITECTURES:
        refuse(f"no sandbox for processors of type {platform.machine()}")
    user, group = os.getuid(), os.getgid()
    call("unshare", NEW_USER | NEW_NAMES | NEW_HOST | NEW_IPC | NEW_PIDS | NEW_NETWORK)
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    parent = os.getpid()
    child = os.fork()
    if child:
        keeper(child)
    call("prctl", DIE_WITH_PARENT, signal.SIGKILL, 0, 0, 0)
    if parent == os.getppid():  # never so in a new process namespace, whose first process sees parent 0
        refuse("process namespaces are not in force")
    build_root(roots, limits["files"])
    limit(limits)
    give_up_rights()
    refuse_processes(*ARCHITECTURES[platform.machine()])
    os.execve(sys.executable, [sys.executable, "-I", "-"], dict(os.environ))


def keeper(child: int) -> None:
    """Wait for the jailed process, whose end ends its whole namespace, and end it when told to."""
    signal.signal(signal.SIGTERM, lambda *_: os.kill(child, signal.SIGKILL))
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    os._exit(code if code >= 0 else 128 - code)


def mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    encoded = [None if text is None else os.fsencode(text) for text in (source, target, kind, data)]
    call("mount", *encoded[:3], flags, encoded[3])


def build_root(roots: list[str], size: int) -> None:
    """A file system of `size` bytes in memory becomes /, with the roots in it; work goes on in its /tmp."""
    taken = [root for root in roots if not os.path.islink(root)]
    base = next(each for each in ("/tmp", "/mnt", "/media") if not any(root.startswith(each) for root in taken))
    mount(None, "/", None, RECURSIVE | PRIVATE)
    mount("tmpfs", base, "tmpfs", NO_SETUID | NO_DEVICES, f"size={size},mode=755")
    for root in roots:
        inside = base + root
        if os.path.islink(root):
            os.symlink(os.readlink(root), inside)
            continue
        os.makedirs(inside, exist_ok=True)
        mount(root, inside, None, BIND | RECURSIVE)
        mount(None, inside, None, BIND | REMOUNT | READ_ONLY | NO_SETUID | NO_DEVICES)
    for folder in ("/tmp", "/mnt/data", "/dev"):
        os.makedirs(base + folder, exist_ok=True)
    os.chroot(base)
    os.chdir("/tmp")


def limit(limits: dict[str, int]) -> None:
    for kind, value in (
        (resource.RLIMIT_AS, limits["memory"]),
        (resource.RLIMIT_CPU, limits["cpu_seconds"]),
        (resource.RLIMIT_FSIZE, limits["files"]),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (value, value))


def give_up_rights() -> None:
    for capability in range(64):
        with contextlib.suppress(OSError):
            _libc.prctl(DROP_CAPABILITY, capability, 0, 0, 0)
    call("prctl", NO_NEW_RIGHTS, 1, 0, 0, 0)


def refuse_processes(audit: int, clone: int, clone3: int, fork: int, vfork: int) -> None:
    """A seccomp filter: a foreign architecture is killed, clone3 is "not known" (so that the C library falls back to
    clone), new processes are refused, threads and all else allowed."""
    load, equal, least, has, give = 0x20, 0x15, 0x35, 0x45, 0x06  # load; jump if equal, at least, bits set; return
    kill, allow, denied, unknown = 0x80000000, 0x7FFF0000, 0x00050001, 0x00050026  # errors: EPERM, ENOSYS
    program = [
        (load, 0, 0, 4),  # the architecture
        (equal, 1, 0, audit),
        (give, 0, 0, kill),
        (load, 0, 0, 0),  # the number of the call
        (least, 5, 0, 0x40000000),  # x86's x32 variants
        (equal, 5, 0, clone3),
        (equal, 3, 0, fork),
        (equal, 2, 0, vfork),
        (equal, 3, 0, clone),
        (give, 0, 0, allow),
        (give, 0, 0, denied),
        (give, 0, 0, unknown),
        (load, 0, 0, 16),  # clone's flags
        (has, 0, 1, THREAD),
        (give, 0, 0, allow),
        (give, 0, 0, denied),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *each) for each in program))
    header = ctypes.create_string_buffer(struct.pack("@HP", len(program), ctypes.addressof(code)))
    call("prctl", SECCOMP, 2, header, 0, 0)


if __name__ == "__main__":
    main()
