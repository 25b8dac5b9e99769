"""bench/against_one_rank.py on two GPUs whose kernels are their twins: what holds is good, an error is seen where it is."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from bench_scripts import bench
from fake_host import FakeHost, Machine
from two_ranks import CONFIG, PROMPT, learn

from gptoss_compile.artifact import Artifact
from gptoss_compile.checkpoint import Checkpoint
from gptoss_compile.compiler import Request, compile_checkpoint
from gptoss_compile.config import Bucket
from gptoss_compile.launch_plan import Operand, Step
from gptoss_compile.random_weights import round_bf16, widen_bf16
from gptoss_compile.runtime import cuda_driver
from gptoss_compile.runtime.executor_cuda import CudaExecutor
from gptoss_compile.runtime.rank_cuda import RESERVE
from gptoss_compile.target import Target

DECODE = Bucket.decode(1)
TOKENS, NEW = 90, 3  # fewer than the bucket's 96, and more than a one-shot sum takes
BLOCKS = ["attention of layer 0", "experts of layer 0", "attention of layer 1", "experts of layer 1 and head"]
Measure = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[Artifact]:
    folder = tmp_path_factory.mktemp("pair")
    requests = [Request(Target.parse("sm90"), "random:7", (DECODE, PROMPT), ranks=ranks) for ranks in (1, 2)]
    return [compile_checkpoint(Checkpoint.random(CONFIG, 7), None, r, folder / f"tp{r.ranks}") for r in requests]


@pytest.fixture
def gpus(pair: list[Artifact], monkeypatch: pytest.MonkeyPatch) -> FakeHost:
    """Two that know both artifacts' kernels, and are told which plan comes."""
    host = FakeHost(2, RESERVE + (256 << 20))
    monkeypatch.setattr(cuda_driver, "bindings", lambda: host)
    for artifact in pair:
        learn(host, artifact)
    upload = CudaExecutor.upload

    def told(self: CudaExecutor, bucket: Bucket, inputs: Any) -> None:
        for rank in self.ranks:
            shapes = {str(cache.key): rank.true_shape(cache).shape for cache in rank.plans[bucket].caches}
            host.expect(rank.number, rank.plans[bucket], {**shapes, "sampled": (rank.rows,)}, 1)
        upload(self, bucket, inputs)

    monkeypatch.setattr(CudaExecutor, "upload", told)
    return host


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return bench("against_one_rank", monkeypatch)


@pytest.fixture
def measure(module: ModuleType, pair: list[Artifact], gpus: FakeHost, monkeypatch: pytest.MonkeyPatch,
            capsys: pytest.CaptureFixture[str]) -> Measure:
    """The bench's exit status and JSON."""
    def call(replays: int = 1) -> tuple[int, dict[str, Any]]:
        paths = [str(artifact.path) for artifact in pair]
        options = [f"--tokens={TOKENS}", f"--new={NEW}", f"--replays={replays}"]
        monkeypatch.setattr(sys, "argv", ["against_one_rank.py", *paths, *options])
        status = module.main()
        out = capsys.readouterr().out
        print(out)
        assert not any(machine.blocks for machine in gpus.machines), "everything was given back"
        return status, json.loads(out.splitlines()[-1])

    return call


def disturb(module: ModuleType, monkeypatch: pytest.MonkeyPatch, bias: str, size: float) -> None:
    """A bias of several ranks is larger or smaller by `size`, by turns."""
    load = module.load

    def loaded(artifact: Artifact, *options: Any) -> CudaExecutor:
        executor: CudaExecutor = load(artifact, *options)
        for rank in executor.ranks if len(executor.ranks) > 1 else ():
            known = next(w for w in rank.plans[DECODE].weights if w.name == bias)
            place = Operand("weight", bias, known.dtype, known.shape)
            values = widen_bf16(executor.read(DECODE, place, rank.number))
            values[..., ::2] += size
            values[..., 1::2] -= size
            executor.write(DECODE, place, round_bf16(values), rank.number)
        return executor

    monkeypatch.setattr(module, "load", loaded)


