"""Draw a contact sheet: real digits of the clients above, a run's synthetic digits of the same classes below.

.venv/bin/python examples/digits/contact_sheet.py ~/fgl-runs/digits sheet.png
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from fgl_app.data.digits import CLASS_NAMES
from torchvision.utils import make_grid

from fgl_app.config import default_run_config, parse_run_config
from fgl_app.data.images import ImageSet, resize
from fgl_app.data.sources import SHOWN_SIZE_PX, digits_split
from fgl_app.store import UnitStore
from fgl_app.synthesis.plan import Plan

COLUMNS, ROWS_PER_KIND = 2, 3


def sheet(data: ImageSet) -> torch.Tensor:
    """Lay out six images of each class: three rows, two columns a class; float ``[H, W]`` in 0 to 1."""
    picked = []
    for row in range(ROWS_PER_KIND):
        for label in range(len(CLASS_NAMES)):
            rows = torch.nonzero(data.labels == label).flatten()[row * COLUMNS : (row + 1) * COLUMNS]
            picked += [data.images[index] for index in rows]
    grid = make_grid(torch.stack(picked), nrow=COLUMNS * len(CLASS_NAMES), padding=2, pad_value=128)
    return grid[0].float() / 255


def main() -> None:
    run, output = Path(sys.argv[1]).expanduser(), Path(sys.argv[2])
    plan = Plan.load(run / "synthetic" / "plan.json")
    synthetic = UnitStore(run / "synthetic").read([unit.unit_id for unit in plan.units()])
    settings = parse_run_config(default_run_config() | {"image-size": SHOWN_SIZE_PX})
    figure, axes = plt.subplots(2, 1, figsize=(10, 3.6), layout="constrained")
    for axis, title, data in (
        (axes[0], "real: private digits of the clients", digits_split(settings.data, "train")),
        (axes[1], "synthetic: drawn from the clients' prompts", synthetic),
    ):
        axis.imshow(sheet(ImageSet(resize(data.images, SHOWN_SIZE_PX), data.labels)), cmap="gray", vmin=0, vmax=1)
        axis.set_title(title, fontsize=10, loc="left")
        pitch = (SHOWN_SIZE_PX + 2) * COLUMNS
        axis.set_xticks([pitch * (label + 0.5) for label in range(len(CLASS_NAMES))], CLASS_NAMES)
        axis.set_yticks([])
        axis.tick_params(length=0, labelsize=9)
    figure.savefig(output, dpi=90)


if __name__ == "__main__":
    main()
