"""The demo's little world: scenarios (what happens in a video) and the questions asked about them.

Four categories, as in LongVideo-Reason: `temporal` (shapes appear one after another), `spatial` (a ball goes
into one of three boxes, the boxes are swapped), `goal` (an agent walks toward one of four targets and stops
on the way), `plot` (two scenes that differ in one thing). Pure functions of a `random.Random`: no files, no pixels.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

COLOURS = ("red", "green", "blue", "yellow", "purple")
SHAPES = ("circle", "square", "cross")
PLACES = ("left", "middle", "right")
DIRECTIONS = ("up", "down", "left", "right")
ORDINALS = ("first", "second", "third", "fourth")
SWAPS = ((0, 1), (1, 2), (0, 2))
CHANGES = ("colour", "shape", "position", "light")


@dataclass(frozen=True, slots=True)
class Thing:
    """A coloured shape in one of the nine cells of the picture (row-major, 0 is top left)."""

    colour: str
    shape: str
    cell: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Temporal:
    events: tuple[Thing, ...]  # in the order they appear, one at a time


@dataclass(frozen=True, kw_only=True, slots=True)
class Spatial:
    boxes: tuple[str, str, str]  # colours, left to right, at the start
    ball: int  # place (index into PLACES) of the box that gets the ball
    swaps: tuple[tuple[int, int], ...]  # pairs of places whose boxes trade, in order
    taken_out: bool  # the ball lies in front of the boxes at the end

    def final_boxes(self) -> tuple[str, ...]:
        """Colours, left to right, after all swaps."""
        boxes = list(self.boxes)
        for one, other in self.swaps:
            boxes[one], boxes[other] = boxes[other], boxes[one]
        return tuple(boxes)


@dataclass(frozen=True, kw_only=True, slots=True)
class Goal:
    targets: tuple[str, str, str, str]  # colours, in the order of DIRECTIONS
    heading: int  # index into DIRECTIONS
    detour: int  # index into DIRECTIONS: the agent first looks that way, a few pixels


@dataclass(frozen=True, kw_only=True, slots=True)
class Plot:
    before: Thing
    after: Thing
    dark_before: bool
    dark_after: bool
    change: str  # one of CHANGES


Scenario = Temporal | Spatial | Goal | Plot


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """One question about a scenario; `pool` holds what a multiple choice may offer (the answer included)."""

    text: str
    answer: str
    pool: tuple[str, ...]
    reasoning: str


def draw_temporal(rng: random.Random) -> Temporal:
    colours = rng.sample(COLOURS, rng.choice((2, 3, 4)))
    return Temporal(events=tuple(Thing(c, rng.choice(SHAPES), rng.randrange(9)) for c in colours))


def draw_spatial(rng: random.Random) -> Spatial:
    left, middle, right = rng.sample(COLOURS, 3)
    swaps = tuple(rng.sample(SWAPS, rng.choice((1, 2))))
    return Spatial(boxes=(left, middle, right), ball=rng.randrange(3), swaps=swaps, taken_out=rng.random() < 0.25)


def draw_goal(rng: random.Random) -> Goal:
    up, down, left, right = rng.sample(COLOURS, 4)
    return Goal(targets=(up, down, left, right), heading=rng.randrange(4), detour=rng.randrange(4))


def draw_plot(rng: random.Random) -> Plot:
    change = rng.choice(CHANGES)
    before = Thing(rng.choice(COLOURS), rng.choice(SHAPES), rng.choice((3, 4, 5)))
    dark = rng.random() < 0.5
    colour, shape, cell = before.colour, before.shape, before.cell
    if change == "colour":
        colour = rng.choice([c for c in COLOURS if c != colour])
    elif change == "shape":
        shape = rng.choice([s for s in SHAPES if s != shape])
    elif change == "position":
        cell = rng.choice([c for c in (3, 4, 5) if c != cell])
    return Plot(
        before=before,
        after=Thing(colour, shape, cell),
        dark_before=dark,
        dark_after=dark != (change == "light"),
        change=change,
    )


def ask_temporal(scenario: Temporal) -> list[Question]:
    colours = [event.colour for event in scenario.events]
    seen = f"I see {', then '.join(colours)}."
    asked = [(ORDINALS[index], colour) for index, colour in enumerate(colours[:-1])] + [("last", colours[-1])]
    questions = [
        Question(
            text=f"Which colour appears {when}?",
            answer=colour,
            pool=COLOURS,
            reasoning=f"{seen} The {when} colour is {colour}.",
        )
        for when, colour in asked
    ]
    count = str(len(colours))
    how_many = Question(
        text="How many shapes appear?", answer=count, pool=("1", "2", "3", "4"), reasoning=f"{seen} That makes {count}."
    )
    return [*questions, how_many]


def ask_spatial(scenario: Spatial) -> list[Question]:
    box, final = scenario.boxes[scenario.ball], scenario.final_boxes()
    place = PLACES[final.index(box)]
    into = f"The ball goes into the {box} box."
    where = "outside" if scenario.taken_out else place
    ending = "At the end the ball is outside." if scenario.taken_out else f"At the end the {box} box is {place}."
    return [
        Question(
            text="Where is the ball at the end?",
            answer=where,
            pool=(*PLACES, "outside"),
            reasoning=f"{into} {ending}",
        ),
        Question(text="Which box does the ball go into?", answer=box, pool=COLOURS, reasoning=into),
        *(
            Question(
                text=f"Which box is {name} at the end?",
                answer=colour,
                pool=COLOURS,
                reasoning=f"At the end the {colour} box is {name}.",
            )
            for name, colour in zip(PLACES, final, strict=True)
        ),
    ]


def ask_goal(scenario: Goal) -> list[Question]:
    direction, colour = DIRECTIONS[scenario.heading], scenario.targets[scenario.heading]
    moves = f"The agent moves {direction}."
    return [
        Question(
            text="Which target does the agent want to reach?",
            answer=colour,
            pool=COLOURS,
            reasoning=f"{moves} The target there is {colour}.",
        ),
        Question(text="Which way does the agent go?", answer=direction, pool=DIRECTIONS, reasoning=moves),
    ]


def ask_plot(scenario: Plot) -> list[Question]:
    before, after = scenario.before, scenario.after
    first, then = describe(before, dark=scenario.dark_before), describe(after, dark=scenario.dark_after)
    return [
        Question(
            text="What changes in the second scene?",
            answer=scenario.change,
            pool=CHANGES,
            reasoning=f"First {first}. Then {then}. The {scenario.change} changes.",
        ),
        Question(
            text="What colour is the shape in the second scene?",
            answer=after.colour,
            pool=COLOURS,
            reasoning=f"First {first}. Then {then}.",
        ),
    ]


def describe(thing: Thing, *, dark: bool) -> str:
    """One scene of a plot in words."""
    return f"{'dark' if dark else 'bright'} {thing.colour} {thing.shape} {PLACES[thing.cell - 3]}"


DRAW: dict[str, Callable[[random.Random], Scenario]] = {
    "temporal": draw_temporal,
    "spatial": draw_spatial,
    "goal": draw_goal,
    "plot": draw_plot,
}
ASK: dict[str, Callable[..., list[Question]]] = {
    "temporal": ask_temporal,
    "spatial": ask_spatial,
    "goal": ask_goal,
    "plot": ask_plot,
}
CATEGORIES = tuple(DRAW)
