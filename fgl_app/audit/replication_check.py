"""The audit's second part: do synthetic images replicate private ones?"""

from __future__ import annotations

import math

import numpy as np

from fgl_app.audit.backbones import open_backbone
from fgl_app.audit.check import Check
from fgl_app.audit.figures import pairs_figure, similarity_figure
from fgl_app.audit.material import Material, all_real_images
from fgl_app.privacy.replication import NEAR_IDENTICAL, QUANTILE, Replication, find_replicas, top_pairs
from fgl_app.reporting.finished_run import synthetic_images
from fgl_app.training import pick_device

MAX_SYNTHETIC = 2_000
"""Synthetic images that are compared, evenly over classes and prompts; the paper takes 1,000."""
SHOWN_PAIRS = 20
_SHOWN_PX = 64


def check_replication(material: Material, backbone: str) -> Check:
    """Compare synthetic images with the clients' training images.

    The contact sheet shows private images: it is for those at whose side the audit runs.

    Args:
        material: A run that drew images.
        backbone: What features are compared; see :func:`fgl_app.audit.backbones.open_backbone`.

    Raises:
        DataError: If the real images are not on this machine.
        SynthesisError: If the store is absent or damaged.
    """
    run, settings = material.run, material.settings
    opened = open_backbone(
        backbone,
        lambda: material.model(material.last_round),
        settings.data.image_size,
        pick_device(settings.run.device),
    )
    num_classes = len(run.class_names)
    per_class = math.ceil(MAX_SYNTHETIC / num_classes)
    size = max(opened.size_px, _SHOWN_PX)
    synthetic = synthetic_images(run, num_classes, per_class, size)
    real = all_real_images(material, opened.size_px)
    found = find_replicas(opened(synthetic), opened(real.members), opened(real.others))
    pairs = top_pairs(found, SHOWN_PAIRS)
    content = {
        "backbone": opened.name,
        "num_synthetic": len(synthetic),
        "num_train": len(real.members),
        "num_held_out": len(real.others),
        "quantile": QUANTILE,
        "threshold": found.threshold,
        "near_copies": found.near_copies,
        "p_value": found.p_value,
        "beyond_baseline": found.beyond_baseline,
        "near_identical": found.near_identical,
        "near_identical_held_out": found.usual_identical,
        "replicates": found.replicates,
        "median_similarity": float(np.median(found.similarity[:, 0])),
        "median_baseline": float(np.median(found.baseline)),
        "top_similarities": [similarity for _, _, similarity in pairs],
    }
    shown = [(synthetic.images[row], real.members.images[near], similarity) for row, near, similarity in pairs]
    return Check(
        [verdict(found, opened.name)],
        content,
        {
            "similarity": similarity_figure(found.similarity[:, 0], found.baseline, found.threshold, opened.name),
            "pairs": pairs_figure(shown),
        },
    )


def verdict(found: Replication, features: str) -> str:
    """Say whether synthetic images replicate training images, and by what numbers.

    Args:
        found: What was compared.
        features: Name of what was compared.
    """
    synthetic, held_out = len(found.similarity), len(found.baseline)
    usual = float(np.mean(found.baseline > found.threshold))
    share = f"{found.near_copies:,} of {synthetic:,} ({100 * found.near_copies / synthetic:.1f} %)"
    if found.more_near_copies:
        said = "The synthetic images replicate private training images"
    elif found.copies:
        said = (
            "Some synthetic images are all but identical to private training images (audit/pairs.png shows the nearest "
            "pairs), though no more are near-copies than chance explains"
        )
    else:
        said = "The synthetic images do not replicate private training images"
    return (
        f"{said}: {share} are near-copies, nearer to a training image than {100 * QUANTILE:g} % of the real images on "
        f"which nobody trained (cosine similarity above {found.threshold:.3f}, {features}); of those images themselves "
        f"{100 * usual:.1f} % are (Fisher's exact test, one-sided: p = {found.p_value:.2g}). Of the synthetic images "
        f"{found.beyond_baseline:,} are nearer than any of those (above {found.baseline.max():.3f}) and "
        f"{found.near_identical:,} all but identical to a training image ({NEAR_IDENTICAL:g} and more), as are "
        f"{found.usual_identical:,} of those {held_out:,} real images."
    )
