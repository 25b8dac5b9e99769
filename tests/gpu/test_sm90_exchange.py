"""sm90's kernels of several ranks, each rank on a GPU of its own, against their twins in fp32.

Ranks poll for one another, which crawls where several processes have ranks on the same GPUs: with pytest-xdist (-n) say
`--dist loadgroup`, and they all run in one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from gptoss_compile.dialect import exchanged
from gptoss_compile.kernels.exchange import FEW_TOKENS, ONE_SHOT_TOKENS, added

from .harness import error, run_kernel
from .ranks import At, Call, Group, microseconds

pytestmark = [pytest.mark.gpu, pytest.mark.xdist_group("ranks")]
TOLERANCE = 4e-3  # of outputs rounded to bf16
EPS, TOP_K = 1e-5, 4
# hidden, a rank's columns of o, rows of qkv, experts, all columns of the logits
LARGE, SMALL = (2880, 2048, 2560, 128, 4096), (576, 128, 384, 40, 1003)
SUMS = [*((LARGE, tokens) for tokens in (1, 2, 3, 4, 5, 20, 64, 65, 512, 2049)),
        *((SMALL, tokens) for tokens in (1, 4, 8, 130, 259))]
Size = tuple[int, int, int, int, int]


@pytest.fixture(params=[2, 4, 8])
def ranks(request: pytest.FixtureRequest) -> int:
    count: int = request.param
    return count


def randn(*shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape) * scale).bfloat16()


def twin(op: str, arguments: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """In fp32, on the host."""
    host = {k: v.cpu().float() if isinstance(v, Tensor) and v.dtype == torch.bfloat16 else
            v.cpu() if isinstance(v, Tensor) else v for k, v in arguments.items()}
    result = getattr(torch.ops.gptoss, op)(**host)
    return tuple(result) if isinstance(result, tuple | list) else (result,)


def room(ranks: int, tokens: int, size: Size) -> int:
    return (1 << 20) + ranks * size[0] * 8 * 8 + tokens * (4 * size[0] + 4 * size[4]) * 2


def place_partial(group: Group, tokens: int, hidden: int) -> At:
    few, many = tokens <= FEW_TOKENS, tokens > ONE_SHOT_TOKENS
    return group.place((tokens, hidden), torch.float32 if few else torch.bfloat16, slots=few, shares=many)


def partials(group: Group, at: At) -> list[Tensor]:
    """The ranks' partial sums; where they are pushed, all ranks must have the same."""
    if at.shape[0] > ONE_SHOT_TOKENS:
        return [group.read_shares(rank, at) for rank in range(len(group.ranks))]
    if at.shape[0] > FEW_TOKENS:
        return [group.read(rank, at).cpu() for rank in range(len(group.ranks))]
    first, *others = ([part.cpu() for part in group.read_slots(rank, at)] for rank in range(len(group.ranks)))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))
    return first


def o_arguments(tokens: int, size: Size) -> dict[str, Tensor]:
    hidden, columns, *_ = size
    return {"x": randn(tokens, columns), "weight": randn(hidden, columns, scale=columns**-0.5), "bias": randn(hidden)}


