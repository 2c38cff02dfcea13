"""Writes every fragment: `python -m fragments`."""

from __future__ import annotations

import shutil
from pathlib import Path

from fragments import names, pictures, results, settings, zoo

WHERE = Path("build/fragments")


def main() -> None:
    """All fragments anew, so that none outlives what it was made of."""
    shutil.rmtree(WHERE, ignore_errors=True)
    parts = {
        "settings": settings.pages(),
        "names": names.pages(),
        "results": results.tables(),
        "pictures": pictures.drawings(),
        "zoo": zoo.pages(),
    }
    for folder, texts in parts.items():
        (WHERE / folder).mkdir(parents=True)
        for name, text in texts.items():
            (WHERE / folder / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
