"""The settings of a run as frozen dataclasses; ``config`` makes them of the run configuration and checks them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from fgl_app.cards import Card, PromptForm

RunConfigValue = bool | int | float | str
TRACKERS = ("tensorboard", "wandb", "mlflow")


@dataclass(frozen=True)
class RunSettings:
    """What is run and where the results go."""

    method: Literal["fgl", "gpt-fl", "fedavg", "centralized"]
    """``fgl``: prompts, synthesis, pre-training, rounds; ``gpt-fl``: the same with prompts written on the server;
    ``fedavg``: rounds only; ``centralized``: all real data in one place."""
    run_name: str
    """Folder of the run below ``output-dir``; the same name resumes."""
    output_dir: str
    """Absolute path, or one that begins with ``~``."""
    store_dir: str
    """Folder of the synthetic images; empty for ``synthetic/`` of the run. Runs with equal prompts and synthesis
    settings that share one draw their images once."""
    trackers: str
    """Where metrics go besides the run folder: ``tensorboard``, ``wandb``, ``mlflow``, separated by commas. MLflow
    writes ``mlflow.db`` into the run's folder where ``MLFLOW_TRACKING_URI`` is not set."""
    seed: int
    """Seed of everything random, also of which private images of a card are for training, validation and test."""
    num_clients: int
    """Clients of the federation."""
    num_server_rounds: int
    """Rounds as the paper counts them: 1 = one-shot, 5 = prompt round and 4 FedAvg rounds."""
    device: str
    """``auto``, ``cpu``, ``cuda`` or ``cuda:N``."""


@dataclass(frozen=True)
class DataSettings:
    """The clients' data."""

    dataset: str
    """A shipped card, the absolute path of a card or of a folder with one folder of images per class, or ``folder``:
    each node's own images, from its node-config."""
    data_dir: str
    """Absolute folder where the card's data lie; empty for the library's download into the cache."""
    class_names: str
    """Class names, separated by commas, for ``folder``; empty there for the union of the clients' own."""
    image_size: int
    """Side of the classifier's input, px; 0 for the card's."""
    max_train_images: int
    """Use this many training images of all clients together, chosen by the seed; 0 for all."""
    partition: Literal["iid", "dirichlet", "pathological", "shards", "domain"]
    """How the training images are divided over the clients; ``domain``: one domain each."""
    dirichlet_beta: float
    """Concentration of the Dirichlet partition, > 0; small is skewed."""
    classes_per_client: int
    """Classes of each client in the pathological partition."""
    shards_per_client: int
    """Shards of each client, of images sorted by class, in the partition by shards."""
    min_samples_per_client: int
    """A random partition is drawn again until every client has this many images; 0 for no such rule."""


@dataclass(frozen=True)
class PromptSettings:
    """What the generator is asked for, and who says it."""

    prompt_source: Literal["auto", "clients", "server"]
    """``clients``: from their images; ``server``: from class names alone; ``auto``: as the method says."""
    prompt_level: Literal["class", "instance", "embedding"]
    """``class``: the classes held; ``instance``: a caption of every image; ``embedding``: captions as the generator's
    text encoder sees them."""
    num_prompts_per_class: int
    """Templates per class and domain (class level), or prompts that the server writes per class."""
    class_prompt: str
    """Template with ``{class}`` or ``{a class}``, and ``{domain}`` for the name of an image's domain; ``card`` for the
    card's."""
    instance_prompt: str
    """Template with ``{class}`` and ``{caption}``, and ``{domain}`` as above; ``card`` for the card's."""
    captioner: str
    """``tiny`` (shipped), a hub id or a folder of an image-to-text model; a node's own ``captioner`` wins."""
    captioner_revision: str
    """Git revision of a hub id; empty for the newest."""
    captioner_dtype: Literal["auto", "float32", "bfloat16", "float16", "4bit"]
    """Arithmetic of the captioner; ``auto``: bfloat16 on a GPU, float32 on a CPU; ``4bit`` needs bitsandbytes or
    torchao."""
    captioning_batch_size: int
    """Images captioned at a time."""
    max_new_tokens: int
    """Longest caption, or prompt of the prompt writer, tokens."""
    prompt_writer: str
    """Who writes the server's prompts: ``templates`` of the card, or a causal language model by hub id or folder."""
    prompt_writer_revision: str
    """Git revision of a hub id; empty for the newest."""
    embedding_summary: Literal["none", "mean", "clusters"]
    """What a client sends of its embeddings: each, or with noise one for each image, one mean per class, or centres of
    clusters per class."""
    embedding_clusters: int
    """Centres per class."""
    embedding_clip: float
    """Largest norm of one embedding; 0 for no clipping."""
    embedding_epsilon: float
    """Epsilon of the Gaussian mechanism on embeddings, for replacing the prompt of one image by another of its class;
    0 for no noise."""
    embedding_delta: float
    """Delta of the Gaussian mechanism."""

    @property
    def noises_each_image(self) -> bool:
        """Whether each image has a noised embedding of its own: one for each prompt would tell which are equal."""
        return self.prompt_level == "embedding" and self.embedding_summary == "none" and self.embedding_epsilon > 0