def consumer_arguments(op: str, size: Size, rows: Tensor | None) -> dict[str, Any]:
    hidden, _, width, experts, vocabulary = size
    features = {"reduce_norm_linear": width, "reduce_norm_route": experts, "reduce_norm_head": vocabulary // 2 // 8 * 8}[op]
    weight = randn(features, hidden, scale=hidden**-0.5)
    found: dict[str, Any] = {"norm_weight": 1 + randn(hidden, scale=0.3), "weight": weight}
    if op == "reduce_norm_head":
        return {"rows": rows, **found, "eps": EPS}
    return {**found, "bias": randn(features), "eps": EPS, **({"top_k": TOP_K} if op == "reduce_norm_route" else {})}


def chain(group: Group, op: str, tokens: int, size: Size, rows: Tensor | None = None) -> tuple[Call, Call, At, Tensor]:
    """(linear_partial, what consumes it, where the partial sums are, the residual)."""
    partial, residual = place_partial(group, tokens, size[0]), randn(tokens, size[0])
    count = len(group.ranks)
    producer = Call(group, "linear_partial", [o_arguments(tokens, size) for _ in range(count)], {0: partial})
    peers_write = tokens > ONE_SHOT_TOKENS and op != "reduce_norm_head"
    outputs = {0: group.place(residual.shape, torch.bfloat16)} if peers_write else {}
    if peers_write and op == "reduce_norm_route":
        outputs |= {1: group.place((tokens, TOP_K), torch.float32), 2: group.place((tokens, TOP_K), torch.int32)}
    arguments = {"partial": partial, "residual": residual, **consumer_arguments(op, size, rows)}
    return producer, Call(group, op, [arguments] * count, outputs), partial, residual


def check_sums(group: Group, op: str, tokens: int, size: Size, rows: Tensor | None = None) -> None:
    torch.manual_seed(tokens)
    count, (producer, consumer, partial, residual) = len(group.ranks), chain(group, op, tokens, size, rows)
    for call in (producer, consumer):
        call.poison()
    producer.launch()
    consumer.launch()
    group.wait(10)
    parts = partials(group, partial)
    for rank, part in enumerate(parts):
        assert error(part, twin("linear_partial", producer.given[rank])[0]) < TOLERANCE, f"the partial sums of rank {rank}"
    x = added(exchanged("sum", parts), residual)
    rest = {name: value for name, value in consumer.given[0].items() if name not in ("partial", "residual")}
    expected = twin(op.removeprefix("reduce_"), {"x": x, **rest})
    for rank in range(count):
        got = [out.cpu() for out in consumer.all_outputs(rank)]
        if op != "reduce_norm_head":
            assert torch.equal(got.pop(0), x), f"the sum on rank {rank}"
        for i, (a, b) in enumerate(zip(got, expected, strict=True)):
            if b.dtype == torch.int32:
                assert (a == b).float().mean() > 0.99, f"experts of rank {rank}"  # near ties aside
            else:
                assert error(a, b) < TOLERANCE, f"result {i} of rank {rank}"
        assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(
            consumer.all_outputs(rank), consumer.all_outputs(0), strict=True)), f"rank {rank} and rank 0 differ"
    assert consumer.counters_are_zero()


@pytest.mark.parametrize("op", ["reduce_norm_linear", "reduce_norm_route", "reduce_norm_head"])
@pytest.mark.parametrize(("size", "tokens"), SUMS)
def test_sums(ranks: int, op: str, size: Size, tokens: int) -> None:
    check_sums(Group(ranks, room(ranks, tokens, size)), op, tokens, size)


@pytest.mark.parametrize("tokens", [4, 20, 64, 130, 512])
def test_rows_of_the_head(ranks: int, tokens: int) -> None:
    rows = torch.randint(tokens, (3,), dtype=torch.int32)
    check_sums(Group(ranks, room(ranks, tokens, SMALL)), "reduce_norm_head", tokens, SMALL, rows)


