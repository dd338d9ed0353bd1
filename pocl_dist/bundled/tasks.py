"""The fourteen task families: each turns a random generator into one instruction row."""

import random
from collections.abc import Callable
from dataclasses import dataclass

from pocl_dist.bundled import words


@dataclass(frozen=True)
class Exercise:
    """One instruction with its (possibly empty) input and the single right output."""

    instruction: str
    input: str
    output: str


def _some(rng: random.Random, pool: tuple[str, ...], least: int, most: int) -> list[str]:
    """Between `least` and `most` different words of `pool`, in random order."""
    return rng.sample(pool, rng.randint(least, most))


def copy(rng: random.Random) -> Exercise:
    """Say the words again, in the same order."""
    instruction = rng.choice(
        ("Copy these words.", "Write the same words again.", "Say this list once more.")
    )
    text = " ".join(_some(rng, words.NOUNS, 3, 6))
    return Exercise(instruction, text, text)


def repeat(rng: random.Random) -> Exercise:
    """Say one word two to six times."""
    word, (count, number) = rng.choice(words.NOUNS), rng.choice(list(words.NUMBER_WORDS.items()))
    instruction = rng.choice(
        (
            f"Write the word {word} {number} times.",
            f"Repeat {word} {number} times.",
            f"Say {number} times the word {word}.",
        )
    )
    return Exercise(instruction, "", " ".join([word] * count))


def ends(rng: random.Random) -> Exercise:
    """The first, the last, or the first and the last word of a list."""
    chosen = _some(rng, words.NOUNS, 4, 7)
    which, output = rng.choice(
        (
            ("first word", chosen[0]),
            ("last word", chosen[-1]),
            ("first and the last word", f"{chosen[0]} {chosen[-1]}"),
            ("first two words", " ".join(chosen[:2])),
            ("last two words", " ".join(chosen[-2:])),
        )
    )
    instruction = rng.choice(
        (f"Give the {which} of the list.", f"What is the {which} here?", f"Pick the {which}.")
    )
    return Exercise(instruction, " ".join(chosen), output)


def reverse(rng: random.Random) -> Exercise:
    """Say the words from the last to the first."""
    instruction = rng.choice(
        ("Reverse the list.", "Write the words backwards.", "Turn the order of the words around.")
    )
    chosen = _some(rng, words.NOUNS, 3, 6)
    return Exercise(instruction, " ".join(chosen), " ".join(reversed(chosen)))


def sort(rng: random.Random) -> Exercise:
    """Say the words in the order of the alphabet."""
    instruction = rng.choice(
        ("Sort the words.", "Put the words in alphabetical order.", "Order this list from a to z.")
    )
    chosen = _some(rng, words.NOUNS, 3, 5)
    return Exercise(instruction, " ".join(chosen), " ".join(sorted(chosen)))


def keep(rng: random.Random) -> Exercise:
    """Say only the words of one category, in the order given."""
    category = rng.choice(list(words.CATEGORIES))
    wanted = set(words.CATEGORIES[category])
    chosen = _some(rng, words.NOUNS, 4, 7)
    while not wanted & set(chosen):
        chosen = _some(rng, words.NOUNS, 4, 7)
    instruction = rng.choice(
        (
            f"Keep only the {category}.",
            f"Which of these are {category}?",
            f"List the {category} you see here.",
        )
    )
    kept = " ".join(word for word in chosen if word in wanted)
    return Exercise(instruction, " ".join(chosen), kept)


def opposites(rng: random.Random) -> Exercise:
    """The opposite of each word; pairs are used in both directions."""
    table = words.OPPOSITES | {right: left for left, right in words.OPPOSITES.items()}
    instruction = rng.choice(
        ("Give the opposite of each word.", "Write the opposites.", "Say the contrary of this.")
    )
    chosen = _some(rng, tuple(table), 2, 4)
    return Exercise(instruction, " ".join(chosen), " ".join(table[word] for word in chosen))


