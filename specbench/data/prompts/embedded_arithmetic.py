"""Arithmetic word problems with worked answers: the mathematics domain of the embedded corpus, generated without data.

A problem is a story, its numbers and a short chain of equations. Its key (story and numbers) determines it: the same
key always has the same answer, and only the key decides to which split it belongs.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

NAMES = (
    *("Anna", "Ben", "Clara", "David", "Emma", "Finn", "Grace", "Hugo", "Iris", "Jack"),
    *("Kate", "Leo", "Mia", "Noah", "Olga", "Paul", "Rosa", "Sam", "Tina", "Victor"),
)
THINGS = (
    *("apples", "pens", "books", "cards", "stamps", "marbles"),
    *("cookies", "shells", "tickets", "candles", "bottles", "pencils"),
)
OPENINGS = ("Let us work it out.", "Step by step:", "First we look at what is given.", "We can solve this in steps.")
CLOSINGS = ("The answer is {}.", "So the answer is {}.", "Therefore the answer is {}.")


@dataclass(frozen=True)
class Problem:
    """One word problem: `key` names story and numbers, `answer` is the number that `solution` ends with."""

    key: str
    story: str
    numbers: tuple[int, ...]
    question: str
    solution: str
    answer: int


class _Draw:
    """The random choices of one problem; remembers the numbers in the order in which the question shows them."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.numbers: list[int] = []
        self.x, self.y, self.z = rng.sample(NAMES, 3)
        self.thing, self.other = rng.sample(THINGS, 2)

    def number(self, low: int, high: int) -> int:
        return self.keep(self.rng.randint(low, high))

    def keep(self, value: int) -> int:
        self.numbers.append(value)
        return value

    def one(self, *phrases: str) -> str:
        return self.rng.choice(phrases)


Steps = list[str]


def _shopping(d: _Draw) -> tuple[str, Steps, int]:
    a, p, b, q = d.number(2, 12), d.number(2, 15), d.number(2, 12), d.number(2, 15)
    verb = d.one("buys", "orders", "picks")
    question = (
        f"{d.x} {verb} {a} {d.thing} at {p} dollars each and {b} {d.other} at {q} dollars each. "
        f"How much does {d.x} pay?"
    )
    steps = [
        d.one(f"The {d.thing} cost", f"For the {d.thing} {d.x} pays") + f" {a} * {p} = {a * p} dollars.",
        d.one(f"The {d.other} cost", f"For the {d.other} {d.x} pays") + f" {b} * {q} = {b * q} dollars.",
        d.one("Together that is", "In total that makes") + f" {a * p} + {b * q} = {a * p + b * q} dollars.",
    ]
    return question, steps, a * p + b * q


def _sharing(d: _Draw) -> tuple[str, Steps, int]:
    a, each, n = d.rng.randint(10, 40), d.rng.randint(6, 20), d.rng.randint(3, 9)
    b = each * n - a
    if b < 2:
        a, b = each * n - 2, 2
    a, b, n = d.keep(a), d.keep(b), d.keep(n)
    question = (
        f"{d.x} has {a} {d.thing} and gets {b} more. {d.one('All of them', 'They')} are shared equally among "
        f"{n} friends. How many {d.thing} does each friend get?"
    )
    steps = [
        d.one(f"{d.x} has", f"Altogether {d.x} holds") + f" {a} + {b} = {a + b} {d.thing}.",
        d.one("Each friend gets", "Shared equally, each one gets") + f" {a + b} / {n} = {each} {d.thing}.",
    ]
    return question, steps, each


def _journey(d: _Draw) -> tuple[str, Steps, int]:
    v, t, w, u = d.number(4, 12) * 10, d.number(2, 6), d.number(4, 12) * 10, d.number(2, 6)
    who = d.one("A train", "A bus", "A car")
    question = (
        f"{who} travels {t} hours at {v} kilometres an hour and then {u} hours at {w} kilometres an hour. "
        "How far does it go?"
    )
    d.numbers = [t, v, u, w]
    steps = [
        d.one("The first part is", "In the first part it covers") + f" {v} * {t} = {v * t} kilometres.",
        d.one("The second part is", "In the second part it covers") + f" {w} * {u} = {w * u} kilometres.",
        d.one("The whole way is", "In all it goes") + f" {v * t} + {w * u} = {v * t + w * u} kilometres.",
    ]
    return question, steps, v * t + w * u


