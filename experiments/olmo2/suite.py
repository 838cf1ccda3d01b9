"""A small benchmark suite from held-out text, in the request format of OLMES.

The tasks mirror what OLMo 2 is judged by, at a size a tiny model can be measured on: arithmetic and
word problems (for GSM8K), continuations of documentation (for HellaSwag), identifiers that the
context determines (for DROP's reading), and copying a colour (copycolors). Each question becomes
one row a choice; the right choice sits at `label`.
"""

import keyword
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from experiments.olmo2.recipe import Evaluation

MATH_TASKS = ("arithmetic_rc", "word_problems_rc")
"""What the annealing mix's arithmetic is meant to teach."""
WORDED_TASKS = (
    "arithmetic_rc",
    "word_problems_rc",
    "docs_cloze_rc",
    "code_identifiers_rc",
    "copy_colors_rc",
)
"""Tasks whose answers are text, not letters: those that bits per byte say something about."""
METRICS = {
    "arithmetic_rc": "acc_raw",
    "word_problems_rc": "acc_raw",
    "arithmetic_mc": "acc_raw",
    "docs_cloze_rc": "acc_per_char",
    "code_identifiers_rc": "acc_per_char",
    "copy_colors_rc": "acc_raw",
}
"""Metric of each task: the most likely choice, or the one most likely by character."""
DESCRIPTIONS = {
    "arithmetic_rc": "sums, products, quotients: solution with the right result among three wrong",
    "word_problems_rc": "the same for one- and two-step word problems",
    "arithmetic_mc": "the right letter among four lettered results",
    "docs_cloze_rc": "which continuation of a passage of documentation is its own",
    "code_identifiers_rc": "which name of the surrounding code comes next",
    "copy_colors_rc": "which colour an object was given just before",
}
"""What each task asks."""
CHOICES = 4

Question = tuple[str, list[str], int]
"""Context, choices (each with the space or line it starts with) and the index of the right one."""


def tasks(
    held_out: Mapping[str, Sequence[str]], evaluation: Evaluation
) -> dict[str, list[dict[str, Any]]]:
    """Request rows of every task.

    Args:
      held_out: held-out documents of the sources `arithmetic`, `docs` and `code`.
      evaluation: how many questions and examples.
    """
    problems = [_parse(text) for text in held_out["arithmetic"]]
    sums = [p for p in problems if p[0].startswith("What is")]
    words = [p for p in problems if not p[0].startswith("What is")]
    makers = {
        "arithmetic_rc": lambda rng: _problems(sums, evaluation.shots, rng),
        "word_problems_rc": lambda rng: _problems(words, evaluation.shots, rng),
        "arithmetic_mc": lambda rng: _multiple_choice(sums, evaluation.shots, rng),
        "docs_cloze_rc": lambda rng: _cloze(held_out["docs"], rng),
        "code_identifiers_rc": lambda rng: _identifiers(held_out["code"], rng),
        "copy_colors_rc": _colors,
    }
    result = {}
    for name, make in makers.items():
        rng = random.Random(f"{name} {evaluation.seed}")
        rows: list[dict[str, Any]] = []
        for number, question in zip(range(evaluation.questions), make(rng), strict=False):
            rows += _rows(name, number, question)
        result[name] = rows
    return result


def _rows(task: str, number: int, question: Question) -> list[dict[str, Any]]:
    context, choices, gold = question
    return [
        {
            "request_type": "loglikelihood",
            "doc": {"id": number, "query": context, "choices": choices, "gold": gold},
            "request": {"context": context, "continuation": choice},
            "idx": index,
            "task_name": task,
            "doc_id": number,
            "native_id": f"{task}-{number}",
            "label": gold,
        }
        for index, choice in enumerate(choices)
    ]


def _shuffled(right: str, wrong: Sequence[str], rng: random.Random) -> tuple[list[str], int]:
    choices = [right, *wrong]
    rng.shuffle(choices)
    return choices, choices.index(right)


def _parse(problem: str) -> tuple[str, str, int]:
    """Question, worked answer and result of a generated problem."""
    match = re.fullmatch(r"Question: (.*)\nAnswer: (.*)\n#### (\d+)\n", problem, re.DOTALL)
    assert match is not None, problem
    return match[1], match[2], int(match[3])


def _near(result: int, rng: random.Random) -> list[int]:
    """Wrong results of the size of the right one."""
    offsets = [1, 2, 3, 9, 10, 11, 20]
    near = {result + sign * offset for offset in offsets for sign in (1, -1)}
    same_length = [n for n in sorted(near) if n > 0 and len(str(n)) == len(str(result))]
    pool = same_length if len(same_length) >= CHOICES - 1 else sorted(n for n in near if n > 0)
    return rng.sample(pool, CHOICES - 1)


def _usable(problem: tuple[str, str, int]) -> bool:
    """Whether the result stands in the answer and nowhere in the question."""
    question, answer, result = problem
    pattern = rf"(?<!\d){result}(?!\d)"
    return bool(re.search(pattern, answer)) and not re.search(pattern, question)


