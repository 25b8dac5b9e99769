"""Does the machine code keep what the kernel's launch promises? Reads SASS (NVIDIA) or the AMDGCN listing.

SASS and not PTX, because ptxas moves loads across `griddepcontrol.wait`, spills, and chooses the matrix instructions.
Its names: ACQBULK is the wait, PREEXIT lets the dependents start, LDG and its asynchronous kin read global memory, STL
and LDL are a thread's local memory.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable, Mapping

from gptoss_compile.build import Binary, nvidia_tool
from gptoss_compile.kernels.spec import Launch
from gptoss_compile.target import Target

TOLERATED_SPILLS = 8  # instructions: ptxas sometimes parks a pointer outside the loops to fit one more block on an SM
GLOBAL_LOAD = re.compile(r"\b(LDG|LDGSTS|UTMALDG|UBLKCP)\b")
SPILL = re.compile(r"\b(STL|LDL)\b")
WAIT = re.compile(r"\bACQBULK\b")
TRIGGER = re.compile(r"\bPREEXIT\b")


ELF_ARCHITECTURE = 49  # where a cubin's ELF header names its architecture: the second byte of e_flags


def sass(binary: Binary) -> str:
    """The instructions of a cubin, in the order of their addresses.

    Triton's nvdisasm is older than its ptxas for Blackwell and knows no sm_103, whose instructions are those of sm_100.
    """
    code = bytearray(binary.code)
    if code[ELF_ARCHITECTURE] == 103:
        code[ELF_ARCHITECTURE] = 100
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        return subprocess.run([nvidia_tool("nvdisasm"), "-c", file.name], capture_output=True, text=True,
                              check=True).stdout


def check_launch(launch: Launch, binary: Binary, target: Target) -> list[str]:
    """What is wrong with a launch's machine code, a sentence each that names the kernel; empty if nothing is."""
    if target.backend == "hip":
        found = check_amdgcn(launch, binary.assembly.decode())
    else:
        found = check_sass(launch, sass(binary), pdl=target.has("pdl"))
    where = f"{binary.symbol} on {target.name} ({binary.stem})"
    return [f"{where}: {message}" for message in found]


def check_all(launches: Iterable[tuple[Launch, Binary]], target: Target) -> list[str]:
    """`check_launch` of many, each binary read once."""
    once: Mapping[str, tuple[Launch, Binary]] = {binary.key: (launch, binary) for launch, binary in launches}
    return [message for launch, binary in once.values() for message in check_launch(launch, binary, target)]


def check_sass(launch: Launch, text: str, *, pdl: bool) -> list[str]:
    """The findings in one kernel's SASS. Without `pdl` the contract of programmatic launch does not apply."""
    found = []
    if pdl:
        found += _check_pdl(launch, text)
    if (spills := len(SPILL.findall(text))) > TOLERATED_SPILLS:
        found.append(f"{spills} local memory instructions (STL, LDL): registers spill or an array lies in memory")
    return found + _check_promises(launch, text)


def _check_pdl(launch: Launch, text: str) -> list[str]:
    wait, trigger = WAIT.search(text), TRIGGER.search(text)
    found = []
    if trigger is None:
        found.append("no PREEXIT: its dependents start only when it has ended")
    if wait is None:
        return [*found, "no ACQBULK: it does not wait for the kernel before it"]
    late = launch.pdl.trigger == "after_wait"
    if trigger is not None and (trigger.start() > wait.start()) != late:
        found.append(f"PREEXIT {'before' if late else 'behind'} ACQBULK, but the contract says {launch.pdl.trigger}")
    promised = [name for name in launch.pdl.preloads if name in launch.args]
    early = len(GLOBAL_LOAD.findall(text[: wait.start()]))
    if early < len(promised):
        found.append(f"{early} global loads before ACQBULK, but the contract preloads {', '.join(promised)}")
    return found


def _check_promises(launch: Launch, text: str) -> list[str]:
    return [f"no {name}, which it promises" for name in launch.promises if not re.search(rf"\b{name}", text)]


def check_amdgcn(launch: Launch, text: str) -> list[str]:
    """The findings in one kernel's AMDGCN listing."""
    found = []
    spilled = dict(re.findall(r"\.(vgpr_spill_count|private_segment_fixed_size):\s+(\d+)", text))
    if any(int(n) for n in spilled.values()):
        found.append("registers spill: " + ", ".join(f"{k} {v}" for k, v in spilled.items()))
    return found + _check_promises(launch, text)
