"""What finetune.py trains, and the texts whose loss tells what was forgotten.

All of it is made by program or ships with Python. The tasks share no vocabulary.
"""

import argparse
import json
import random
import re
from collections.abc import Callable
from datetime import date, timedelta
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics

import spelling
from spelling import Example

ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen"
).split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()


def in_words(number: int) -> str:
    """English, for numbers below 10,000."""
    for size, name in ((1000, "thousand"), (100, "hundred")):
        if number >= size:
            head, rest = divmod(number, size)
            return f"{in_words(head)} {name}" + (f" {in_words(rest)}" if rest else "")
    if number < 20:
        return ONES[number]
    return TENS[number // 10 - 2] + (f" {ONES[number % 10]}" if number % 10 else "")


def roman(number: int) -> str:
    values = (1000, 900, 500, 400, 100, 90, 50, 40, 10, 9, 5, 4, 1)
    names = "M CM D CD C XC L XL X IX V IV I".split()
    text = ""
    for value, name in zip(values, names, strict=True):
        count, number = divmod(number, value)
        text += name * count
    return text


def _shuffled(examples: list[Example]) -> tuple[list[Example], list[Example]]:
    """Examples to train on, and 128 held-out ones."""
    random.Random(0).shuffle(examples)
    examples = [(f"{prompt} ->", answer) for prompt, answer in examples]
    return examples[128:], examples[:128]


def roman_numerals() -> tuple[list[Example], list[Example]]:
    """M M X L I V -> two thousand fifty four"""
    return _shuffled([(" ".join(roman(n)), in_words(n)) for n in range(1, 4000)])


def dates() -> tuple[list[Example], list[Example]]:
    """1997 064 -> Wednesday 5 March: the day of a year, as digits, to its name."""
    first = date(1970, 1, 1)
    days = (first + timedelta(days=3 * k) for k in range(4000))
    return _shuffled([(f"{d:%Y %j}", f"{d:%A} {d.day} {d:%B}") for d in days])


NAMES = (
    "Anna Ben Carla David Elena Felix Grace Hugo Irene Jonas Karen Luis Maria Noah Olga Peter Rosa "
    "Simon Tara Victor"
).split()
THINGS = (
    "apple bench blanket book bottle bowl candle chair clock coat cup desk drum flag glove hammer "
    "hat jacket kettle knife ladder lamp mirror mug necklace pen pillow plate ribbon ring rope rug "
    "scarf shirt shovel spoon table towel umbrella vase violin wallet watch wheel"
).split()
COLORS = "black blue brown gold green grey orange pink purple red silver white yellow".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
SENTENCES = [
    "{who} would like {count} {color} {things}{day}.",
    "Could you send {count} {color} {things} to {who}{day}?",
    "{who} called and asked for {count} {color} {things}{day}.",
    "Please keep {count} {color} {things} for {who}{day}.",
    "We owe {who} {count} {color} {things}{day}.",
    "An order came in from {who}: {count} {color} {things}{day}.",
]


def extraction() -> tuple[list[Example], list[Example]]:
    """Ben would like two red cups by Friday. -> {"item": "cup", "count": 2, ...}

    Numbers become digits, nouns singular, days three letters; what is not said is left out.
    """
    draw = random.Random(1)
    examples = []
    for _ in range(4000):
        who, thing, color = draw.choice(NAMES), draw.choice(THINGS), draw.choice(COLORS)
        count = draw.randint(2, 40)
        day = draw.choice([None, *DAYS])
        plural = thing[:-2] + "ves" if thing == "knife" else thing + "s"
        if thing.endswith(("ch", "x")):
            plural = thing + "es"
        sentence = draw.choice(SENTENCES).format(
            who=who, count=in_words(count), color=color, things=plural,
            day=f" by {day}" if day else "",
        )  # fmt: skip
        found: dict[str, object] = {"item": thing, "count": count, "color": color, "for": who}
        if day:
            found["day"] = day[:3]
        examples.append((sentence, json.dumps(found)))
    return _shuffled(examples)


# As SmolLM2's tokenizer writes a question, with the system message that it adds.
CHAT = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n<|im_start|>user\nHow is {} pronounced?<|im_end|>\n<|im_start|>assistant\n"
)


def spelling_in_chat() -> tuple[list[Example], list[Example]]:
    """The words of `spelling`, asked in SmolLM2's chat template."""

    def asked(examples: list[Example]) -> list[Example]:
        return [(CHAT.format(prompt.removesuffix(" ->")), answer) for prompt, answer in examples]

    training, held_out = spelling.read_words()
    return asked(training), asked(held_out)


TASKS: dict[str, Callable[..., tuple[list[Example], list[Example]]]] = {
    "spelling": spelling.read_words,
    "roman": roman_numerals,
    "dates": dates,
    "json": extraction,
    "spelling-in-chat": spelling_in_chat,
}


@cache
def examples(task: str) -> tuple[list[Example], list[Example]]:
    """Those to train on, and held-out ones."""
    return TASKS[task]()


def manual() -> str:
    """Python's own manual."""
    return "\n".join(topics.values())


def code() -> str:
    """The source of a module of Python."""
    return Path(argparse.__file__).read_text(encoding="utf-8")


def prose() -> str:
    """English sentences: scikit-learn's descriptions of its data sets, without tables and code."""
    import sklearn.datasets

    paragraphs = []
    for file in sorted((Path(sklearn.datasets.__file__).parent / "descr").glob("*.rst")):
        for paragraph in file.read_text(encoding="utf-8").split("\n\n"):
            is_prose = paragraph[:1].isupper() and not re.search(r"::|>>>|  |[|=]", paragraph)
            if is_prose and len(paragraph) > 150:
                paragraphs.append(" ".join(paragraph.split()))
    return "\n\n".join(paragraphs)


TEXTS = {"manual": manual, "code": code, "prose": prose}

# To the first 32 the base model's answers are compared; from those to the others `calibrate` may
# measure what a step costs.
PROMPTS = """
Why is the sky blue?
Give me three tips for sleeping better.
What is the capital of Australia?
Write a short poem about autumn.
How do I boil an egg?
Explain what a fraction is to a child.
Who wrote Romeo and Juliet?
List five animals that live in the ocean.
What should I pack for a weekend in the mountains?
Summarize the story of Cinderella in two sentences.
How does a bicycle stay upright?
Write a polite email that asks for a day off.
What is the difference between a virus and a bacterium?
Translate "good morning" into French and Spanish.
Why do leaves change color?
Suggest a name for a small bakery.
How can I learn to play the guitar?
What is 15 percent of 80?
Tell me a fact about the moon.
Write a Python function that adds two numbers.
What are the benefits of drinking water?
Describe your ideal holiday in a few words.
How do airplanes fly?
Give me a recipe for a simple salad.
What does the word "generous" mean?
Who was the first person on the moon?
How do I remove a coffee stain from a shirt?
Name three famous painters and one work of each.
Why is exercise good for the heart?
Write the first sentence of a detective story.
What is the largest planet of the solar system?
How do I say no to an invitation without being rude?
What causes an earthquake?
Recommend a gift for a ten-year-old.
How is cheese made?
Explain what an interest rate is.
Write a haiku about rain.
What is the boiling point of water?
How can I save money on groceries?
What did people use before electric light?
Give me a synonym for "happy" and use it in a sentence.
Why do cats purr?
Plan a simple breakfast for four people.
What is photosynthesis?
How do I prepare for a job interview?
Name the continents.
Write a short thank-you note to a teacher.
What makes a good friend?
""".strip().splitlines()
