"""Public data sets of the tasks: from a folder of them, else from the hub."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]
DATA_VARIABLE = "LAYERSKIP_DATA"


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """Where the rows of a data set lie.

    Attributes:
        folder: its folder's name.
        files: split -> pattern of its files there, each compressed (.gz, .xz) or not.
        hub: id at the hub, None where it is not there.
        config: part of it at the hub.
        hub_splits: split -> its name at the hub, where that is another one.
        origin: where its makers publish it.
        ids: split -> ids of its rows, where one file holds all splits.
    """

    folder: str
    files: Mapping[str, str]
    hub: str | None = None
    config: str | None = None
    hub_splits: Mapping[str, str] = field(default_factory=dict)
    origin: str
    ids: Mapping[str, range] = field(default_factory=dict)

    def rows(self, split: str, data: str | None = None) -> list[Row]:
        """All rows of a split.

        Args:
            split: "test", "train", "validation" or "prompt".
            data: the folder of data sets; None takes that of $LAYERSKIP_DATA.

        Raises:
            ValueError: it is not to be had; the message says how to get it.
        """
        from layerskip.training.rows import read_rows

        root = os.path.expanduser(data or os.environ.get(DATA_VARIABLE, "")) or None
        if split not in self.files:
            raise ValueError(f"{self.folder} has no {split} split")
        files = self._files(Path(root, self.folder), split) if root else []
        if files:
            rows = [row for file in files for _, row in read_rows(str(file))]
            return [row for row in rows if split not in self.ids or _id(row) in self.ids[split]]
        name = self.hub_splits.get(split, split)
        try:
            if self.hub is None:
                raise ValueError("it is not on the hub")
            return [row for _, row in read_rows(self.hub, name, config=self.config)]
        except ValueError as error:
            raise ValueError(self._advice(split, root, str(error))) from None

    def _files(self, folder: Path, split: str) -> list[Path]:
        """A split's files, each in one form alone: `gunzip -k` leaves both."""
        from layerskip.training.rows import COMPRESSED

        pattern = self.files[split].removesuffix("*")
        found: dict[str, Path] = {}
        for suffix in (*COMPRESSED, ""):
            for path in folder.glob(pattern + suffix):
                found[path.name.removesuffix(suffix)] = path
        return [found[name] for name in sorted(found)]

    def _advice(self, split: str, root: str | None, reason: str) -> str:
        place = Path(root or f"${DATA_VARIABLE}", self.folder, self.files[split])
        ways = [f"get it from {self.origin} and put it at {place}"]
        if root is None:
            ways[0] += f", with {DATA_VARIABLE} naming the folder above"
        if self.hub is not None:
            ways.append(
                f"be online with `datasets` (pip install 'layerskip[bench]') for {self.hub}"
            )
        return f"{self.folder} ({split}) is not here: {', or '.join(ways)} ({reason})"


def _id(row: Row) -> int:
    number: Any = row.get("task_id")
    try:
        return int(number)
    except (TypeError, ValueError):
        raise ValueError(f"a row's task_id is {number!r}; it must be a number") from None
