"""Write benchmarks/results/index.json: commit, date, CPU, its flags and command of every result.

    python benchmarks/index.py

The values are those in the result files; null where a file does not have them.
"""

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
INDEX = RESULTS / "index.json"
KEYS = ("commit", "date", "cpu", "cpu_model", "cpu_flags", "cpu_capability", "device", "command")


def main() -> None:
    INDEX.write_text(json.dumps(index(), indent=1) + "\n", encoding="utf-8")


def index() -> dict[str, dict[str, Any]]:
    """Describe each result file, by its path below results/ without the suffix."""
    files = sorted(file for file in RESULTS.rglob("*.json") if file != INDEX)
    return {str(file.relative_to(RESULTS).with_suffix("")): entry(file) for file in files}


def entry(file: Path) -> dict[str, Any]:
    """Read the environment of a result; a result with one per row is described by its first row."""
    document = json.loads(file.read_text(encoding="utf-8"))
    rows = document.get("rows")
    row = next((row for row in rows if "environment" in row), {}) if isinstance(rows, list) else {}
    sources = (document, document.get("environment", {}), row.get("environment", {}))
    return {key: next((s[key] for s in sources if s.get(key)), None) for key in KEYS}


if __name__ == "__main__":
    main()
