"""What becomes of a server of several GPUs when one of them stalls or fails: who is named, and how soon all is over.

    python bench/fault.py ARTIFACT [--how stall|trap] [--rank 1]

Starts gptoss-serve, has it answer a request, and puts a kernel into a rank's stream that does nothing for a minute, or that
fails. Prints the seconds from there until the request has failed, /health has told, and the process has ended, its exit code
and its last words; then one JSON line. Exits with 1 unless all came within two seconds and the rank was named.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from gptoss_compile.runtime import server
from gptoss_compile.runtime.executor_cuda import CudaExecutor

LIMIT = 2.0  # seconds
STALL = 60  # seconds
PTX = """
.version 8.0
.target sm_80
.address_size 64
.visible .entry stall() {
    .reg .u64 %now, %end;
    .reg .pred %early;
    mov.u64 %now, %globaltimer;
    add.u64 %end, %now, NANOSECONDS;
AGAIN:
    mov.u64 %now, %globaltimer;
    setp.lt.u64 %early, %now, %end;
    @%early bra AGAIN;
    ret;
}
.visible .entry trap() {
    trap;
}
""".replace("NANOSECONDS", str(STALL * 10**9))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT")
    parser.add_argument("--how", choices=("stall", "trap"), default="stall")
    parser.add_argument("--rank", type=int, default=1)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)  # in the process that is to end
    options = parser.parse_args()
    if options.serve:
        return serve(options)
    command = [sys.executable, __file__, str(options.artifact), "--how", options.how, "--rank", str(options.rank), "--serve"]
    process = subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    words: list[str] = []
    threading.Thread(target=lambda: words.extend(process.stderr or ()), daemon=True).start()
    try:
        result = watch(process, words)
    finally:
        process.kill()
    good = (result["code"] == 1 and result["status"] >= 500 and result["ended_s"] <= LIMIT and result["health_s"] is not None
            and f"rank {options.rank} (" in result["said"])
    for name, value in result.items():
        print(f"  {name:12} {value}")
    print(json.dumps({"bench": "fault", "artifact": options.artifact.name, "how": options.how, "good": good, **result}))
    return int(not good)


def serve(options: argparse.Namespace) -> int:
    """gptoss-serve, with a thread that does what the bench is about when a line comes."""
    init = CudaExecutor.__init__

    def keep(executor: CudaExecutor, *arguments: Any) -> None:
        init(executor, *arguments)
        threading.Thread(target=inject, args=(executor, options), daemon=True).start()

    CudaExecutor.__init__ = keep  # type: ignore[method-assign]
    return server.main([str(options.artifact), "--port", "0", "--max-num-seqs", "4", "--log-level", "error"])


def inject(executor: CudaExecutor, options: argparse.Namespace) -> None:
    device = executor.ranks[options.rank].device
    device.use()
    meta = {"global_scratch_size": 0, "profile_scratch_size": 0, "num_ctas": 1, "shared": 0, "threads": 1,
            "symbol": options.how}
    kernel = device.load_kernel(options.how, PTX.encode() + b"\0", meta)
    config = device.api.CUlaunchConfig()
    config.gridDimX = config.gridDimY = config.gridDimZ = config.blockDimX = config.blockDimY = config.blockDimZ = 1
    config.hStream = device.stream
    sys.stdin.readline()
    device.check(device.api.cuLaunchKernelEx(config, kernel.function, 0, 0), f"launching {options.how}")


def watch(process: subprocess.Popen[str], words: list[str]) -> dict[str, Any]:
    assert process.stdout and process.stdin
    line = next((line for line in process.stdout if line.startswith("Ready: ")), None)
    if line is None:
        process.wait()
        raise SystemExit("fault: error: the server does not start\n" + "".join(words))
    url = line.split()[1]
    model = json.loads(urllib.request.urlopen(f"{url}/v1/models").read())["data"][0]["id"]
    body = {"model": model, "prompt": [1, 2, 3], "max_tokens": 16, "ignore_eos": True}
    if ask(url, body) != 200:
        raise SystemExit("fault: error: the server does not answer\n" + "".join(words))
    answers: list[tuple[int, float]] = []

    def long() -> None:
        answers.append((ask(url, {**body, "max_tokens": 100_000}), time.perf_counter()))

    request = threading.Thread(target=long)
    request.start()
    time.sleep(1)
    process.stdin.write("now\n")
    process.stdin.flush()
    start, told = time.perf_counter(), None
    while process.poll() is None and time.perf_counter() < start + 30:
        if told is None and health(url) == 503:
            told = time.perf_counter() - start
        time.sleep(0.01)
    ended = time.perf_counter() - start
    request.join(30)
    ((status, failed),) = answers
    return {"status": status, "failed_s": round(failed - start, 3), "health_s": told and round(told, 3),
            "ended_s": round(ended, 3), "code": process.poll(), "said": words[-1].strip() if words else ""}


def ask(url: str, body: dict[str, Any]) -> int:
    kind = {"content-type": "application/json"}
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), kind)
    try:
        with urllib.request.urlopen(request) as answer:
            answer.read()
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def health(url: str) -> int:
    try:
        return int(urllib.request.urlopen(f"{url}/health", timeout=1).status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


if __name__ == "__main__":
    sys.exit(main())