# ---- end to end ----------------------------------------------------------------------------------------------------


def test_what_holds_is_good(measure: Measure) -> None:
    status, result = measure(replays=3)
    assert status == 0 and not result["faults"]
    assert (result["artifact"], result["gpu"], result["tokens"], result["replays"]) == ("tp2", "2 x Fake GPU", TOKENS, 3)
    assert [(r["tokens"], r["block"]) for r in result["rows"]] == [(t, b) for t in ("prompt", "decoded") for b in BLOCKS]
    assert all(r["mean"] >= r["least"] > 0.9999 for r in result["rows"])
    assert min(r["mean"] for r in result["rows"]) < 1 - 1e-7, "ranks round their parts of a sum"
    assert result["greedy"]["tokens"] == NEW + 1 == result["greedy"]["same"] + len(result["greedy"]["parted"])


@pytest.mark.parametrize(("bias", "at"), [("layers.0.o.bias", 0), ("layers.0.down.bias", 1), ("layers.1.down.bias", 3)])
def test_a_wrong_block_is_named(measure: Measure, module: ModuleType, monkeypatch: pytest.MonkeyPatch, bias: str,
                                at: int) -> None:
    """What its own kernel makes of the wrong stream, for the next block, may be wrong too; nothing else is."""
    disturb(module, monkeypatch, bias, 0.5)
    status, result = measure()
    assert status == 1 and result["faults"][0].startswith(f"prompt, {BLOCKS[at]}: the mean cosine is 0.")
    assert any(fault.startswith(f"decoded, {BLOCKS[at]}: the mean cosine is 0.") for fault in result["faults"])
    for row in result["rows"]:
        if row["block"] not in BLOCKS[at : at + 2]:
            assert row["mean"] > 0.9999 and row.get("gap", 0) <= module.NEAR_TIE, row


