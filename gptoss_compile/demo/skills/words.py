"""Counting words and putting them in order."""

from __future__ import annotations

from random import Random

from gptoss_compile.demo.skills.common import WORDS, Made, opened, single, thought
from gptoss_compile.runtime.api.render import Effort


def counting(random: Random, effort: Effort) -> Made:
    words = random.sample(WORDS, random.randint(2, 9))
    text = " ".join(words)
    asked = random.choice(("How many words are in this list: {text}?", "Count the words: {text}",
                           "How many words do you see here: {text}?", "Count these words for me: {text}.",
                           "What is the number of words in: {text}?"))
    counted = ", ".join(f"{number} {word}" for number, word in enumerate(words, 1))
    total = len(words)
    analysis = thought(effort, f"{counted}.", f"I count the words one by one: {counted}. That makes {total}.",
                       f"Check: the last word is {words[-1]}, with number {total}.")
    return single(opened(random, asked.format(text=text)), analysis, f"There are {total} words.", [str(total)])


def sorting(random: Random, effort: Effort) -> Made:
    words: list[str] = []
    for word in random.sample(WORDS, len(WORDS)):
        if word[0] not in [chosen[0] for chosen in words]:
            words.append(word)
    words = words[:random.randint(3, 6)]
    ordered = sorted(words)
    asked = random.choice(("Sort these words alphabetically: {text}", "Put these words in alphabetical order: {text}.",
                           "Sort the words: {text}", "Please sort in alphabetical order: {text}",
                           "What is the alphabetical order of: {text}?"))
    letters, sorted_letters = (", ".join(word[0] for word in some) for some in (words, ordered))
    analysis = thought(effort, f"By first letter: {sorted_letters}.",
                       f"The first letters are {letters}. In order they are {sorted_letters}.",
                       "Check: " + ", ".join(f"{word[0]} is {word}" for word in ordered) + ".")
    final = ", ".join(ordered)
    return single(opened(random, asked.format(text=random.choice((", ", " ")).join(words))), analysis, final, [final])
