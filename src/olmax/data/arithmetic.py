"""Generated arithmetic: what Dolmino's synthetic math is to OLMo 2, this is to a tiny model."""

from __future__ import annotations

import random
from collections.abc import Callable

_NAMES = (
    "Ana",
    "Ben",
    "Chen",
    "Dina",
    "Emil",
    "Fatou",
    "Grace",
    "Hugo",
    "Ines",
    "Jonas",
    "Kofi",
    "Lena",
)
_THINGS = (
    "apples",
    "books",
    "coins",
    "eggs",
    "marbles",
    "pencils",
    "shells",
    "stamps",
    "stickers",
    "tickets",
)
_PLACES = ("box", "bag", "basket", "drawer", "jar", "crate")


def problem(seed: int, index: int) -> str:
    """Problem number `index`: `Question: ...` and `Answer: ...` with the steps, then the result on
    a line `#### n`.

    The form of the answer is that of GSM8K, so that its grader reads it. The same (seed, index)
    gives the same text.
    """
    # A string seed goes through a hash of its own that does not differ between processes or Python
    # versions.
    rng = random.Random(f"olmax arithmetic {seed} {index}")
    question, steps, result = rng.choice(_KINDS)(rng)
    return f"Question: {question}\nAnswer: {steps}\n#### {result}\n"


def _number(rng: random.Random) -> int:
    # As many small as large numbers: uniform in the number of digits.
    return rng.randrange(1, 10 ** rng.choice((1, 1, 2, 2, 3)))


def _sum(rng: random.Random) -> tuple[str, str, int]:
    terms = [_number(rng) for _ in range(rng.choice((2, 2, 2, 3)))]
    expression = " + ".join(map(str, terms))
    return f"What is {expression}?", f"{expression} = {sum(terms)}.", sum(terms)


def _difference(rng: random.Random) -> tuple[str, str, int]:
    a, b = sorted((_number(rng), _number(rng)), reverse=True)
    return f"What is {a} - {b}?", f"{a} - {b} = {a - b}.", a - b


def _product(rng: random.Random) -> tuple[str, str, int]:
    a, b = rng.randrange(2, 100), rng.randrange(2, 10)
    tens, ones = divmod(a, 10)
    steps = (
        f"{a} * {b} = {tens * 10} * {b} + {ones} * {b} = {tens * 10 * b} + {ones * b} = {a * b}."
    )
    return f"What is {a} * {b}?", steps, a * b


def _quotient(rng: random.Random) -> tuple[str, str, int]:
    b, q = rng.randrange(2, 13), rng.randrange(2, 50)
    return f"What is {b * q} / {b}?", f"{b} * {q} = {b * q}, so {b * q} / {b} = {q}.", q


def _gain(rng: random.Random) -> tuple[str, str, int]:
    name, other = rng.sample(_NAMES, 2)
    thing = rng.choice(_THINGS)
    a, b = rng.randrange(2, 60), rng.randrange(2, 60)
    question = (
        f"{name} has {a} {thing}. {other} gives {name} {b} more. "
        f"How many {thing} does {name} have now?"
    )
    return question, f"{name} has {a} + {b} = {a + b} {thing}.", a + b


def _loss(rng: random.Random) -> tuple[str, str, int]:
    name = rng.choice(_NAMES)
    thing = rng.choice(_THINGS)
    a = rng.randrange(5, 90)
    b = rng.randrange(1, a)
    question = f"{name} had {a} {thing} and lost {b} of them. How many {thing} are left?"
    return question, f"There are {a} - {b} = {a - b} {thing} left.", a - b


def _containers(rng: random.Random) -> tuple[str, str, int]:
    name = rng.choice(_NAMES)
    thing, place = rng.choice(_THINGS), rng.choice(_PLACES)
    a, b, c = rng.randrange(2, 13), rng.randrange(2, 13), rng.randrange(1, 20)
    question = (
        f"{name} fills {a} {place}{'es' if place == 'box' else 's'} with {b} {thing} each and has "
        f"{c} {thing} left over. "
        f"How many {thing} does {name} have in all?"
    )
    steps = (
        f"In the containers there are {a} * {b} = {a * b} {thing}. "
        f"In all there are {a * b} + {c} = {a * b + c}."
    )
    return question, steps, a * b + c


def _share(rng: random.Random) -> tuple[str, str, int]:
    names = rng.sample(_NAMES, 2)
    thing = rng.choice(_THINGS)
    people, each, bought = rng.randrange(2, 10), rng.randrange(2, 20), rng.randrange(1, 10)
    total = people * each
    if total <= bought:
        bought = total - 1
    question = (
        f"{names[0]} has {total - bought} {thing} and {names[1]} brings {bought}. They share all "
        "of them equally among "
        f"{people} friends. How many {thing} does each friend get?"
    )
    steps = (
        f"Together they have {total - bought} + {bought} = {total} {thing}. "
        f"Each gets {total} / {people} = {each}."
    )
    return question, steps, each


_KINDS: tuple[Callable[[random.Random], tuple[str, str, int]], ...] = (
    _sum, _difference, _product, _quotient, _gain, _loss, _containers, _share,
)  # fmt: skip
