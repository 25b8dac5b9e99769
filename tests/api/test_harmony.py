"""The harmony wrapper: agrees with openai-harmony on good turns, recovers from bad ones, never raises or leaks."""

from __future__ import annotations

import os
import random

import pytest
from openai_harmony import Author, Message, RenderOptions, Role, StreamableParser
from scripted import SPECIAL, Script

from gptoss_compile.runtime.api.harmony import HarmonyParser, headless_text, parse_header
from gptoss_compile.runtime.api.tokenizer import VOCABULARY, Tokenizer, TooLongError, pieces

GOOD = [
    "<|channel|>final<|message|>Hello<|return|>",
    "<|channel|>analysis<|message|>Let me see.<|end|><|start|>assistant<|channel|>final<|message|>42 👍🏽 é<|return|>",
    "<|channel|>analysis<|message|>Call.<|end|><|start|>assistant<|channel|>commentary to=functions.get_weather "
    '<|constrain|>json<|message|>{"city": "Paris"}<|call|>',
    " to=functions.f<|channel|>commentary <|constrain|>json<|message|>{}<|call|>",
    "<|channel|>commentary<|message|>I will look it up.<|end|><|start|>assistant<|channel|>analysis "
    "to=functions.f code<|message|>x<|call|>",
]


def parse(tokenizer: Tokenizer, ids: list[int], **options: bool) -> HarmonyParser:
    """Parses, checking that events are nested and their texts add up to the messages."""
    parser = HarmonyParser(tokenizer, **options)
    events = [event for token in ids for event in parser.push(token)] + parser.finish()
    texts: list[str] = []
    opened = None
    for event in events:
        if event.kind == "open":
            assert opened is None
            opened = event.message
            texts.append("")
        assert event.message is opened
        texts[-1] += event.text
        if event.kind == "close":
            opened = None
    assert opened is None and texts == [message.text for message in parser.messages]
    assert all(message.closed for message in parser.messages[:-1])
    return parser


@pytest.mark.parametrize("text", GOOD)
def test_agrees_with_the_library(tokenizer: Tokenizer, script: Script, text: str) -> None:
    ids = script.ids(text)
    library = StreamableParser(tokenizer.encoding, Role.ASSISTANT)
    for token in ids:
        library.process(token)
    parser = parse(tokenizer, ids)
    assert parser.repairs == 0
    ours = [(m.channel, m.recipient, m.text) for m in parser.messages]
    assert ours == [(m.channel, m.recipient, m.content[0].text) for m in library.messages]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<|channel|>final<|message|>a<|end|>b", [("final", "a"), ("final", "b")]),
        (
            "<|channel|>final<|message|>a<|start|>assistant<|channel|>final<|message|>b",
            [("final", "a"), ("final", "b")],
        ),
        (
            "<|channel|>analysis<|message|>a<|end|>assistant<|channel|>final<|message|>b",
            [("analysis", "a"), ("final", "b")],
        ),
        ("<|channel|>analysis<|message|>a<|channel|>final<|message|>b<|return|>", [("analysis", "a"), ("final", "b")]),
        ("<|channel|><|message|>a<|return|>", [("final", "a")]),
        ("<|message|>a<|return|>", [("final", "a")]),
        ("<|channel|>analysis<|channel|>final<|message|>a<|return|>", [("analysis", "a")]),
        ("<|channel|>final extra words<|message|>a<|return|>", [("final", "a")]),
        ("<|channel|>final <|constrain|>JSON<|message|>{}<|return|>", [("final", "{}")]),
        ("<|start|>final<|message|>a<|return|>", [("final", "a")]),
        (
            "<|channel|>analysis<|message|>a<|end|><|start|>user<|message|>b<|end|>",
            [("analysis", "a"), ("analysis", "b")],
        ),
        ("plain text without any header<|return|>", [("final", "plain text without any header")]),
        ("<|channel|>final the text<|end|>", [("final", "the text")]),
        ("<|channel|>final<|message|>a<|message|>b<|constrain|>c<|return|>", [("final", "abc")]),
        ("<|channel|>final<|message|>a<|return|><|return|>", [("final", "a")]),
    ],
)
def test_recovers(tokenizer: Tokenizer, script: Script, text: str, expected: list[tuple[str, str]]) -> None:
    parser = parse(tokenizer, script.ids(text))
    assert [(m.channel, m.text) for m in parser.messages] == expected
    assert parser.repairs >= (0 if "<|constrain|>JSON" in text else 1)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<|channel|>",
        "<|channel|>fin",
        "<|channel|>commentary to",
        "<|channel|>commentary to=functions.f",
        "<|channel|>commentary to=functions.f <|constrain|>json",
        "<|channel|>analysis<|message|>",
        "<|channel|>final<|message|>a<|end|><|start|>",
        "<|channel|>final<|message|>a<|end|><|start|>ass",
        "<|channel|>final<|message|>a<|end|><|start|>assistant to",
        " to=functions.f",
    ],
)
def test_a_turn_cut_in_a_header_shows_nothing_of_it(tokenizer: Tokenizer, script: Script, text: str) -> None:
    parser = parse(tokenizer, script.ids(text))
    assert parser.repairs == 0 and all(m.text in ("", "a") for m in parser.messages)


