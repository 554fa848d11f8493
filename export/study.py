"""The commands on a labelled set: what is judged, what is learned, and where the bank goes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.text import Text

from edge.bank import PromptBank
from edge.bundle import Bundle
from edge.errors import ConfigError
from export.calibrate import uncalibrated
from export.evaluate import (
    Score,
    Variant,
    best_regions,
    learned_from_all,
    people_judged,
    people_of,
    score,
    variant_from,
    views_of,
)
from export.labels import LabelledSet
from export.learn import LABELS_PER_OPTION, CurvePoint, Mask, adapt, calibrate, curve
from export.looks import Seen
from export.pack import alone, replace_bank
from export.report import Judged, print_comparison, print_curve, print_score, write_json, write_picture


class Study:
    """One labelled set before one bundle. bars: where long work shows; console: where results are told."""

    def __init__(self, bundle: Bundle, labelled: LabelledSet, bars: Progress, console: Console) -> None:
        self._bundle, self._labelled, self._bars, self._console = bundle, labelled, bars, console
        self._scale = bundle.manifest.encoder.logit_scale
        self._task = bars.add_task("looking at people", total=len(labelled))
        self._seen = Seen(labelled, bundle, lambda done: bars.advance(self._task, done))
        for name in labelled.skipped_categories:
            self._note(f"{name}: the bundle does not ask it")
        for word in labelled.unseen_words:
            self._note(f"the map asks for {word!r}, which no picture has")
        if not self._seen.pictures:  # then the vectors there are of whole people
            for category in bundle.bank.categories:
                if category.region != "whole" and category.name in labelled.labels:
                    self._note(f"{category.name}: looks at the {category.region}, of which there is no picture")
            whole = {category.name for category in bundle.bank.categories if category.region == "whole"}
            labels = {name: options for name, options in labelled.labels.items() if name in whole}
            self._labelled = replace(labelled, labels=labels)

    def evaluate(self, compare: Sequence[str], with_regions: bool, out: Path | None) -> None:
        """Judge the bundle's bank, and what `compare` asks for. Raises ConfigError, BundleError, CaptureError."""
        variants = [Variant("as it is", self._bundle.bank)]
        variants += [variant_from(spec, self._bundle) for spec in compare]
        keep = people_judged(self._labelled, variants, both_halves=not with_regions)
        if with_regions:
            learn = self._learners(everyone=False)
            bank = best_regions(self._bundle.bank, self._labelled, learn, self._seen, self._scale)
            for category in bank.categories:
                if category.region != "whole":
                    self._note(f"best regions: {category.name} looks at the {category.region}")
            variants.append(Variant("best regions", bank))
        self._tell(keep, variants, out)

    def calibrate(self, coverage: float, everyone: bool, to: Path | None, out: Path | None) -> None:
        """Calibrate the bundle's bank, judge it, and put it where it belongs. Raises as `evaluate`, and OSError."""
        if not 0 < coverage <= 1:  # NaN, which is in any range
            raise ConfigError("--coverage", expected="more than 0, at most 1", got=coverage)
        bank, learn = self._bundle.bank, self._learners(everyone)
        if not everyone and (fit := learned_from_all(uncalibrated(bank), self._labelled)):
            raise ConfigError(
                f"{self._labelled.source}: the bank was {fit.how} on all of these people: nobody is left to judge by",
                remedy="calibrate with --everyone too, or by the labels of others",
            )
        vectors = self._seen.vectors(views_of(bank.only(self._labelled.labels)))
        new = calibrate(bank, self._labelled, learn, vectors, self._scale, coverage, self._note)
        if not everyone:
            self._tell(~learn, [*self._before(), Variant("calibrated", new)], out, shown=-1)
        self._keep(new, to)

    def adapt(self, everyone: bool, to: Path | None, out: Path | None) -> None:
        """The same for what labels say of the vectors."""
        bank, learn = self._bundle.bank, self._learners(everyone)
        vectors = self._seen.vectors(views_of(bank.only(self._labelled.labels)))
        new = adapt(bank, self._labelled, learn, vectors, self._scale, self._note)
        if not everyone:
            steps = self._bars.add_task(
                "how much labels are worth", total=(len(LABELS_PER_OPTION) + 1) * len(bank.categories)
            )
            points = curve(bank, self._labelled, learn, vectors, self._scale, lambda: self._bars.advance(steps))
            if points:
                print_curve(self._console, points)
            self._tell(~learn, [*self._before(), Variant("adapted", new)], out, points, shown=-1)
        self._keep(new, to)

    def _learners(self, everyone: bool) -> Mask:
        """(n,) the pictures to learn from. Raises ConfigError where half of the people is nobody."""
        learn = np.ones(len(self._labelled), bool) if everyone else self._labelled.half()
        if not learn.any() or not (everyone or not learn.all()):
            raise ConfigError(
                f"{self._labelled.source}: too few people to learn from one half and judge by the other",
                got=len(set(self._labelled.people)),
                remedy="label more, or learn from all with --everyone",
            )
        return learn

    def _before(self) -> list[Variant]:
        """The bundle's bank, where the people of one half can judge it."""
        if fit := learned_from_all(self._bundle.bank, self._labelled):
            self._note(f"the bank before was {fit.how} on all of these people, and is not judged by them")
            return []
        return [Variant("before", self._bundle.bank)]

    def _tell(
        self,
        keep: Mask,
        variants: Sequence[Variant],
        out: Path | None,
        points: Sequence[CurvePoint] = (),
        shown: int = 0,
    ) -> None:
        """shown: the variant whose every category is told."""
        labelled = self._labelled
        scores: list[Score] = [score(one, labelled, keep, self._seen, self._scale) for one in variants]
        judged = Judged(labelled.source.name, people_of(labelled, keep), int(keep.sum()), not keep.all())
        print_score(self._console, judged, scores[shown])
        if len(scores) > 1:
            print_comparison(self._console, judged, scores)
        if out is not None:
            write_json(out / "report.json", judged, scores, points)
            write_picture(out / "report.png", judged, scores, points)
            self._console.print(Text(f"report: {out / 'report.png'}"), soft_wrap=True)

    def _keep(self, bank: PromptBank, to: Path | None) -> None:
        if to is not None:
            to.parent.mkdir(parents=True, exist_ok=True)
            to.write_bytes(bank.to_bytes())
        else:
            with alone(self._bundle.path.absolute().parent):
                replace_bank(self._bundle, bank)
        last = bank.fits[-1]
        said = f"{last.how} on {last.people:,} people of {last.labels}"
        self._console.print(Text(f"{to or self._bundle.path}: {said}, bank {bank.sha256[:12]}"), soft_wrap=True)

    def _note(self, said: str) -> None:
        self._bars.console.print(Text(f"note: {said}"), soft_wrap=True)
