from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from fgl_app.compilation import can_compile, lacking_for_compilation, reproducible
from fgl_app.data.images import ImageSet
from fgl_app.training import train


def test_compilation_takes_place_only_where_a_compiler_and_the_headers_of_python_are_found(tmp_path):
    tools, headers = tmp_path / "bin", tmp_path / "include"
    for folder in (tools, headers):
        folder.mkdir()
    here = {"PATH": str(tools)}
    assert "a C compiler" in (lacking_for_compilation("cuda", here, headers) or "")

    for name in ("gcc", "mycc"):
        (tools / name).touch(mode=0o755)
    assert "python3-dev" in (lacking_for_compilation("cuda", here, headers) or "")
    (headers / "Python.h").touch()

    assert lacking_for_compilation("cuda", here, headers) is None
    assert lacking_for_compilation("cuda", here | {"CC": "mycc"}, headers) is None
    absent = lacking_for_compilation("cuda", here | {"CC": "absent"}, headers)
    assert "a C compiler" in (absent or "")  # Triton calls no other
    assert "a C++ compiler" in (lacking_for_compilation("cpu", here, headers) or "")
    assert lacking_for_compilation("cpu", here | {"CXX": "mycc"}, headers) is None


@pytest.fixture
def fresh():
    """What was compiled, and warned of, by the tests before is forgotten, and what this one compiles by the next."""
    can_compile.cache_clear()
    torch.compiler.reset()
    yield
    can_compile.cache_clear()
    torch.compiler.reset()


def trained(compiled: bool) -> list[torch.Tensor]:
    """Weights after two steps."""
    generator = torch.Generator().manual_seed(0)
    data = ImageSet(torch.randint(256, (8, 3, 8, 8), generator=generator, dtype=torch.uint8), torch.arange(8) % 2)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 2))
    train(
        model, data, epochs=1, batch_size=4, learning_rate=0.01, weight_decay=0.0, augmentation="crop",
        generator=generator, device=torch.device("cpu"), compiled=compiled,
    )  # fmt: skip
    return list(model.state_dict().values())


@pytest.mark.skipif(lacking_for_compilation("cpu") is not None, reason="needs a C++ compiler and Python's headers")
def test_a_compiled_classifier_learns_the_same(fresh):
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]

    weights = trained(compiled=True)

    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > before
    for ours, plain in zip(weights, trained(compiled=False), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(lacking_for_compilation("cpu") is not None, reason="needs a C++ compiler and Python's headers")
def test_a_thread_of_its_own_may_draw_in_many_shapes(fresh):
    double = reproducible(lambda rows: rows * 2)  # for more shapes than PyTorch compiles unasked
    with ThreadPoolExecutor(1) as pool:
        doubled = [pool.submit(double, torch.ones(count)).result() for count in range(2, 14)]

    assert [int(rows.sum()) for rows in doubled] == [2 * count for count in range(2, 14)]


def test_without_a_compiler_a_classifier_trains_uncompiled_with_a_warning(fresh, monkeypatch, capsys):
    monkeypatch.setenv("CXX", "absent")

    weights = trained(compiled=True)

    assert all(torch.equal(ours, plain) for ours, plain in zip(weights, trained(compiled=False), strict=True))
    assert (
        "training: warning: nothing is compiled, and all is slower, because this machine lacks a C++ compiler"
        in capsys.readouterr().err
    )
