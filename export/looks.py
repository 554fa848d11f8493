"""A labelled set as the encoder sees it: every picture cropped and encoded as a bank wants to look at it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from edge.backend import open_session
from edge.bank import Look
from edge.bundle import IMAGE, Bundle
from edge.encode import MAX_BATCH, Encoder
from edge.errors import ConfigError
from edge.images import read_image
from edge.imaging import HostImaging
from edge.values import Floats, Frame, Image, Region
from export.labels import VECTORS, LabelledSet

Progress = Callable[[int], None]  # is told how many pictures more are done


@dataclass(frozen=True)
class View:
    """One way to make a picture of a person: what a look does to one region."""

    look: Look
    region: Region = "whole"


class Seen:
    """The vectors of n labelled pictures, made when they are first asked for.

    A picture is one person, cut out: its box is all of it, so that a margin above 0 finds nothing more to add.
    """

    def __init__(self, labelled: LabelledSet, bundle: Bundle, progress: Progress = lambda done: None) -> None:
        self._labelled, self._bundle, self._progress = labelled, bundle, progress
        self._vectors: dict[View, Floats] = {}
        self._ms: dict[View, float] = {}
        self._heights = np.zeros(len(labelled), np.int64)
        names = (None, bundle.manifest.files[IMAGE], bundle.manifest.seal())  # the last: events of before 0.3
        if labelled.encoder not in names:
            raise ConfigError(
                f"{labelled.source / VECTORS}: made by another bundle's encoder",
                expected=bundle.manifest.files[IMAGE][:12],
                got=labelled.encoder[:12],
                remedy="name the bundle that ran on the boxes, or label pictures",
            )

    @property
    def heights(self) -> NDArray[np.int64]:
        """(n,) px of each picture; 0 where only its vector is there, or none was asked for yet."""
        return self._heights

    @property
    def pictures(self) -> bool:
        """Whether there are any: a person whose crop never left the box has a vector only."""
        return all((self._labelled.source / name).is_file() for name in self._labelled.images)

    def vectors(self, looks: Sequence[View]) -> dict[Region, Floats]:
        """By region, (n, d) float32 unit rows, as `match` takes them. looks: of one `Look`.

        A box's own vectors are taken for the bundle's own look at whole people. Raises ConfigError where another is
        asked for and there are no pictures, CaptureError for one that cannot be read, BackendError.
        """
        asked = [self._settled(view) for view in looks]
        plain = self._settled(View(self._bundle.bank.look))
        if self._labelled.vectors is not None:
            self._vectors[plain], self._ms[plain] = self._labelled.vectors, 0.0
        if wanted := [view for view in asked if view not in self._vectors]:
            if self._labelled.vectors is not None and not self.pictures:
                other, look = wanted[0].region, wanted[0].look
                raise ConfigError(
                    f"{self._labelled.source}: no pictures, and the vectors there are of whole people",
                    got=f"a look at {other} with square={look.square}, margin={look.margin:g}, flip={look.flip}",
                    remedy="label pictures of people to try this",
                )
            self._encode(wanted)
        return {view.region: self._vectors[view] for view in asked}

    def ms(self, looks: Sequence[View]) -> float:
        """Milliseconds that cropping and encoding took per picture."""
        return sum(self._ms[self._settled(view)] for view in looks)

    def _settled(self, view: View) -> View:
        """The same with the square that it comes to."""
        square = view.look.square or self._bundle.manifest.encoder.square
        return replace(view, look=replace(view.look, square=square))

    def _encode(self, views: Sequence[View]) -> None:
        facts = self._bundle.manifest.encoder
        rows: dict[View, list[Floats]] = {view: [] for view in views}
        seconds = dict.fromkeys(views, 0.0)
        with open_session(self._bundle.file(IMAGE)) as session:
            encoder, imaging = Encoder(session, facts), HostImaging()
            encoder(np.zeros((1, facts.size, facts.size, 3), np.uint8))  # the first run plans its memory
            for start in range(0, len(self._labelled), MAX_BATCH):
                names = self._labelled.images[start : start + MAX_BATCH]
                pictures = [read_image(self._labelled.source / name) for name in names]
                self._heights[start : start + len(names)] = [picture.shape[0] for picture in pictures]
                for view in views:
                    began = time.perf_counter()
                    found = [_as_found(picture) for picture in pictures]
                    crops = imaging.crop(found, facts, view.look, view.region)
                    rows[view].append(encoder(crops, imaging.mirror(crops) if view.look.flip else None))
                    seconds[view] += time.perf_counter() - began
                self._progress(len(names))
        for view in views:
            self._vectors[view] = np.concatenate(rows[view])
            self._ms[view] = 1000 * seconds[view] / len(self._labelled)


def _as_found(picture: Image) -> tuple[Frame, Floats]:
    """A picture of one person as a frame and its only box."""
    height, width = picture.shape[:2]
    return Frame("labelled", 0, 0.0, picture), np.array([[0, 0, width, height]], np.float32)