def test_a_turn_cut_in_text_without_a_header_shows_it(tokenizer: Tokenizer, script: Script) -> None:
    parser = parse(tokenizer, script.ids("no header"))
    assert [(m.channel, m.text) for m in parser.messages] == [("final", "no header")] and parser.repairs == 1


def test_long_text_without_header_streams(tokenizer: Tokenizer) -> None:
    parser = HarmonyParser(tokenizer)
    ids = tokenizer.encode("word " * 200)
    shown = [bool(parser.push(token)) for token in ids]
    assert shown.index(True) < 70 and all(shown[shown.index(True) :])
    parser.finish()
    assert parser.messages[0].text.split() == ["word"] * 200


def test_ignore_eos_goes_on(tokenizer: Tokenizer, script: Script) -> None:
    parser = parse(tokenizer, script.ids("<|channel|>final<|message|>a<|return|>b<|call|>c"), ignore_eos=True)
    assert [(m.channel, m.text) for m in parser.messages] == [("final", "abc")] and parser.repairs == 0


@pytest.mark.parametrize(
    ("text", "channel", "recipient"),
    [
        ("<|channel|>commentary to=functions.f<|channel|>commentary <|constrain|>json", "commentary", "functions.f"),
        ("assistant<|channel|>analysis to=functions.f <|constrain|>json", "analysis", "functions.f"),
        ("<|channel|>commentaryjson", "commentary", None),
        ("<|channel|>final to=functions.f", "final", None),
        ("functions.f to=assistant<|channel|>commentary", "analysis", None),
        ("<|channel|>commentary to=", "commentary", None),
    ],
)
def test_headers(text: str, channel: str, recipient: str | None) -> None:
    header = parse_header(text)
    assert (header.channel, header.recipient) == (channel, recipient)


def test_headless_text() -> None:
    assert headless_text("assistant<|channel|>final") == ""
    assert headless_text("<|channel|>finally done") == "finally done"
    assert headless_text("assistants help") == "assistants help"


