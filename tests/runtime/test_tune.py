"""The tuner on a driver that computes nothing but keeps a clock: what wins is faster and right, and goes into the table."""

from __future__ import annotations

import ctypes
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_cuda import Captured, FakeDriver

from gptoss_compile import tune as tune_module
from gptoss_compile.checkpoint import Checkpoint
from gptoss_compile.cli import compile_main, progress_bar
from gptoss_compile.compiler import CompileError, Job, Request
from gptoss_compile.config import Bucket, ModelConfig
from gptoss_compile.config_parse import parse_config
from gptoss_compile.kernels import tuned
from gptoss_compile.kernels.sm90 import gemv
from gptoss_compile.kernels.sm90.gemv import Shape
from gptoss_compile.launch_plan import LaunchPlan
from gptoss_compile.runtime import cuda_driver
from gptoss_compile.runtime.cuda_driver import Device, Kernel
from gptoss_compile.runtime.executor_cuda import CudaExecutor
from gptoss_compile.runtime.rank_cuda import RESERVE
from gptoss_compile.runtime.timing import Timing
from gptoss_compile.target import Target
from gptoss_compile.tune import Race, Tuned, tune, write_table
from gptoss_compile.variants import Kernels, Variants

CONFIG = ModelConfig(
    num_layers=2, hidden=64, intermediate=32, num_heads=4, num_kv_heads=2, head_dim=16, num_experts=4,
    experts_per_token=2, vocab_size=96, sliding_window=16, windowed=(True, False), max_position=512,
    rope_original_context=32, eos_ids=(0,))
DECODE, EXTEND = Bucket.decode(1), Bucket.extend(24, 3, 3)
SM90 = Target.parse("sm90")
FAST, RULE, WRONG, EQUAL, BROKEN = (Shape(8, 1, 1, 1), Shape(16, 1, 1, 1), Shape(32, 1, 1, 1), Shape(16, 1, 1, 2),
                                    Shape(64, 1, 2, 1))


