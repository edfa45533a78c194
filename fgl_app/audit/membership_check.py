"""The audit's first part: membership inference on the models of a run."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from fgl_app.audit.check import Check
from fgl_app.audit.figures import distributions_figure, roc_figure
from fgl_app.audit.labels import model_name
from fgl_app.audit.material import Material, RealImages, attacked_images
from fgl_app.audit.shadow import joined, train_shadows
from fgl_app.data.images import ImageSet
from fgl_app.intervals import Interval
from fgl_app.privacy.gap_intervals import Scored, gap, over_images
from fgl_app.privacy.lira import one_sided_lira, two_sided_lira
from fgl_app.privacy.membership import (
    FALSE_POSITIVE_RATES,
    SIGNS,
    Attack,
    Floats,
    allowed_alarms,
    attack,
    guessing_rate,
    measures,
    roc,
    scaled_confidence,
)
from fgl_app.rng import numpy_generator
from fgl_app.training import normalize, pick_device

ONE_SIDED, TWO_SIDED = "LiRA, one-sided", "LiRA, two-sided"
"""The offline attack as Carlini et al. 2022 state it, and as their reference code computes it."""
SIGNIFICANCE = 0.05
"""Largest probability with which a model that guesses is said to expose some members."""
_BATCH = 256


def check_membership(material: Material, shadow_models: int) -> Check:
    """Attack the last model of a run, and its one-shot model where it has one.

    Args:
        material: The run.
        shadow_models: Shadow models of the likelihood-ratio attack; 0 for none.

    Raises:
        DataError: If the real images are not on this machine.
    """
    images = attacked_images(material, with_rest=shadow_models > 0)
    device = pick_device(material.settings.run.device)
    shadows = _Shadows(material, images, shadow_models, device) if shadow_models else None
    shown = ONE_SIDED if shadow_models else "loss"
    ids = image_ids(images)
    flat = material.run.config["run_config"]
    models, values, curves, sentences = [], {}, {}, []
    scored: dict[int, dict[str, Scored]] = {}
    for server_round in material.audited_rounds():
        name = model_name(flat, server_round, material.last_round)
        network = material.model(server_round)
        of_members, of_others = (logits_of(network, each, device) for each in (images.members, images.others))
        scores = _scores(of_members, of_others, images)
        values[name] = dict(scores)
        if shadows is not None:
            scores |= shadows.scores(of_members, of_others, images)
        scored[server_round] = {
            measure: Scored(ids, len(of_members), SIGNS.get(measure, 1) * np.concatenate(sides))
            for measure, sides in scores.items()
        }
        attacks = {}
        for measure, (members, others) in scores.items():
            generator = numpy_generator(material.settings.run.seed, "audit", "bootstrap", server_round, measure)
            attacks[measure] = attack(members, others, SIGNS.get(measure, 1), generator)
        curves[name] = roc(*scores[shown], SIGNS.get(shown, 1))
        models.append(
            {
                "name": name,
                "round": server_round,
                "measures": {
                    measure: {
                        "member_mean": float(scores[measure][0].mean()),
                        "other_mean": float(scores[measure][1].mean()),
                        **_as_json(found),
                        "gap_above_one_shot": _above_one_shot(scored, server_round, measure, material),
                    }
                    for measure, found in attacks.items()
                },
            }
        )
        sentences.append(verdict(name, attacks, len(images.others)))
    least = 1 / len(images.others)
    sentences.append(
        f"{len(images.members):,} members and {len(images.others):,} others were compared, as many of each class; a "
        f"false-positive rate below {100 * least:.2g} % can therefore only be zero."
    )
    rest = 0 if images.rest is None else len(images.rest)
    num_shadow = (len(images.members) + len(images.others)) // 2 + rest if shadow_models else 0
    if shadow_models:
        sentences.append(
            f"For LiRA (one-sided as Carlini et al. 2022 state it, two-sided with medians as their code computes it) "
            f"{shadow_models} shadow models were trained on {num_shadow:,} images each, a half of those that "
            f"were compared and the {rest:,} members that were not; the clients hold {len(images.members) + rest:,}."
        )
    score = f"{ONE_SIDED}, {shadow_models} shadow models" if shadow_models else "threshold on the loss"
    return Check(
        sentences,
        {
            "num_members": len(images.members),
            "num_others": len(images.others),
            "least_fpr": least,
            "guessing": {f"{rate:g}": guessing_rate(rate, len(images.others)) for rate in FALSE_POSITIVE_RATES},
            "shadow_models": shadow_models,
            "shadow_images": num_shadow,
            "models": models,
        },
        {"roc": roc_figure(curves, least, score), "distributions": distributions_figure(values)},
        scored,
    )


def image_ids(images: RealImages) -> npt.NDArray[np.int64]:
    """Return the identity of each attacked image, members first: the first eight bytes of its pixels' SHA-256."""
    pixels = [image for side in (images.members, images.others) for image in side.images.numpy()]
    digests = b"".join(hashlib.sha256(np.ascontiguousarray(image).tobytes()).digest()[:8] for image in pixels)
    return np.frombuffer(digests, dtype="<i8").astype(np.int64)