def _change(d: _Draw) -> tuple[str, Steps, int]:
    n, q = d.number(2, 9), d.number(2, 11)
    paid = d.keep(d.rng.choice([m for m in (20, 50, 100) if m > n * q]))
    question = f"{d.x} buys {n} {d.thing} for {q} dollars each and pays with {paid} dollars. How much change is due?"
    steps = [
        d.one(f"The {d.thing} cost", "The price is") + f" {n} * {q} = {n * q} dollars.",
        d.one("The change is", f"{d.x} gets back") + f" {paid} - {n * q} = {paid - n * q} dollars.",
    ]
    return question, steps, paid - n * q


def _boxes(d: _Draw) -> tuple[str, Steps, int]:
    a, b = d.number(3, 15), d.number(4, 15)
    c = d.number(2, a * b // 2)
    e = d.number(2, 30)
    fate = d.one("are sold", "are broken", "are given away")
    question = (
        f"There are {a} boxes with {b} {d.thing} in each. {c} of them {fate} and later {e} new ones arrive. "
        f"How many {d.thing} are there now?"
    )
    steps = [
        d.one("At first there are", "The boxes hold") + f" {a} * {b} = {a * b} {d.thing}.",
        d.one(f"After {c} {fate} there are", "Then there remain") + f" {a * b} - {c} = {a * b - c} {d.thing}.",
        d.one("With the new ones there are", "Now there are") + f" {a * b - c} + {e} = {a * b - c + e} {d.thing}.",
    ]
    return question, steps, a * b - c + e


def _savings(d: _Draw) -> tuple[str, Steps, int]:
    a, n = d.number(3, 25), d.number(3, 12)
    b = d.number(2, a * n - 1)
    thing = d.one("a game", "a bag", "a lamp", "a coat")
    question = f"{d.x} saves {a} dollars a week for {n} weeks and then spends {b} dollars on {thing}. What is left?"
    steps = [
        d.one(f"In {n} weeks {d.x} saves", "The savings are") + f" {a} * {n} = {a * n} dollars.",
        d.one(f"After buying {thing} there are", "What is left is") + f" {a * n} - {b} = {a * n - b} dollars.",
    ]
    return question, steps, a * n - b


def _ages(d: _Draw) -> tuple[str, Steps, int]:
    a, k = d.number(4, 18), d.number(2, 5)
    b, c = d.number(1, a), d.number(2, 12)
    question = (
        f"{d.x} is {a} years old. {d.y} is {k} times as old as {d.x}, and {d.z} is {b} years younger than {d.y}. "
        f"How old will {d.z} be in {c} years?"
    )
    steps = [
        f"{d.y} is {a} * {k} = {a * k} years old.",
        d.one(f"{d.z} is", f"So {d.z} is") + f" {a * k} - {b} = {a * k - b} years old.",
        d.one(f"In {c} years {d.z} will be", "Later that is") + f" {a * k - b} + {c} = {a * k - b + c} years old.",
    ]
    return question, steps, a * k - b + c


def _discount(d: _Draw) -> tuple[str, Steps, int]:
    p, r = d.keep(20 * d.rng.randint(2, 30)), d.keep(d.rng.choice((5, 10, 15, 20, 25, 30, 40)))
    thing = d.one("bicycle", "table", "camera", "jacket", "phone")
    off = p * r // 100
    question = f"A {thing} costs {p} dollars. In the sale it is {r} percent cheaper. What does the {thing} cost now?"
    steps = [
        d.one("First we take", f"{r} percent of the price:") + f" {p} * {r} = {p * r}.",
        d.one("The discount is", "That is a discount of") + f" {p * r} / 100 = {off} dollars.",
        d.one("The new price is", f"The {thing} now costs") + f" {p} - {off} = {p - off} dollars.",
    ]
    return question, steps, p - off


def _fence(d: _Draw) -> tuple[str, Steps, int]:
    a, b, c = d.number(4, 30), d.number(4, 30), d.number(2, 9)
    place = d.one("garden", "field", "yard")
    question = (
        f"A {place} is {a} metres long and {b} metres wide. A fence costs {c} dollars a metre. What does it cost?"
    )
    steps = [
        d.one("Length and width make", "One long and one short side make") + f" {a} + {b} = {a + b} metres.",
        d.one(f"The way around the {place} is", "The fence has a length of") + f" {a + b} * 2 = {2 * (a + b)} metres.",
        d.one("The fence costs", "The price is") + f" {2 * (a + b)} * {c} = {2 * (a + b) * c} dollars.",
    ]
    return question, steps, 2 * (a + b) * c


def _reading(d: _Draw) -> tuple[str, Steps, int]:
    a, days, b, rest = d.rng.randint(5, 25), d.rng.randint(3, 9), d.rng.randint(5, 20), d.rng.randint(2, 12)
    pages, a, days, b = d.keep(a * days + b * rest), d.keep(a), d.keep(days), d.keep(b)
    question = (
        f"A book has {pages} pages. {d.x} reads {a} pages a day for {days} days and from then on {b} pages a day. "
        "How many more days does it take?"
    )
    steps = [
        d.one("At first", f"In {days} days") + f" {d.x} reads {a} * {days} = {a * days} pages.",
        d.one("There remain", "What is left is") + f" {pages} - {a * days} = {b * rest} pages.",
        d.one("That takes", "For these it takes") + f" {b * rest} / {b} = {rest} days.",
    ]
    return question, steps, rest


def _comparing(d: _Draw) -> tuple[str, Steps, int]:
    a, b, k = d.number(3, 40), d.number(2, 30), d.number(2, 4)
    u, v = a + b, (a + b) * k
    question = (
        f"{d.x} has {a} {d.thing}. {d.y} has {b} more than {d.x}, and {d.z} has {k} times as many as {d.y}. "
        "How many do the three have together?"
    )
    steps = [
        f"{d.y} has {a} + {b} = {u} {d.thing}.",
        f"{d.z} has {u} * {k} = {v} {d.thing}.",
        f"{d.x} and {d.y} have {a} + {u} = {a + u} {d.thing}.",
        d.one("All three have", "Together they have") + f" {a + u} + {v} = {a + u + v} {d.thing}.",
    ]
    return question, steps, a + u + v


def _wages(d: _Draw) -> tuple[str, Steps, int]:
    h, n, w = d.number(3, 9), d.number(2, 6), d.number(8, 25)
    e = d.number(5, 60)
    question = (
        f"{d.x} works {h} hours a day on {n} days a week and earns {w} dollars an hour. {d.x} pays {e} dollars a week "
        "for the bus. What remains after one week?"
    )
    steps = [
        d.one(f"{d.x} works", "That makes") + f" {h} * {n} = {h * n} hours a week.",
        d.one(f"{d.x} earns", "The wage is") + f" {h * n} * {w} = {h * n * w} dollars.",
        d.one("After the bus there remain", "What remains is") + f" {h * n * w} - {e} = {h * n * w - e} dollars.",
    ]
    return question, steps, h * n * w - e


STORIES: dict[str, Callable[[_Draw], tuple[str, Steps, int]]] = {
    "shopping": _shopping,
    "sharing": _sharing,
    "journey": _journey,
    "change": _change,
    "boxes": _boxes,
    "savings": _savings,
    "ages": _ages,
    "discount": _discount,
    "fence": _fence,
    "reading": _reading,
    "comparing": _comparing,
    "wages": _wages,
}


def problems(seed: int | str) -> Iterator[Problem]:
    """An endless, deterministic stream of problems; the same seed gives the same stream on every machine."""
    rng = random.Random(f"arithmetic/{seed}")
    names = sorted(STORIES)
    while True:
        story = rng.choice(names)
        draw = _Draw(rng)
        question, steps, answer = STORIES[story](draw)
        solution = "\n".join([draw.one(*OPENINGS), *steps, draw.one(*CLOSINGS).format(answer)])
        numbers = tuple(draw.numbers)
        yield Problem(f"{story}:{','.join(map(str, numbers))}", story, numbers, question, solution, answer)
