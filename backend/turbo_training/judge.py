"""Accuracy of clips against the scenes they should show."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from turbo_training.measures import Measured
from turbo_training.scene import Scene

ATTRIBUTES = ("subject", "color", "motion", "surroundings", "light", "light_end", "camera")


#: Right or wrong by attribute; one entry an actor for those of actors.
Verdict = dict[str, list[bool]]


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Right decisions of so many."""

    right: int
    total: int

    @property
    def percent(self) -> float:
        return 100 * self.right / self.total if self.total else math.nan


def judge(scene: Scene, measured: Measured) -> Verdict:
    """Which attributes are as the scene says; one entry an actor for those of actors.

    With one actor, color and motion are those of whatever subject is there; with two, those of the subject of the
    right kind, and wrong where there is none.
    """
    verdict: Verdict = {
        "surroundings": [measured.surroundings == scene.surroundings],
        "light": [measured.light == scene.light],
        "light_end": [measured.light_end == scene.light_end],
        "camera": [measured.camera == scene.camera],
        "subject": [],
        "color": [],
        "motion": [],
    }
    for actor in scene.actors:
        found = measured.find(actor.subject)
        verdict["subject"].append(found is not None)
        if found is None and len(scene.actors) == 1 and measured.subjects:
            found = measured.subjects[0]
        verdict["color"].append(found is not None and found.color == actor.color)
        verdict["motion"].append(found is not None and found.motion == actor.motion)
    return verdict


def tally(verdicts: Iterable[Verdict]) -> dict[str, Accuracy]:
    """Accuracies by attribute."""
    right: dict[str, int] = defaultdict(int)
    total: dict[str, int] = defaultdict(int)
    for verdict in verdicts:
        for name, decisions in verdict.items():
            right[name] += sum(decisions)
            total[name] += len(decisions)
    return {name: Accuracy(right[name], total[name]) for name in ATTRIBUTES}


def tally_by_subjects(verdicts: Sequence[Verdict]) -> dict[str, dict[str, Accuracy]]:
    """Accuracies over clips of one and of two subjects apart, where there are any."""
    apart = {
        name: [verdict for verdict in verdicts if len(verdict["subject"]) == count]
        for name, count in (("one subject", 1), ("two subjects", 2))
    }
    return {name: tally(some) for name, some in apart.items() if some}
