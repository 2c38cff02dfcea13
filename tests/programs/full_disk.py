"""Runs `elastic train`, `search` and `export` on a disk that becomes full, and counts the harm.

    mount -t tmpfs -o size=24m none /mnt/small
    python tests/programs/full_disk.py /mnt/small

By hand, for it needs a small file system of its own. Every subject of the stress program is begun
with less and less room; the room is given back, and the same command must then end as if nothing
had been. Counted are, beside what the stress program counts:

    unnamed     ends with another exit code than 0 or 1, or in more than one line

All must be 0; the exit code says whether.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.programs.stress import Subject, ended, prepare, subjects
from tests.programs.stress_place import Place

ROOM = (0.9, 0.7, 0.5, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0)
"""Parts of what the command leaves on the disk."""


def with_room(subject: Subject, place: Place, whole: Place, room: int) -> str:
    """How the command ended with so many bytes free on the disk of `place`."""
    subject.prepare(place)
    filler = place.folder.parent / "filler"
    free = shutil.disk_usage(place.folder).free
    filler.write_bytes(bytes(max(0, free - room)))
    code = ended(place.begin(subject.arguments))
    text = place.log.read_text(encoding="utf-8")
    filler.unlink()
    last = text.strip().splitlines()[-1] if text.strip() else ""
    named = code == 0 or (code == 1 and last.startswith("error: ") and "Traceback" not in text)
    subject.counts["unnamed"] += not named
    subject.counts["failed"] += ended(place.begin(subject.arguments)) != 0
    subject.compare(place, whole, subject.counts, [])
    return f"exit code {code}: {last}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("disk", type=Path)
    parser.add_argument("--only", default="", help="subjects whose name begins so")
    given = parser.parse_args()
    prepare()
    total: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="full-disk-") as home:
        for number, subject in enumerate(subjects(Path(home), seed=0)):
            if subject.workers > 1 or not subject.name.startswith(given.only):
                continue
            whole = Place(Path(home) / f"{number}-whole")
            subject.whole(whole)
            taken = sum(path.stat().st_size for path in whole.folder.rglob("*") if path.is_file())
            for room in ROOM:
                place = Place(given.disk / f"{number}-{room:g}", Path(home))
                before = Counter(subject.counts)
                how = with_room(subject, place, whole, int(taken * room))
                print(
                    f"{subject.name}, room for {room:.1%} of it: {how[:200]}",
                    dict(subject.counts - before),
                    flush=True,
                )
                shutil.rmtree(place.folder)
                place.log.unlink()
            total += subject.counts
    print(dict(total))
    return int(bool(+total))


if __name__ == "__main__":
    sys.exit(main())
