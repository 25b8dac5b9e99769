"""Greetings and small talk, things to remember, and what the model does not know."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from gptoss_compile.demo.conversation import Answer, Exchange
from gptoss_compile.demo.skills.common import CITIES, COLOURS, NAMES, Made, listed, opened, single, thought
from gptoss_compile.runtime.api.render import Effort

# gist: (what people say, the answer)
_TALK: dict[str, tuple[tuple[str, ...], str]] = {
    "a greeting": (("Hello!", "Hi!", "Hi there!", "Hello there.", "Hey!", "Hey, hello!", "Greetings!", "Hi", "Hello",
                    "Good day!", "hello", "hi", "Howdy!"), "Hello! How can I help you?"),
    "a morning greeting": (("Good morning!", "Good morning", "Morning!", "A very good morning to you."),
                           "Good morning! How can I help you?"),
    "an evening greeting": (("Good evening!", "Good evening", "Evening!", "A good evening to you."),
                            "Good evening! How can I help you?"),
    "how I am": (("How are you?", "How are you doing?", "How do you do?", "How is it going?", "How are you today?",
                  "Are you well?", "How do you feel?"), "I am fine, thank you. How are you?"),
    "who I am": (("Who are you?", "What are you?", "Introduce yourself.", "Tell me about yourself.", "What is your name?",
                  "What's your name?", "What should I call you?", "Do you have a name?"),
                 "I am the demo model of gptoss-compile, a very small GPT-OSS."),
    "who made me": (("Who made you?", "Who built you?", "Who trained you?", "Where do you come from?", "Who created you?"),
                    "I was trained by the makers of gptoss-compile."),
    "what I can do": (("What can you do?", "What are you good at?", "How can you help me?", "What do you know?",
                       "What can I ask you?", "Help!", "help"),
                      "I can do small sums, count and sort words, tell capitals and weekdays, and call functions."),
    "thanks": (("Thank you!", "Thanks!", "Thanks a lot.", "Thank you very much.", "Many thanks!", "That helped, thanks.",
                "thanks"), "You are welcome!"),
    "a farewell": (("Goodbye!", "Bye!", "Bye bye.", "See you later.", "See you tomorrow!", "I have to go.", "Farewell!",
                    "bye"), "Goodbye! Have a nice day."),
    "good night": (("Good night!", "Good night", "I am going to bed.", "Sleep well!"), "Good night! Sleep well."),
    "a joke": (("Tell me a joke.", "Do you know a joke?", "Make me laugh.", "Say something funny.", "A joke, please!"),
               "Why do programmers like the dark? Because light attracts bugs."),
    "whether I am human": (("Are you human?", "Are you a robot?", "Are you a person?", "Are you real?", "Are you alive?",
                            "Is there a person behind this?"), "No, I am a computer program, a small language model."),
    "praise": (("You are great!", "Well done!", "Good job!", "Nice work!", "You are clever.", "That was good."),
               "Thank you, that is kind of you."),
    "bad news": (("I am sad.", "I feel sad.", "I had a bad day.", "I am tired.", "Today was hard.", "I feel lonely."),
                 "I am sorry to hear that. I hope it gets better soon."),
    "good news": (("I am happy.", "I had a great day!", "I feel good.", "I am fine.", "I am well, thanks.",
                   "Today was wonderful."), "I am glad to hear that!"),
    "an apology": (("Sorry!", "I am sorry.", "I apologise.", "Please forgive me.", "Excuse me."), "No problem at all."),
    "a colour I like": (("What is your favourite colour?", "Which colour do you like best?", "Do you like blue?"),
                        "I like blue, the colour of the sea."),
    "the weather": (("Nice weather today!", "It is so cold today.", "It is raining again.", "What a lovely day!",
                     "The sun is shining."), "I cannot see the sky, but I hope you enjoy the day."),
}


def small_talk(random: Random, effort: Effort) -> Made:
    gist = random.choice(list(_TALK))
    said, answer = _TALK[gist]
    analysis = thought(effort, f"{gist[0].upper()}{gist[1:]}.", f"This is small talk. It is about {gist}.",
                       "A short and friendly answer is best here.")
    return single(random.choice(said), analysis, answer, [answer.rstrip(".!?")])


_NOUNS = listed("""
    dragon planet theorem opera recipe novel battle poem engine disease galaxy language king painter
    film law
