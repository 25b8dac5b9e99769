"""What the generators share: phrasing, and how effort sets the length of the analysis."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from gptoss_compile.demo.conversation import Answer, Exchange
from gptoss_compile.runtime.api.render import Effort


def listed(text: str) -> list[str]:
    """The words of a text."""
    return text.split()


Made = tuple[tuple[Exchange, ...], tuple[str, ...]]

_OPENINGS = ("", "", "", "", "", "", "Please help: ", "Quick question: ", "Hi! ", "Hello, ", "Tell me: ", "I wonder: ",
             "One more: ", "Okay. ")
WORDS = listed("""
    apple bread chair dog eagle flower garden house island jacket kitchen lemon mountain night ocean
    paper queen river stone table uncle village water yellow zebra bridge candle doctor engine forest
    guitar hammer juice king letter mirror needle orange pencil rabbit silver tiger umbrella window ball
    cloud desk egg fish green hat ice jungle key lamp milk nose onion plane road sun tree valley wolf
    baker coffee dream earth fire gold horse idea kitten leaf moon nurse oil piano rain snow train vase
    wheel box cat door ear farm glass hill ink jar knife lake map nest oven pear rope ship tower voice
    wine bear cow drum eye fork goat hand iron lion mouse nail owl pig ring salt tent violin wall
""")
NAMES = listed("""
    Anna Ben Carla David Emma Frank Grace Henry Iris Jack Kate Leo Maria Noah Olivia Paul Rosa Sam Tom
    Victor Alice Bob Clara Daniel Eva Felix George Hannah Ivan Julia Karl Laura Max Nina Oscar Peter
    Robert Sarah Tina Simon Lucy Mark Linda James Sophie Martin Ella Adam Diana
""")
COLOURS = listed("""
    red blue green yellow orange purple black white pink brown grey silver
""")
CITIES = listed("""
    Paris London Berlin Madrid Rome Vienna Tokyo Oslo Dublin Lisbon Athens Prague Warsaw Cairo Lima
    Delhi Boston Chicago Toronto Sydney Moscow Munich Milan Seattle Denver Dallas Istanbul Bangkok Seoul
    Mumbai
""")


def opened(random: Random, text: str) -> str:
    """The question, perhaps after a few words of introduction; now and then in lower case or without its mark."""
    opening = random.choice(_OPENINGS)
    if opening.endswith(": ") and random.random() < 0.5:
        text = text[0].lower() + text[1:]
    if random.random() < 0.08:
        text = text.rstrip("?.")
    return opening + text


def thought(effort: Effort, short: str, steps: str, check: str) -> str:
    """Low effort: the gist. Medium: the steps. High: the steps and a check of them."""
    return short if effort == "low" else steps if effort == "medium" else f"{steps} {check}"


def single(user: str, analysis: str, final: str, expected: Sequence[str]) -> Made:
    return (Exchange(user, (Answer(analysis, final),)),), tuple(expected)
