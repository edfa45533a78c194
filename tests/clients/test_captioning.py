import pytest
import torch

from clients.captioning import Blip2Captioner
from clients.prompting import write_prompts
from fgl_app.data.digits import CLASS_NAMES
from fgl_app.data.sources import digits_split
from fgl_app.errors import ModelError


def load(source: str = "tiny", batch_size: int = 64) -> Blip2Captioner:
    return Blip2Captioner(source, revision="", batch_size=batch_size, max_new_tokens=32, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def captioner() -> Blip2Captioner:
    return load()


def test_captions_of_private_digits_name_their_class_and_style(captioner, settings):
    data = digits_split(settings.data, "validation")

    captions = captioner(data.images)

    named = [CLASS_NAMES[label] in caption for label, caption in zip(data.labels.tolist(), captions, strict=True)]
    assert sum(named) / len(named) > 0.6  # at 8 x 8 pixels; nothing but the image tells it
    assert all(any(word in caption for word in ("thin", "medium", "bold")) for caption in captions)
    assert len(set(captions)) > 20


def test_the_image_decides_the_caption(captioner):
    assert captioner(torch.zeros(1, 3, 16, 16, dtype=torch.uint8)) != captioner(
        torch.full((1, 3, 16, 16), 255, dtype=torch.uint8)
    )


def test_a_caption_does_not_depend_on_the_batch(captioner, settings):
    images = digits_split(settings.data, "validation").images[:10]

    assert load(batch_size=3)(images) == captioner(images)


def test_instance_prompts_are_distinct_with_counts(captioner, settings):
    data = digits_split(settings.data, "validation")

    prompts = write_prompts(
        data, CLASS_NAMES, class_template="{class}", instance_template="{class}, {caption}", captioner=captioner
    )

    assert sum(item.count for item in prompts) == len(data)
    assert len({(item.label, item.prompt) for item in prompts}) == len(prompts)
    assert all(item.prompt.startswith(f"{CLASS_NAMES[item.label]}, a ") for item in prompts)


def test_a_folder_that_is_no_captioner_is_refused(tmp_path):
    with pytest.raises(ModelError, match="`captioner`"):
        load(str(tmp_path))
