"""Draw a contact sheet: real digits of the clients on the left, a run's synthetic digits on the right.

.venv/bin/python examples/digits/contact_sheet.py ~/fgl-runs/digits sheet.png

The page of a run, `fgl report`, shows held-out images instead; this data set is public, the clients' part included.
"""

from __future__ import annotations

import sys
from pathlib import Path

from fgl_app.config import default_run_config, parse_run_config
from fgl_app.data.sources import load_split
from fgl_app.reporting.figures import contact_sheet, to_png
from fgl_app.reporting.finished_run import read_run, synthetic_images

SHOWN_SIZE_PX = 32
IMAGES_PER_CLASS = 8


def main() -> None:
    run, output = read_run(Path(sys.argv[1])), Path(sys.argv[2])
    settings = parse_run_config(default_run_config() | {"dataset": "digits", "image-size": SHOWN_SIZE_PX})
    panels = {
        "real: private digits of the clients": load_split(
            settings.card, settings.data, "train", int(run.results["seed"])
        ),
        "synthetic: drawn from the clients' prompts": synthetic_images(
            run, len(run.class_names), IMAGES_PER_CLASS, SHOWN_SIZE_PX
        ),
    }
    output.write_bytes(to_png(contact_sheet(panels, run.class_names, IMAGES_PER_CLASS)))


if __name__ == "__main__":
    main()
