"""People cut out of their frame: how well each can be seen."""

from __future__ import annotations

import cv2
import numpy as np

from edge.boxes import iou
from edge.imaging import cut, resized
from edge.values import Detections, Floats, Frame

FULL_HEIGHT = 160  # px; encoders see 128 to 224, and more of a person adds little
SHARP = 200.0  # variance of the Laplacian, grey levels², at which a crop counts half
BORDER = 2.0  # px; a box that ends there may go on


def qualities_of(frame: Frame, people: Detections) -> Floats:
    """How well each person can be seen: (n,) float32 in 0..1, a product of what speaks for a look.

    The box's height up to FULL_HEIGHT, its sharpness (the variance of the Laplacian, which blur lowers: Pech-Pacheco et
    al. 2000), the detector's score, one less its largest IoU with another box, and half for a box cut by the border.
    """
    qualities = np.zeros(len(people), np.float32)
    for i, box in enumerate(people.boxes):
        height = min(float(box[3] - box[1]) / FULL_HEIGHT, 1)
        person = cut(frame.image, box)
        if person.shape[0] > FULL_HEIGHT:  # near and far are then measured alike, and a crowd up close costs no more
            person = resized(person, max(1, round(person.shape[1] * FULL_HEIGHT / person.shape[0])), FULL_HEIGHT)
        grey = cv2.cvtColor(person, cv2.COLOR_BGR2GRAY)
        variance = float(cv2.Laplacian(grey, cv2.CV_32F).var())
        others = np.delete(people.boxes, i, axis=0)
        free = 1 - float(iou(box, others).max(initial=0))
        border = (box <= BORDER).any() or box[2] >= frame.width - BORDER or box[3] >= frame.height - BORDER
        sharp = variance / (variance + SHARP)
        qualities[i] = height * sharp * people.scores[i] * free * (0.5 if border else 1)
    return qualities