@pytest.mark.parametrize("tokens", [321, 2049, 8191])
def test_products_that_are_pushed(ranks: int, tokens: int) -> None:
    """Tiles of all shapes, twice in a row, and into nothing but the rows that there are."""
    torch.manual_seed(tokens)
    group, columns = Group(ranks, 64 << 20), 4096 // ranks
    partial = place_partial(group, tokens, 2880)
    call = Call(group, "linear_partial", [o_arguments(tokens, (2880, columns, 0, 0, 0)) for _ in range(ranks)], {0: partial})
    for area in group.areas:
        area[partial.offset:].fill_(0xFF)
    group.synchronize()
    for _ in range(2):
        call.launch()
    group.wait(10)
    for rank, own in enumerate(call.given):
        x, weight, bias = (own[name].to(f"cuda:{rank}").float() for name in ("x", "weight", "bias"))  # type: ignore[union-attr]
        assert error(group.read_shares(rank, partial), (x @ weight.T + bias).cpu()) < TOLERANCE, f"rank {rank}"
    most = -(-tokens // ranks)
    for owner, area in enumerate(group.areas):
        rows = area[partial.offset:partial.offset + ranks * most * 5760].view(ranks, most, 5760)
        assert (rows[:, len(range(owner, tokens, ranks)):] == 0xFF).all()
        assert (area[partial.offset + ranks * most * 5760:] == 0xFF).all()


def experts(count: int, rows: int, columns: int, mxfp4: bool = True) -> tuple[Tensor, Tensor | None, Tensor]:
    groups = (count, rows, columns // 32)
    if not mxfp4:
        return randn(count, rows, columns, scale=columns**-0.5), None, randn(count, rows)
    return (torch.randint(256, (*groups, 16), dtype=torch.uint8), torch.randint(115, 121, groups, dtype=torch.uint8),
            randn(count, rows))


@pytest.mark.parametrize(("inner", "mxfp4"), [(384, True), (288, True), (360, False), (46, False)])
@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 70, 515])
def test_partial_sums_of_experts(ranks: int, tokens: int, inner: int, mxfp4: bool) -> None:
    torch.manual_seed(tokens)
    hidden, count = 576, 8
    group, few = Group(ranks, 8 << 20), tokens <= FEW_TOKENS
    partial, given = place_partial(group, tokens, hidden), []
    for _ in range(ranks):
        own = {"ids": torch.rand(tokens, count).topk(TOP_K).indices.int(), "probs": torch.rand(tokens, TOP_K).softmax(-1)}
        down = experts(count, hidden, inner, mxfp4)
        if few:
            given.append({"h": randn(tokens, TOP_K, inner), **own, "weight": down[0], "scales": down[1], "bias": down[2]})
        else:
            up = experts(count, 2 * inner, hidden, mxfp4)
            given.append({"x": randn(tokens, hidden), "norm_weight": 1 + randn(hidden, scale=0.3), **own, "up": up[0],
                          "up_scales": up[1], "up_bias": up[2], "down": down[0], "down_scales": down[1],
                          "down_bias": down[2], "eps": EPS, "alpha": 1.702, "limit": 7.0})
    op = "moe_down_partial" if few else "moe_grouped_partial"
    call = Call(group, op, given, {0: partial}, want=None if mxfp4 else op)
    call.poison()
    call.launch()
    group.wait(10)
    for part, arguments in zip(partials(group, partial), given, strict=True):
        assert error(part, twin(op, arguments)[0]) < (TOLERANCE if few else 2 * TOLERANCE)


@pytest.mark.parametrize("tokens", [1, 4])
def test_gate_up_behind_the_kernel_that_makes_x(tokens: int) -> None:
    torch.manual_seed(tokens)
    weight, scales, bias = experts(8, 768, 576)
    arguments = {"x": randn(tokens, 576), "norm_weight": 1 + randn(576, scale=0.3),
                 "ids": torch.rand(tokens, 8).topk(TOP_K).indices.int(), "weight": weight, "scales": scales, "bias": bias,
                 "eps": EPS, "alpha": 1.702, "limit": 7.0, "early": 0}
    (got,) = run_kernel("moe_gate_up", arguments, "sm90_moe_gate_up_pair")
    assert error(got, twin("moe_gate_up", arguments)[0]) < 2 * TOLERANCE