def _above_one_shot(
    scored: Mapping[int, Mapping[str, Scored]], server_round: int, measure: str, material: Material
) -> dict[str, float] | None:
    """Return the gap minus that of the run's one-shot model, which has seen neither side; None without one."""
    untouched = material.settings.training.initial_weights in ("random", "imagenet")
    if server_round == 1 or not material.settings.synthesizes or not untouched:
        return None
    return asdict(over_images([scored[server_round][measure]], [scored[1][measure]], gap))


def verdict(name: str, attacks: Mapping[str, Attack], num_others: int) -> str:
    """Say whether members can be told, on the whole by the area under the curve, or a few of them at few false alarms.

    An area of about 0.5 hides a few members who are exposed. They are looked for by every measure at every rate, which
    chance passes more often than a single one; each p-value is therefore held against :data:`SIGNIFICANCE` divided by
    their number (Bonferroni). A bound of a bootstrap interval is no such test: at no false alarm at all it is above the
    rate in 6 to 8 of 100 attacks that guess.
    """
    measure, best = max(attacks.items(), key=lambda pair: pair[1].auc.value)
    area = f"AUC {best.auc.value:.3f}, 95 % interval {best.auc.low:.3f} to {best.auc.high:.3f}"
    if best.auc.low > 0.5:
        return (
            f"{name}: members can be told from other images by {measure} ({area}); with 1 % false alarms the attack "
            f"finds {_share(best.tpr[0.01])}."
        )
    tested = [(p_value, by, rate) for by, each in attacks.items() for rate, p_value in each.p_values.items()]
    p_value, by, rate = min(tested)
    if p_value * len(tested) >= SIGNIFICANCE:
        return f"{name}: members cannot be told from other images; the best attack, by {measure}, guesses ({area})."
    allowed = allowed_alarms(rate, num_others)
    alarms = f"at most {allowed} false {'alarm' if allowed == 1 else 'alarms'}" if allowed else "no false alarm"
    return (
        f"{name}: some members can be told from other images, though on the whole the best attack, by {measure}, "
        f"guesses ({area}). With {alarms} among {num_others:,} others the attack by {by} finds "
        f"{_share(attacks[by].tpr[rate])}, guessing {100 * guessing_rate(rate, num_others):.1f} %."
    )


def logits_of(network: nn.Module, data: ImageSet, device: torch.device) -> Floats:
    """Return the classifier's logits of each image, float64 ``[N, K]``."""
    network.to(device).eval()
    with torch.inference_mode():
        parts = [network(normalize(part.to(device))).double().cpu() for part in data.images.split(_BATCH)]
    return np.asarray(torch.cat(parts).numpy())


class _Shadows:
    """Scaled confidences of all attacked images under shadow models."""

    def __init__(self, material: Material, images: RealImages, number: int, device: torch.device) -> None:
        pool = joined(images.members, images.others)
        networks, inside = train_shadows(material, pool, images.rest, number)
        labels = pool.labels.numpy()
        self._confidences = np.stack([scaled_confidence(logits_of(each, pool, device), labels) for each in networks])
        self._inside: npt.NDArray[np.bool_] = inside.numpy()

    def scores(self, of_members: Floats, of_others: Floats, images: RealImages) -> dict[str, tuple[Floats, Floats]]:
        """Return each form's score of members and of others."""
        labels = torch.cat([images.members.labels, images.others.labels]).numpy()
        target = scaled_confidence(np.concatenate([of_members, of_others]), labels)
        return {
            name: (found[: len(of_members)], found[len(of_members) :])
            for name, score in ((ONE_SIDED, one_sided_lira), (TWO_SIDED, two_sided_lira))
            for found in [score(target, self._confidences, self._inside)]
        }


def _scores(of_members: Floats, of_others: Floats, images: RealImages) -> dict[str, tuple[Floats, Floats]]:
    members = measures(of_members, images.members.labels.numpy())
    others = measures(of_others, images.others.labels.numpy())
    return {name: (members[name], others[name]) for name in SIGNS}


def _as_json(found: Attack) -> dict[str, Any]:
    return {
        "gap": asdict(found.gap),
        "auc": asdict(found.auc),
        "tpr": {f"{rate:g}": asdict(estimate) for rate, estimate in found.tpr.items()},
        "guessing_p_values": {f"{rate:g}": p_value for rate, p_value in found.p_values.items()},
    }


def _share(found: Interval) -> str:
    return f"{100 * found.value:.1f} % of the members ({100 * found.low:.1f} to {100 * found.high:.1f} %)"
