"""The GPU benches on a driver that computes nothing: they run to their end, and reckon with the right bytes and pages."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench_scripts import bench, learn_kernels
from fake_cuda import Captured, FakeDriver

from gptoss_compile.artifact import Artifact
from gptoss_compile.checkpoint import Checkpoint
from gptoss_compile.compiler import Request, compile_checkpoint
from gptoss_compile.config import Bucket, ModelConfig
from gptoss_compile.launch_plan import LaunchPlan, Operand
from gptoss_compile.runtime import cuda_driver, timing
from gptoss_compile.runtime.executor_cuda import CudaExecutor
from gptoss_compile.runtime.rank_cuda import RESERVE
from gptoss_compile.target import Target

CONFIG = ModelConfig(
    num_layers=2, hidden=64, intermediate=32, num_heads=4, num_kv_heads=2, head_dim=16, num_experts=4,
    experts_per_token=2, vocab_size=96, sliding_window=16, windowed=(True, False), max_position=512,
    rope_original_context=32, eos_ids=(0,))
BUCKETS = (Bucket.decode(1), Bucket.decode(3), Bucket.extend(24, 3, 3), Bucket.extend(64, 2, 2))


class NullDriver(FakeDriver):
    """Kernels do nothing, but for the generator's, and events are a millisecond apart."""

    def _execute(self, captured: Captured) -> None:
        if captured.function.startswith("random_weights"):
            self._generate(captured)

    def _cuEventElapsedTime(self, start: Any, end: Any) -> float:
        return 1.0


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("bench") / "artifact"
    return compile_checkpoint(Checkpoint.random(CONFIG, 3), None, Request(Target.parse("sm90"), "random:1", BUCKETS), folder)


