"""Running the model's Python: a fresh, jailed process for every piece of code (what shuts it in is in jail.py)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from gptoss_compile.runtime.api.tool_server import jail
from gptoss_compile.runtime.api.tool_server.base import ToolError

CONCURRENT = 4
_JAIL = str(Path(jail.__file__).resolve())


@dataclass(frozen=True)
class Limits:
    """memory and files (all files together) in bytes, output in characters."""

    memory: int = 1 << 30
    files: int = 32 << 20
    cpu_seconds: int = 30
    wall_seconds: float = 60.0
    output: int = 16_000


class Sandbox:
    """Stateless: nothing of one run is there in the next."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self._free = asyncio.Semaphore(CONCURRENT)

    def unavailable(self) -> str | None:
        """Why this system cannot jail a process, or None if it can."""
        if sys.platform != "linux":
            return "the sandbox needs Linux"
        try:
            done = subprocess.run(
                self._command(), input=b"print(6 * 7)", capture_output=True, timeout=30, env=_environment()
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return str(error)
        if done.stdout == b"42\n":
            return None
        return done.stderr.decode(errors="replace").strip()[-300:] or f"it ended with code {done.returncode}"

    async def run(self, code: str) -> str:
        """What the code printed, errors included. Raises ToolError if it did not run to its end."""
        async with self._free:
            process = await asyncio.create_subprocess_exec(
                *self._command(),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                env=_environment(),
                start_new_session=True,
            )
            try:
                return await self._finish(process, code)
            finally:
                if process.returncode is None:
                    with contextlib.suppress(ProcessLookupError):
                        process.terminate()  # the keeper, which ends the jailed process
                    await process.wait()

    async def _finish(self, process: asyncio.subprocess.Process, code: str) -> str:
        assert process.stdin is not None and process.stdout is not None
        output = bytearray()
        feeder = asyncio.create_task(_feed(process.stdin, code.encode(errors="replace")))
        try:
            async with asyncio.timeout(self.limits.wall_seconds):
                while data := await process.stdout.read(65536):
                    output += data[: 4 * self.limits.output - len(output)]  # the rest is read and forgotten
                code_of_exit = await process.wait()
        except TimeoutError:
            raise ToolError(_shown(output, self.limits.output, f"Timed out after {self.limits.wall_seconds:g} s.")) from None
        finally:
            feeder.cancel()
        if code_of_exit > 128:
            reason = f"Ended by signal {code_of_exit - 128}: a limit was reached (CPU {self.limits.cpu_seconds} s)."
            raise ToolError(_shown(output, self.limits.output, reason))
        return _shown(output, self.limits.output)

    def _command(self) -> list[str]:
        limits = {name: value for name, value in asdict(self.limits).items() if isinstance(value, int)}
        return [sys.executable, "-I", "-B", _JAIL, json.dumps(limits), *_roots()]


def _roots() -> list[str]:
    """What an interpreter needs to see of this system: itself and the system's libraries, nothing of anyone's home."""
    prefixes = {os.path.realpath(each) for each in (sys.base_prefix, sys.prefix)} | {sys.base_prefix, sys.prefix}
    system = ["/usr", "/lib", "/lib64", "/bin"]
    outside = sorted(each for each in prefixes if not each.startswith("/usr"))
    return [each for each in system if os.path.exists(each)] + outside


def _environment() -> dict[str, str]:
    """Nothing of the server's environment, which may hold keys."""
    return {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


async def _feed(stdin: asyncio.StreamWriter, data: bytes) -> None:
    with contextlib.suppress(ConnectionError):
        stdin.write(data)
        await stdin.drain()
        stdin.close()


def _shown(output: bytearray, limit: int, note: str = "") -> str:
    text = output.decode(errors="replace")
    if len(text) > limit:
        text = f"{text[:limit]}\n[output cut at {limit} characters]"
    return "\n".join(part for part in (text.rstrip("\n"), note) if part)
