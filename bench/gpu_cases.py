"""Cases for gpu_check.py: small models compiled for a GPU, and what they must compute, made on any machine.

    python bench/gpu_cases.py DIR [--target sm90] [--seed N] [--extern always]
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from gptoss_compile import expected
from gptoss_compile.checkpoint import Checkpoint
from gptoss_compile.compiler import Request, compile_checkpoint
from gptoss_compile.config import Bucket, ModelConfig
from gptoss_compile.target import TARGETS, Target

PLAIN = ModelConfig(
    num_layers=2, hidden=128, intermediate=64, num_heads=8, num_kv_heads=2, head_dim=64, num_experts=8,
    experts_per_token=4, vocab_size=512, sliding_window=32, windowed=(True, False), max_position=512,
    rope_original_context=64, eos_ids=(0,))
CASES = {  # what each has that the others have not
    "mxfp4": PLAIN,
    "odd": replace(PLAIN, hidden=288, intermediate=96, num_heads=6, num_experts=12, vocab_size=500),  # no power of two
    "bf16": replace(PLAIN, hidden=120, intermediate=72, num_heads=4, num_kv_heads=1, head_dim=32, num_experts=5,
                    experts_per_token=2, expert_format="bf16"),  # experts unpacked, sizes no multiple of 32
    "heads": replace(PLAIN, num_heads=64, num_kv_heads=8, num_experts=32, sliding_window=128, max_position=192),  # gpt-oss's
    "wide": replace(PLAIN, hidden=576, intermediate=480, num_heads=64, num_kv_heads=8, num_experts=32, vocab_size=1000,
                    sliding_window=128, max_position=1024),  # sizes that one target's own kernels take, and fill up
}
BUCKETS = (Bucket.decode(1), Bucket.decode(3), Bucket.decode(8), Bucket.decode(20), Bucket.extend(48, 3, 8),
           Bucket.extend(160, 2, 4))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--target", default="sm90", choices=[t for t in TARGETS if t.startswith("sm")])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--extern", default="never", choices=("never", "always"), help="take other projects' kernels")
    options = parser.parse_args()
    for name, config in CASES.items():
        print(f"{name}:")
        case = options.folder / name
        request = Request(Target.parse(options.target), buckets=BUCKETS, extern=options.extern)
        compile_checkpoint(Checkpoint.random(config, options.seed), None, request, case / "artifact")
        expected.main([str(case / "artifact"), "-o", str(case / "expected"), "--seed", str(options.seed)])
    return 0


if __name__ == "__main__":
    sys.exit(main())
