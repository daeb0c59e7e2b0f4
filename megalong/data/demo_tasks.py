"""The demo's little world: scenarios (what happens in a video) and the questions asked about them.

Four categories, as in LongVideo-Reason: `temporal` (shapes appear one after another), `spatial` (a ball goes
into one of four boxes, the boxes are swapped), `goal` (an agent walks toward one of four targets and stops
on the way), `plot` (two scenes that differ in one thing). Pure functions of a `random.Random`: no files, no pixels.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations

COLOURS = ("red", "green", "blue", "yellow")
SHAPES = ("circle", "square", "cross")
SIZES = ("big", "small")
PLACES = ("left", "middle", "right")
CORNERS = ("northwest", "northeast", "southwest", "southeast")
SWAPS = tuple(combinations(range(4), 2))
CHANGES = ("colour", "size", "position", "light")


@dataclass(frozen=True, slots=True)
class Thing:
    """A coloured shape in one of the nine cells of the picture (row-major, 0 is top left)."""

    colour: str
    shape: str
    cell: int
    size: str = "plain"


@dataclass(frozen=True, kw_only=True, slots=True)
class Temporal:
    events: tuple[Thing, ...]  # in the order they appear, one at a time
    drift: int  # index into CORNERS: where every shape slides to while it is shown


@dataclass(frozen=True, kw_only=True, slots=True)
class Spatial:
    boxes: tuple[str, ...]  # colours at the start, in the order of CORNERS
    ball: int  # corner (index into CORNERS) of the box that gets the ball
    swaps: tuple[tuple[int, int], ...]  # pairs of corners whose boxes trade, in order

    def final_boxes(self) -> tuple[str, ...]:
        """Colours after all swaps, in the order of CORNERS."""
        boxes = list(self.boxes)
        for one, other in self.swaps:
            boxes[one], boxes[other] = boxes[other], boxes[one]
        return tuple(boxes)


@dataclass(frozen=True, kw_only=True, slots=True)
class Goal:
    targets: tuple[str, ...]  # colours, in the order of CORNERS
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
    cut: float  # moment of the second scene, as a fraction of the video


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
    events = tuple(Thing(c, rng.choice(SHAPES), rng.randrange(9), "huge") for c in colours)
    return Temporal(events=events, drift=rng.randrange(4))


def draw_spatial(rng: random.Random) -> Spatial:
    swaps = tuple(rng.sample(SWAPS, rng.choice((1, 2))))
    return Spatial(boxes=tuple(rng.sample(COLOURS, 4)), ball=rng.randrange(4), swaps=swaps)


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
        cut=rng.choice((0.45, 0.5, 0.55)),
    )


def cell_of(place: str) -> int:
    """The cell of the middle row that a place names."""
    return 3 + PLACES.index(place)


def ask_temporal(scenario: Temporal) -> list[Question]:
    colours = [event.colour for event in scenario.events]
    seen = f"I see {', then '.join(colours)}."
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
            for when, colour in (("first", colours[0]), ("last", colours[-1]))
        ),
    ]


def ask_spatial(scenario: Spatial) -> list[Question]:
    box, final = scenario.boxes[scenario.ball], scenario.final_boxes()
    corner = CORNERS[final.index(box)]
    seen = (
        f"The boxes are {', '.join(scenario.boxes)}. The ball goes into {box}. "
        f"Then they are {', '.join(final)}. The ball is {corner} in {box}."
    )
    return [
        Question(
            text="Where is the ball at the end?",
            answer=corner,
            options=CORNERS,
            reasoning=f"{seen} It is {corner}.",
        ),
        Question(
            text="Which box does the ball go into?",
            answer=box,
            options=COLOURS,
            reasoning=f"{seen} It is {box}.",
        ),
    ]


def ask_goal(scenario: Goal) -> list[Question]:
    corner, colour = CORNERS[scenario.heading], scenario.targets[scenario.heading]
    seen = f"The targets are {', '.join(scenario.targets)}. The agent goes {corner} to {colour}."
    return [
        Question(
            text="Which way does the agent go?",
            answer=corner,
            options=CORNERS,
            reasoning=f"{seen} It is {corner}.",
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
    pairs = {
        "light": (brightness(scenario.dark_before), brightness(scenario.dark_after)),
        "size": (before.size, after.size),
        "colour": (before.colour, after.colour),
        "position": (PLACES[before.cell - 3], PLACES[after.cell - 3]),
    }
    told = (f"{old} to {new}" + f" changes {name}" * (old != new) for name, (old, new) in pairs.items())
    seen = f"I see {', '.join(told)}."
    return [
        Question(
            text="What changes in the second scene?",
            answer=scenario.change,
            options=CHANGES,
            reasoning=f"{seen} It changes {scenario.change}.",
        ),
        *(
            Question(
                text=f"What colour is the shape in the {which} scene?",
                answer=thing.colour,
                options=COLOURS,
                reasoning=f"{seen} It is {thing.colour}.",
            )
            for which, thing in (("first", before), ("second", after))
        ),
    ]


def brightness(dark: bool) -> str:
    return "dark" if dark else "bright"


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
