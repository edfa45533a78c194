import torch
from torch import nn

from fgl_app.synthesis.packing import pack


def test_packed_layers_multiply_as_before(generator):
    layers = nn.Sequential(nn.Linear(24, 40), nn.Sequential(nn.GELU(), nn.Linear(40, 7, bias=False)))
    values = torch.randn(3, 24, 5, generator=generator).transpose(1, 2)  # as attention passes them: not contiguous
    with torch.inference_mode():
        expected = layers(values)
        pack(layers)

        torch.testing.assert_close(layers(values), expected)


def test_only_plain_layers_of_fp32_are_packed():
    class Scaled(nn.Linear):
        def forward(self, values):
            return 2 * super().forward(values)

    layers = nn.Sequential(nn.Linear(4, 4), Scaled(4, 4), nn.Linear(4, 4).bfloat16(), nn.Conv2d(4, 4, 1))
    packs = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX")

    pack(layers)

    assert [type(layer).__name__ for layer in layers] == [
        "_PackedLinear" if packs else "Linear", "Scaled", "Linear", "Conv2d",
    ]  # fmt: skip
