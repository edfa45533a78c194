"""Write the image folders of three sites for a try: `python examples/deployment/write_sites.py DIR`.

They are handwritten digits that no shipped model has seen: site0 holds 0 to 3, site1 3 to 6, site2 6 to 9.
"""

import sys
from pathlib import Path

from PIL import Image

from fgl_app.cards import load_card
from fgl_app.data.division import divide
from fgl_app.data.readers import open_part

SITES = {"site0": range(0, 4), "site1": range(3, 7), "site2": range(6, 10)}
SIZE_PX = 32


def write_sites(folder: Path) -> None:
    """Write `folder/SITE/CLASS/*.png`; what two sites hold of a class is divided between them."""
    card = load_card("digits")
    part = open_part(card, "train", "")
    for row in divide(card, part.labels, seed=0)["train"]:
        label = part.labels[row]
        holders = [site for site, labels in SITES.items() if label in labels]
        target = folder / holders[row % len(holders)] / card.classes[label].name
        target.mkdir(parents=True, exist_ok=True)
        image = part.image(row).resize((SIZE_PX, SIZE_PX), Image.Resampling.BILINEAR)
        image.save(target / f"{row}.png")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/deployment/write_sites.py DIR")
    write_sites(Path(sys.argv[1]))
