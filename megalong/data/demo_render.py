"""Pixels of the demo's little world: one frame of a scenario at a moment of its story."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from megalong.data.demo_tasks import Goal, Plot, Scenario, Spatial, Temporal, Thing

FRAME_SIZE = 96
"""Height and width of a frame in pixels; the picture is a grid of 3 x 3 cells."""
CELL = FRAME_SIZE // 3
RGB = {
    "red": (225, 40, 40),
    "green": (40, 185, 60),
    "blue": (45, 75, 235),
    "yellow": (240, 220, 40),
    "purple": (180, 50, 210),
    "white": (250, 250, 250),
}
RADIUS = {"huge": 0.75, "plain": 0.46, "big": 0.6, "small": 0.2}
STEPS = ((-1.0, -1.0), (1.0, -1.0), (-1.0, 1.0), (1.0, 1.0))
"""Pixel direction (x, y) of each of CORNERS."""
BALL_SHOWN, SWAPS_START, SWAPS_END = 0.30, 0.38, 0.65
"""Moments of a spatial story, as fractions of the video."""

_Y, _X = np.mgrid[0:FRAME_SIZE, 0:FRAME_SIZE].astype(np.float32)


def render(scenario: Scenario, moment: float, *, backdrop: tuple[int, int, int]) -> np.ndarray:
    """moment: 0 (start) to 1 (end) of the story. Returns uint8 RGB [FRAME_SIZE, FRAME_SIZE, 3]."""
    if not 0.0 <= moment <= 1.0:
        raise ValueError(f"moment must be within 0..1, got {moment}")
    frame_HWC = np.empty((FRAME_SIZE, FRAME_SIZE, 3), dtype=np.uint8)
    frame_HWC[:] = backdrop
    PAINT[type(scenario)](frame_HWC, scenario, moment)
    return frame_HWC


def paint_temporal(frame_HWC: np.ndarray, scenario: Temporal, moment: float) -> None:
    """Each event fills an equal share of the story; the shape slides a little toward a corner."""
    share = moment * len(scenario.events)
    index = min(int(share), len(scenario.events) - 1)
    thing = scenario.events[index]
    x, y = cell_centre(thing.cell)
    slide_x, slide_y = STEPS[scenario.drift]
    along = 6.0 * (share - index) - 3.0
    paint_shape(
        frame_HWC, thing.shape, at=(x + along * slide_x, y + along * slide_y), colour=thing.colour, size=thing.size
    )


def paint_spatial(frame_HWC: np.ndarray, scenario: Spatial, moment: float) -> None:
    """The ball goes into its box, boxes trade corners, the ball comes out again."""
    at = [corner_centre(corner) for corner in range(4)]  # where each box is, by its first corner
    order = [0, 1, 2, 3]  # box at each corner
    span = (SWAPS_END - SWAPS_START) / len(scenario.swaps)
    for number, (one, other) in enumerate(scenario.swaps):
        done = smooth((moment - SWAPS_START - number * span) / (0.8 * span))
        first, second = order[one], order[other]
        at[first], at[second] = between(one, other, done), between(other, one, done)
        if done < 1.0:
            break
        order[one], order[other] = second, first
    for box, colour in enumerate(scenario.boxes):
        paint_shape(frame_HWC, "square", at=at[box], colour=colour)
    shown = min(1.0 - smooth((moment - BALL_SHOWN) / 0.06), 1.0) + smooth((moment - SWAPS_END) / 0.05)
    if shown > 0.0:
        paint_ball(frame_HWC, at[scenario.ball], scale=shown)


def between(start: int, end: int, done: float) -> tuple[float, float]:
    """Pixel (x, y) on the way from corner to corner; the two of a swap pass each other at a distance."""
    (x0, y0), (x1, y1) = corner_centre(start), corner_centre(end)
    aside = 0.25 * math.sin(math.pi * done)
    return x0 + (x1 - x0) * done + aside * (y1 - y0), y0 + (y1 - y0) * done - aside * (x1 - x0)


def paint_goal(frame_HWC: np.ndarray, scenario: Goal, moment: float) -> None:
    """The agent looks one way, then walks most of the way to its target and stops."""
    middle = FRAME_SIZE / 2
    for corner, colour in enumerate(scenario.targets):
        paint_shape(frame_HWC, scenario.shape, at=corner_centre(corner), colour=colour)
    look, walk = STEPS[scenario.glance], STEPS[scenario.heading]
    glance = 3.0 * math.sin(math.pi * min(moment / 0.2, 1.0))
    way = 0.7 * CELL * smooth((moment - 0.25) / 0.35)
    paint_ball(frame_HWC, (middle + look[0] * glance + walk[0] * way, middle + look[1] * glance + walk[1] * way))


def paint_plot(frame_HWC: np.ndarray, scenario: Plot, moment: float) -> None:
    """Two scenes with a short black cut between them; the floor shows whether the light is on."""
    if abs(moment - scenario.cut) < 0.01:
        frame_HWC[:] = 0
        return
    second = moment >= scenario.cut
    thing: Thing = scenario.after if second else scenario.before
    dark = scenario.dark_after if second else scenario.dark_before
    if dark:
        frame_HWC[:] = frame_HWC // 6
    x, y = cell_centre(thing.cell)
    paint_shape(frame_HWC, thing.shape, at=(x, y), colour=thing.colour, size=thing.size)


def paint_shape(
    frame_HWC: np.ndarray, shape: str, *, at: tuple[float, float], colour: str, size: str = "plain"
) -> None:
    """Fill a shape around pixel (x, y); a plain one is about as large as a cell."""
    across, along = np.abs(_X + 0.5 - at[0]), np.abs(_Y + 0.5 - at[1])
    radius = CELL * RADIUS[size]
    if shape == "circle":
        inside = across**2 + along**2 <= radius**2
    elif shape == "square":
        inside = np.maximum(across, along) <= radius
    elif shape == "cross":
        inside = (np.maximum(across, along) <= radius) & (np.minimum(across, along) <= 0.4 * radius)
    else:
        raise ValueError(f"shape must be circle, square or cross, got {shape!r}")
    frame_HWC[inside] = RGB[colour]


def paint_ball(frame_HWC: np.ndarray, at: tuple[float, float], *, scale: float = 1.0) -> None:
    """A white disc: the ball, and the agent."""
    frame_HWC[(_X + 0.5 - at[0]) ** 2 + (_Y + 0.5 - at[1]) ** 2 <= (0.32 * CELL * scale) ** 2] = RGB["white"]


def corner_centre(corner: int) -> tuple[float, float]:
    """Pixel (x, y) of the middle of a corner cell."""
    dx, dy = STEPS[corner]
    return FRAME_SIZE / 2 + dx * CELL, FRAME_SIZE / 2 + dy * CELL


def cell_centre(cell: int) -> tuple[float, float]:
    """Pixel (x, y) of the middle of a cell."""
    return CELL * (cell % 3 + 0.5), CELL * (cell // 3 + 0.5)


def smooth(progress: float) -> float:
    """Ease in and out: 0 before the movement, 1 after it."""
    clamped = min(max(progress, 0.0), 1.0)
    return clamped * clamped * (3.0 - 2.0 * clamped)


PAINT: dict[type, Callable[..., None]] = {
    Temporal: paint_temporal,
    Spatial: paint_spatial,
    Goal: paint_goal,
    Plot: paint_plot,
}
