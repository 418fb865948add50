"""What pytest's XML report says: how many tests passed, failed and were skipped, and why."""

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

PLACE = re.compile(r"^\S+\.py:\d+: ")


@dataclass
class TestCounts:
    """Of one run."""

    __test__ = False  # no test, whatever pytest makes of the name

    passed: int = 0
    failed: list[str] = field(default_factory=list)  # their names
    skipped: Counter[str] = field(default_factory=Counter)  # by reason

    @property
    def ran(self) -> int:
        """How many did anything."""
        return self.passed + len(self.failed)

    def line(self) -> str:
        """In words."""
        return f"{self.passed} passed, {len(self.failed)} failed, {self.skipped.total()} skipped"


def read(path: Path) -> TestCounts:
    """The counts of a report by `pytest --junitxml`."""
    counts = TestCounts()
    for case in ElementTree.parse(path).iter("testcase"):
        skipped = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            counts.failed.append(f"{case.get('classname')}::{case.get('name')}")
        elif skipped is not None:
            counts.skipped[PLACE.sub("", skipped.get("message") or "no reason")] += 1
        else:
            counts.passed += 1
    return counts