def test_fuzz(tokenizer: Tokenizer, script: Script, seed: int) -> None:
    """Mutated turns: no exception, no special token in text, ordinary text of contents kept, events consistent.

    GPTOSS_FUZZ sets the number of streams.
    """
    rng = random.Random(seed)
    good = [script.ids(text) for text in GOOD]
    special = list(SPECIAL.values())

    def token() -> int:
        kind = rng.random()
        if kind < 0.5:
            return rng.choice(special)
        return rng.choice(rng.choice(good)) if kind < 0.8 else rng.randrange(-2, VOCABULARY + 200)

    for _ in range(int(os.environ.get("GPTOSS_FUZZ", "10000"))):
        ids = list(rng.choice(good)) + (list(rng.choice(good)) if rng.random() < 0.3 else [])
        for _ in range(rng.randrange(1, 6)):
            at = rng.randrange(len(ids) + 1)
            edit = rng.random()
            if edit < 0.4:
                ids.insert(at, token())
            elif edit < 0.7:
                del ids[at : at + rng.randrange(1, 3)]
            elif edit < 0.9:
                ids[at : at + 1] = [token()]
            else:
                rng.shuffle(ids)
        try:
            parser = parse(tokenizer, ids, ignore_eos=rng.random() < 0.1)
        except BaseException as error:
            raise AssertionError(f"{ids}") from error
        for message in parser.messages:
            assert message.channel in ("analysis", "commentary", "final"), ids
            assert not any(mark in message.text for mark in (*SPECIAL, "<|reserved_", "<|endoftext|>")), ids
            assert "<|" not in (message.recipient or ""), ids


# Tokenizer and rendering ------------------------------------------------------------


def test_rendering_agrees_with_the_library(tokenizer: Tokenizer) -> None:
    import asyncio

    from gptoss_compile.runtime.api.render import FunctionTool, Prompt, Turn, render

    tool = FunctionTool(
        "get", "Gets it.", {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
    )
    turns = [
        Turn("developer", "Be brief."),
        Turn("user", "hi <|end|> 👍🏽"),
        Turn("assistant", "thought", channel="analysis"),
        Turn("tool", "{}", name="functions.get"),
    ]
    ids = asyncio.run(render(tokenizer, Prompt(turns, [tool], "high", "2026-01-02"), 10_000))
    text = tokenizer.encoding.decode(ids)
    assert text.startswith("<|start|>system<|message|>You are ChatGPT") and "Current date: 2026-01-02" in text
    assert "Reasoning: high" in text and "Calls to these tools must go to the commentary channel: 'functions'." in text
    assert "<|start|>developer<|message|># Instructions\n\nBe brief.\n\n# Tools\n\n## functions" in text
    assert text.endswith("<|start|>assistant")
    encoding = tokenizer.encoding
    user = encoding.render(Message.from_role_and_content(Role.USER, "hi <|end|> 👍🏽"))
    analysis = encoding.render(Message.from_role_and_content(Role.ASSISTANT, "thought").with_channel("analysis"))
    answer = Message.from_author_and_content(Author.new(Role.TOOL, "functions.get"), "{}")
    answer = answer.with_channel("commentary").with_recipient("assistant")
    expected = user + analysis + encoding.render(answer, RenderOptions(conversation_has_function_tools=True))
    assert ids[-len(expected) - 2 : -2] == expected


def test_pieces_do_not_change_the_tokens(tokenizer: Tokenizer, seed: int) -> None:
    rng = random.Random(seed)
    words = [
        "hello",
        "World",
        "it's",
        "é",
        "naïve",
        "12345",
        "字字",
        "x_y",
        "...",
        "\n",
        "\r\n",
        "  ",
        "a,b",
        "don't",
        "ПРИВЕТ",
        ". ",
    ]
    for _ in range(50):
        text = "".join(rng.choice(words) + rng.choice(["", " ", " ", "\n"]) for _ in range(2000))
        assert "".join(pieces(text)) == text and max(map(len, pieces(text))) <= 2048
        assert tokenizer.encode(text) == tokenizer.encoding._inner.encode(text, [])


def test_long_runs_stay_linear(tokenizer: Tokenizer) -> None:
    for text in ("a" * 1_000_000, "👍🏽" * 20_000, " " * 200_000, "字" * 50_000):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    with pytest.raises(TooLongError):
        tokenizer.encode("字" * 1_000_000, limit=1000)