@dataclass(frozen=True)
class SynthesisSettings:
    """How the synthetic training set is drawn."""

    generator: str
    """``tiny`` (shipped), a hub id or a folder of a text-to-image pipeline."""
    generator_revision: str
    """Git revision of a hub id; empty for the newest."""
    images_per_class: int
    """Images drawn per class."""
    prompt_budget: Literal["proportional", "uniform"]
    """How the images of a class are spread over its prompts: by the prompts' counts, or evenly."""
    profile: Literal["paper", "balanced", "turbo"]
    """A named set of the settings that follow, each of which overrides it: ``paper``: the card's steps and guidance;
    ``balanced``: fewer steps of a better solver; ``turbo``: four steps, for a ``lora`` that was distilled for them."""
    scheduler: Literal["card", "own", "ddim", "pndm", "dpm-solver++", "unipc", "euler", "lcm", "tcd"]
    """Solver of the denoising; ``own``: the pipeline's; ``card``: the profile's or the card's."""
    num_inference_steps: int
    """Denoising steps; 0 for the profile's or the card's."""
    guidance_scale: float
    """Classifier-free guidance; 1 is none, -1 the profile's or the card's."""
    guidance_start: float
    """Share of the steps before guidance begins, 0 to 1; -1 for the profile's."""
    guidance_stop: float
    """Share of the steps after which guidance ends, 0 to 1; -1 for the profile's."""
    deep_cache_interval: int
    """The deep layers of Stable Diffusion's UNet are evaluated at every so manieth step; 0 for the profile's."""
    lora: str
    """Hub id or folder of LoRA weights, fused into the generator; empty for none."""
    decoder: str
    """Hub id or folder of an ``AutoencoderTiny`` in the place of the generator's decoder; empty for none."""
    negative_prompt: str
    """What the generator is steered away from; may be empty; ``card`` for the card's, by domain."""
    safety_checker: bool
    """Whether images that the generator's own safety checker flags are drawn again, and left out in the end."""
    filter: str
    """Hub id or folder of an image classifier or a zero-shot model (CLIP, SigLIP); an image that it takes for another
    class is drawn again, and left out in the end. Empty for none."""
    filter_revision: str
    """Git revision of a hub id; empty for the newest."""
    filter_attempts: int
    """Times that a rejected image is drawn again, from other noise."""
    generation_size: int
    """Side at which images are drawn, px; 0 for the card's, or else the pipeline's own."""
    stored_size: int
    """Images larger than this are reduced to it before they are stored, px."""
    synthesis_device: str
    """Where images are drawn: ``auto``: as ``device`` says; else ``cpu``, ``cuda`` or ``cuda:N``, for a server without
    a GPU whose images are drawn on another machine (``ray-address``, ``synthesis-wait-s``)."""
    synthesis_batch_size: int
    """Images drawn at a time on a GPU, a divisor of the 64 images of a unit; a CPU always draws 64, so that not even
    rounding depends on it."""
    synthesis_workers: int
    """Actors of Ray that draw, one GPU each where there are any; 0 is one worker process without Ray."""
    ray_address: str
    """Cluster of Ray for the actors; empty for actors on this machine."""
    synthesis_wait_s: float
    """If positive, the server draws nothing, but waits until ``fgl synthesize``, started elsewhere, has filled the
    store, and gives up when nothing was added for so many seconds."""


