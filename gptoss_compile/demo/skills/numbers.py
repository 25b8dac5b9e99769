"""Small arithmetic, in the steps one would take in one's head."""

from __future__ import annotations

from random import Random

from gptoss_compile.demo.skills.common import NAMES, Made, listed, opened, single, thought
from gptoss_compile.runtime.api.render import Effort

_THINGS = listed("""
    apples books coins cards eggs pens balls stamps cups keys oranges tickets
""")


def arithmetic(random: Random, effort: Effort) -> Made:
    return random.choice((_add, _add, _subtract, _multiply, _three, _story))(random, effort)


def _plus(effort: Effort, a: int, b: int) -> str:
    tens, units, total = a // 10 * 10 + b // 10 * 10, a % 10 + b % 10, a + b
    steps = (f"Tens: {a // 10 * 10} + {b // 10 * 10} = {tens}. Units: {a % 10} + {b % 10} = {units}. "
             f"Together: {tens} + {units} = {total}.")
    return thought(effort, f"{tens} + {units} = {total}.", steps, f"Check: {total} - {b} = {a}, which is right.")


def _minus(effort: Effort, a: int, b: int) -> str:
    tens, units = b // 10 * 10, b % 10
    steps = f"First the tens: {a} - {tens} = {a - tens}. Then the units: {a - tens} - {units} = {a - b}."
    return thought(effort, f"{a - tens} - {units} = {a - b}.", steps, f"Check: {a - b} + {b} = {a}, which is right.")


def _add(random: Random, effort: Effort) -> Made:
    a, b = random.randint(1, 99), random.randint(1, 99)
    asked = random.choice(("What is {a} + {b}?", "What is {a} plus {b}?", "Add {a} and {b}.", "{a} + {b} = ?", "{a}+{b}?",
                           "How much is {a} plus {b}?", "Calculate {a} + {b}.", "What do {a} and {b} make together?",
                           "Compute {a} + {b}", "What is the sum of {a} and {b}?"))
    return single(opened(random, asked.format(a=a, b=b)), _plus(effort, a, b), f"{a} + {b} = {a + b}.", [str(a + b)])


def _subtract(random: Random, effort: Effort) -> Made:
    b, a = sorted((random.randint(1, 99), random.randint(1, 99)))
    asked = random.choice(("What is {a} - {b}?", "What is {a} minus {b}?", "Subtract {b} from {a}.", "{a} - {b} = ?",
                           "How much is {a} minus {b}?", "Calculate {a} - {b}.", "Take {b} away from {a}.",
                           "What is the difference between {a} and {b}?"))
    return single(opened(random, asked.format(a=a, b=b)), _minus(effort, a, b), f"{a} - {b} = {a - b}.", [str(a - b)])


def _multiply(random: Random, effort: Effort) -> Made:
    a = random.randint(2, 9)
    b = random.randint(2, 12) if random.random() < 0.5 else random.randint(11, 49)
    tens, units = b // 10 * 10, b % 10
    asked = random.choice(("What is {a} × {b}?", "What is {a} times {b}?", "Multiply {a} by {b}.", "{a} * {b} = ?",
                           "{a} x {b}?", "Calculate {a} * {b}.", "How much is {a} times {b}?",
                           "What is the product of {a} and {b}?"))
    if b < 10:
        steps = f"From the times table: {a} × {b} = {a * b}."
        short = f"{a} × {b} = {a * b}."
    else:
        steps = f"{a} × {tens} = {a * tens}. {a} × {units} = {a * units}. {a * tens} + {a * units} = {a * b}."
        short = f"{a * tens} + {a * units} = {a * b}."
    analysis = thought(effort, short, steps, f"Check: {b} × {a} = {a * b} as well.")
    return single(opened(random, asked.format(a=a, b=b)), analysis, f"{a} × {b} = {a * b}.", [str(a * b)])


def _three(random: Random, effort: Effort) -> Made:
    a, b, c = (random.randint(1, 20) for _ in range(3))
    asked = random.choice(("What is {a} + {b} + {c}?", "Add {a}, {b} and {c}.", "{a} + {b} + {c} = ?",
                           "What is the sum of {a}, {b} and {c}?"))
    steps = f"{a} + {b} = {a + b}. {a + b} + {c} = {a + b + c}."
    analysis = thought(effort, f"{a + b} + {c} = {a + b + c}.", steps, f"Check: {a + b + c} - {c} = {a + b}.")
    final = f"{a} + {b} + {c} = {a + b + c}."
    return single(opened(random, asked.format(a=a, b=b, c=c)), analysis, final, [str(a + b + c)])


def _story(random: Random, effort: Effort) -> Made:
    thing, name = random.choice(_THINGS), random.choice(NAMES)
    b, a = sorted((random.randint(2, 50), random.randint(2, 50)))
    if random.random() < 0.5:
        asked = random.choice((
            "I have {a} {t} and buy {b} more. How many {t} do I have?",
            "{n} has {a} {t} and gets {b} more. How many {t} does {n} have now?",
            "There are {a} {t} in one box and {b} in another. How many {t} are there together?"))
        analysis, result = "This is a sum. " + _plus(effort, a, b), a + b
    else:
        asked = random.choice((
            "I have {a} {t} and give away {b}. How many {t} are left?",
            "{n} had {a} {t} and lost {b}. How many {t} does {n} have left?",
            "There were {a} {t} and {b} were sold. How many {t} remain?"))
        analysis, result = "This is a difference. " + _minus(effort, a, b), a - b
    user = asked.format(a=a, b=b, t=thing, n=name)
    return single(opened(random, user), analysis, f"The answer is {result} {thing}.", [str(result)])
