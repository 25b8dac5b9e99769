"""The commands. Only `gptoss-compile` needs PyTorch; `gptoss-serve` and `gptoss-inspect` import the runtime alone."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from gptoss_compile.config import Bucket
from gptoss_compile.target import TARGETS, Target

if TYPE_CHECKING:
    from gptoss_compile.checkpoint import Checkpoint
    from gptoss_compile.pipeline import Options

USAGE_ERROR = 2


def compile_main(arguments: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["tune"]:
        return _run(_tune, _tune_parser().parse_args(given[1:]), "the table has what buckets that were done have shown")
    return _run(_compile, _compile_parser().parse_args(given), "nothing was written")


def _run(work: Callable[[argparse.Namespace], None], options: argparse.Namespace, interrupted: str) -> int:
    """The exit code of a command on the compile side, whose errors are told in a line."""
    try:
        import torch  # noqa: F401
    except ImportError:
        return _fail("compiling needs PyTorch and Triton: pip install 'gptoss-compile[compile]'")
    from gptoss_compile.pipeline import PassError
    from gptoss_compile.verify import VerifyError

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as an exception, so that half-written files are removed
    try:
        work(options)
    except (ValueError, OSError, PassError, VerifyError) as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return _fail(f"interrupted; {interrupted}", 130)
    return 0


def _compile_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gptoss-compile", description="Compile a GPT-OSS checkpoint into an artifact that gptoss-serve runs.")
    parser.add_argument("model", nargs="?", metavar="MODEL",
                        help="a checkpoint folder (Hugging Face or OpenAI original layout) or a hub id; without it the "
                             "built-in demo model is compiled")
    parser.add_argument("--target", required=True, choices=sorted(TARGETS), help="the machine to compile for; it need not "
                        "be here")
    parser.add_argument("-o", "--output", type=Path, metavar="OUT", help="artifact directory (default: MODEL-TARGET here)")
    parser.add_argument("--tp", "--tensor-parallel-size", type=int, default=1, metavar="N", help="GPUs to shard over")
    parser.add_argument("--weights", default="pack", metavar="pack|link|random:SEED",
                        help="store the weights in the artifact; once in the user's cache with a link; or not at all, "
                             "generated at load (default: pack)")
    parser.add_argument("--buckets", type=parse_buckets, default=(), metavar="decode:1,8;extend:64x8",
                        help="step shapes: decode batch sizes, and extend TOKENSxSEQUENCES (default: by target)")
    parser.add_argument("--max-context", "--max-model-len", type=int, metavar="N", help="longest sequence in tokens")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="of activations (default: fp32 on cpu, else bf16)")
    parser.add_argument("--extern", choices=("never", "measured", "always"), default="never",
                        help="take other projects' kernels (FlashInfer's attention for prompts, on sm90) where they were "
                             "measured faster than ours, or wherever they can; the artifact then needs apache-tvm-ffi")
    parser.add_argument("--dump-ir", type=Path, metavar="DIR", help="write every stage as runnable Python, with diffs")
    parser.add_argument("--verify", action="store_true", help="check every pass on a two-layer random model")
    parser.add_argument("--skip", action="append", default=[], metavar="PASS", help="leave a pass out")
    parser.add_argument("--limit", action="append", default=[], metavar="PASS=N", help="at most N rewrites of a pass")
    return parser


def _compile(options: argparse.Namespace) -> None:
    from gptoss_compile.compiler import Request, compile_checkpoint

    target = Target.parse(options.target)
    request = Request(target, options.weights, options.buckets, options.max_context, options.dtype, options.tp,
                      _pass_options(options.skip, options.limit), options.dump_ir, options.verify, options.extern)
    checkpoint, folder, name = _open_model(options)
    output = options.output or Path(f"{name}-{target.name}")
    artifact = compile_checkpoint(checkpoint, folder, request, output, progress_bar)
    if not artifact.has_tokenizer:
        print(f"no tokenizer in the artifact, it is served by token ids: {artifact.tokenizer_note}")
    print(f"wrote {output}; serve it with: gptoss-serve {output}")


def _open_model(options: argparse.Namespace) -> tuple[Checkpoint, Path, str]:
    """The model that is asked for, its folder, and what to call it."""
    from gptoss_compile.checkpoint import Checkpoint
    from gptoss_compile.config_parse import parse_config
    from gptoss_compile.demo import build_demo
    from gptoss_compile.hub import locate

    if options.model is None:
        print("no MODEL given: compiling the built-in demo model")
        folder, name = build_demo(), "demo"
    else:
        name = Path(options.model).resolve().name
        folder = Path(options.model) if _shapes_suffice(options) else locate(options.model)
    if _shapes_suffice(options):
        return Checkpoint.random(parse_config(folder / "config.json", "mxfp4"), 0), folder, name
    return Checkpoint.open(folder), folder, name


def _tune_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gptoss-compile tune", description="Measure what kernels leave to choose, inside whole steps on the GPU here, "
        "and write what was best into the table that compiling for the target reads.")
    parser.add_argument("model", metavar="MODEL", help="a checkpoint folder (a config.json in it is enough) or a hub id")
    parser.add_argument("--target", required=True, choices=sorted(TARGETS), help="what the GPU here is")
    parser.add_argument("-o", "--output", type=Path, metavar="TABLE",
                        help="what it says of other choices stays (default: the target's table in this package)")
    parser.add_argument("--weights", default="random:0", metavar="random:SEED", help="(default: random:0)")
    parser.add_argument("--tp", "--tensor-parallel-size", type=int, default=1, metavar="N", help="GPUs to shard over")
    parser.add_argument("--buckets", type=parse_buckets, default=(), metavar="decode:1,8;extend:64x8",
                        help="step shapes to tune, one after the other (default: by target)")
    parser.add_argument("--kernels", type=lambda text: text.split(","), default=[], metavar="NAME[,NAME]",
                        help="whose choices to measure, as the table calls them (default: all)")
    parser.add_argument("--max-context", "--max-model-len", type=int, metavar="N", help="longest sequence in tokens")
    parser.add_argument("--context", type=int, default=1024, metavar="N",
                        help="tokens that each sequence of a decode step has (default: 1024)")
    return parser


def _tune(options: argparse.Namespace) -> None:
    from gptoss_compile.compiler import Request
    from gptoss_compile.kernels.tuned import path
    from gptoss_compile.tune import tune

    target = Target.parse(options.target)
    request = Request(target, options.weights, options.buckets, options.max_context, ranks=options.tp)
    checkpoint, _, _ = _open_model(options)
    table = options.output or path(target.name)
    print(json.dumps(tune(checkpoint, request, options.context, table, progress_bar, options.kernels)))


def _shapes_suffice(options: argparse.Namespace) -> bool:
    """With random weights a folder that holds only a config.json is a model."""
    return bool(options.weights.startswith("random:") and options.model and (Path(options.model) / "config.json").is_file())


def parse_buckets(text: str) -> tuple[Bucket, ...]:
    """`decode:1,8;extend:64x8,256x1` -> buckets. Raises argparse's error with the offending part."""
    buckets: list[Bucket] = []
    for group in filter(None, text.split(";")):
        kind, _, shapes = group.partition(":")
        for shape in shapes.split(","):
            tokens, _, sequences = shape.partition("x")
            try:
                sizes = [int(n) for n in (tokens, sequences) if n]
                if kind == "decode" and len(sizes) == 1 and sizes[0] > 0:
                    buckets.append(Bucket.decode(sizes[0]))
                elif kind == "extend" and len(sizes) == 2 and 0 < sizes[1] <= sizes[0]:
                    buckets.append(Bucket.extend(*sizes))
                else:
                    raise ValueError
            except ValueError:
                raise argparse.ArgumentTypeError(
                    f"{kind}:{shape} is no bucket; write decode:BATCH or extend:TOKENSxSEQUENCES (SEQUENCES at most "
                    "TOKENS), several separated by commas, kinds by ';'") from None
    return tuple(dict.fromkeys(buckets))