@dataclass(frozen=True)
class TrainingSettings:
    """The classifier, its optimisation on the server and on the clients, and the aggregation."""

    model: str
    """A torchvision classifier by name, or ``cnn``, McMahan's two convolutions, which has at most 2.2 million weights
    (8.6 MB), whatever the size of the images. Clients get and send the whole model in each round; a start says how
    much that is."""
    initial_weights: str
    """``random``, ``imagenet`` (torchvision's), or the absolute path of a run's checkpoint. On the same card that run
    must have the same ``seed``, which divides the images, unless its weights are a one-shot model's."""
    strategy: str
    """A strategy of Flower by the name of its class."""
    strategy_options: str
    """Its parameters, e.g. ``eta=0.1 tau=0.01``."""
    weighting: Literal["examples", "uniform"]
    """Weights of the mean: the clients' numbers of images, or equal ones (FGL, Eq. 4)."""
    fraction_train: float
    """Share of the clients that train in each round, drawn anew each time."""
    augmentation: Literal["card", "none", "crop", "crop-flip"]
    """Random resized crop of 0.75 to 1 of the area, and a horizontal flip."""
    batch_size: int
    """Images per SGD step."""
    compile_training: bool
    """Whether a classifier is compiled before it trains, by DP-SGD excepted: a minute that pays on a GPU."""
    server_epochs: int
    """Epochs of pre-training on the synthetic set."""
    server_finetune_epochs: int
    """Epochs on the synthetic set after each aggregation; 0 for none."""
    server_learning_rate: float
    """SGD step size on the server."""
    server_schedule: Literal["constant", "cosine"]
    """Step size during the server's training: ``constant`` as in the paper, or falling to zero along a cosine."""
    local_epochs: int
    """Epochs of each client in each round."""
    learning_rate: float
    """SGD step size on the clients."""


@dataclass(frozen=True)
class PolicySettings:
    """How long the server waits for the clients, and what it accepts of them."""

    min_clients: int
    """Quorum: so many clients must be connected when ``connect-timeout-s`` is over, and so many usable replies must
    come in every exchange, or all where fewer are asked; else the run ends, and keeps what it has. 0: all of
    ``num-clients`` must be connected, and one usable reply is enough."""
    connect_timeout_s: float
    """Seconds to wait for the clients to connect."""
    prompt_deadline_s: float
    """Seconds to wait for the clients' prompts; captioning may take hours. Prompts that come later, but before all
    images are drawn, are merged."""
    round_deadline_s: float
    """Seconds to wait for the replies in a round; slower clients are left out of it."""
    max_prompts_per_client: int
    """Distinct prompts accepted of one client, which sends those that stand for most images."""
    max_prompt_chars: int
    """Longest prompt, characters: clients cut what their captioner says behind it, and the server accepts no longer
    one. A prompt of a class name must fit."""
    max_classes: int
    """Most classes where the label space is the union of the clients' class names; what would exceed it is refused,
    of the clients that name most classes first."""
    blocked_words: str
    """Words and phrases, separated by commas, that no prompt may hold, or the absolute path of a file with one per
    line."""
    max_client_share: float
    """Largest share of a class's images that the prompts of one client may claim, > 0 to 1; 1 is no limit. A class
    that one client holds alone stays its own."""
    max_update_norm: float
    """Largest L2 norm of a client's update, over all trained weights. 0: the weights may become 10 times as large as
    they were sent, by their norm, which no sound training does. BatchNorm's statistics may always grow 1000 times."""


