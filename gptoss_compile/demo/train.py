"""Train the demo model: `python -m gptoss_compile.demo.train --data DIR --out DIR [--minutes 15] [--resume]`.

The schedule goes by the clock, so that a run always ends in time: the learning rate follows a cosine, and for the last
quarter the forward pass sees every weight as the checkpoint will keep it (MXFP4 experts, bf16). --out receives log.jsonl
(loss, and the held-out accuracy by skill), model.safetensors (see `packed`) and, for --resume, state.pt.

Needs torch and numpy only. On a GPU it computes in bf16 with fp32 weights and router.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gptoss_compile.config import ModelConfig
from gptoss_compile.config_parse import O200K_HARMONY
from gptoss_compile.demo import packed
from gptoss_compile.demo.network import Network
from gptoss_compile.demo.shards import OTHER, Rows, Shard, pack_rows, read_held_out, read_meta, read_train

WIDTH = 512  # tokens of a row
PEAK = 2e-3  # learning rate
WARM_UP = 200  # steps
QUANTIZE_FROM = 0.75  # part of the run
BALANCE = 0.01  # weight of the experts' imbalance in the loss
ENDING = 25.0  # seconds kept for the last accuracy table and the files
LOG_EVERY, TEST_SECONDS, SAVE_SECONDS = 50, 60.0, 120.0


@dataclass(frozen=True)
class Settings:
    data: Path
    out: Path
    minutes: float
    resume: bool
    device: str
    rows: int
    hidden: int
    layers: int
    seed: int


@dataclass(frozen=True)
class Batch:
    """Rows on the device, and where (flat) the model is to write which token."""

    tokens: Tensor
    positions: Tensor
    segments: Tensor
    places: Tensor
    targets: Tensor


def model_config(hidden: int, layers: int) -> ModelConfig:
    return ModelConfig(num_layers=layers, hidden=hidden, intermediate=hidden, num_heads=8, num_kv_heads=1, head_dim=64,
                       num_experts=8, experts_per_token=4, vocab_size=O200K_HARMONY, sliding_window=128,
                       windowed=tuple(i % 2 == 0 for i in range(layers)))


def to_batch(rows: Rows, device: str) -> Batch:
    targets = rows.targets.reshape(-1)
    places = np.flatnonzero(targets >= 0)

    def move(array: np.ndarray[Any, Any]) -> Tensor:
        tensor = torch.from_numpy(array)
        return tensor.pin_memory().to(device, non_blocking=True) if device == "cuda" else tensor

    return Batch(move(rows.tokens), move(rows.positions), move(rows.segments), move(places), move(targets[places]))


def batches(shard: Shard, rows: int, device: str, seed: int) -> Iterator[Batch]:
    """Batches without end, each epoch in another order."""
    random = np.random.default_rng(seed)
    while True:
        for packed_rows in pack_rows(shard, random.permutation(len(shard.lengths)), WIDTH, rows):
            yield to_batch(packed_rows, device)


class Trainer:
    """One run. `spent`: seconds of earlier runs that this one resumes."""

    def __init__(self, settings: Settings) -> None:
        self.begun = time.monotonic()
        self.settings = settings
        self.vocabulary, self.skills = read_meta(settings.data)
        self.train, self.test = read_train(settings.data), read_held_out(settings.data)
        self.config = model_config(settings.hidden, settings.layers)
        classes = len(self.vocabulary) + 1
        torch.manual_seed(settings.seed)
        self.network = Network(self.config, classes, settings.seed).to(settings.device)
        self.optimizer = self._optimizer()
        self.rows, self.step, self.spent, self.rate_factor, self.seen = settings.rows, 0, 0.0, 1.0, 0
        # OTHER is as likely as all ids outside the vocabulary together, whose rows are equal.
        self.offset = torch.zeros(classes, device=settings.device)
        self.offset[OTHER] = math.log(self.config.vocab_size - len(self.vocabulary))
        settings.out.mkdir(parents=True, exist_ok=True)
        self.state_path = settings.out / "state.pt"
        if settings.resume and self.state_path.exists():
            self._restore()
        self.log = open(settings.out / "log.jsonl", "a" if self.step else "w")  # noqa: SIM115  open for the run

    def _optimizer(self) -> torch.optim.AdamW:
        matrices = [p for p in self.network.parameters() if p.dim() > 1]
        others = [p for p in self.network.parameters() if p.dim() <= 1]
        groups = [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=PEAK, betas=(0.9, 0.98), eps=1e-9, fused=self.settings.device == "cuda")

    @property
    def elapsed(self) -> float:
        return self.spent + time.monotonic() - self.begun

    @property
    def progress(self) -> float:
        """The part of the run's time that is over: 0 to 1."""
        return min(1.0, self.elapsed / max(1.0, self.settings.minutes * 60 - ENDING))

    def learning_rate(self) -> float:
        cosine = 0.5 + 0.5 * math.cos(math.pi * self.progress)
        return PEAK * self.rate_factor * max(0.01, cosine) * min(1.0, (self.step + 1) / WARM_UP)

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(cross entropy of what is to be written, imbalance of the experts)."""
        with torch.autocast(self.settings.device, torch.bfloat16, enabled=self.settings.device == "cuda"):
            hidden, imbalance = self.network(batch.tokens, batch.positions, batch.segments)
            logits = self.network.logits(hidden.flatten(0, 1)[batch.places])
        return F.cross_entropy(logits + self.offset, batch.targets), imbalance

    def update(self, batch: Batch) -> Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        self.optimizer.zero_grad(set_to_none=True)
        loss, imbalance = self.loss(batch)
        (loss + BALANCE * imbalance).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        self.seen += batch.tokens.numel()
        return loss.detach()

    @torch.no_grad()
    def accuracy(self) -> dict[str, dict[str, float]]:
        """By skill: share of right next tokens, and of conversations with all of them right (so greedy decoding gives
        exactly the reference)."""
        size = len(self.test.lengths)
        right, wrong = np.zeros(size, np.int64), np.zeros(size, np.int64)
        for rows in pack_rows(self.test, np.arange(size), WIDTH, self.rows):
            batch = to_batch(rows, self.settings.device)
            with torch.autocast(self.settings.device, torch.bfloat16, enabled=self.settings.device == "cuda"):
                hidden, _ = self.network(batch.tokens, batch.positions, batch.segments)
                logits = self.network.logits(hidden.flatten(0, 1)[batch.places])
            good = (logits.argmax(-1) == batch.targets).cpu().numpy()
            numbers = rows.conversations.reshape(-1)[batch.places.cpu().numpy()]
            np.add.at(right, numbers[good], 1)
            np.add.at(wrong, numbers[~good], 1)
        table = {}
        for i, skill in enumerate(self.skills):
            of = self.test.skills == i
            tokens = max(1, int((right + wrong)[of].sum()))
            table[skill] = {"tokens": round(float(right[of].sum()) / tokens, 4),
                            "exact": round(float((wrong[of] == 0).mean()), 4) if of.any() else 0.0}
        return table

    @torch.no_grad()
    def rounding_cost(self) -> dict[str, float]:
        """What MXFP4 and bf16 change, on the held-out set in fp32: mean KL(trained ‖ packed) a token, in nats, and the
        share of written tokens that are right before and after."""
        divergence, right, count = 0.0, [0, 0], 0
        for rows in pack_rows(self.test, np.arange(len(self.test.lengths)), WIDTH, max(1, self.rows // 4)):
            batch = to_batch(rows, self.settings.device)
            logs = []
            for i, self.network.quantized in enumerate((False, True)):
                hidden, _ = self.network(batch.tokens, batch.positions, batch.segments)
                logits = self.network.logits(hidden.flatten(0, 1)[batch.places]) + self.offset
                right[i] += int((logits.argmax(-1) == batch.targets).sum())
                logs.append(torch.log_softmax(logits, -1))
            divergence += float((logs[0].exp() * (logs[0] - logs[1])).sum())
            count += len(batch.targets)
        return {"kl": divergence / count, "right_trained": right[0] / count, "right_packed": right[1] / count}

    def report(self, **fields: Any) -> None:
        self.log.write(json.dumps(fields) + "\n")
        self.log.flush()
        print(json.dumps(fields), flush=True)

    def test_now(self) -> None:
        table = self.accuracy()
        mean = round(sum(row["exact"] for row in table.values()) / len(table), 4)
        self.report(step=self.step, seconds=round(self.elapsed, 1), exact=mean, skills=table)

    def save(self) -> None:
        """Files appear whole or not at all."""
        state = {"weights": self.network.state_dict(), "optimizer": self.optimizer.state_dict(), "step": self.step,
                 "spent": self.elapsed, "seen": self.seen, "rate_factor": self.rate_factor}
        fresh = self.state_path.with_suffix(".new")
        torch.save(state, fresh)
        fresh.rename(self.state_path)
        export = self.settings.out / "model.safetensors.new"
        packed.save(export, self.config, self.vocabulary, self.weights())
        export.rename(export.with_suffix(""))

    def weights(self) -> dict[str, Tensor]:
        return dict(zip(self.network.names, self.network.weights, strict=True))

    def _restore(self) -> None:
        state = torch.load(self.state_path, map_location=self.settings.device, weights_only=True)
        self.network.load_state_dict(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.spent, self.seen = state["step"], state["spent"], state["seen"]
        self.rate_factor = state["rate_factor"]

    def self_check(self) -> None:
        """The first steps: fused parts if they compile, rows that fit the memory."""
        if self.settings.device == "cuda":
            self.network.compile_parts()
        while True:
            try:
                first = float(self.update(next(batches(self.train, self.rows, self.settings.device, 0))))
                break
            except torch.OutOfMemoryError:
                if self.rows == 1:
                    raise
                self.rows //= 2
                torch.cuda.empty_cache()
            except Exception as error:
                if self.network.plain:
                    raise
                print(f"fused parts do not compile, so without: {type(error).__name__}: {str(error)[:200]}", flush=True)
                self.network.use_plain_parts()
        self.report(step=self.step, seconds=round(self.elapsed, 1), loss=round(first, 4), rows=self.rows,
                    fused=not self.network.plain, parameters=sum(p.numel() for p in self.network.parameters()),
                    conversations=len(self.train.lengths), tokens=len(self.train.tokens))

    def run(self) -> None:
        self.self_check()
        tested = saved = self.elapsed
        losses: list[Tensor] = []
        marked, marked_seen = time.monotonic(), self.seen
        for batch in batches(self.train, self.rows, self.settings.device, self.settings.seed + self.step):
            self.network.quantized = self.progress >= QUANTIZE_FROM
            losses.append(self.update(batch))
            if self.step % LOG_EVERY == 0:
                loss = float(torch.stack(losses).mean())  # waits for the device, so the clock is right
                now = time.monotonic()
                self.report(step=self.step, seconds=round(self.elapsed, 1), loss=round(loss, 5),
                            rate=round(self.learning_rate(), 7), quantized=self.network.quantized, tokens=self.seen,
                            tokens_per_second=round((self.seen - marked_seen) / (now - marked)))
                losses, marked, marked_seen = [], now, self.seen
                if not math.isfinite(loss):
                    self._step_back()
            if self.elapsed - tested > TEST_SECONDS:
                self.test_now()
                tested = self.elapsed
            if self.elapsed - saved > SAVE_SECONDS and (not losses or math.isfinite(float(losses[-1]))):
                self.save()
                saved = self.elapsed
            if self.progress >= 1.0:
                break
        self.network.quantized = True
        self.save()
        self.test_now()
        self.report(step=self.step, seconds=round(self.elapsed, 1), rounding=self.rounding_cost())
        print(f"done: {self.step} steps, {self.seen / 1e6:.0f}M tokens, {self.elapsed:.0f} s", flush=True)

    def _step_back(self) -> None:
        """The loss is not finite: on from the last state, at half the learning rate."""
        spent, factor = self.elapsed, self.rate_factor / 2
        if not self.state_path.exists():
            raise RuntimeError("the loss is not finite and no state has been saved yet")
        self._restore()
        self.spent, self.begun, self.rate_factor = spent, time.monotonic(), factor
        print(f"the loss is not finite: back to step {self.step}, rate factor {factor}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the shards (see demo.corpus)")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=15.0, help="everything included; earlier runs too with --resume")
    parser.add_argument("--resume", action="store_true", help="go on from --out's state.pt if it is there")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", type=int, default=64, help=f"rows of {WIDTH} tokens a step")
    parser.add_argument("--hidden", type=int, default=192)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    torch.backends.cuda.enable_cudnn_sdp(False)  # attention with a mask: leave it to the memory-efficient kernel
    Trainer(Settings(**vars(parser.parse_args()))).run()


if __name__ == "__main__":
    main()
