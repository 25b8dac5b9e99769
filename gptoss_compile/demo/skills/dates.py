"""Weekdays, months, and the date that the system message gives."""

from __future__ import annotations

import datetime
from random import Random

from gptoss_compile.demo.skills.common import Made, listed, opened, single, thought
from gptoss_compile.runtime.api.render import Effort

DAYS = listed("""
    Monday Tuesday Wednesday Thursday Friday Saturday Sunday
""")
MONTHS = listed("""
    January February March April May June July August September October November December
""")
LENGTHS = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)


def random_date(random: Random) -> str:
    return (datetime.date(2024, 1, 1) + datetime.timedelta(random.randrange(365 * 4))).isoformat()


def dates(random: Random, effort: Effort, date: str) -> Made:
    made = random.choice(("days", "days", "near", "month", "length", "today", "today"))
    if made == "days":
        return _days(random, effort)
    if made == "near":
        return _near(random, effort)
    if made == "today":
        return _today(random, effort, date)
    return _month(random, effort) if made == "month" else _length(random, effort)


def _days(random: Random, effort: Effort) -> Made:
    start, count = random.randrange(7), random.randint(1, 13)
    rest = count % 7
    target = DAYS[(start + rest) % 7]
    asked = random.choice(("Today is {day}. What day is it in {n} days?", "If today is {day}, what day is it in {n} days?",
                           "Which day of the week is {n} days after {day}?", "What day comes {n} days after {day}?"))
    passed = ", ".join(DAYS[(start + i) % 7] for i in range(1, rest + 1)) or DAYS[start]
    weeks = f"{count} days are one week and {rest} days. " if count >= 7 else f"{rest} days. "
    analysis = thought(effort, f"{passed}.", f"{weeks}After {DAYS[start]}: {passed}.", f"So the day is {target}.")
    user = asked.format(day=DAYS[start], n=count).replace(" 1 days", " 1 day")
    return single(opened(random, user), analysis, f"It is {target}.", [target])


def _near(random: Random, effort: Effort) -> Made:
    day, step = random.randrange(7), random.choice((-1, 1))
    word = random.choice(("after", "follows")) if step == 1 else "before"
    asked = {"after": ("What day comes after {day}?", "Which day is the day after {day}?"),
             "follows": ("Which day follows {day}?",),
             "before": ("What day comes before {day}?", "Which day is the day before {day}?")}[word]
    target = DAYS[(day + step) % 7]
    order = f"{DAYS[day]}, {target}" if step == 1 else f"{target}, {DAYS[day]}"
    analysis = thought(effort, f"{order}.", f"The days of the week run: {order}.", f"So the day is {target}.")
    return single(opened(random, random.choice(asked).format(day=DAYS[day])), analysis, f"It is {target}.", [target])


def _month(random: Random, effort: Effort) -> Made:
    month, step = random.randrange(12), random.choice((-1, 1))
    target = MONTHS[(month + step) % 12]
    asked = f"{random.choice(('Which', 'What'))} month comes {'after' if step == 1 else 'before'} {MONTHS[month]}?"
    order = f"{MONTHS[month]}, {target}" if step == 1 else f"{target}, {MONTHS[month]}"
    analysis = thought(effort, f"{order}.", f"The months of the year run: {order}.", f"So the month is {target}.")
    return single(opened(random, asked), analysis, f"It is {target}.", [target])


def _length(random: Random, effort: Effort) -> Made:
    month = random.randrange(12)
    name, days = MONTHS[month], LENGTHS[month]
    asked = random.choice(("How many days does {m} have?", "How many days are in {m}?", "How long is {m} in days?"))
    leap = " In a leap year it has 29." if month == 1 else ""
    analysis = thought(effort, f"{name}: {days}.", f"{name} is month {month + 1} of the year. It has {days} days.",
                       f"{leap} No other rule applies.".strip())
    return single(opened(random, asked.format(m=name)), analysis, f"{name} has {days} days.", [str(days)])


def _today(random: Random, effort: Effort, date: str) -> Made:
    year, month, day = date.split("-")
    name = MONTHS[int(month) - 1]
    asked, final, expected = random.choice((
        (("What is today's date?", "What date is it today?", "Which date is today?", "What is the date?"),
         f"Today is {date}.", date),
        (("What year is it?", "Which year is it now?"), f"It is {year}.", year),
        (("What month is it?", "Which month is it now?"), f"It is {name}.", name)))
    analysis = thought(effort, f"The date is {date}.", f"The system message says that the current date is {date}.",
                       f"Its year is {year}, its month is {month}, {name}, and its day is {day}.")
    return single(opened(random, random.choice(asked)), analysis, final, [expected])
