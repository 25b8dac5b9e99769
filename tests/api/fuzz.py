"""Schemathesis over /openapi.json: a real server, the scripted sampler, and requests made from the document.

    python tests/api/fuzz.py [what `schemathesis run` takes, such as --max-examples 200]

Needs `pip install schemathesis`. Ends with schemathesis's exit code: 0 without a finding.
"""

from __future__ import annotations

import gzip
import importlib.util
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import httpx

sys.path.insert(0, str(Path(__file__).parent))

from scripted import Script, ScriptedEngine

from gptoss_compile.runtime import server
from gptoss_compile.runtime.api.options import ServerOptions
from gptoss_compile.runtime.api.tokenizer import Tokenizer

ANSWER = "<|channel|>analysis<|message|>Think.<|end|><|start|>assistant<|channel|>final<|message|>Hello!<|return|>"
KEY = "key"
# A schema cannot say that tool_choice must name one of tools, or that a prompt must fit: valid by it is not yet valid.
EXCLUDED = "positive_data_acceptance"


class Always(Script):
    """The same answer to everybody."""

    def next(self) -> list[int]:
        return self.ids(ANSWER)


def main() -> int:
    spec = importlib.util.find_spec("bpe_openai")
    assert spec is not None and spec.origin is not None, "pip install bpe-openai"
    with tempfile.TemporaryDirectory() as folder:
        packed = Path(spec.origin).parent / "data" / "o200k_base.tiktoken.gz"
        (Path(folder) / "o200k_base.tiktoken").write_bytes(gzip.decompress(packed.read_bytes()))
        tokenizer = Tokenizer.load(Path(folder))
    engine = ScriptedEngine(Always(tokenizer), max_context=512)
    engine.start()
    listener = server._listen("127.0.0.1", 0)
    options = ServerOptions(api_keys=(KEY,))
    threading.Thread(target=server.run, args=(engine, tokenizer, options, listener), daemon=True).start()
    url = server._url(listener)
    headers = ["-H", f"Authorization: Bearer {KEY}"]
    command = ["schemathesis", "run", f"{url}/openapi.json", *headers, "--exclude-checks", EXCLUDED, *sys.argv[1:]]
    with tempfile.TemporaryDirectory() as folder:  # for what schemathesis leaves behind
        code = subprocess.run(command, cwd=folder).returncode
    healthy = httpx.get(f"{url}/health").status_code == 200
    print("the engine is alive" if healthy else "the engine died")
    return code if healthy else 1


if __name__ == "__main__":
    sys.exit(main())