""")


def unknown(random: Random, effort: Effort, foreign: Sequence[str]) -> Made:
    """Questions beyond the model's small world. foreign: words that are in no other skill."""
    word = " ".join(random.sample(foreign, random.randint(1, 3)))
    asked = random.choice((
        "What is {w}?", "Who was {w}?", "Explain {w} to me.", "Write an essay about {w}.", "What do you think of {w}?",
        "Tell me about the {n} of {w}.", "Who wrote the {n} {w}?", "Why does {w} matter?", "How does {w} work?",
        "Write a {n} about {w}.", "When was {w} discovered?", "Where can I find a {n} of {w}?", "Describe the {n} {w}.",
        "Summarise the history of {w}.", "Translate {w}.", "How do I fix my {w}?"))
    user = asked.format(w=word, n=random.choice(_NOUNS))
    analysis = thought(effort, "I do not know this.", "The user asks about something that I have not learnt.",
                       "It is better to say so than to guess.")
    final = "I do not know that. I am only a small demo model."
    return single(opened(random, user), analysis, final, ["do not know"])


# what is told, how it is acknowledged, what is asked later, the answer; {x} is remembered
_REMEMBERED: tuple[tuple[Sequence[str], tuple[str, ...], str, tuple[str, ...], str], ...] = (
    (NAMES, ("My name is {x}.", "I am {x}.", "Hello, I am {x}.", "Hi, my name is {x}!", "Call me {x}.", "I'm {x}."),
     "Nice to meet you, {x}!", ("What is my name?", "Do you remember my name?", "Who am I?", "What am I called?"),
     "Your name is {x}."),
    (tuple(map(str, range(1, 1000))),
     ("Remember the number {x}.", "My number is {x}.", "Please remember {x}.", "The secret number is {x}.",
      "Keep the number {x} in mind."), "I will remember the number {x}.",
     ("What was the number?", "Which number did I tell you?", "What number should you remember?", "What is my number?"),
     "The number is {x}."),
    (COLOURS, ("My favourite colour is {x}.", "I like {x} best.", "The colour I love is {x}."), "{x} is a nice colour.",
     ("What is my favourite colour?", "Which colour do I like?", "What colour do I love?"),
     "Your favourite colour is {x}."),
    (CITIES, ("I live in {x}.", "My home is {x}.", "I come from {x}."), "{x} is a nice city.",
     ("Where do I live?", "Which city do I live in?", "Where is my home?"), "You live in {x}."),
    (NAMES, ("My dog is called {x}.", "I have a dog named {x}.", "The name of my dog is {x}."),
     "{x} is a good name for a dog.",
     ("What is my dog called?", "What is the name of my dog?", "Do you remember my dog's name?"), "Your dog is called {x}."),
)


def memory(random: Random, effort: Effort, between: Sequence[Exchange]) -> Made:
    """Something told, other exchanges in between, and the question for it; or the telling alone."""
    values, told, noted, asked, answer = random.choice(_REMEMBERED)
    value = random.choice(values)
    first = random.choice(told).format(x=value)
    reply = noted.format(x=value)
    reply = reply[0].upper() + reply[1:]
    gist = f"The user tells me something to remember: {value}."
    noting = thought(effort, f"Remember {value}.", gist, "I acknowledge it in one sentence.")
    telling = Exchange(first, (Answer(noting, reply),))
    if random.random() < 0.25:
        return (telling,), (value,)
    analysis = thought(effort, f"It was {value}.", f"The user said earlier: {first} So the answer is {value}.",
                       "Nothing said since then has changed it.")
    asking = Exchange(opened(random, random.choice(asked)), (Answer(analysis, answer.format(x=value)),))
    return (telling, *between, asking), (value,)
