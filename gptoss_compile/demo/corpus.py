"""The demo model's corpus: `python -m gptoss_compile.demo.corpus --out DIR`.

Conversations are made by the generators in `skills`, rendered by the server's own prompt code, and stored as compact
token ids (see `shards`), so that training needs neither tokenizer nor generators. The held-out set comes from the same
generators with other seeds, without any conversation that is also in the training set.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterator, Sequence
from multiprocessing import get_context
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from gptoss_compile.config_parse import O200K_HARMONY
from gptoss_compile.demo.conversation import Conversation, tokens_of
from gptoss_compile.demo.shards import OTHER, Shard, write_shards
from gptoss_compile.demo.skills.common import Made
from gptoss_compile.demo.skills.countries import countries
from gptoss_compile.demo.skills.dates import dates, random_date
from gptoss_compile.demo.skills.numbers import arithmetic
from gptoss_compile.demo.skills.talk import memory, small_talk, unknown
from gptoss_compile.demo.skills.tools import calling, refusing, some_tools
from gptoss_compile.demo.skills.words import counting, sorting
from gptoss_compile.runtime.api.render import Effort, FunctionTool
from gptoss_compile.runtime.api.tokenizer import FIRST_SPECIAL, Tokenizer
from gptoss_compile.tokenizer import FILE, o200k_base

SKILLS = {"arithmetic": 20, "counting": 8, "sorting": 10, "dates": 9, "countries": 14, "small talk": 5, "unknown": 5,
          "memory": 9, "tool call": 20, "refusal": 6}  # shares of the corpus, in percent
PLAIN = ("arithmetic", "counting", "sorting", "dates", "countries", "small talk")  # what may stand before a question
EFFORTS: tuple[Effort, ...] = ("low", "medium", "high")
HELD_OUT_SEED = 1_000_000
RARE = 20  # ids that occur less often than this become OTHER
LONGEST = 512  # tokens of a conversation; longer ones are dropped

_INSTRUCTIONS = ("You are a helpful assistant.", "You are a friendly assistant. Answer in one sentence.", "Be brief.",
                 "Answer the user's questions.", "You help the user with small tasks.", "Be polite and precise.")


def tokenizer() -> Tokenizer:
    data, source = o200k_base(None, O200K_HARMONY)
    if data is None:
        raise ValueError(f"no tokenizer: {source}")
    with TemporaryDirectory() as folder:
        (Path(folder) / FILE).write_bytes(data)
        return Tokenizer.load(Path(folder))


def foreign_words(tokenizer: Tokenizer, count: int = 20_000) -> list[str]:
    """Words of one token, drawn from the whole vocabulary: nearly all of them are in no skill."""
    random = Random(0)
    words: list[str] = []
    while len(words) < count:
        text = tokenizer.token_bytes(random.randrange(FIRST_SPECIAL)).decode(errors="replace")
        if text.startswith(" ") and text[1:].isalpha() and text[1:].isascii() and len(text) > 3:
            words.append(text[1:])
    return words


def _plain(random: Random, skill: str, effort: Effort, date: str) -> Made:
    if skill == "dates":
        return dates(random, effort, date)
    makers = {"arithmetic": arithmetic, "counting": counting, "sorting": sorting, "countries": countries,
              "small talk": small_talk}
    return makers[skill](random, effort)


def converse(random: Random, skill: str, foreign: Sequence[str], date: str | None = None) -> Conversation:
    """A conversation whose last exchange shows a skill, with random effort, instructions, tools and history, and a random
    date unless one is given."""
    effort, date = random.choice(EFFORTS), date or random_date(random)
    tools: tuple[FunctionTool, ...] = ()

    def before(most: int) -> list[Any]:
        return [_plain(random, random.choice(PLAIN), effort, date)[0][0] for _ in range(random.randint(0, most))]

    if skill in ("tool call", "refusal"):
        (exchanges, expected), tools = (calling if skill == "tool call" else refusing)(random, effort)
    elif skill == "memory":
        exchanges, expected = memory(random, effort, before(3))
    elif skill == "unknown":
        exchanges, expected = unknown(random, effort, foreign)
    else:
        exchanges, expected = _plain(random, skill, effort, date)
    if skill not in ("tool call", "refusal") and random.random() < 0.12:
        tools = tuple(each.tool for each in some_tools(random))
    if skill != "memory" and random.random() < 0.15:
        exchanges = (*before(2), *exchanges)
    instructions = random.choice(_INSTRUCTIONS) if random.random() < 0.2 else ""
    return Conversation(skill, exchanges, expected, effort, tools, instructions, date)


def conversations(seed: int, count: int, foreign: Sequence[str]) -> Iterator[Conversation]:
    """`count` conversations of all skills in their shares."""
    random = Random(seed)
    for skill in random.choices(list(SKILLS), list(SKILLS.values()), k=count):
        yield converse(random, skill, foreign)


def held_out(seed: int, each: int, foreign: Sequence[str], date: str | None = None) -> list[Conversation]:
    """`each` conversations of every skill, from seeds that are not used in training."""
    random = Random(HELD_OUT_SEED + seed)
    return [converse(random, skill, foreign, date) for skill in SKILLS for _ in range(each)]


def _shard(arguments: tuple[int, int]) -> Shard:
    """One shard, in its own process."""
    seed, count = arguments
    words = tokenizer()
    return to_shard(words, conversations(seed, count, foreign_words(words)))


def to_shard(words: Tokenizer, made: Iterator[Conversation]) -> Shard:
    tokens: list[int] = []
    learnt: list[bool] = []
    lengths: list[int] = []
    skills: list[int] = []
    names = list(SKILLS)
    for conversation in made:
        ids, marks = tokens_of(words, conversation)
        if len(ids) <= LONGEST:
            tokens += ids
            learnt += marks
            lengths.append(len(ids))
            skills.append(names.index(conversation.skill))
    return Shard(np.array(tokens, np.int32), np.array(learnt), np.array(lengths, np.int32), np.array(skills, np.uint8))


def vocabulary_of(shards: Sequence[Shard]) -> np.ndarray[Any, Any]:
    """Ids that are common, or that the model must write, ascending."""
    counts = sum(np.bincount(shard.tokens, minlength=O200K_HARMONY) for shard in shards)
    written = sum(np.bincount(shard.tokens[shard.learnt], minlength=O200K_HARMONY) for shard in shards)
    return np.flatnonzero((counts >= RARE) | (written > 0)).astype(np.int32)


def compact(shard: Shard, vocabulary: np.ndarray[Any, Any]) -> Shard:
    """Token ids replaced by 1 + their place in the vocabulary, or OTHER."""
    table = np.full(O200K_HARMONY, OTHER, np.uint16)
    table[vocabulary] = np.arange(1, len(vocabulary) + 1)
    return Shard(table[shard.tokens], shard.learnt, shard.lengths, shard.skills)


def without(shard: Shard, known: set[bytes]) -> Shard:
    """The shard's conversations that are not in `known`, as bytes of their tokens."""
    starts = np.concatenate(([0], np.cumsum(shard.lengths)))
    kept = np.array([shard.tokens[starts[i]:starts[i + 1]].tobytes() not in known for i in range(len(shard.lengths))])
    tokens = np.repeat(kept, shard.lengths)
    return Shard(shard.tokens[tokens], shard.learnt[tokens], shard.lengths[kept], shard.skills[kept])


