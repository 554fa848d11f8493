"""A frame with its people boxed, numbered and described beside it: a picture for people to look at."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import cv2
import numpy as np

from edge.values import Detections, Frame, Image, Matches
from edge.zones import Polygon

_FRAME_WIDTH, _FRAME_HEIGHT, _PANEL_WIDTH, _LINE, _PAD = 1152, 1400, 700, 24, 12  # px
_THUMB = (60, 110)  # width, height in px
_COLOURS = [  # BGR, told apart on asphalt and grass alike
    (60, 180, 255),
    (255, 160, 60),
    (90, 220, 90),
    (200, 100, 255),
    (80, 80, 255),
    (220, 220, 60),
    (160, 160, 255),
    (255, 120, 180),
]
Colour = tuple[int, int, int]
_INK, _PAPER = (235, 235, 235), (32, 30, 28)
_CHARS = 60  # a line of the panel


def draw(
    frame: Frame,
    people: Detections,
    matches: Matches,
    tracks: Sequence[int] | None = None,
    zones: Sequence[Polygon] = (),
) -> Image:
    """(h, w, 3) uint8 BGR: the frame enlarged, numbered boxes, and each person's best option of every category.

    tracks: the people's numbers; without them they are counted from 1, best score first. What is unknown is left out.
    People beyond what the panel holds are boxed, and counted below it. zones: outlined.
    """
    scale = min(_FRAME_WIDTH / frame.width, _FRAME_HEIGHT / frame.height)
    width, height = max(1, round(frame.width * scale)), max(1, round(frame.height * scale))
    picture = np.asarray(cv2.resize(frame.image, (width, height), interpolation=cv2.INTER_CUBIC), np.uint8)
    clean = picture.copy()  # the thumbnails are cut from it
    for zone in zones:
        corners = np.rint(np.multiply(zone, (width - 1, height - 1))).astype(np.int32)  # (k, 2) px
        cv2.polylines(picture, [corners], True, _INK, 1, cv2.LINE_AA)
    panel = np.full((height, _PANEL_WIDTH, 3), _PAPER, np.uint8)
    top, shown = _PAD, 0
    numbers = range(1, len(people) + 1) if tracks is None else tracks
    for i, (box, number) in enumerate(zip(people.boxes, numbers, strict=True)):
        colour = _COLOURS[(number - 1) % len(_COLOURS)]
        x1, y1, x2, y2 = (round(float(edge) * scale) for edge in box)
        cv2.rectangle(picture, (x1, y1), (x2, y2), colour, 2, cv2.LINE_AA)
        _tag(picture, str(number), x1, y1, colour)
        lines = textwrap.wrap(_words(matches, i), _CHARS)
        block = max(_THUMB[1], (len(lines) + 1) * _LINE) + _PAD
        if shown < i or top + block > height - _LINE:
            continue
        _entry(panel, top, f"{number}   person {people.scores[i]:.0%}", lines, clean[y1:y2, x1:x2], colour)
        top, shown = top + block, shown + 1
    left = len(people) - shown
    if not len(people) or left:
        _write(panel, f"and {left} more" if left else "nobody here", _PAD, height - _PAD, _INK)
    return np.concatenate([picture, panel], axis=1)


def _words(matches: Matches, person: int) -> str:
    """The best option of each category; where two categories have it ("dark"), the category's name goes before."""
    names = [option for category in matches.categories for option in category.options]
    best = [(answer.category.name, answer.top[0]) for answer in matches.answers(person, 1) if not answer.unknown]
    return ", ".join(
        f"{f'{category} ' if names.count(choice.option) > 1 else ''}{choice.option} {choice.probability:.0%}"
        for category, choice in best
    )


def _entry(panel: Image, top: int, title: str, lines: list[str], person: Image, colour: Colour) -> None:
    cv2.rectangle(panel, (0, top), (4, top + _THUMB[1]), colour, cv2.FILLED)
    if person.size:
        scale = min(_THUMB[0] / person.shape[1], _THUMB[1] / person.shape[0])
        size = max(1, int(person.shape[1] * scale)), max(1, int(person.shape[0] * scale))
        thumb = cv2.resize(person, size, interpolation=cv2.INTER_AREA)
        panel[top : top + size[1], _PAD : _PAD + size[0]] = thumb
    left = _THUMB[0] + 2 * _PAD
    _write(panel, title, left, top + _LINE - 6, colour)
    for number, line in enumerate(lines, 2):
        _write(panel, line, left, top + number * _LINE - 6, _INK)


def _tag(picture: Image, text: str, x: int, y: int, colour: Colour) -> None:
    (width, height), _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, 0.6, 2)
    y = max(y, height + 8)
    cv2.rectangle(picture, (x, y - height - 8), (x + width + 8, y), colour, cv2.FILLED)
    cv2.putText(picture, text, (x + 4, y - 4), cv2.FONT_HERSHEY_SIMPLEX, 0.6, (20, 20, 20), 2, cv2.LINE_AA)


def _write(panel: Image, text: str, x: int, y: int, colour: Colour) -> None:
    cv2.putText(panel, text, (x, y), cv2.FONT_HERSHEY_SIMPLEX, 0.55, colour, 1, cv2.LINE_AA)