def colours(rng: random.Random) -> Exercise:
    """The colour of each thing."""
    instruction = rng.choice(
        (
            "What colour is each thing?",
            "Name the colours of these things.",
            "Give the colour of each word.",
        )
    )
    chosen = _some(rng, tuple(words.COLOURS), 2, 5)
    return Exercise(
        instruction, " ".join(chosen), " ".join(words.COLOURS[thing] for thing in chosen)
    )


def past_tense(rng: random.Random) -> Exercise:
    """The sentence in the past tense."""
    instruction = rng.choice(
        (
            "Put the sentence in the past tense.",
            "Write this as if it was yesterday.",
            "Change the verb to the past.",
        )
    )
    name, verb = rng.choice(words.NAMES), rng.choice(list(words.PAST_TENSE))
    rest = " and ".join(f"the {noun}" for noun in _some(rng, words.NOUNS, 1, 2))
    return Exercise(
        instruction, f"{name} {verb} {rest}.", f"{name} {words.PAST_TENSE[verb]} {rest}."
    )


def count_up(rng: random.Random) -> Exercise:
    """The whole numbers from one number to a larger one."""
    start = rng.randint(1, 30)
    stop = start + rng.randint(2, 7)
    instruction = rng.choice(
        (
            f"Count from {start} to {stop}.",
            f"List the numbers from {start} up to {stop}.",
            f"Start at {start} and count to {stop}.",
        )
    )
    return Exercise(instruction, "", " ".join(str(n) for n in range(start, stop + 1)))


def add(rng: random.Random) -> Exercise:
    """The sum of two small numbers, said as a sentence."""
    left, right = rng.randint(1, 15), rng.randint(1, 15)
    instruction = rng.choice(
        (f"What is {left} plus {right}?", f"Add {left} and {right}.", f"Sum up {left} and {right}.")
    )
    return Exercise(instruction, "", f"{left} plus {right} is {left + right}")


def compare(rng: random.Random) -> Exercise:
    """Whether one number is more than another, with the reason."""
    left, right = rng.sample(range(1, 38), 2)
    instruction = rng.choice(
        (
            f"Is {left} more than {right}?",
            f"Tell me if {left} is more than {right}.",
            f"Compare {left} with {right}.",
        )
    )
    if left > right:
        return Exercise(instruction, "", f"yes, {left} is more than {right}")
    return Exercise(instruction, "", f"no, {left} is less than {right}")


def describe(rng: random.Random) -> Exercise:
    """A sentence that is filled from a short record."""
    name, job = rng.choice(words.NAMES), rng.choice(words.JOBS)
    city, pet = rng.choice(words.CITIES), rng.choice(words.ANIMALS)
    instruction = rng.choice(
        (
            "Write a sentence from the record.",
            "Describe this person.",
            "Turn the record into a sentence.",
        )
    )
    record = f"name: {name}, job: {job}, city: {city}, pet: {pet}"
    return Exercise(instruction, record, f"{name} is a {job} in {city} and has a {pet}.")


def extract(rng: random.Random) -> Exercise:
    """One or two fields of a record whose fields come in random order."""
    record = {
        "name": rng.choice(words.NAMES),
        "age": str(rng.randint(10, 37)),
        "job": rng.choice(words.JOBS),
        "city": rng.choice(words.CITIES),
        "pet": rng.choice(words.ANIMALS),
    }
    fields = rng.sample(list(record), 4)
    asked = _some(rng, tuple(fields), 1, 2)
    what = " and the ".join(asked)
    instruction = rng.choice(
        (f"Give the {what}.", f"What does the record say for the {what}?", f"Find the {what}.")
    )
    text = ", ".join(f"{field}: {record[field]}" for field in fields)
    return Exercise(instruction, text, " ".join(record[field] for field in asked))


TASKS: dict[str, Callable[[random.Random], Exercise]] = {
    task.__name__: task
    for task in (
        copy,
        repeat,
        ends,
        reverse,
        sort,
        keep,
        opposites,
        colours,
        past_tense,
        count_up,
        add,
        compare,
        describe,
        extract,
    )
}
