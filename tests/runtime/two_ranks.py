"""A model on two ranks for sm90, which a fake host can run."""

from __future__ import annotations

from pathlib import Path

from fake_host import FakeHost

from gptoss_compile.artifact import Artifact
from gptoss_compile.checkpoint import Checkpoint
from gptoss_compile.compiler import Request, compile_checkpoint
from gptoss_compile.config import Bucket, ModelConfig
from gptoss_compile.target import Target

FEW, MANY, PROMPT = Bucket.decode(3), Bucket.extend(24, 8), Bucket.extend(96, 2, 2)  # slots, one-shot and two-shot sums
TWO = Bucket.decode(2)  # collected by the kernels that need the sums
CONFIG = ModelConfig(  # heads and experts' features are shared 2 : 1
    num_layers=2, hidden=192, intermediate=288, num_heads=12, num_kv_heads=3, head_dim=16, num_experts=32,
    experts_per_token=2, vocab_size=1040, sliding_window=16, windowed=(True, False), max_position=128,
    rope_original_context=32, eos_ids=(0,))


def compile_for_two(folder: Path, config: ModelConfig = CONFIG) -> Artifact:
    """With random weights."""
    request = Request(Target.parse("sm90"), "random:7", (TWO, FEW, MANY, PROMPT), ranks=2)
    return compile_checkpoint(Checkpoint.random(config, 7), None, request, folder)


def learn(host: FakeHost, artifact: Artifact) -> None:
    for path in (artifact.path / "kernels").glob("*.cubin"):
        for machine in host.machines:
            machine.codes[path.read_bytes()] = path.stem