@pytest.fixture
def driver(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> NullDriver:
    fake = NullDriver(memory=RESERVE + (64 << 20))
    for path in (artifact.path / "kernels").glob("*.cubin"):
        fake.codes[path.read_bytes()] = path.stem
    monkeypatch.setattr(cuda_driver, "bindings", lambda: fake)
    return fake


@pytest.fixture
def executor(artifact: Artifact, driver: NullDriver) -> Iterator[CudaExecutor]:
    loaded = CudaExecutor.load(artifact, num_pages=400, max_num_seqs=8)
    yield loaded
    loaded.close()


def test_decode(artifact: Artifact, driver: NullDriver, read: Path, monkeypatch: pytest.MonkeyPatch,
                capsys: pytest.CaptureFixture[str]) -> None:
    module = bench("decode", monkeypatch)
    learn_kernels(driver.codes, read)
    monkeypatch.setattr(sys, "argv", ["decode.py", str(artifact.path), "--batches=1,3", "--contexts=128,256,513",
                                      f"--read={read}"])
    assert module.main() == 0
    lines = capsys.readouterr().out.splitlines()
    (result,) = json.loads(lines[-1])["artifacts"]
    assert [(r["batch"], r["context"]) for r in result["rows"]] == [(1, 128), (1, 256), (3, 128), (3, 256)]
    assert result["left_out"] == [[1, 513], [3, 513]], "beyond the artifact's context"
    assert all(row["ratio"].keys() == {"chain", "early", "bytes"} for row in result["rows"])
    assert not driver.blocks, "everything was given back"


def test_kernels(artifact: Artifact, driver: NullDriver, monkeypatch: pytest.MonkeyPatch,
                 capsys: pytest.CaptureFixture[str]) -> None:
    module = bench("kernels", monkeypatch)
    monkeypatch.setattr(sys, "argv", ["kernels.py", str(artifact.path), "--context=128", "--buckets=decode-1,extend-64x2"])
    assert module.main() == 0
    (result,) = json.loads(capsys.readouterr().out.splitlines()[-1])["artifacts"]
    decode, extend = ({op["op"] for op in bucket["ops"]} for bucket in result["buckets"])
    assert {"embed", "norm_linear", "rope_kv_attention", "norm_route", "moe_gate_up", "moe_down", "norm_head"} <= decode
    assert {"norm_linear", "attention", "moe_grouped"} <= extend
    assert not driver.blocks, "everything was given back"


def test_steps(artifact: Artifact, driver: NullDriver, monkeypatch: pytest.MonkeyPatch,
               capsys: pytest.CaptureFixture[str]) -> None:
    module = bench("steps", monkeypatch)
    monkeypatch.setattr(sys, "argv", ["steps.py", str(artifact.path), "--batches=1,3", "--context=50", "--steps=40"])
    assert module.main() == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [row["batch"] for row in rows] == [1, 3] and all(row["bare_ms"] == 0.02 for row in rows)
    assert not driver.blocks, "everything was given back"


def test_steps_that_the_context_does_not_hold(artifact: Artifact, driver: NullDriver,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    module = bench("steps", monkeypatch)
    monkeypatch.setattr(sys, "argv", ["steps.py", str(artifact.path), "--batches=1", "--context=50", "--steps=500"])
    with pytest.raises(SystemExit, match=r"^answers ended after \d+ of 20 \+ 500 steps: ask for fewer --steps or less"):
        module.main()
    assert not driver.blocks, "everything was given back"


@pytest.mark.parametrize("name", ["decode", "prefill", "kernels", "startup", "steps", "collectives"])
def test_an_artifact_that_is_not_there(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                       capsys: pytest.CaptureFixture[str]) -> None:
    module = bench(name, monkeypatch)
    monkeypatch.setattr(module, "matmul", lambda: None, raising=False)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", str(tmp_path / "none")])
    assert module.main() > 0
    assert capsys.readouterr().err.startswith(f"{name}: error: {tmp_path / 'none'}")


def test_host(monkeypatch: pytest.MonkeyPatch) -> None:
    module = bench("host", monkeypatch)
    assert all(us > 0 for consumers in (False, True) for us in module.measure(3, 100, 5, consumers))


def test_prefill(artifact: Artifact, driver: NullDriver, monkeypatch: pytest.MonkeyPatch,
                 capsys: pytest.CaptureFixture[str]) -> None:
    module = bench("prefill", monkeypatch)
    monkeypatch.setattr(module, "SUSTAINED", 0.05)
    monkeypatch.setattr(module, "matmul", lambda: {"rested": 700.0, "sustained": 600.0})
    monkeypatch.setattr(sys, "argv", ["prefill.py", str(artifact.path), "--lengths=20,150", "--rest=0"])
    assert module.main() == 0
    (result,) = json.loads(capsys.readouterr().out.splitlines()[-1])["artifacts"]
    assert [row["tokens"] for row in result["rows"]] == [20, 150]
    assert result["rows"][1]["chunks"] == "extend-64x2 x 3"


def test_against_transformers(artifact: Artifact, driver: NullDriver, monkeypatch: pytest.MonkeyPatch,
                              tmp_path: Path) -> None:
    """With a driver whose kernels are their twins: what holds is good, and a wrong layer is seen where it is."""
    module = bench("against_transformers", monkeypatch)
    tokens = np.random.default_rng(0).integers(0, CONFIG.vocab_size, 40)
    module.reference(artifact, tokens, tmp_path / "reference.npz")
    wanted = dict(np.load(tmp_path / "reference.npz"))
    real = FakeDriver(memory=driver.memory, codes=driver.codes)
    monkeypatch.setattr(cuda_driver, "bindings", lambda: real)
    load = module.CudaExecutor.load

    def loaded(*args: Any, **options: Any) -> CudaExecutor:
        executor = load(*args, **options)
        plan = executor.plans[BUCKETS[3]]
        real.expect(plan, {str(c.key): executor.true_shape(c).shape for c in plan.caches})
        return executor

    monkeypatch.setattr(module.CudaExecutor, "load", loaded)
    result = module.compare(artifact, tokens, wanted)
    assert result["good"] and result["kl"] < 1e-3 and [row["layer"] for row in result["layers"]] == [0, 1]
    wanted["hidden"][1] *= np.random.default_rng(1).uniform(0.5, 1.5, wanted["hidden"][1].shape)
    faulty = module.compare(artifact, tokens, wanted)
    assert not faulty["good"] and faulty["layers"][0]["cosine"] > 0.999 > faulty["layers"][1]["cosine"]


def test_startup(artifact: Artifact, driver: NullDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    module = bench("startup", monkeypatch)
    result = module.measure(artifact.path, None, 8, module.time.time())
    assert result["graphs"] == 4 and result["total_s"] == pytest.approx(sum(result["seconds"].values()), abs=0.01)
    assert [n for n in result["seconds"] if n.startswith("capture")] == [f"capture {b}" for b in BUCKETS]
    layouts = LaunchPlan.loads(artifact.file(f"plans/{BUCKETS[0].name}.json").read_text()).layouts
    plain = {w["name"] for w in artifact.recipes()} - {name for layout in layouts.values() for name in layout.sources}
    assert result["checked_weights"] == sum(name.startswith("layers.1.") for name in plain) > 0
    module.show(result)


def test_chunks_of_a_prompt_reach_every_key_they_need(executor: CudaExecutor) -> None:
    """A page that is given to a position stays that position's as long as a window may look at it."""
    page = executor.page_size
    steps = timing.prompt_chunks(executor, 150, [b for b in executor.buckets if b.kind == "extend"])
    assert [(b.tokens, int((i["positions"] >= 0).sum())) for b, i in steps] == [(64, 64), (64, 64), (24, 22)]
    owner: dict[int, int] = {}
    for _, inputs in steps:
        positions = inputs["positions"][inputs["positions"] >= 0]
        for p in positions:
            entry = int(inputs["window_table"][0, p // page % executor.window_ring])
            assert 0 < entry < executor.num_window_pages
            owner[entry] = int(p // page)
        for p in range(max(0, positions[0] - CONFIG.sliding_window + 1), positions[-1] + 1):
            assert owner[int(inputs["window_table"][0, p // page % executor.window_ring])] == p // page
            assert inputs["full_table"][0, p // page] == 1 + p // page


def test_bytes_of_a_step(executor: CudaExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = bench("gpu", monkeypatch)
    plan = executor.plans[Bucket.decode(3)]
    moe = next(step for step in plan.steps if step.op.startswith("moe"))
    experts = sum(o.bytes for n, o in moe.operands.items() if n in gpu.EXPERT_WEIGHTS and isinstance(o, Operand))
    assert gpu.step_bytes(CONFIG, moe, 100, 3) - gpu.step_bytes(CONFIG, moe, 100, 1) == experts * 2 // 4
    full = next(s for s in plan.steps if s.op == "rope_kv_attention" and s.operands["window"] == 0)
    windowed = next(s for s in plan.steps if s.op == "rope_kv_attention" and s.operands["window"] == 16)
    key_and_value = 2 * CONFIG.num_kv_heads * CONFIG.head_dim * 2
    assert gpu.step_bytes(CONFIG, full, 100, 1) == full.moved + 3 * 100 * key_and_value
    assert gpu.step_bytes(CONFIG, windowed, 100, 1) == windowed.moved + 3 * 16 * key_and_value


def test_decode_inputs_share_no_page(executor: CudaExecutor) -> None:
    bucket, page = Bucket.decode(3), executor.page_size
    inputs = timing.decode_inputs(executor, bucket, 256, 64)
    assert timing.fits(executor, 3, 256, 64) and not timing.fits(executor, 3, 4096, 64)
    live = range((256 - 65 - 15) // page, 256 // page)
    windows = inputs["window_table"][:, [e % executor.window_ring for e in live]]
    for pages, most in ((inputs["full_table"][:, : 256 // page], executor.num_pages), (windows, executor.num_window_pages)):
        assert len(np.unique(pages)) == pages.size and pages.min() > 0 and pages.max() < most
