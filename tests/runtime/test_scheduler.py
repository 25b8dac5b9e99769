"""The scheduler's rules, one by one."""

from __future__ import annotations

import numpy as np
import pytest
from fake_executor import FakeExecutor
from scheduler_bench import Bench, prompt

from gptoss_compile.config import Bucket
from gptoss_compile.runtime.request import Request
from gptoss_compile.runtime.sampling_params import SamplingParams
from gptoss_compile.runtime.scheduler import Step


def chunks(step: Step | None) -> tuple[Bucket, list[int]]:
    """Its bucket, and each sequence's tokens."""
    assert step is not None
    return step.bucket, [chunk.tokens for chunk in step.chunks]


def test_a_step_mixes_generating_sequences_with_a_prompt() -> None:
    bench = Bench(FakeExecutor())
    bench.add(prompt(20), 50)
    bench.step()
    bench.add(prompt(600, 1), 50)
    assert chunks(bench.step()) == (Bucket.extend(256, 16), [1, 255])


def test_generating_sequences_are_served_while_prompts_keep_coming() -> None:
    """The extend bucket has one sequence, so steps alternate: no answer waits for the end of the prompts."""
    bench = Bench(FakeExecutor(buckets=(Bucket.decode(4), Bucket.extend(32, 1))), max_num_seqs=4)
    bench.add(prompt(10), 100)
    bench.step()
    for salt in range(3):
        bench.add(prompt(1000, salt + 1), 100)
    kinds = [step.bucket.kind for step in (bench.step() for _ in range(20)) if step]
    assert kinds == ["decode", "extend"] * 10 or kinds == ["extend", "decode"] * 10


def test_prompts_fill_the_bucket_that_takes_most_of_them() -> None:
    bench = Bench(FakeExecutor(buckets=(Bucket.decode(8), Bucket.extend(64, 8), Bucket.extend(256, 1))))
    bench.add(prompt(300), 5)
    assert chunks(bench.step()) == (Bucket.extend(256, 1), [256])
    for i in range(3):
        bench.add(prompt(30, i + 1), 5)
    assert chunks(bench.step()) == (Bucket.extend(64, 8), [44, 20]), "256x1 has room for one of them"
    bench.drain(20)


def test_a_large_bucket_without_room_for_who_generates_is_left_aside() -> None:
    bench = Bench(FakeExecutor(buckets=(Bucket.decode(8), Bucket.extend(64, 8), Bucket.extend(256, 1))))
    bench.add(prompt(2), 20)
    bench.step()
    bench.add(prompt(300), 5)
    assert chunks(bench.step()) == (Bucket.extend(64, 8), [1, 63])


def test_where_no_bucket_has_room_for_all_prompts_go_first_in_their_steps() -> None:
    """Four places, five that generate: three for prompts that fill the step, and one for the longest unserved."""
    bench = Bench(FakeExecutor(buckets=(Bucket.decode(8), Bucket.extend(32, 4))))
    answers = [bench.add(prompt(2, i), 50, stop_ids=()) for i in range(5)]
    while any(r.num_generated == 0 for r in answers):
        bench.step()
    for i in range(3):
        bench.add(prompt(15, i + 9), 50)
    steps = [step for step in (bench.step() for _ in range(4)) if step]
    mixed = [step for step in steps if step.bucket.kind == "extend"]
    assert [step.bucket.kind for step in steps[:3]] in (["extend", "decode", "extend"], ["decode", "extend", "decode"])
    assert [c.tokens for c in mixed[0].chunks] == [1, 15, 15, 1]


def test_generating_sequences_beyond_a_step_take_turns() -> None:
    bench = Bench(FakeExecutor(), budget=2)
    requests = [bench.add(prompt(2, i), 50, stop_ids=()) for i in range(5)]
    while any(r.num_generated == 0 for r in requests):
        bench.step()
    before = [r.num_generated for r in requests]
    for _ in range(25):
        bench.step()
    assert [r.num_generated - b for r, b in zip(requests, before, strict=True)] == [10] * 5