def _known(shards: Sequence[Shard]) -> set[bytes]:
    found = set()
    for shard in shards:
        starts = np.concatenate(([0], np.cumsum(shard.lengths)))
        found |= {shard.tokens[a:b].tobytes() for a, b in itertools.pairwise(starts)}
    return found


def build(out: Path, count: int, *, each: int, seed: int, jobs: int, shard_size: int = 10_000) -> None:
    """Write `count` training conversations and `each` held-out ones a skill."""
    begun = time.monotonic()
    jobs_of = [(seed * 10_000 + i, min(shard_size, count - i * shard_size)) for i in range(-(-count // shard_size))]
    with get_context("spawn").Pool(jobs) as pool:
        shards = list(pool.imap(_shard, jobs_of))
    words = tokenizer()
    tests = to_shard(words, iter(held_out(seed, each, foreign_words(words))))
    vocabulary = vocabulary_of(shards)
    shards = [compact(shard, vocabulary) for shard in shards]
    tests = without(compact(tests, vocabulary), _known(shards))
    size = write_shards(out, shards, tests, vocabulary, tuple(SKILLS))
    tokens = sum(len(shard.tokens) for shard in shards)
    written = sum(int(shard.learnt.sum()) for shard in shards)
    print(f"{count} conversations, {tokens / 1e6:.1f}M tokens ({written / tokens:.0%} to be written), "
          f"{len(vocabulary)} ids, {len(tests.lengths)} held out, {size / 1e6:.1f} MB, {time.monotonic() - begun:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the shards")
    parser.add_argument("--conversations", type=int, default=300_000)
    parser.add_argument("--held-out", type=int, default=100, help="conversations a skill")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args()
    build(given.out, given.conversations, each=given.held_out, seed=given.seed, jobs=given.jobs)


if __name__ == "__main__":
    main()
