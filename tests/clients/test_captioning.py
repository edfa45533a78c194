import pytest
import torch

from clients.captioning import CachedCaptioner, HubCaptioner
from clients.defences import caption_filter
from clients.prompting import write_prompts
from fgl_app.cards import load_card
from fgl_app.data.images import ImageSet
from fgl_app.data.sources import load_split
from fgl_app.errors import ModelError
from fgl_app.privacy.prompt_leaks import public_words

CLASS_NAMES = load_card("digits").class_names()


def load(source: str = "tiny") -> HubCaptioner:
    return HubCaptioner(source, revision="", dtype="auto", max_new_tokens=32, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def captioner() -> HubCaptioner:
    return load()


def test_captions_of_private_digits_name_their_class_and_style(captioner, settings):
    data = load_split(settings.card, settings.data, "validation", 0)

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
    images = load_split(settings.card, settings.data, "validation", 0).images[:10]

    assert [caption for image in images for caption in captioner(image[None])] == captioner(images)


def test_instance_prompts_are_distinct_with_counts(captioner, settings):
    data = load_split(settings.card, settings.data, "validation", 0)

    prompts = write_prompts(
        data, CLASS_NAMES, form_of=settings.prompt_form, domains=(), num_prompts_per_class=1, captioner=captioner
    )

    assert sum(item.count for item in prompts) == len(data)
    assert len({(item.label, item.prompt) for item in prompts}) == len(prompts)
    assert all(item.prompt.startswith(f"{CLASS_NAMES[item.label]}, a ") for item in prompts)


@pytest.mark.parametrize(
    "caption",
    [
        "mail jane@\u200bexample.org",
        "mail jane@\u200dexample.org",
        "mail ja\ufe0fne@exam\u180bple.org",
        "mail jane\uff20example\uff0eorg",
        "call 0171\u2060 555 0123 now",
        "seen by maria  gonzalez",
    ],
)
def test_what_hides_in_odd_characters_is_scrubbed_as_well(settings, caption):
    data = ImageSet(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.tensor([0]))
    names = settings.card.prompt_names(settings.card.class_names())
    defend = caption_filter(public_words(settings.public_texts(names)), scrubbing="on", vocabulary_file="", max_words=0)

    (prompt,) = write_prompts(
        data, names, form_of=settings.prompt_form, domains=(), num_prompts_per_class=1,
        captioner=lambda images: [caption], defend=defend,
    )  # fmt: skip

    for private in ("jane", "example", "0171", "0123", "gonzalez"):
        assert private not in prompt.prompt


def test_a_folder_that_is_no_captioner_is_refused(tmp_path):
    with pytest.raises(ModelError, match="`captioner`"):
        load(str(tmp_path))


def test_captions_are_kept_by_the_images_hash_so_that_an_interruption_resumes(tmp_path):
    images = torch.arange(5 * 3 * 8 * 8, dtype=torch.int64).remainder(251).to(torch.uint8).reshape(5, 3, 8, 8)
    seen: list[int] = []

    def stop_after_two_batches(batch: torch.Tensor) -> list[str]:
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(len(batch))
        return [f"caption {int(image.sum())}" for image in batch]

    def cached(captioner) -> CachedCaptioner:
        return CachedCaptioner(lambda: captioner, identity=("a", 1), batch_size=2, folder=tmp_path)

    with pytest.raises(KeyboardInterrupt):
        cached(stop_after_two_batches)(images)
    (kept,) = tmp_path.iterdir()
    kept.write_bytes(kept.read_bytes() + b'\n["cut sho')
    rest: list[int] = []
    captions = cached(lambda batch: rest.append(len(batch)) or [f"caption {int(i.sum())}" for i in batch])(images)

    assert (seen, rest) == ([2, 2], [1])
    assert captions == [f"caption {int(image.sum())}" for image in images]
    assert kept.stat().st_mode & 0o777 == 0o600
    assert cached(None)(images) == captions  # nothing is loaded where nothing is missing


def test_kept_captions_with_odd_line_ends_are_read_and_lines_that_are_none_passed_over(tmp_path):
    image = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    caption = "a line\u2028separator, a next\u0085line and [1, 2]"

    def cached(captioner) -> CachedCaptioner:
        return CachedCaptioner(lambda: captioner, identity=("c",), batch_size=8, folder=tmp_path)

    cached(lambda batch: [caption])(image)
    (kept,) = tmp_path.iterdir()
    lines = kept.read_text("utf-8")
    for line in ("5", '["one"]', '["key", 3]', '{"a": 1, "b": 2}', '"ab"', "[1, 2, 3]", "[" * 100_000):
        kept.write_text(f"{line}\n{lines}\n{line}", "utf-8")

        assert cached(None)(image) == [caption]  # it was read: nothing is loaded


def test_equal_images_are_captioned_once(tmp_path):
    asked: list[int] = []
    cached = CachedCaptioner(
        lambda: lambda batch: asked.append(len(batch)) or ["same"] * len(batch),
        identity=("b",),
        batch_size=8,
        folder=tmp_path,
    )

    assert cached(torch.zeros(6, 3, 8, 8, dtype=torch.uint8)) == ["same"] * 6
    assert asked == [1]


def test_captioning_batches_shrink_when_memory_runs_out(captioner, settings, tmp_path):
    images = load_split(settings.card, settings.data, "validation", 0).images[:7]
    sizes: list[int] = []

    def room_for_three(batch: torch.Tensor) -> list[str]:
        if len(batch) > 3:
            raise torch.OutOfMemoryError
        sizes.append(len(batch))
        return captioner(batch)

    def cached(inner, name: str) -> list[str]:
        return CachedCaptioner(lambda: inner, identity=(name,), batch_size=4, folder=tmp_path)(images)

    assert cached(room_for_three, "small") == captioner(images)
    assert sizes == [2, 2, 2, 1]

    def no_room(batch: torch.Tensor) -> list[str]:
        raise torch.OutOfMemoryError

    with pytest.raises(ModelError, match="one image at a time"):
        cached(no_room, "none")