def test_a_small_token_budget_prefers_the_bucket_with_more_sequences() -> None:
    buckets = (Bucket.decode(8), Bucket.extend(64, 8), Bucket.extend(256, 2))
    bench = Bench(FakeExecutor(buckets=buckets), budget=64)
    for i in range(5):
        bench.add(prompt(8, i), 5)
    step = bench.step()
    assert step is not None and len(step.chunks) == 5


def test_a_prompt_waits_while_admitting_it_would_only_take_pages_from_others() -> None:
    bench = Bench(FakeExecutor(num_pages=1 + 30))
    first = bench.add(prompt(160), 100, stop_ids=())  # ends with 17 pages
    bench.step()
    second = bench.add(prompt(400, 1), 5)  # 25 pages
    bench.step()
    assert [r.request for r in bench.scheduler.running] == [first]
    bench.drain(300)
    assert bench.scheduler.preemptions == 0 and second.request_id in bench.finished


def test_an_early_request_is_not_starved_by_a_stream_of_small_ones() -> None:
    """A large one waits for pages while small ones keep coming; it is never overtaken for good."""
    bench = Bench(FakeExecutor(num_pages=1 + 40, num_window_pages=1 + 60))
    for i in range(5):
        bench.add(prompt(60, i), 30)
    bench.step()
    large = bench.add(prompt(500), 20)
    for i in range(400):
        bench.add(prompt(40, i), 30)
        bench.step()
        if large.request_id in bench.finished:
            break
    assert large.request_id in bench.finished
    assert bench.scheduler.num_waiting > 10


def test_priority_then_arrival_decides_who_goes_first_and_who_yields() -> None:
    bench = Bench(FakeExecutor(num_pages=1 + 12, num_window_pages=1 + 60), max_num_seqs=2)
    low = bench.add(prompt(64, 1), 60, priority=5, stop_ids=())
    first = bench.add(prompt(64, 2), 60, stop_ids=())
    second = bench.add(prompt(64, 3), 60, stop_ids=())
    bench.step()
    assert [r.request for r in bench.scheduler.running] == [first, second]
    bench.drain(2000)
    assert list(bench.finished) == [first.request_id, second.request_id, low.request_id]
    assert bench.scheduler.preemptions > 0


def test_a_preempted_prompt_is_not_scored_twice() -> None:
    """Few rows make scoring slow, and meanwhile an older answer takes the pages away."""
    buckets = (Bucket.decode(1), Bucket("extend", 64, 2, 3))
    bench = Bench(FakeExecutor(buckets=buckets, num_pages=1 + 25), max_num_seqs=2)
    bench.add(prompt(200), 150, stop_ids=())
    scored = bench.add(prompt(150, 1), 3, score=True)
    while not bench.scheduler.preemptions:
        bench.step()
    assert 0 < scored.scored < 149
    bench.drain(1000)


@pytest.mark.parametrize("rows", [1, 3, 64])
def test_scored_prompts_take_chunks_of_the_rows_there_are(rows: int) -> None:
    bench = Bench(FakeExecutor(buckets=(Bucket.decode(1), Bucket("extend", 64, 2, rows))), max_num_seqs=1)
    request = bench.add(prompt(300), 0, score=True)
    sizes = []
    while step := bench.step():
        sizes.append(step.chunks[0].tokens)
    # The last prompt token predicts nothing and is free where there is room for it in the last chunk.
    assert set(sizes[:-1]) == {min(rows, 64)} and sum(sizes) == 300 and request.scored == 299


def test_a_request_without_scores_is_not_limited_by_rows() -> None:
    bench = Bench(FakeExecutor(buckets=(Bucket.decode(1), Bucket("extend", 64, 1, 1))), max_num_seqs=1)
    bench.add(prompt(128), 1)
    bench.drain(3)


