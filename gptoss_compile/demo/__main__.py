"""`make demo`: build the demo checkpoint, compile it for this machine's CPU, serve it, and talk to it."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gptoss_compile.cli import compile_main

ARTIFACT = Path(".demo/gptoss-demo-cpu")
QUESTION = "What is the capital of France?"
DIM, PLAIN = "\033[2m", "\033[0m"


def main() -> int:
    if code := compile_main(["--target", "cpu", "--output", str(ARTIFACT)]):
        return code
    with _served(ARTIFACT) as url:
        _ask(url)
    print(f"\nServe it yourself:  {Path(sys.executable).parent / 'gptoss-serve'} {ARTIFACT}")
    print("then point any OpenAI client at http://127.0.0.1:8000/v1")
    return 0


@contextmanager
def _served(artifact: Path) -> Iterator[str]:
    """gptoss-serve on a free port, ready to answer; ended in the end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "gptoss_compile.cli", "serve", str(artifact), "--port", str(port)]
    server = subprocess.Popen([*command, "--log-level", "warning"])  # the terminal is for the answer
    try:
        _wait(server, port)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait()


def _wait(server: subprocess.Popen[bytes], port: int, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and server.poll() is None:
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise SystemExit(f"the server did not come up within {seconds:.0f} s" if server.poll() is None
                     else f"the server ended with code {server.returncode}")


def _ask(url: str) -> None:
    """One streamed question through the openai client: reasoning dimmed, then the answer."""
    from openai import OpenAI

    client = OpenAI(base_url=url, api_key="none")
    model = client.models.list().data[0].id
    print(f"\n> {QUESTION}")
    stream = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": QUESTION}], max_tokens=64, temperature=0, stream=True)
    for chunk in stream:
        delta = chunk.choices[0].delta if chunk.choices else None
        if reasoning := getattr(delta, "reasoning", None):
            print(f"{DIM}{reasoning}{PLAIN}", end="", flush=True)
        if delta and delta.content:
            print(delta.content, end="", flush=True)
    print()


if __name__ == "__main__":
    raise SystemExit(main())
