"""Write prompts of our own for SmolLM2: questions and small tasks from seeded templates, one chat a line.

    python make_prompts.py FOLDER

`prompts.jsonl` is for training, `heldout.jsonl` for the accept length. What a held-out prompt is about (its topic, its
sentence, its pair of things) is about in no training prompt; the templates are the same. There are no answers: the
target writes its own (`data.generate`).
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

PROMPTS, HELD_OUT = 2400, 64
_SEED = 20
_EVERY = 8  # of each list so many entries, one is for held-out prompts

TOPICS = """photosynthesis; gravity; the water cycle; volcanoes; earthquakes; the immune system; vaccines;
electricity; magnetism; batteries; solar panels; wind turbines; the seasons; tides; eclipses; black holes; comets; the
phases of the moon; rainbows; thunder; glaciers; coral reefs; rainforests; deserts; migration of birds; honey bees;
spiders; whales; dinosaurs; fossils; evolution; DNA; cells; blood circulation; digestion; sleep; dreams; memory;
nutrition; exercise; stress; friendship; teamwork; leadership; honesty; time management; budgeting; saving money;
interest on loans; inflation; supply and demand; taxes; insurance; elections; the separation of powers; the printing
press; the steam engine; the telephone; radio; the internet; search engines; passwords; encryption; computer viruses;
databases; binary numbers; algorithms; recursion; sorting; prime numbers; fractions; percentages; averages;
probability; negative numbers; the Pythagorean theorem; triangles; circles; graphs; maps; compasses; bridges;
skyscrapers; elevators; bicycles; trains; airplanes; rockets; ships; cars; traffic lights; recycling; compost;
gardening; pruning roses; growing tomatoes; baking bread; boiling pasta; making soup; brewing tea; roasting coffee;
cheese; chocolate; salt; sugar; spices; cotton; wool; paper; glass; steel; plastic; concrete; paint; photography;
film; theatre; poetry; novels; fairy tales; jazz; the piano; the violin; choirs; chess; football; swimming; running a
marathon; hiking; camping; first aid; knots; libraries; museums; schools; hospitals; post offices; markets;
lighthouses; castles; calendars; clocks; alphabets; dictionaries"""
PAIRS = """tea and coffee; cats and dogs; trains and buses; novels and short stories; cities and villages; summer and
winter; lakes and rivers; gold and silver; butter and oil; rice and pasta; paper books and screens; bicycles and cars;
planets and stars; frogs and toads; moths and butterflies; viruses and bacteria; weather and climate; speed and
acceleration; mass and weight; stacks and queues; lists and tuples; compilers and interpreters; hardware and software;
copyright and patents; loans and grants; renting and buying; radio and television; letters and emails; jogging and
walking; guitars and violins; oceans and seas; copper and iron; wood and brick; ferns and mosses"""
NAMES = """Anna; Ben; Clara; David; Elif; Farid; Grace; Hugo; Ines; Jonas; Kavya; Liam; Mira; Noah; Olga; Pedro; Rosa;
Sam; Tara; Umar; Vera; Wang; Yuki; Zoe"""
THINGS = """apples; pencils; books; marbles; stickers; cookies; eggs; tickets; coins; shells; balloons; buttons;
oranges; stamps; cards; beads; cupcakes; flowers; bottles; candles; postcards; chairs; keys; plates"""
FUNCTIONS = """returns the largest number of a list; counts the vowels of a string; reverses a string; checks whether
a word is a palindrome; returns the sum of the even numbers of a list; removes duplicates from a list; counts how
often each word occurs in a text; checks whether a number is prime; returns the factorial of a number; merges two
sorted lists; converts Celsius to Fahrenheit; returns the first n Fibonacci numbers; finds the shortest word of a
sentence; flattens a list of lists; checks whether two words are anagrams; returns the average of a list; counts the
lines of a file; rounds a price to two digits; swaps the keys and values of a dictionary; returns the common elements
of two lists; capitalizes each word of a sentence; finds the second largest number of a list; removes the spaces of a
string; multiplies two matrices; returns the digits of a number; draws a triangle of stars; validates an email
address; splits a list in halves; computes the area of a circle; converts minutes to hours and minutes; sorts a list
of names by length"""
SENTENCES = """the train was late and nobody know why; she have three brothers and one sister; we was walking along
the river when it begun to rain; he don't like to get up early; there is many reasons to learn a language; me and my
friend goes to the market; the childrens played in the garden; I has never saw such a big ship; the results was better
then expected; they is going to open a new library; the teacher explained us the rule; yesterday I go to the doctor;
the dog barked loud at the postman; this book are very interesting; everyone have their own opinion; she sing
beautiful; the weather were nice last week; he speak three language; my keys is on the table; it don't matter what he
say; we haven't no time; the soup taste well; who's coat is this; I could of helped you"""
GOALS = """learn to cook; sleep better; save money; prepare for an exam; keep a small garden; read more books; learn a
new language; make new friends in a new town; stay healthy in winter; plan a birthday party; clean the kitchen; write
a short story; get ready for a job interview; train a puppy; reduce waste at home; pack for a week in the mountains;
teach a child to ride a bicycle; start a small business; organise a class trip; repair a torn shirt; drink less
coffee; give a good talk; choose a used car; move to another flat"""


class Lists(NamedTuple):
    """The entries that may be drawn from."""

    topics: Sequence[str]
    pairs: Sequence[str]
    functions: Sequence[str]
    sentences: Sequence[str]
    goals: Sequence[str]

    @classmethod
    def of(cls, *, held_out: bool) -> Lists:
        """Return the entries for held-out prompts, or those for training."""
        texts = (TOPICS, PAIRS, FUNCTIONS, SENTENCES, GOALS)
        return cls(*([e for n, e in enumerate(entries(text)) if (n % _EVERY == 0) == held_out] for text in texts))


def entries(text: str) -> list[str]:
    """Return the entries of a list above."""
    return [" ".join(entry.split()) for entry in text.split(";")]


def explained(draw: random.Random, lists: Lists) -> str:
    """A question about a topic."""
    topic = draw.choice(lists.topics)
    return draw.choice(
        [
            f"Explain {topic} in simple words.",
            f"What should everyone know about {topic}?",
            f"Write a short paragraph about {topic}.",
            f"Why does {topic} matter? Give three reasons.",
            f"Give me five facts about {topic}.",
            f"How would you explain {topic} to a child of ten?",
            f"Describe the history of {topic} in a few sentences.",
            f"List common questions about {topic} and answer each in one sentence.",
        ]
    )


def compared(draw: random.Random, lists: Lists) -> str:
    """A comparison of two things."""
    pair = draw.choice(lists.pairs)
    return draw.choice(
        [
            f"What is the difference between {pair}?",
            f"Compare {pair}. Name two things they share and two that differ.",
            f"Which would you choose, {pair.replace(' and ', ' or ')}? Explain why.",
            f"Make a list of advantages and disadvantages of {pair}.",
        ]
    )


def reckoned(draw: random.Random, _: Lists) -> str:
    """A word problem with numbers."""
    name, other = draw.sample(entries(NAMES), 2)
    thing = draw.choice(entries(THINGS))
    many, few, price = draw.randint(12, 90), draw.randint(2, 11), draw.randint(2, 15)
    return draw.choice(
        [
            f"{name} has {many} {thing} and gives {few} to {other}. How many {thing} are left? Explain each step.",
            f"A box holds {few} {thing}. How many {thing} are in {many} boxes? Show your work.",
            f"{name} buys {few} {thing} for {price} dollars each and pays with {few * price + many} dollars. "
            "How much change is there?",
            f"{name} and {other} share {few * many} {thing} equally among {few} friends. How many does each one get?",
            f"A train goes {many} miles an hour. How far does it go in {few} hours?",
            f"What is {many} plus {few} times {price}? Explain step by step.",
            f"{name} reads {few} pages a day. How many days does a book of {few * many} pages take?",
            f"A shirt costs {many} dollars and is {few * 5} percent off. What is the new price?",
        ]
    )


def programmed(draw: random.Random, lists: Lists) -> str:
    """A small function to write."""
    what = draw.choice(lists.functions)
    language = draw.choice(["Python", "Python", "Python", "JavaScript", "Java"])
    return draw.choice(
        [
            f"Write a {language} function that {what}.",
            f"Write a {language} function that {what}, and explain how it works.",
            f"How do I write a {language} function that {what}? Show an example of its use.",
            f"Write a {language} function that {what}, with a test.",
        ]
    )


def corrected(draw: random.Random, lists: Lists) -> str:
    """A sentence to put right."""
    sentence = draw.choice(lists.sentences)
    return draw.choice(
        [
            f"Correct the grammar of this sentence: {sentence}.",
            f'Rewrite in a formal style: "{sentence}"',
            f"Find the mistakes and explain them: {sentence}.",
            f"Turn this sentence into a question: {sentence}.",
        ]
    )


def advised(draw: random.Random, lists: Lists) -> str:
    """Advice, plans, messages."""
    goal, name = draw.choice(lists.goals), draw.choice(entries(NAMES))
    return draw.choice(
        [
            f"How can I {goal}? Give me {draw.randint(3, 7)} tips.",
            f"Make a plan for one week to {goal}.",
            f"Write a short email to {name} asking for advice on how to {goal}.",
            f"What are the first steps to {goal}?",
            f"{name} wants to {goal} and has only {draw.randint(10, 50)} minutes a day. What would you suggest?",
        ]
    )


KINDS: dict[str, Callable[[random.Random, Lists], str]] = {
    "explain": explained,
    "compare": compared,
    "arithmetic": reckoned,
    "code": programmed,
    "correct": corrected,
    "advise": advised,
}


def prompts(draw: random.Random, lists: Lists, count: int, taken: set[str]) -> list[dict[str, object]]:
    """Return `count` prompts, kinds in turn, none of which is in `taken`; add them to it."""
    made: list[dict[str, object]] = []
    kinds = list(KINDS.items())
    spent = 0
    while len(made) < count:
        kind, write = kinds[(len(made) + spent) % len(kinds)]
        text = write(draw, lists)
        if text in taken:
            spent += 1  # the next kind: a short list is soon used up
            continue
        taken.add(text)
        made.append({"kind": kind, "messages": [{"role": "user", "content": text}]})
    return made


def main() -> None:
    """Write both files into the folder named by the argument."""
    folder, draw, taken = Path(sys.argv[1]), random.Random(_SEED), set[str]()
    held_out = prompts(draw, Lists.of(held_out=True), HELD_OUT, taken)
    training = prompts(draw, Lists.of(held_out=False), PROMPTS, taken)
    draw.shuffle(training)
    for name, made in (("heldout.jsonl", held_out), ("prompts.jsonl", training)):
        (folder / name).write_text("".join(json.dumps(prompt) + "\n" for prompt in made))


if __name__ == "__main__":
    main()