@pytest.mark.parametrize(("rows", "columns"), [(1, 1003), (7, 1003), (1, 201088), (5, 201088)])
def test_all_gather(ranks: int, rows: int, columns: int) -> None:
    group = Group(ranks, (1 << 20) + rows * columns * 4)
    bounds = [-(-columns * r // ranks) for r in range(ranks + 1)]
    parts = [torch.randn(rows, bounds[r + 1] - bounds[r]) for r in range(ranks)]
    offset = group.place((rows, -(-columns // ranks)), torch.float32).offset
    for rank, part in enumerate(parts):
        group.read(rank, At(offset, part.shape, part.dtype)).copy_(part)
    call = Call(group, "all_gather", [{"x": At(offset, part.shape, part.dtype), "columns": columns} for part in parts])
    for step in (1, 2):
        assert [group.step(rank) for rank in range(ranks)] == [step] * ranks
        call.poison()
        call.launch()
        group.wait(10)
        for rank in range(ranks):
            assert torch.equal(call.output(rank, 0).cpu(), torch.cat(parts, -1))
    assert call.counters_are_zero()


@pytest.mark.parametrize("tokens", [1, 3, 20, 130])
def test_a_hundred_steps(ranks: int, tokens: int) -> None:
    """o, qkv, another o on a part of that, lm_head, all_gather, in a queue of 100 steps whose inputs differ: what one step
    left behind serves no other, and no rank runs away."""
    torch.manual_seed(tokens)
    steps, (hidden, _, width, _, vocabulary) = 100, SMALL
    group = Group(ranks, 4 * room(ranks, tokens, SMALL))
    producer, middle, _, _ = chain(group, "reduce_norm_linear", tokens, SMALL)
    again, own = place_partial(group, tokens, hidden), -(-vocabulary // ranks) // 8 * 8
    second = Call(group, "linear_partial", [{**o_arguments(tokens, SMALL), "x": randn(tokens, 128)} for _ in range(ranks)],
                  {0: again})
    logits = group.place((tokens, own), torch.float32)
    head = {"norm_weight": randn(hidden), "weight": randn(own, hidden, scale=hidden**-0.5)}
    last = Call(group, "reduce_norm_head", [{"partial": again, "residual": randn(tokens, hidden), "rows": None, **head,
                                             "eps": EPS}] * ranks, {0: logits})
    gather = Call(group, "all_gather", [{"x": logits, "columns": own * ranks}] * ranks)
    inputs = [randn(steps, tokens, 128).to(f"cuda:{r}") for r in range(ranks)]
    found = [(torch.empty(steps, tokens, width, dtype=torch.bfloat16, device=x.device),
              torch.empty(steps, tokens, own * ranks, device=x.device)) for x in inputs]
    group.synchronize()
    for step in range(steps):
        for rank in group.ranks:
            rank.copy(producer.buffers[rank.number]["x"], inputs[rank.number][step])
            rank.copy(second.buffers[rank.number]["x"], inputs[rank.number][(7 * step + 3) % steps])
        for call in (producer, middle, second, last, gather):
            call.launch()
        for rank in group.ranks:
            rank.copy(found[rank.number][0][step], middle.output(rank.number, 1))
            rank.copy(found[rank.number][1][step], gather.output(rank.number, 0))
    group.wait(30)
    assert not group.reports.any() and [group.step(r) for r in range(ranks)] == [steps + 1] * ranks
    others = [(7 * step + 3) % steps for step in range(steps)]
    x = given_sum(producer, inputs, middle.given[0]).flatten(0, 1)
    y = given_sum(second, [each[others] for each in inputs], last.given[0]).flatten(0, 1)
    weights = {k: middle.given[0][k] for k in ("norm_weight", "weight", "bias")}
    wanted = (*twin("norm_linear", {"x": x, **weights, "eps": EPS}),
              *twin("norm_head", {"x": y, "rows": None, **head, "eps": EPS}))
    for rank, results in enumerate(found):
        on_host = [result.cpu() for result in results]
        assert worst_step(on_host[0], wanted[0]) < 2 * TOLERANCE, f"rank {rank}"
        assert worst_step(on_host[1], wanted[1].repeat(1, ranks)) < 2 * TOLERANCE, f"rank {rank}"
        assert all(torch.equal(a, b.cpu()) for a, b in zip(on_host, found[0], strict=True))


@pytest.mark.parametrize("tokens", [65, 259])
def test_routes_of_many_steps(ranks: int, tokens: int) -> None:
    """Every rank learns all ranks' choices of the step that runs."""
    torch.manual_seed(tokens)
    steps, group = 50, Group(ranks, 4 * room(ranks, tokens, SMALL))
    producer, consumer, _, _ = chain(group, "reduce_norm_route", tokens, SMALL)
    gather = Call(group, "all_gather", [{"x": group.place((1, 8), torch.float32), "columns": 8 * ranks}] * ranks)
    inputs = [randn(steps, tokens, 128).to(f"cuda:{r}") for r in range(ranks)]
    found = [[torch.empty(steps, *out.shape, dtype=out.dtype, device=out.device) for out in consumer.all_outputs(rank)]
             for rank in range(ranks)]
    group.synchronize()
    for step in range(steps):
        for rank in group.ranks:
            rank.copy(producer.buffers[rank.number]["x"], inputs[rank.number][step])
        for call in (producer, consumer, gather):
            call.launch()
        for rank in group.ranks:
            for kept, out in zip(found[rank.number], consumer.all_outputs(rank.number), strict=True):
                rank.copy(kept[step], out)
    group.wait(30)
    assert not group.reports.any() and producer.counters_are_zero() and consumer.counters_are_zero()
    given = {name: consumer.given[0][name] for name in ("norm_weight", "weight", "bias", "eps", "top_k")}
    x, probs, ids = (each.cpu() for each in found[0])
    assert worst_step(x, given_sum(producer, inputs, consumer.given[0]).flatten(0, 1)) < 2 * TOLERANCE
    wanted = twin("norm_route", {"x": x.flatten(0, 1), **given})
    assert (ids == wanted[1].view_as(ids)).float().mean((1, 2)).min() > 0.99
    assert worst_step(probs, wanted[0]) < 10 * TOLERANCE
    for others in found[1:]:
        assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(others, found[0], strict=True))


def worst_step(got: Tensor, expected: Tensor) -> float:
    """The largest `error` of a step: of got [step, token, ...], and of expected with steps and tokens in one dimension."""
    difference, size = (x.double().flatten(1).norm(dim=1) for x in (got - expected.view_as(got), expected.view_as(got)))
    worst = (difference / size).max()
    return float(worst) if torch.isfinite(worst) else float("inf")


def given_sum(producer: Call, inputs: Sequence[Tensor], consumer: Mapping[str, Any]) -> Tensor:
    """residual + the sum of the ranks' products, in fp32; inputs: a rank's each, [..., token, column]."""
    parts = [x.cpu().float() @ given["weight"].float().T + given["bias"].float()
             for x, given in zip(inputs, producer.given, strict=True)]
    return torch.stack(parts).sum(0) + consumer["residual"].float()


@pytest.mark.parametrize("tokens", [1, 4, 20, 130])
def test_a_rank_that_does_not_come(tokens: int) -> None:
    """The others give up, say for whom they waited, and then wait no more."""
    group = Group(2, room(2, tokens, SMALL), limit_ms=300)
    producer, consumer, _, _ = chain(group, "reduce_norm_linear", tokens, SMALL)
    for call in (producer, consumer):
        call.launch([0])
    assert group.wait(1.3) > 0.2
    assert group.reports[:, 0].tolist() == [2, 0]
    consumer.launch([0])
    assert group.wait(1.0) < 0.2


@pytest.mark.parametrize(("op", "tokens", "most"), [
    ("reduce_norm_linear", 1, 20), ("reduce_norm_linear", 2, 20), ("reduce_norm_linear", 4, 30),
    ("reduce_norm_linear", 64, 60), ("reduce_norm_route", 1, 20), ("reduce_norm_route", 4, 30)])
def test_time_of_few_tokens(op: str, tokens: int, most: float, capsys: pytest.CaptureFixture[str]) -> None:
    """Of o and what follows it, two ranks' shares of gpt-oss-120b, beyond what ends a step."""
    group = Group(2, room(2, tokens, LARGE))
    gather = Call(group, "all_gather", [{"x": group.place((1, 8), torch.float32), "columns": 16}] * 2)
    producer, consumer, _, _ = chain(group, op, tokens, LARGE)
    alone = microseconds(group, [gather])
    time = microseconds(group, [producer, consumer, gather]) - alone
    with capsys.disabled():
        print(f"\nlinear_partial and {op} of {tokens} tokens, 2 ranks: {time:.2f} us (all_gather {alone:.2f} us)")
    assert time < most and not group.reports.any()


def test_time_of_a_two_shot_sum(capsys: pytest.CaptureFixture[str]) -> None:
    """Of 8,192 rows of 2,880 over two ranks: by itself, and behind o of two ranks' shares of gpt-oss, which pushes them."""
    group = Group(2, 256 << 20)
    gather = Call(group, "all_gather", [{"x": group.place((1, 8), torch.float32), "columns": 16}] * 2)
    producer, consumer, _, _ = chain(group, "reduce_norm_linear", 8192, (2880, 2048, 64, 40, 1003))
    consumer.calls = [calls[:1] for calls in consumer.calls]  # the exchange alone
    alone = microseconds(group, [gather])
    time, product, both = (microseconds(group, [*calls, gather]) - alone
                           for calls in ([consumer], [producer], [producer, consumer]))
    given = {**consumer.given[0], **consumer_arguments("reduce_norm_route", LARGE, None)}
    outputs = {0: group.place((8192, 2880), torch.bfloat16), 1: group.place((8192, TOP_K), torch.float32),
               2: group.place((8192, TOP_K), torch.int32)}
    routed = microseconds(group, [Call(group, "reduce_norm_route", [given] * 2, outputs), gather]) - alone
    with capsys.disabled():
        print(f"\nsum and route of 8,192 tokens over 2 ranks: {routed:.0f} us")
        print(f"two-shot sum of 8,192 x 2,880 over 2 ranks: {time:.0f} us; o {product:.0f} us, both {both:.0f} us")
    assert time < 120 and both < time + product + 20 and not group.reports.any()


def test_time_of_pushed_experts(capsys: pytest.CaptureFixture[str]) -> None:
    """The mix of 8,192 tokens' experts, half the features of gpt-oss-20b's, whose rows go to two ranks."""
    torch.manual_seed(0)
    group, tokens, hidden, inner = Group(2, 256 << 20), 8192, 2880, 1536
    gather = Call(group, "all_gather", [{"x": group.place((1, 8), torch.float32), "columns": 16}] * 2)
    up, down = experts(32, 2 * inner, hidden), experts(32, hidden, inner)
    given = {"x": randn(tokens, hidden), "norm_weight": 1 + randn(hidden, scale=0.3),
             "ids": torch.rand(tokens, 32).topk(TOP_K).indices.int(), "probs": torch.rand(tokens, TOP_K).softmax(-1),
             "up": up[0], "up_scales": up[1], "up_bias": up[2], "down": down[0], "down_scales": down[1],
             "down_bias": down[2], "eps": EPS, "alpha": 1.702, "limit": 7.0}
    partial = place_partial(group, tokens, hidden)
    call = Call(group, "moe_grouped_partial", [given] * 2, {0: partial})
    residual, norm = randn(tokens, hidden), consumer_arguments("reduce_norm_linear", (hidden, 64, 64, 40, 1003), None)
    consumer = Call(group, "reduce_norm_linear", [{"partial": partial, "residual": residual, **norm}] * 2,
                    {0: group.place(residual.shape, torch.bfloat16)})
    consumer.calls = [calls[:1] for calls in consumer.calls]
    alone = microseconds(group, [gather])
    every = microseconds(group, [call, gather]) - alone
    both = microseconds(group, [call, consumer, gather]) - alone
    call.calls = [calls[-1:] for calls in call.calls]  # the mix alone
    mix = microseconds(group, [call, gather]) - alone
    with capsys.disabled():
        print(f"\nexperts of 8,192 tokens, 2 ranks: {every:.0f} us, of it the mix {mix:.0f} us; and the sum {both:.0f} us")
    assert mix < 200 and both < every + 150 and not group.reports.any()
