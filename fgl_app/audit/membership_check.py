"""The audit's first part: membership inference on the models of a run."""

from __future__ import annotations

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
from fgl_app.audit.shadow import pool_of, train_shadows
from fgl_app.data.images import ImageSet
from fgl_app.privacy.membership import SIGNS, Attack, Floats, attack, measures, offline_lira, roc, scaled_confidence
from fgl_app.rng import numpy_generator
from fgl_app.training import normalize, pick_device

LIRA = "LiRA"
_BATCH = 256


def check_membership(material: Material, shadow_models: int) -> Check:
    """Attack the last model of a run, and its one-shot model where it has one.

    Args:
        material: The run.
        shadow_models: Shadow models of the likelihood-ratio attack; 0 for none.

    Raises:
        DataError: If the real images are not on this machine.
    """
    images = attacked_images(material)
    device = pick_device(material.settings.run.device)
    shadows = _Shadows(material, images, shadow_models, device) if shadow_models else None
    flat = material.run.config["run_config"]
    models, values, curves, sentences = [], {}, {}, []
    for server_round in material.audited_rounds():
        name = model_name(flat, server_round, material.last_round)
        network = material.model(server_round)
        of_members, of_others = (logits_of(network, each, device) for each in (images.members, images.others))
        scores = _scores(of_members, of_others, images)
        values[name] = dict(scores)
        if shadows is not None:
            scores[LIRA] = shadows.scores(of_members, of_others, images)
        attacks = {}
        for measure, (members, others) in scores.items():
            generator = numpy_generator(material.settings.run.seed, "audit", "bootstrap", server_round, measure)
            attacks[measure] = attack(members, others, SIGNS.get(measure, 1), generator)
        curves[name] = roc(
            *scores[LIRA if LIRA in scores else "loss"], SIGNS.get("loss" if LIRA not in scores else LIRA, 1)
        )
        models.append(
            {
                "name": name,
                "round": server_round,
                "measures": {
                    measure: {
                        "member_mean": float(scores[measure][0].mean()),
                        "other_mean": float(scores[measure][1].mean()),
                        **_as_json(found),
                    }
                    for measure, found in attacks.items()
                },
            }
        )
        sentences.append(_sentence(name, attacks))
    least = 1 / len(images.others)
    sentences.append(
        f"{len(images.members):,} members and {len(images.others):,} others were compared, as many of each class; a "
        f"false-positive rate below {100 * least:.2g} % can therefore only be zero."
    )
    score = f"LiRA, {shadow_models} shadow models" if shadow_models else "threshold on the loss"
    return Check(
        sentences,
        {
            "num_members": len(images.members),
            "num_others": len(images.others),
            "least_fpr": least,
            "shadow_models": shadow_models,
            "models": models,
        },
        {"roc": roc_figure(curves, least, score), "distributions": distributions_figure(values)},
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
        pool = pool_of(images)
        networks, inside = train_shadows(material, pool, number)
        labels = pool.labels.numpy()
        self._confidences = np.stack([scaled_confidence(logits_of(each, pool, device), labels) for each in networks])
        self._inside: npt.NDArray[np.bool_] = inside.numpy()

    def scores(self, of_members: Floats, of_others: Floats, images: RealImages) -> tuple[Floats, Floats]:
        """Return the attack's score of members and of others."""
        labels = torch.cat([images.members.labels, images.others.labels]).numpy()
        target = scaled_confidence(np.concatenate([of_members, of_others]), labels)
        found = offline_lira(target, self._confidences, self._inside)
        return found[: len(of_members)], found[len(of_members) :]


def _scores(of_members: Floats, of_others: Floats, images: RealImages) -> dict[str, tuple[Floats, Floats]]:
    members = measures(of_members, images.members.labels.numpy())
    others = measures(of_others, images.others.labels.numpy())
    return {name: (members[name], others[name]) for name in SIGNS}


def _as_json(found: Attack) -> dict[str, Any]:
    return {
        "gap": asdict(found.gap),
        "auc": asdict(found.auc),
        "tpr": {f"{rate:g}": asdict(estimate) for rate, estimate in found.tpr.items()},
    }


def _sentence(name: str, attacks: dict[str, Attack]) -> str:
    measure, best = max(attacks.items(), key=lambda pair: pair[1].auc.value)
    interval = f"AUC {best.auc.value:.3f}, 95 % interval {best.auc.low:.3f} to {best.auc.high:.3f}"
    if best.auc.low <= 0.5:
        return f"{name}: members cannot be told from other images; the best attack, by {measure}, guesses ({interval})."
    found = best.tpr[0.01]
    return (
        f"{name}: members can be told from other images by {measure} ({interval}); with 1 % false alarms the attack "
        f"finds {100 * found.value:.1f} % of them ({100 * found.low:.1f} to {100 * found.high:.1f} %)."
    )