@dataclass(frozen=True)
class PrivacySettings:
    """Defences, all off by default; SECURITY.md says what each one stops."""

    scrub: Literal["off", "on", "strict"]
    """What clients remove from captions: ``on``: contacts, numbers, names and places; ``strict``: rare words, too."""
    caption_vocabulary: str
    """Absolute path, on each client, of a text file with the words that captions may hold, one per line; all others
    are removed. Empty for any."""
    max_caption_words: int
    """Captions are cut behind so many words; 0 for no cut."""
    prompt_counts: Literal["exact", "noised", "withheld"]
    """Numbers of images that clients report with their prompts: ``noised``: discrete Laplace noise, and prompts whose
    noised count is small are not sent; ``withheld``: all 1."""
    counts_epsilon: float
    """Epsilon of noised counts, for adding or removing one image; replacing one costs twice as much."""
    counts_delta: float
    """Delta of noised counts: the probability that a prompt of one image is sent at all."""
    classes_epsilon: float
    """Randomized response on which classes a client holds, epsilon per class, of which adding or removing one image
    changes one at most; 0 for the truth."""
    require_approval: bool
    """Whether prompts wait on each client until its owner approves them with ``fgl approve``; without an approval the
    client takes no part in the rounds either."""
    min_clients_per_prompt: int
    """A caption is used only if so many clients sent it or one that differs in case, digits and punctuation alone;
    otherwise the class's own prompt takes its place."""
    retain_prompts: bool
    """Whether the server keeps the prompts after the images are drawn."""
    client_dp: Literal["off", "fixed", "adaptive", "client-fixed", "client-adaptive"]
    """Differential privacy of each client's whole data in the rounds, by Flower's strategies: clipping on the server or
    on the clients, to a fixed norm or to an adaptive one."""
    client_dp_noise: float
    """Noise multiplier: standard deviation of the noise on the sum of updates, in clipping norms. Epsilon is that of
    zeroing one client out, against all others together."""
    client_dp_clip: float
    """Clipping norm of an update; the first one where it is adaptive."""
    example_dp_noise: float
    """Noise multiplier of DP-SGD on the clients; epsilon is that of zeroing out one training image. 0 for ordinary
    SGD."""
    example_dp_clip: float
    """Clipping norm of the gradient of one image in DP-SGD."""
    dp_delta: float
    """Delta at which the epsilon of the rounds is stated."""


@dataclass(frozen=True)
class Settings:
    """Everything that a run was asked for, with the card's values where it left them to the card."""

    run: RunSettings
    data: DataSettings
    prompts: PromptSettings
    synthesis: SynthesisSettings
    training: TrainingSettings
    policy: PolicySettings
    privacy: PrivacySettings
    card: Card

    def flat(self) -> dict[str, RunConfigValue]:
        """Return the settings as the user would type them: kebab-case keys, sections dissolved."""
        return {
            field.name.replace("_", "-"): getattr(getattr(self, name), field.name)
            for name, section in SECTIONS.items()
            for field in dataclasses.fields(section)
        }

    @property
    def prompts_from_server(self) -> bool:
        """Whether the server writes the prompts itself (GPT-FL)."""
        return self.run.method == "gpt-fl" or self.prompts.prompt_source == "server"

    @property
    def synthesizes(self) -> bool:
        """Whether the method draws a synthetic set."""
        return self.run.method in ("fgl", "gpt-fl")

    @property
    def own_folders(self) -> bool:
        """Whether each node holds images of its own, so that the server has none to evaluate on."""
        return self.data.dataset == "folder"

    def prompt_form(self, domain: str | None = None) -> PromptForm:
        """Return how prompts of a domain are written: the card's form, overridden by the run configuration."""
        form = self.card.form_of(domain)

        def of_domain(text: str) -> str:
            return text.replace("{domain}", domain or "")

        if self.prompts.class_prompt != "card":
            form = dataclasses.replace(form, class_templates=(of_domain(self.prompts.class_prompt),))
        if self.prompts.instance_prompt != "card":
            form = dataclasses.replace(form, instance_template=of_domain(self.prompts.instance_prompt))
        if self.synthesis.negative_prompt != "card":
            form = dataclasses.replace(form, negative=of_domain(self.synthesis.negative_prompt))
        return form

    def public_texts(self, class_names: Iterable[str]) -> list[str]:
        """Return what anybody may know of the clients' prompts: the names of classes and domains, the templates.

        The styles are left out: no client writes them, and who allows a few words only has not allowed theirs.
        """
        names = list(class_names)
        forms = [self.prompt_form(domain) for domain in (None, *self.card.domains)]
        templates = [text for form in forms for text in (*form.class_templates, form.instance_template)]
        return [*names, *self.card.prompt_names(names), *self.card.domains, *templates]


SECTIONS = {
    "run": RunSettings,
    "data": DataSettings,
    "prompts": PromptSettings,
    "synthesis": SynthesisSettings,
    "training": TrainingSettings,
    "policy": PolicySettings,
    "privacy": PrivacySettings,
}
"""The parts of :class:`Settings` that hold keys of the run configuration."""


def tracker_names(trackers: str) -> list[str]:
    """Split the value of ``trackers``."""
    return [name.strip() for name in trackers.split(",") if name.strip()]
