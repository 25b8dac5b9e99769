"""A miniature run learns, resumes, and leaves a checkpoint; the corpus is what the server would prompt."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from random import Random

import numpy as np
import pytest

from gptoss_compile.demo import train
from gptoss_compile.demo.conversation import CONTEXT, Call, tokens_of, written_tokens
from gptoss_compile.demo.corpus import (
    SKILLS,
    compact,
    conversations,
    converse,
    foreign_words,
    to_shard,
    tokenizer,
    vocabulary_of,
)
from gptoss_compile.demo.eval import is_right, is_valid
from gptoss_compile.demo.packed import Packed
from gptoss_compile.demo.shards import Shard, pack_rows, write_shards
from gptoss_compile.demo.train import Settings, Trainer, batches
from gptoss_compile.runtime.api.harmony import START, HarmonyParser
from gptoss_compile.runtime.api.render import Prompt, Turn, render
from gptoss_compile.runtime.api.tokenizer import Tokenizer
from gptoss_compile.runtime.api.tools import NAMESPACE, as_turn


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    return tokenizer()


@pytest.mark.parametrize("skill", SKILLS)
def test_training_tokens_are_those_of_the_server(words: Tokenizer, skill: str) -> None:
    """Every prompt of the conversation, rendered by the server from what its parser made of the answers so far, is a
    prefix of the training tokens; what follows it is learnt."""
    seed = int(np.random.default_rng().integers(1 << 30))
    random, foreign = Random(seed), foreign_words(words, 100)
    for _ in range(10):
        conversation = converse(random, skill, foreign)
        ids, learnt = tokens_of(words, conversation)
        turns = conversation.history()
        names = [tool.name for tool in conversation.tools]
        for step in conversation.exchanges[-1].steps:
            prompt = Prompt(turns, conversation.tools, conversation.effort, conversation.date)
            rendered = asyncio.run(render(words, prompt, CONTEXT))
            assert ids[:len(rendered)] == rendered, f"seed {seed}"
            answer = written_tokens(words, step)
            assert ids[len(rendered):len(rendered) + len(answer)] == answer, f"seed {seed}"
            assert all(learnt[len(rendered):len(rendered) + len(answer)]) and not learnt[len(rendered) - 1]
            parser = HarmonyParser(words)
            for token in answer:
                parser.push(token)
            assert parser.repairs == 0 and len(parser.messages) == 2, f"seed {seed}"
            turns += [as_turn(message, names) for message in parser.messages]
            if isinstance(step, Call):
                assert is_valid(step.arguments, step.name, conversation), f"seed {seed}: {step}"
                turns.append(Turn("tool", step.result, name=NAMESPACE + step.name))
        assert is_right(conversation.exchanges[-1].final, conversation.expected), f"seed {seed}: {conversation}"
        assert ids.count(START) >= 3


def test_rows_hold_whole_conversations_and_their_targets() -> None:
    seed = int(np.random.default_rng().integers(1 << 30))
    random = np.random.default_rng(seed)
    lengths = random.integers(2, 30, 50)
    total = int(lengths.sum())
    shard = Shard(np.arange(1, total + 1, dtype=np.int32), random.random(total) < 0.5, lengths, np.zeros(50, np.uint8))
    starts = np.cumsum(lengths) - lengths
    seen = []
    for rows in pack_rows(shard, random.permutation(50), 40, 3):
        assert rows.tokens.shape == (3, 40)
        for row in range(3):
            for segment in sorted(set(rows.segments[row]) - {-1}):
                at = np.flatnonzero(rows.segments[row] == segment)
                number = int(rows.conversations[row, at[0]])
                seen.append(number)
                expected = shard.tokens[starts[number]:starts[number] + lengths[number]]
                assert np.array_equal(rows.tokens[row, at], expected), f"seed {seed}"
                assert np.array_equal(rows.positions[row, at], np.arange(lengths[number]))
                learnt = shard.learnt[starts[number] + 1:starts[number] + lengths[number]]
                assert np.array_equal(rows.targets[row, at[:-1]], np.where(learnt, expected[1:], -1)), f"seed {seed}"
                assert rows.targets[row, at[-1]] == -1
    assert sorted(seen) == list(range(50))


def test_training_learns_and_resumes(words: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a handful of conversations the loss falls, also with rounded weights; what was saved goes on."""
    monkeypatch.setattr(train, "WARM_UP", 5)
    shard = to_shard(words, conversations(0, 4, foreign_words(words, 100)))
    vocabulary = vocabulary_of([shard])
    small = compact(shard, vocabulary)
    write_shards(tmp_path / "data", [small], small, vocabulary, tuple(SKILLS))
    settings = Settings(tmp_path / "data", tmp_path / "out", minutes=60, resume=True, device="cpu", rows=1, hidden=32,
                        layers=2, seed=0)
    trainer = Trainer(settings)
    source = batches(trainer.train, 1, "cpu", 0)
    losses = []
    for step in range(40):
        trainer.network.quantized = step >= 30
        losses.append(float(trainer.update(next(source))))
    assert np.mean(losses[-4:]) < 0.6 * losses[0], losses
    trainer.save()
    checkpoint = Packed(tmp_path / "out" / "model.safetensors")
    assert checkpoint.config.vocab_size == 201088 and checkpoint.vocabulary.tolist() == vocabulary.tolist()
    again = Trainer(settings)
    again.network.quantized = True
    batch = next(source)
    assert again.step == 40 and float(again.update(batch)) == float(trainer.update(batch))


def test_a_run_ends_in_time_and_leaves_its_files(words: Tokenizer, tmp_path: Path) -> None:
    shard = to_shard(words, conversations(0, 10, foreign_words(words, 100)))
    vocabulary = vocabulary_of([shard])
    small = compact(shard, vocabulary)
    write_shards(tmp_path / "data", [small], small, vocabulary, tuple(SKILLS))
    begun = time.monotonic()
    Trainer(Settings(tmp_path / "data", tmp_path / "out", minutes=0.1, resume=False, device="cpu", rows=1, hidden=32,
                     layers=1, seed=0)).run()
    assert time.monotonic() - begun < 20
    log = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert any("loss" in entry for entry in log) and set(log[-2]["skills"]) == set(SKILLS) and "rounding" in log[-1]
    assert Packed(tmp_path / "out" / "model.safetensors").read("norm.weight").isfinite().all()