def _pass_options(skip: Sequence[str], limit: Sequence[str]) -> Options:
    from gptoss_compile.pipeline import Options

    limits = {}
    for item in limit:
        name, _, count = item.partition("=")
        if not count.isdecimal():
            raise ValueError(f"--limit takes PASS=N, found {item!r}")
        limits[name] = int(count)
    return Options(frozenset(skip), limits)


@contextmanager
def progress_bar(label: str) -> Iterator[Callable[[int, int], None]]:
    """A bar of rich on a terminal; silence elsewhere."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:>10}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bars:
        task = bars.add_task(label, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)


def serve_main(arguments: Sequence[str] | None = None) -> int:
    from gptoss_compile.runtime.server import main

    return main(sys.argv[1:] if arguments is None else list(arguments))


def inspect_main(arguments: Sequence[str] | None = None) -> int:
    from gptoss_compile.inspect import main

    return main(arguments)


COMMANDS = {"compile": compile_main, "serve": serve_main, "inspect": inspect_main}


def main() -> int:
    """`python -m gptoss_compile.cli compile|serve|inspect ...`, where the installed commands are not on the PATH."""
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        return _fail(f"usage: python -m gptoss_compile.cli {'|'.join(COMMANDS)} ...")
    return COMMANDS[sys.argv[1]](sys.argv[2:])


def _fail(message: str, code: int = USAGE_ERROR) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
