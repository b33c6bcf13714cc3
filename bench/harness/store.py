"""Results on disk: one JSON file that grows case by case, so that a run can be resumed."""

from __future__ import annotations

import json
import os
from datetime import datetime
from pathlib import Path
from typing import Any

from bench.harness.machine import allocator, machine

RESULTS = Path(__file__).parents[1] / "results"


class StoreError(RuntimeError):
    """Results that cannot be added to; the message is one sentence for the user."""


class Store:
    """Results of one run of the suite.

    Parameters
    ----------
    directory : Path
        Made if needed; ``results.json`` in it is read if it is there.
    command : str
        The command that adds results now.
    anywhere : bool
        Also add to results of another machine, or of other versions.
    """

    def __init__(self, directory: Path, command: str, anywhere: bool = False) -> None:
        self.directory = directory
        self.path = directory / "results.json"
        about = machine()
        if self.path.exists():
            self.data: dict[str, Any] = json.loads(self.path.read_text())
            changed = [
                key
                for key in about
                if key not in ("date", "vllm_kvcompress")
                and self.data["machine"][key] != about[key]
            ]
            if changed and not anywhere:
                raise StoreError(
                    f"{self.path} was measured elsewhere ({', '.join(changed)} differ); "
                    "choose another --out, or add --anywhere."
                )
        else:
            self.data = {
                "machine": about,
                "allocator": allocator(),
                "commands": [],
                "results": {},
                "failures": {},
            }
        if command not in self.data["commands"]:
            self.data["commands"].append(command)
        self._version = about["vllm_kvcompress"]
        directory.mkdir(parents=True, exist_ok=True)

    def results(self, scenario: str) -> dict[str, dict[str, Any]]:
        """What the cases of a scenario gave, by key."""
        return {key: row["figures"] for key, row in self.data["results"].get(scenario, {}).items()}

    def versions(self) -> list[str]:
        """Versions of this package that the results are of."""
        rows = (row for part in self.data["results"].values() for row in part.values())
        return sorted({row["vllm_kvcompress"] for row in rows})

    def add(self, scenario: str, key: str, figures: dict[str, Any], seconds: float) -> None:
        """Keep the result of a case."""
        self.data["results"].setdefault(scenario, {})[key] = {
            "figures": figures,
            "seconds": round(seconds, 2),
            # Of the last minute, our own included: more than the cores says who else was there.
            "load": round(os.getloadavg()[0], 2),
            "at": datetime.now().isoformat(timespec="seconds"),
            "vllm_kvcompress": self._version,
        }
        self.data["failures"].get(scenario, {}).pop(key, None)
        self._write()

    def fail(self, scenario: str, key: str, message: str) -> None:
        """Remember that a case failed; it runs again when the run is resumed."""
        self.data["failures"].setdefault(scenario, {})[key] = message
        self._write()

    def _write(self) -> None:
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.data, indent=1) + "\n")
        partial.replace(self.path)