def _with_result(problem: tuple[str, str, int], result: int) -> str:
    _, answer, right = problem
    answer = re.sub(rf"(?<!\d){right}(?!\d)", str(result), answer)
    return f" {answer}\n#### {result}"


def _example(problem: tuple[str, str, int]) -> str:
    question, answer, result = problem
    return f"Question: {question}\nAnswer: {answer}\n#### {result}\n\n"


def _problems(problems, shots: int, rng: random.Random) -> Iterator[Question]:
    """Solved examples, a question, and its solution with the right or a wrong result.

    The wrong solutions differ in the result alone, so only calculating tells them apart.
    """
    usable = [p for p in problems if _usable(p)]
    rng.shuffle(usable)
    examples, questions = usable[:shots], usable[shots:]
    prefix = "".join(map(_example, examples))
    for problem in questions:
        right = _with_result(problem, problem[2])
        wrong = [_with_result(problem, n) for n in _near(problem[2], rng)]
        choices, gold = _shuffled(right, wrong, rng)
        yield f"{prefix}Question: {problem[0]}\nAnswer:", choices, gold


def _multiple_choice(problems, shots: int, rng: random.Random) -> Iterator[Question]:
    """The same with lettered results to choose from."""
    usable = [p for p in problems if _usable(p)]
    rng.shuffle(usable)

    def lettered(problem) -> tuple[str, int]:
        results, gold = _shuffled(str(problem[2]), [str(n) for n in _near(problem[2], rng)], rng)
        lines = "".join(f" {letter}. {r}\n" for letter, r in zip("ABCD", results, strict=True))
        return f"Question: {problem[0]}\n{lines}Answer:", gold

    prefix = ""
    for problem in usable[:shots]:
        text, gold = lettered(problem)
        prefix += f"{text} {'ABCD'[gold]}\n\n"
    for problem in usable[shots:]:
        text, gold = lettered(problem)
        yield prefix + text, [f" {letter}" for letter in "ABCD"], gold


def _cloze(documents: Sequence[str], rng: random.Random) -> Iterator[Question]:
    """A passage and what follows it, among what follows passages of other documents.

    Cut between words; several passages of a long document may be asked.
    """
    context_length, length = 240, 60
    passages: list[tuple[int, str, str]] = []
    for number, text in enumerate(documents):
        words = re.sub(r"[ \t]+", " ", text)
        starts = range(0, len(words) - context_length - length - 40, 2 * context_length)
        for start in list(starts)[:8]:
            middle = words.find(" ", start + context_length)
            end = words.find(" ", middle + length)
            if middle < 0 or end < 0 or "\n" in words[middle : middle + 2]:
                continue
            passages.append((number, words[start:middle].lstrip(), words[middle:end]))
    rng.shuffle(passages)
    for number, context, right in passages:
        others = [p for p in passages if p[0] != number and p[2] != right]
        if len(others) < CHOICES - 1:
            return
        wrong = [p[2] for p in rng.sample(others, CHOICES - 1)]
        choices, gold = _shuffled(right, wrong, rng)
        yield context, choices, gold


_NAME = re.compile(r"(?<![\w.'\"])[a-z_][a-z0-9_]{3,}(?![\w'\"])")


def _identifiers(documents: Sequence[str], rng: random.Random) -> Iterator[Question]:
    """Code up to a name that occurred before, among other names that occurred before.

    Choices are names of the context, so knowing which names exist is not enough.
    """
    questions = []
    for text in documents:
        matches = [m for m in _NAME.finditer(text) if not keyword.iskeyword(m[0])]
        for match in matches[40::25][:12]:
            start = text.rfind("\n", 0, max(0, match.start() - 300)) + 1
            context = text[start : match.start()]
            line = context.rpartition("\n")[2]
            seen = {m[0] for m in _NAME.finditer(context) if not keyword.iskeyword(m[0])}
            others = sorted(seen - {match[0]})
            if match[0] not in seen or len(others) < CHOICES - 1 or "#" in line:
                continue
            questions.append((context, match[0], others))
    rng.shuffle(questions)
    for context, right, others in questions:
        # The space belongs to the continuation, as it belongs to the token of a word.
        space = " " if context.endswith(" ") else ""
        wrong = [space + name for name in rng.sample(others, CHOICES - 1)]
        choices, gold = _shuffled(space + right, wrong, rng)
        yield context.removesuffix(" ") if space else context, choices, gold


_COLORS = ("red", "blue", "green", "black", "white", "yellow", "brown", "pink")
_OBJECTS = ("box", "bag", "door", "hat", "lamp", "ring", "table", "wall")


def _colors(rng: random.Random) -> Iterator[Question]:
    """Four objects with their colours, then one of them again."""
    while True:
        objects, colors = rng.sample(_OBJECTS, CHOICES), rng.sample(_COLORS, CHOICES)
        facts = [f"The {o} is {c}." for o, c in zip(objects, colors, strict=True)]
        asked = rng.randrange(CHOICES)
        choices, gold = _shuffled(
            f" {colors[asked]}.", [f" {c}." for i, c in enumerate(colors) if i != asked], rng
        )
        yield f"{' '.join(facts)} The {objects[asked]} is", choices, gold
