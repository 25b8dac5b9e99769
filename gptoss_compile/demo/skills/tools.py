"""Choosing a function, calling it with arguments that fit its schema, using the result, or saying that none fits."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from gptoss_compile.demo.conversation import Answer, Call, Exchange
from gptoss_compile.demo.skills.common import CITIES, NAMES, WORDS, Made, thought
from gptoss_compile.demo.skills.dates import DAYS
from gptoss_compile.runtime.api.render import Effort, FunctionTool

Values = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """Functions of one purpose under several names.

    task completes "The user wants me to ..". parameters: key -> (names it may have, JSON type or enum's values).
    values draws the arguments by key; result draws what the function returns from them; final says it.
    """

    task: str
    names: tuple[str, ...]
    descriptions: tuple[str, ...]
    parameters: dict[str, tuple[tuple[str, ...], str | tuple[str, ...]]]
    requests: tuple[str, ...]
    values: Callable[[Random], Values]
    result: Callable[[Random, Values], Values]
    final: str


_CITY = (("city", "location", "place"), "string")
_ROOMS = ("kitchen", "bedroom", "bathroom", "garage", "hall", "office")
_LANGUAGES = ("French", "German", "Spanish", "Italian", "Dutch", "Greek", "Polish", "Swedish")
_MONEY = ("USD", "EUR", "GBP", "JPY", "CHF", "INR")
_ARTISTS = ("Mozart", "Queen", "Madonna", "Prince", "Adele", "Bach", "Elvis", "Drake")


def _clock(random: Random) -> str:
    return f"{random.randint(6, 22):02}:{random.choice(('00', '15', '30', '45'))}"


def _two(random: Random, values: tuple[str, ...] | list[str]) -> list[str]:
    return random.sample(list(values), 2)


def _done(_: Random, __: Values) -> Values:
    return {"status": "ok"}


FAMILIES = (
    Family("tell the weather", ("get_weather", "weather", "current_weather", "get_current_weather", "weather_lookup"),
           ("Get the current weather in a city.", "Current weather of a place.", "Look up the weather."),
           {"city": _CITY},
           ("What is the weather in {city}?", "How is the weather in {city}?", "Is it warm in {city}?",
            "Tell me the weather in {city}.", "What's the weather like in {city} today?", "Weather in {city}?"),
           lambda r: {"city": r.choice(CITIES)},
           lambda r, v: {"temperature": r.randint(1, 35), "condition": r.choice(("sunny", "cloudy", "rainy", "windy"))},
           "It is {condition} in {city}, with {temperature} degrees."),
    Family("tell the local time", ("get_time", "local_time", "time_in_city", "current_time"),
           ("Get the local time in a city.", "What time it is in a place."), {"city": _CITY},
           ("What time is it in {city}?", "Tell me the time in {city}.", "What is the local time in {city}?",
            "Which time do they have in {city} now?"),
           lambda r: {"city": r.choice(CITIES)}, lambda r, v: {"time": _clock(r)}, "It is {time} in {city}."),
    Family("convert money", ("convert_currency", "exchange", "currency_converter", "convert_money"),
           ("Convert an amount of money.", "Exchange money from one currency to another."),
           {"amount": (("amount", "value"), "number"), "source": (("from", "source", "from_currency"), _MONEY),
            "target": (("to", "target", "to_currency"), _MONEY)},
           ("Convert {amount} {source} to {target}.", "How much is {amount} {source} in {target}?",
            "Exchange {amount} {source} into {target}.", "What are {amount} {source} worth in {target}?"),
           lambda r: dict(zip(("amount", "source", "target"), (r.randint(1, 500), *_two(r, _MONEY)), strict=True)),
           lambda r, v: {"result": r.randint(1, 900)}, "{amount} {source} are {result} {target}."),
    Family("translate a word", ("translate", "translate_word", "translate_text"),
           ("Translate a word into another language.", "Translate text."),
           {"text": (("text", "word"), "string"), "language": (("language", "target_language", "to"), "string")},
           ("Translate {text} into {language}.", "What is {text} in {language}?", "How do you say {text} in {language}?"),
           lambda r: {"text": r.choice(WORDS), "language": r.choice(_LANGUAGES)},
           lambda r, v: {"translation": r.choice(WORDS)}, "In {language}, {text} is {translation}."),
    Family("set an alarm", ("set_alarm", "create_alarm", "alarm"), ("Set an alarm.", "Wake the user at a time."),
           {"time": (("time", "at"), "string")},
           ("Wake me at {time}.", "Set an alarm for {time}.", "I need an alarm at {time}.", "Set my alarm to {time}."),
           lambda r: {"time": _clock(r)}, _done, "The alarm is set for {time}."),
    Family("set a timer", ("set_timer", "start_timer", "timer"), ("Start a timer.", "Set a timer in minutes."),
           {"minutes": (("minutes", "duration"), "integer")},
           ("Set a timer for {minutes} minutes.", "Start a timer of {minutes} minutes.",
            "Timer, {minutes} minutes, please."),
           lambda r: {"minutes": r.randint(2, 90)}, _done, "The timer runs for {minutes} minutes."),
    Family("send a message", ("send_message", "message", "send_text", "text_contact"),
           ("Send a message to a person.", "Send a text to a contact."),
           {"person": (("recipient", "to", "contact"), "string"), "text": (("text", "message", "body"), "string")},
           ("Send {person} the message {text}.", "Tell {person}: {text}", "Text {person}: {text}",
            "Send a message to {person} saying {text}."),
           lambda r: {"person": r.choice(NAMES), "text": r.choice((
               "I am late", "see you soon", "dinner is ready", "call me back", "happy birthday", "I am at home",
               "the train is late", "good luck"))},
           _done, "I sent {person} the message: {text}"),
    Family("play music", ("play_music", "play", "play_song"), ("Play music.", "Play songs of an artist."),
           {"artist": (("artist", "query", "name"), "string")},
           ("Play some {artist}.", "Play music by {artist}.", "I want to hear {artist}.", "Put on {artist}, please."),
           lambda r: {"artist": r.choice(_ARTISTS)}, _done, "Now playing {artist}."),
    Family("switch a light", ("set_light", "switch_light", "light", "control_light"),
           ("Switch a light on or off.", "Control the light in a room."),
           {"room": (("room", "location"), "string"), "state": (("state", "power"), ("on", "off"))},
           ("Turn {state} the light in the {room}.", "Switch the {room} light {state}.",
            "Light {state} in the {room}, please.", "Turn the light in the {room} {state}."),
           lambda r: {"room": r.choice(_ROOMS), "state": r.choice(("on", "off"))}, _done,
           "The light in the {room} is {state}."),
    Family("set the heating", ("set_temperature", "set_heating", "heating", "thermostat"),
           ("Set the temperature of a room.", "Control the heating."),
           {"room": (("room", "zone"), "string"), "degrees": (("degrees", "temperature"), "integer")},
           ("Set the {room} to {degrees} degrees.", "Heat the {room} to {degrees} degrees.",
            "Make it {degrees} degrees in the {room}."),
           lambda r: {"room": r.choice(_ROOMS), "degrees": r.randint(15, 26)}, _done,
           "The {room} is set to {degrees} degrees."),
    Family("add to the shopping list", ("add_item", "add_to_list", "shopping_list_add", "add_to_shopping_list"),
           ("Add something to the shopping list.", "Put an item on the list."),
           {"item": (("item", "name", "product"), "string"), "count": (("quantity", "count", "amount"), "integer")},
           ("Add {count} of {item} to my shopping list.", "Put {count} times {item} on the list.",
            "I need to buy {item}, {count} of it. Add it to the list."),
           lambda r: {"item": r.choice(("milk", "bread", "coffee", "juice", "salt", "water", "cheese", "rice", "tea",
                                        "butter")),
                      "count": r.randint(1, 12)},
           _done, "I added {count} of {item} to the list."),
    Family("look up a stock price", ("get_stock_price", "stock_price", "stock", "quote"),
           ("Get the price of a stock.", "Current price of a share."),
           {"company": (("symbol", "company", "ticker"), "string")},
           ("What is the stock price of {company}?", "How much is a share of {company}?", "What does {company} stock cost?"),
           lambda r: {"company": r.choice(("Apple", "Google", "Microsoft", "Amazon", "Intel", "Tesla", "Nvidia", "Sony"))},
           lambda r, v: {"price": r.randint(10, 900)}, "A share of {company} costs {price} dollars."),
    Family("define a word", ("define", "define_word", "dictionary", "lookup_word"),
           ("Look a word up in a dictionary.", "Definition of a word."), {"word": (("word", "term"), "string")},
           ("Define the word {word}.", "Look up the definition of {word}.", "What does the dictionary say about {word}?"),
           lambda r: {"word": r.choice(WORDS)}, lambda r, v: {"kind": r.choice(("noun", "verb", "adjective"))},
           "The dictionary says that {word} is a {kind}."),
    Family("make an appointment", ("create_event", "add_event", "calendar_add", "schedule_meeting"),
           ("Add an event to the calendar.", "Create an appointment."),
           {"title": (("title", "name"), "string"), "day": (("day", "weekday", "date"), "string")},
           ("Add {title} on {day} to my calendar.", "Schedule {title} for {day}.", "Put {title} in my calendar for {day}."),
           lambda r: {"title": r.choice(("dinner", "a meeting", "lunch", "a walk", "training", "a party", "a visit")),
                      "day": r.choice(DAYS)},
           _done, "I put {title} on {day} in your calendar."),
    Family("measure a distance", ("get_distance", "distance", "route_length"),
           ("Distance between two cities.", "Length of the way between two places."),
           {"a": (("from", "start", "origin"), "string"), "b": (("to", "end", "destination"), "string")},
           ("How far is it from {a} to {b}?", "What is the distance between {a} and {b}?",
            "How many kilometres from {a} to {b}?"),
           lambda r: dict(zip("ab", _two(r, CITIES), strict=True)),
           lambda r, v: {"kilometres": r.randint(100, 999)}, "It is {kilometres} kilometres from {a} to {b}."),
    Family("draw a random number", ("random_number", "random_integer", "roll"),
           ("Draw a random number.", "A random integer in a range."),
           {"low": (("min", "low", "minimum"), "integer"), "high": (("max", "high", "maximum"), "integer")},
           ("Give me a random number between {low} and {high}.", "Draw a number from {low} to {high}.",
            "Pick a random number from {low} to {high}."),
           lambda r: {"low": r.randint(1, 10), "high": r.randint(20, 200)},
           lambda r, v: {"number": r.randint(v["low"], v["high"])}, "The number is {number}."),
)


@dataclass(frozen=True)
class Shown:
    """A family as one conversation shows it: its function's name and its parameters' names by key."""

    family: Family
    tool: FunctionTool
    parameters: dict[str, str]


def shown(random: Random, family: Family) -> Shown:
    properties: dict[str, Any] = {}
    names: dict[str, str] = {}
    for key, (choices, kind) in family.parameters.items():
        names[key] = random.choice(choices)
        properties[names[key]] = {"type": kind} if isinstance(kind, str) else {"type": "string", "enum": list(kind)}
        if random.random() < 0.3:
            properties[names[key]] |= {"description": f"The {key}."}
    required = list(properties)
    schema = {"type": "object", "properties": properties, "required": required}
    tool = FunctionTool(random.choice(family.names), random.choice(family.descriptions), schema)
    return Shown(family, tool, names)


def some_tools(random: Random, without: Family | None = None, most: int = 4) -> list[Shown]:
    families = [family for family in FAMILIES if family is not without]
    return [shown(random, family) for family in random.sample(families, random.randint(1, most))]


def calling(random: Random, effort: Effort) -> tuple[Made, tuple[FunctionTool, ...]]:
    """A request that one of the functions fulfils, its call and the answer made of the result."""
    family = random.choice(FAMILIES)
    chosen = shown(random, family)
    others = some_tools(random, family, 3) if random.random() < 0.75 else []
    offered = [*others, chosen]
    random.shuffle(offered)
    values = family.values(random)
    arguments = {chosen.parameters[key]: value for key, value in values.items()}
    result = family.result(random, values)
    pairs = ", ".join(f"{name} = {value}" for name, value in arguments.items())
    name = chosen.tool.name
    before = thought(effort, f"Call {name}.", f"The user wants me to {family.task}. The function {name} does that.",
                     f"Its arguments are: {pairs}.")
    after = thought(effort, "Done.", f"The function {name} has answered. I tell the user.",
                    "The answer has all that is needed.")
    final = family.final.format(**values, **result)
    request = random.choice(family.requests).format(**values)
    call = Call(before, name, json.dumps(arguments), json.dumps(result))
    expected = tuple(str(value) for value in result.values() if result != {"status": "ok"}) or (final.rstrip("."),)
    return ((Exchange(_polite(random, request), (call, Answer(after, final))),), expected), tuple(s.tool for s in offered)


def refusing(random: Random, effort: Effort) -> tuple[Made, tuple[FunctionTool, ...]]:
    """A request that none of the functions (or no function at all) fulfils."""
    family = random.choice(FAMILIES)
    offered = some_tools(random, family) if random.random() < 0.8 else []
    random.shuffle(offered)
    names = ", ".join(each.tool.name for each in offered)
    have = f"I have {names}. None of them fits." if offered else "I have no functions."
    analysis = thought(effort, "No function fits.", f"The user wants me to {family.task}. {have}",
                       "So I say that I cannot do it.")
    final = f"I cannot {family.task}: I have no function for that."
    request = _polite(random, random.choice(family.requests).format(**family.values(random)))
    made: Made = ((Exchange(request, (Answer(analysis, final),)),), (f"cannot {family.task}",))
    return made, tuple(each.tool for each in offered)


def _polite(random: Random, text: str) -> str:
    opening = random.choice(("", "", "", "", "Please: ", "Hi! ", "Hello. ", "Could you help? "))
    return opening + text
