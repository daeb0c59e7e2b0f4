"""The demo's little world: scenarios (what happens in a video) and the questions asked about them.

Four categories, as in LongVideo-Reason: `temporal` (shapes appear one after another), `spatial` (a ball goes
into one of three boxes, the boxes are swapped), `goal` (an agent walks toward one of four targets and stops
on the way), `plot` (two scenes that differ in one thing). Pure functions of a `random.Random`: no files, no pixels.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

COLOURS = ("red", "green", "blue", "yellow")
SHAPES = ("circle", "square", "cross")
SIZES = ("big", "small")
PLACES = ("left", "middle", "right")
CORNERS = ("northwest", "northeast", "southwest", "southeast")
ORDINALS = ("first", "second", "third", "fourth")
SWAPS = ((0, 1), (1, 2), (0, 2))
CHANGES = ("colour", "size", "position", "light")


@dataclass(frozen=True, slots=True)
class Thing:
    """A coloured shape in one of the nine cells of the picture (row-major, 0 is top left)."""

    colour: str
    shape: str
    cell: int
    size: str = "big"


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
    targets: tuple[str, str, str, str]  # colours, in the order of CORNERS
    shape: str  # of all targets
    heading: int  # index into CORNERS
    glance: int  # index into CORNERS: where the agent looks before it goes


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
    """One question about a scenario; `options` are what a multiple choice offers, in its order."""

    text: str
    answer: str
    options: tuple[str, str, str, str]
    reasoning: str


def draw_temporal(rng: random.Random) -> Temporal:
    colours = rng.sample(COLOURS, rng.choice((1, 2, 3, 4)))
    return Temporal(events=tuple(Thing(c, rng.choice(SHAPES), rng.randrange(9)) for c in colours))


def draw_spatial(rng: random.Random) -> Spatial:
    left, middle, right = rng.sample(COLOURS, 3)
    swaps = tuple(rng.sample(SWAPS, rng.choice((1, 2))))
    return Spatial(boxes=(left, middle, right), ball=rng.randrange(3), swaps=swaps, taken_out=rng.random() < 0.25)


def draw_goal(rng: random.Random) -> Goal:
    return Goal(
        targets=tuple(rng.sample(COLOURS, 4)),
        shape=rng.choice(SHAPES),
        heading=rng.randrange(4),
        glance=rng.randrange(4),
    )


def draw_plot(rng: random.Random) -> Plot:
    change = rng.choice(CHANGES)
    colour, size, place = rng.choice(COLOURS), rng.choice(SIZES), rng.choice(PLACES)
    before = Thing(colour, rng.choice(SHAPES), cell_of(place), size)
    dark = rng.random() < 0.5
    if change == "colour":
        colour = rng.choice([c for c in COLOURS if c != colour])
    elif change == "size":
        size = "small" if size == "big" else "big"
    elif change == "position":
        place = rng.choice([p for p in PLACES if p != place])
    return Plot(
        before=before,
        after=Thing(colour, before.shape, cell_of(place), size),
        dark_before=dark,
        dark_after=dark != (change == "light"),
        change=change,
    )


def cell_of(place: str) -> int:
    """The cell of the middle row that a place names."""
    return 3 + PLACES.index(place)


def ask_temporal(scenario: Temporal) -> list[Question]:
    colours = [event.colour for event in scenario.events]
    seen = f"I see {', then '.join(colours)}."
    asked = [(ORDINALS[index], colour) for index, colour in enumerate(colours[:-1])] + [("last", colours[-1])]
    count = str(len(colours))
    return [
        Question(
            text="How many shapes appear?",
            answer=count,
            options=("1", "2", "3", "4"),
            reasoning=f"{seen} That makes {count}.",
        ),
        *(
            Question(
                text=f"Which colour appears {when}?",
                answer=colour,
                options=COLOURS,
                reasoning=f"{seen} The {when} is {colour}.",
            )
            for when, colour in asked
        ),
    ]


def ask_spatial(scenario: Spatial) -> list[Question]:
    box, final = scenario.boxes[scenario.ball], scenario.final_boxes()
    where = "outside" if scenario.taken_out else PLACES[final.index(box)]
    seen = (
        f"The boxes are {', '.join(scenario.boxes)}. The ball goes into {box}. "
        f"At the end the boxes are {', '.join(final)}."
    )
    asked = [("does the ball go into", box), *((f"is {n} at the end", c) for n, c in zip(PLACES, final, strict=True))]
    return [
        Question(
            text="Where is the ball at the end?",
            answer=where,
            options=(*PLACES, "outside"),
            reasoning=f"{seen} The ball is {where}.",
        ),
        *(
            Question(text=f"Which box {what}?", answer=colour, options=COLOURS, reasoning=f"{seen} It is {colour}.")
            for what, colour in asked
        ),
    ]


def ask_goal(scenario: Goal) -> list[Question]:
    corner, colour = CORNERS[scenario.heading], scenario.targets[scenario.heading]
    seen = f"The targets are {', '.join(scenario.targets)}. The agent moves {corner} to {colour}."
    return [
        Question(
            text="Which way does the agent go?",
            answer=corner,
            options=CORNERS,
            reasoning=f"{seen} The way is {corner}.",
        ),
        Question(
            text="Which target does the agent want to reach?",
            answer=colour,
            options=COLOURS,
            reasoning=f"{seen} It is {colour}.",
        ),
    ]


def ask_plot(scenario: Plot) -> list[Question]:
    before, after = scenario.before, scenario.after
    first, then = describe(before, dark=scenario.dark_before), describe(after, dark=scenario.dark_after)
    return [
        Question(
            text="What changes in the second scene?",
            answer=scenario.change,
            options=CHANGES,
            reasoning=f"First {first}. Then {then}. It is the {scenario.change}.",
        ),
        *(
            Question(
                text=f"What colour is the shape in the {which} scene?",
                answer=thing.colour,
                options=COLOURS,
                reasoning=f"First {first}. Then {then}. It is {thing.colour}.",
            )
            for which, thing in (("first", before), ("second", after))
        ),
    ]


def describe(thing: Thing, *, dark: bool) -> str:
    """One scene of a plot in words."""
    return f"{'dark' if dark else 'bright'} {thing.size} {thing.colour} {PLACES[thing.cell - 3]}"


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