def test_the_same_prompt_again_hits_the_boundary_before_its_last_token() -> None:
    for length in (127, 128, 129, 144, 300):
        bench = Bench(FakeExecutor())
        bench.add(prompt(length), 3)
        bench.drain(10)
        again = bench.add(prompt(length), 3)
        bench.drain(10)
        assert again.cached_tokens == (length - 1) // 16 * 16
        assert bench.finished["r0"].request.tokens == bench.finished["r1"].request.tokens


def test_the_next_turn_hits_the_end_of_the_answer_and_a_shared_beginning_the_chunk_end() -> None:
    bench = Bench(FakeExecutor())
    first = bench.add(prompt(700), 100)
    bench.drain(200)
    turn = bench.add([*first.tokens, *prompt(30)], 3)
    bench.drain(10)
    assert turn.cached_tokens == (len(first.tokens) - 1) // 16 * 16
    shared = bench.add(
        [*prompt(700)[:300], *prompt(100, 9)], 3
    )  # diverges after the first chunk's end at 256
    bench.drain(10)
    assert shared.cached_tokens == 256


def test_a_hit_needs_the_window_pages() -> None:
    """Other prompts push the window pages out of their small pool while all full pages stay: no hit, same
    answer."""
    bench = Bench(FakeExecutor(num_window_pages=1 + 30))
    bench.add(prompt(400), 3)
    bench.drain(10)
    for salt in range(1, 5):
        bench.add(prompt(300, salt), 3)
        bench.drain(10)
    again = bench.add(prompt(400), 3)
    bench.drain(10)
    assert (
        again.cached_tokens == 0
        and bench.finished["r5"].request.tokens == bench.finished["r0"].request.tokens
    )
    assert bench.cache.full.find(again.keys[0]) is not None


def test_salts_and_scores_keep_prompts_apart() -> None:
    bench = Bench(FakeExecutor())
    bench.add(prompt(200), 1)
    bench.drain(10)
    salted = Request(
        "salted", prompt(200), 200, SamplingParams(max_tokens=1), 1, 0, frozenset(), (0, 99), salt="b"
    )
    bench.scheduler.add(salted)
    scored = bench.add(prompt(200), 1, score=True)
    bench.drain(20)
    assert salted.cached_tokens == 0 and scored.cached_tokens == 0


def test_pages_of_a_beginning_outlive_those_of_its_end() -> None:
    """Eviction takes the least recently used request's last pages first."""
    bench = Bench(FakeExecutor(num_pages=1 + 30))
    request = bench.add(prompt(320), 1)
    bench.drain(10)
    bench.add(prompt(240, 5), 1)
    bench.drain(10)
    there = [bench.cache.full.find(key) is not None for key in request.keys]
    assert there == sorted(there, reverse=True) and any(there) and not all(there)


def test_limits_that_cannot_work_are_refused_with_a_cure() -> None:
    with pytest.raises(ValueError, match="no extend bucket"):
        Bench(FakeExecutor(buckets=(Bucket.decode(4),)))
    with pytest.raises(ValueError, match=r"max_num_seqs \(0\) .* at least 1"):
        Bench(FakeExecutor(), max_num_seqs=0)
    with pytest.raises(ValueError, match="at least 2 and 10"):
        Bench(FakeExecutor(num_window_pages=9))
    with pytest.raises(ValueError, match="extend bucket of at least 16 tokens"):
        Bench(FakeExecutor(buckets=(Bucket.extend(1, 1),), window=130))


def test_inputs_are_padded_as_executors_expect() -> None:
    bench = Bench(FakeExecutor())
    bench.add(prompt(5), 9)
    bench.add(prompt(3), 9)
    step = bench.scheduler.schedule()
    assert step is not None
    assert bench.inputs.build(step) == (2, 1)
    arrays = bench.executor.inputs(step.bucket)
    np.testing.assert_array_equal(arrays["positions"][:10], [0, 1, 2, 3, 4, 0, 1, 2, -1, -1])
    np.testing.assert_array_equal(arrays["sequences"][:10], [0] * 5 + [1] * 5)
    np.testing.assert_array_equal(arrays["rows"][:4], [4, 7, 0, 0])
    assert not arrays["tokens"][8:].any()