class ClockDriver(FakeDriver):
    """A launch takes a time that its block size, its carve-out and nothing else decide, in a world that gets ever faster;
    what it writes is a byte, again and again. gemv: fast with 32 threads; with 128, faster still, but wrong."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.now, self.pace, self.modules = 0.0, 1.0, 0
        self.times: dict[int, float] = {}
        self.carveouts: dict[str, int] = {}
        self.outputs: dict[str, list[tuple[int, int]]] = {}

    def learn(self, plan: LaunchPlan) -> None:
        for step in plan.steps:
            for launch in step.launches:
                outs = {f"out{i}": operand for i, operand in enumerate(step.outputs)}
                self.outputs[launch.binary] = [(i, outs[name].bytes) for i, name in enumerate(launch.args) if name in outs]

    def _execute(self, captured: Captured) -> None:
        name, c = captured.function.partition("#")[0], captured.config
        if name.startswith("random_weights"):
            return
        gemv = {32: 0.5, 128: 0.1}.get(c.blockDimX, 1.0) if name.startswith("gemv") else 1.0
        self.now += gemv * (0.9 if self.carveouts.get(captured.function) == 75 else 1.0) * self.pace
        self.pace *= 0.99999
        for index, size in self.outputs.get(name, ()):
            table = (ctypes.POINTER(ctypes.c_uint64) * (index + 1)).from_address(captured.parameters)
            wrong = name.startswith("gemv") and c.blockDimX == 128
            ctypes.memset(table[index].contents.value, 0x40 if wrong else 0x3C, size)

    def _cuModuleLoadData(self, code: bytes) -> str:
        self.modules += 1
        return f"{self.codes[code]}#{self.modules}"

    def _cuFuncSetAttribute(self, function: str, attribute: Any, value: int) -> None:
        if "CARVEOUT" in attribute.name:
            self.carveouts[function] = value

    def _cuEventCreate(self, flags: int) -> int:
        self.times[len(self.times)] = 0.0
        return len(self.times) - 1

    def _cuEventRecord(self, event: int, stream: Any) -> None:
        self.times[event] = self.now

    def _cuEventElapsedTime(self, start: int, end: int) -> float:
        return self.times[end] - self.times[start]


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(tuned, "path", lambda target: tmp_path / f"{target}.json")
    tuned.table.cache_clear()
    yield tmp_path / "sm90.json"
    tuned.table.cache_clear()


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> ClockDriver:
    fake = ClockDriver(memory=RESERVE + (64 << 20))
    monkeypatch.setattr(cuda_driver, "bindings", lambda: fake)
    load, install = Device.load_kernel, CudaExecutor.install

    def load_kernel(device: Device, name: str, code: bytes, meta: dict[str, Any], carveout: int = -1) -> Kernel:
        fake.codes[code] = name
        return load(device, name, code, meta, carveout)

    def learn(executor: CudaExecutor, bucket: Bucket, plans: list[LaunchPlan], files: dict[str, bytes]) -> Any:
        fake.learn(plans[0])
        return install(executor, bucket, plans, files)

    monkeypatch.setattr(Device, "load_kernel", load_kernel)
    monkeypatch.setattr(CudaExecutor, "install", learn)
    monkeypatch.setattr(tune_module, "with_both_kinds", lambda buckets: (DECODE, EXTEND))
    monkeypatch.setattr(gemv, "shapes", lambda *_: iter((FAST, WRONG, EQUAL, BROKEN)))
    return fake


def run(output: Path, *only: str) -> dict[str, Any]:
    return tune(Checkpoint.random(CONFIG, 3), Request(SM90, "random:1", (DECODE,)), 128, output, progress_bar, only)


def test_the_faster_and_right_wins(driver: ClockDriver, table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run(table)
    (bucket,) = result["buckets"]
    choices = {(c["kernel"], c["key"]): c for c in bucket["choices"]}
    assert [c["share"] for c in bucket["choices"]] == sorted((c["share"] for c in bucket["choices"]), reverse=True)
    dense = {key: c for (kernel, key), c in choices.items() if kernel == "gemv"}
    assert dense.keys() == {f"features={n} columns=64 tokens=1 norm={norm}" for n, norm in ((128, 1), (64, 0), (96, 1))}
    for choice in dense.values():
        assert choice["rule"]["rows"] == 16 and choice["best"] == {"rows": 8, "parts": 1, "ring": 1, "min_blocks": 1}
        assert choice["measured"] == 2 and choice["after_ms"] < choice["before_ms"]
        wrong, broken = choice["skipped"]
        assert wrong.startswith("rows=32 parts=1 ring=1 min_blocks=1 gives other results in ")
        assert broken.startswith("rows=64 parts=1 ring=2 min_blocks=1 does not compile: gemv.cuh(")
    assert choices["step", "decode=1 sequences=1"]["best"] == {"percent": 75}
    assert bucket["after_ms"] < 0.9 * bucket["before_ms"]
    said = json.loads(table.read_text())
    assert said["gpu"] == "Fake GPU" and "nvidia-cuda-nvrtc" in said["tools"]
    assert said["choices"] == {"gemv": {key: FAST.__dict__ for key in dense},
                               "step": {"decode=1 sequences=1": {"percent": 75}}}
    assert "rows=16 parts=1 ring=1 min_blocks=1 -> rows=8" in capsys.readouterr().out
    assert not driver.blocks, "everything was given back"

    again = run(table)  # from where the table leaves off: nothing is better, and the rules do not come back
    assert json.loads(table.read_text()) == said
    (bucket,) = again["buckets"]
    assert bucket["after_ms"] == pytest.approx(bucket["before_ms"], rel=1e-3)


def test_choices_of_one_kernel(driver: ClockDriver, table: Path) -> None:
    (bucket,) = run(table, "step")["buckets"]
    assert [c["kernel"] for c in bucket["choices"]] == ["step"]
    assert json.loads(table.read_text())["choices"] == {"step": {"decode=1 sequences=1": {"percent": 75}}}
    with pytest.raises(CompileError, match=r"--kernels gemm,steps: what leaves something to choose is .*gemv, .*step"):
        run(table, "steps", "gemv", "gemm")


def test_races() -> None:
    steady = Timing((10.0, 9.0, 8.0, 7.0, 6.0, 5.0))  # a clock that rises
    assert Race.of(steady, Timing(tuple(t - 0.1 for t in steady.groups))).won
    assert not Race.of(steady, Timing(tuple(t + 0.1 for t in steady.groups))).won
    assert not Race.of(steady, steady).won
    assert not Race.of(steady, Timing((9.7, 9.2, 7.6, 7.3, 5.5, 5.2))).won, "faster by less than the noise"
    assert not Race.of(Timing((1.0,) * 6), Timing((0.9995,) * 6)).won, "too little to be worth a line"


def result_of(rule: Shape, best: Shape, features: int = 64) -> Tuned:
    choice = tuned.Choice("gemv", {"features": features}, rule, (rule, best))
    return Tuned(choice, 0.1, best, 1.0, 1.0, 1, ())


def test_a_table_keeps_what_was_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "new" / "sm90.json"
    write_table(file, "A", {"b": "1", "a": "2"}, [result_of(RULE, FAST), result_of(RULE, WRONG, 8)])
    first = file.read_text()
    assert first == json.dumps(json.loads(first), indent=1, sort_keys=True) + "\n"
    assert json.loads(first)["choices"] == {"gemv": {"features=64": FAST.__dict__, "features=8": WRONG.__dict__}}
    write_table(file, "B", {}, [result_of(RULE, RULE)])
    assert json.loads(file.read_text()) == {"gpu": "B", "tools": {}, "choices": {"gemv": {"features=8": WRONG.__dict__}}}
    write_table(file, "B", {}, [result_of(RULE, RULE, 8)])
    assert json.loads(file.read_text())["choices"] == {}

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    before = file.read_bytes()
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_table(file, "C", {}, [result_of(RULE, FAST)])
    assert file.read_bytes() == before and [p.name for p in file.parent.iterdir()] == ["sm90.json"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"choices": 3}', '{"choices": {"gemv": 1}}'])
def test_a_file_that_is_no_table_is_left_alone(text: str, tmp_path: Path) -> None:
    file = tmp_path / "notes.json"
    file.write_text(text)
    with pytest.raises(CompileError, match="is no table of choices; name another file with -o"):
        write_table(file, "", {}, [])
    assert file.read_text() == text


CONFIG_20B = Path(__file__).parent.parent / "checkpoint" / "data" / "config-20b.json"


@pytest.mark.parametrize(("bucket", "wanted"), [
    (Bucket.decode(1), {"step": 1, "gemv": 3, "attention_decode": 2}),
    (Bucket.decode(64), {"step": 1, "gemm": 3, "attention_decode": 2, "moe_grouped": 1}),
    (Bucket.extend(256, 4, 4), {"step": 1, "gemm": 2, "gemv": 1, "attention_extend": 2, "moe_grouped": 1})], ids=str)
def test_choices_of_the_published_shapes(bucket: Bucket, wanted: dict[str, int], table: Path) -> None:
    config = replace(parse_config(CONFIG_20B, "mxfp4"), num_layers=2, windowed=(True, False))
    job = Job(config, Request(SM90, "random:0", (DECODE, Bucket.decode(64), Bucket.extend(256, 4, 4))))
    variants = Variants(job, bucket, Kernels(SM90))
    assert Counter(kernel for kernel, _ in variants.choices) == wanted
    assert all(len(choice.candidates) > 1 and choice.taken == choice.rule for choice in variants.choices.values())
    attention = [variants.steps[name] for name in variants.choices if name[0].startswith("attention_")]
    assert all(len(steps) == 1 for steps in attention), "a window layer and a full one choose apart"


def test_choices_of_two_ranks(table: Path) -> None:
    config = replace(parse_config(CONFIG_20B, "mxfp4"), num_layers=2, windowed=(True, False))
    request = Request(SM90, "random:0", (Bucket.decode(64), Bucket.extend(256, 4, 4)), ranks=2)
    variants = Variants(Job(config, request), Bucket.decode(64), Kernels(SM90))
    inner = [key for kernel, key in variants.choices if kernel == "moe_grouped"]
    assert Counter(kernel for kernel, _ in variants.choices) == {
        "step": 1, "gemm": 3, "attention_decode": 2, "moe_grouped": len(inner)}
    assert ("step", "decode=64 sequences=64 ranks=2") in variants.choices
    assert len({tuple(variants.steps["moe_grouped", key]) for key in inner}) == 1, "ranks' shares differ, steps do not"


@pytest.mark.parametrize(("arguments", "machine", "message"), [
    (["--target", "sm90", "--tp", "2"], {}, "tuning was asked for 2 GPUs, one a rank, but 1 is visible"),
    (["--target", "cpu"], {}, "tuning measures on NVIDIA GPUs, and cpu is none"),
    (["--target", "gfx950"], {}, "tuning measures on NVIDIA GPUs, and gfx950 is none"),
    (["--target", "sm90", "--context", "64"], {}, "--context 64 is not within 65 and the 131072 tokens of --max-context"),
    (["--target", "sm90", "--max-context", "512"], {}, "--context 1024 is not within 65 and the 512 tokens"),
    (["--target", "sm90"], {"devices": 0}, "tuning was asked for sm90, an NVIDIA GPU, but the NVIDIA driver sees none"),
    (["--target", "sm90"], {"capability": (10, 0)}, "tuning was asked for sm90, but the GPU here, Fake GPU, is sm100"),
])
def test_what_cannot_be_tuned(arguments: list[str], machine: dict[str, Any], message: str, tmp_path: Path,
                              monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cuda_driver, "bindings", lambda: FakeDriver(**machine))
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_bytes(CONFIG_20B.read_bytes())
    assert compile_main(["tune", str(tmp_path / "m"), *arguments, "-o", str(tmp_path / "t.json")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "t.json").exists()


def test_stored_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CompileError, match="--weights link: tuning takes random:SEED"):
        tune(Checkpoint.random(CONFIG, 0), Request(SM90, "link", (DECODE,)), 128, tmp_path / "t.json", progress_bar)


def test_nothing_to_choose(driver: ClockDriver, table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune_module.Variants, "__init__", lambda self, *_: self.__dict__.update(choices={}))
    monkeypatch.setattr(tune_module.Variants, "sources", lambda self, names: set())
    with pytest.raises(CompileError, match="the kernels of decode-1 leave nothing to choose on sm90"):
        run(table)
