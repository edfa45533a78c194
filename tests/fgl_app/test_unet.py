"""Our UNet against that of diffusers, on small random ones of the shapes that the family has."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from fgl_app.compilation import lacking_for_compilation, reproducible
from fgl_app.synthesis.unet import PlainUNet, is_plain

FAMILY = {
    "as 1.x": {},
    "as 2.x": {"use_linear_projection": True, "attention_head_dim": (2, 4)},
    "attention at once": {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    },
    "deep transformers": {"transformer_layers_per_block": 2, "use_linear_projection": True},
    "no middle block": {"mid_block_type": None},
    "two layers": {"layers_per_block": 2},
}


def unet(**changes: Any) -> UNet2DConditionModel:
    torch.manual_seed(0)
    shape = {
        "sample_size": 8, "block_out_channels": (16, 32), "layers_per_block": 1, "cross_attention_dim": 24,
        "attention_head_dim": 4, "norm_num_groups": 8, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }  # fmt: skip
    return UNet2DConditionModel(**shape | changes).eval().to(memory_format=torch.channels_last)


@torch.inference_mode()
def evaluated(
    theirs: UNet2DConditionModel, sides: tuple[int, int], compiled: Callable[..., Any] = lambda function: function
) -> dict[str, torch.Tensor]:
    """Evaluate both UNets, of ours the functions that ``compiled`` makes of its own."""
    generator = torch.Generator().manual_seed(1)
    latents, text = torch.randn(3, 4, *sides, generator=generator), torch.randn(6, 5, 24, generator=generator)
    timestep = torch.tensor(300)
    ours = PlainUNet(theirs)
    full, shallow = compiled(ours.full), compiled(ours.shallow)
    time, context = ours.time_embedding(timestep), ours.context(text)
    both, deep = full(latents, time, context)
    second = [(key[3:], value[3:]) for key, value in context]
    return {
        "expected": theirs(torch.cat([latents, latents]), timestep, text, return_dict=False)[0],
        "both": both,
        "second": ours.full(latents, time, second)[0],
        "shallow": shallow(latents, time, context, deep),
    }


@pytest.mark.parametrize(("name", "sides"), itertools.product(FAMILY, [(8, 8), (7, 10)]))
def test_our_unet_computes_what_that_of_diffusers_does(name, sides):
    theirs = unet(**FAMILY[name])

    found = evaluated(theirs, sides)

    assert is_plain(theirs.config)
    assert found["expected"].std() > 0.01
    assert not torch.allclose(found["expected"][:3], found["expected"][3:], atol=1e-3)  # the texts differ
    for ours, expected in (
        (found["both"], found["expected"]),
        (found["second"], found["expected"][3:]),
        (found["shallow"], found["expected"]),  # on the deep features of the same step
    ):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_class_embeds": 3},
        {"resnet_time_scale_shift": "scale_shift"},
        {"addition_embed_type": "text"},
        {"dual_cross_attention": True},
        {"time_embedding_type": "fourier"},
        {
            "down_block_types": ("DownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "UpBlock2D"),
            "mid_block_type": None,
        },
        {"down_block_types": ("DownBlock2D", "SimpleCrossAttnDownBlock2D")},
    ],
)
def test_a_unet_that_computes_something_else_is_left_to_its_pipeline(changes):
    assert not is_plain(unet(**changes).config)


@pytest.mark.skipif(lacking_for_compilation("cpu") is not None, reason="needs a C++ compiler and Python's headers")
def test_our_unet_is_compiled_whole_and_computes_the_same():
    torch.compiler.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()

    compiled = evaluated(unet(), (8, 8), reproducible)

    assert counters["stats"]["unique_graphs"] == 2  # all of it, and the shallow end
    assert not counters["graph_break"]
    torch.compiler.reset()
    plain = evaluated(unet(), (8, 8))
    for each in ("both", "shallow"):
        torch.testing.assert_close(compiled[each], plain[each], rtol=1e-4, atol=1e-5)
