"""The offline likelihood-ratio attack: compare each image's score with those of shadow models that did not see it.

Carlini et al. 2022 ("Membership Inference Attacks From First Principles", IEEE S&P) state it one-sided; their reference
code computes another, two-sided score. Both are here, because they can find very different shares of the members.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.stats import norm

from fgl_app.privacy.membership import Floats


def random_halves(num_images: int, num_models: int, generator: np.random.Generator) -> npt.NDArray[np.bool_]:
    """Choose the images that each shadow model trains on: random halves, and the other half for the next model.

    Args:
        num_images: N, at least 2.
        num_models: S, even, so that every image is left out by exactly S / 2 models.
        generator: Makes the choice.

    Returns:
        bool ``[S, N]``: whether a model is trained on an image.
    """
    inside = np.zeros((num_models, num_images), dtype=bool)
    for pair in range(0, num_models, 2):
        inside[pair, generator.permutation(num_images)[: num_images // 2]] = True
        inside[pair + 1] = ~inside[pair]
    return inside


def one_sided_lira(target: Floats, shadows: Floats, inside: npt.NDArray[np.bool_]) -> Floats:
    """Score membership by the offline likelihood-ratio attack as the paper states it (Carlini et al. 2022).

    The paper's score is 1 - Pr[Z > phi] for Z ~ N(mu_out, sigma_out^2), where phi is ``target`` and mu_out the mean of
    an image's ``shadows`` that were not trained on it. Returned is (phi - mu_out) / sigma_out, which orders images
    alike and does not saturate. With few models the paper takes one sigma_out for all images, as here.

    Args:
        target: Scaled confidence of each image under the audited model, ``[N]``.
        shadows: The same under each shadow model, ``[S, N]``, S at least 4.
        inside: Whether a shadow model was trained on an image, bool ``[S, N]``; each image is left out by two or more.

    Returns:
        float64 ``[N]``; large for members.
    """
    outside = np.ma.array(shadows, mask=inside)
    mean = np.asarray(outside.mean(axis=0))
    squares, freedom = float(((outside - mean) ** 2).sum()), int((~inside).sum()) - len(target)
    return np.asarray((target - mean) / max(float(np.sqrt(squares / freedom)), np.finfo(np.float64).tiny))


def two_sided_lira(target: Floats, shadows: Floats, inside: npt.NDArray[np.bool_]) -> Floats:
    """Score membership by the offline attack of the paper's reference code, which takes surprise on either side.

    Its score is -log p(phi) under N(m_out, s^2), where m_out is the median of an image's ``shadows`` that were not
    trained on it, and s the standard deviation of all of these over all images, its choice for few models. An image
    that the audited model is less sure of than the others scores high, too, unlike in :func:`one_sided_lira`.

    Args:
        target: Scaled confidence of each image under the audited model, ``[N]``.
        shadows: The same under each shadow model, ``[S, N]``.
        inside: Whether a shadow model was trained on an image, bool ``[S, N]``.

    Returns:
        float64 ``[N]``, in nats; large for members.
    """
    outside = np.where(inside, np.nan, shadows)
    deviation = max(float(np.nanstd(outside)), np.finfo(np.float64).tiny)
    return np.asarray(-norm.logpdf(target, np.nanmedian(outside, axis=0), deviation))