def test_another_route_is_no_error_of_what_follows(measure: Measure, module: ModuleType,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    disturb(module, monkeypatch, "layers.0.router.bias", 0.015)
    status, result = measure()
    experts = result["rows"][1]
    assert experts["differ"] > 0 and 0 < experts["gap"] <= module.NEAR_TIE
    assert status == 0 and all(r["least"] > 0.9995 for r in result["rows"]), "each token went to the one rank's experts"


def test_a_router_that_is_wrong(measure: Measure, module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    disturb(module, monkeypatch, "layers.1.router.bias", 0.5)
    status, result = measure()
    assert status == 1 and result["rows"][3]["gap"] > 0.1
    text = f"prompt, {BLOCKS[3]}: tokens are routed otherwise with logits "
    assert any(fault.startswith(text) for fault in result["faults"])


def test_a_rank_with_bits_of_its_own(measure: Measure, gpus: FakeHost) -> None:
    class Astray(Machine):
        def run_step(self, step: Step, at: dict[str, int]) -> bool:
            done = super().run_step(step, at)
            if done and step.op == "reduce_norm_linear":
                self._tensor(step.outputs[0], at["out0"])[0, 0] += 1
            return done

    gpus.machines[1].__class__ = Astray
    assert measure()[1]["faults"] == [
        f"{bucket.name}, experts of layer 0: rank 1 holds other bits than rank 0" for bucket in (PROMPT, DECODE)]


@pytest.mark.parametrize(("options", "message"), [
    (["tp2", "tp1"], "they have 2 and 1"), (["tp1", "tp1"], "they have 1 and 1"),
    (["tp1", "tp2", "--tokens=97", "--new=1"], "needs an extend bucket of 97 tokens, and decode-1"),
    (["tp1", "tp2", "--tokens=96", "--new=33"], "holds 128 tokens, fewer than --tokens and --new"),
    (["tp1", "tp2", "--new=0"], "--tokens and --new are 1 or more")])
def test_what_cannot_be_measured(module: ModuleType, pair: list[Artifact], monkeypatch: pytest.MonkeyPatch,
                                 capsys: pytest.CaptureFixture[str], options: list[str], message: str) -> None:
    monkeypatch.chdir(pair[0].path.parent)
    monkeypatch.setattr(sys, "argv", ["against_one_rank.py", *options])
    assert module.main() == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("against_one_rank: error: ") and message in captured.err and not captured.out


# ---- one by one ----------------------------------------------------------------------------------------------------


def routed(logits: dict[int, float]) -> tuple[Any, Any]:
    values = np.exp(np.array([*logits.values()]))
    return (values / values.sum()).astype(np.float32), np.array([*logits], np.int32)


def test_gaps(module: ModuleType) -> None:
    """Differences of the logits that the weights were made of, whatever was added to all."""
    one = routed({4: 3.0, 9: 2.5, 1: 2.0, 7: 1.9})
    assert module.gap(*one, *routed({4: 13.0, 1: 12.0, 9: 12.5, 5: 11.93})) == pytest.approx(0.03, abs=1e-5)
    assert module.gap(*one, *routed({4: 3.0, 9: 2.5, 6: 2.2, 5: 2.2})) == pytest.approx(0.3, abs=1e-5), "7, and 5 or 6"
    assert module.gap(*one, *routed({4: 3.1, 9: 2.4, 1: 2.0, 5: 1.95})) == pytest.approx(0.05, abs=1e-5), "from their mean"
    assert module.gap(*one, *routed({0: 3.0, 2: 2.5, 3: 2.0, 5: 1.9})) == float("inf")
    assert np.isnan(module.gap(one[0] * np.float32("nan"), one[1], *routed({4: 3.0, 9: 2.5, 1: 2.0, 5: 1.9})))


def test_only_routes_to_other_experts_are_overwritten(module: ModuleType) -> None:
    """In whatever order they are; rows behind the tokens stay."""
    stream, weights = np.zeros((3, 4), np.uint16), np.array([[0.6, 0.4], [0.6, 0.4], [0.5, 0.5]], np.float32)
    choice = np.array([[1, 2], [1, 2], [8, 9]], np.int32)
    wanted = np.ones((2, 4), np.uint16), np.array([[0.3, 0.7], [0.9, 0.1]], np.float32), np.array([[2, 1], [1, 3]], np.int32)
    module.overwrite([stream, weights, choice], wanted, 2)
    assert stream[:, 0].tolist() == [1, 1, 0] and choice.tolist() == [[1, 2], [1, 3], [8, 9]]
    assert weights.tolist() == np.array([[0.6, 0.4], [0.9, 0.1], [0.5, 0.5]], np.float32).tolist()


def test_greedy_tokens_that_part(module: ModuleType) -> None:
    one = np.array([5.0, 4.0, 0, 0], np.float32)
    parted = [module.parting(3, one, np.array(several, np.float32)) for several in ([4.5, 4.6, 0, 0], [4.99, 5.0, 0, 0])]
    assert parted[0] == pytest.approx({"token": 3, "gap": 1.0, "other_gap": 0.1, "rms": (0.61 / 4) ** 0.5}, abs=1e-6)
    assert module.judge([], parted[:1]) == []
    assert module.judge([], [{**parted[0], "rms": 0.1}]) == ["greedy token 3 is another without a near tie"]


def test_no_number_is_a_fault(module: ModuleType) -> None:
    row = {"tokens": "prompt", "block": "B", "mean": 1.0, "least": 1.0, "gap": 0.0}
    nan = float("nan")
    assert not module.judge([row], [])
    for bad in ({"mean": nan}, {"gap": nan}, {"gap": 0.06}):
        assert len(module.judge([{**row, **bad}], [])) == 1, bad
    assert len(module.judge([], [{"token": 0, "gap": nan, "other_gap": nan, "rms": nan}])) == 1


@pytest.mark.parametrize(("logits", "faults"), [([1, 1, 1], []), ([1, 1, 2], ["replay 2 gives other logits"]), ([], [])])
def test_replays(module: ModuleType, logits: list[int], faults: list[str]) -> None:
    left = iter(logits)
    executor = SimpleNamespace(run=lambda bucket, inputs: np.full((1, 8), next(left), np.float32))
    assert module.replay(executor, {}, len(logits)) == faults
