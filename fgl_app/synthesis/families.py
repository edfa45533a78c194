"""What a generator's pipeline can be asked for, known from its configuration and its class before a weight is loaded.

Pipelines differ in what they call the guidance scale and in what they do without. A setting that a pipeline would
ignore is refused or left out, so that no image's identity depends on it.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fgl_app import tiny
from fgl_app.errors import ConfigError
from fgl_app.foundation_models import locate, pipeline_parts, read_json
from fgl_app.synthesis.plan import LARGE_ENOUGH, UNJUDGED_ATTEMPTS, DrawSettings
from fgl_app.synthesis.unet import is_plain

SOLVERS = {
    "ddim": "DDIMScheduler",
    "pndm": "PNDMScheduler",
    "dpm-solver++": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "lcm": "LCMScheduler",
    "tcd": "TCDScheduler",
}
"""Class of each value of ``scheduler``; :data:`fgl_app.synthesis.solvers.SCHEDULERS` holds the classes themselves."""
_EMBEDDED = ("Flux", "Flux2", "LatentConsistencyModel")
"""Families whose network is told the guidance scale, instead of being evaluated for two texts."""
_FROM_ZERO = ("ZImage", "ZImageOmni", "Krea2")
"""Families that count guidance from 0, where all others, and our settings, say 1 for none."""
_NOISE_SCHEDULERS = frozenset({
    *SOLVERS.values(), "DDPMScheduler", "DEISMultistepScheduler", "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler", "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler", "LMSDiscreteScheduler",
})  # fmt: skip
"""Schedulers in whose place another may stand, because all of them take out noise of one schedule."""
_LONGEST_TEXT = 100_000
"""Tokens; a tokenizer that knows no limit of its own claims 1e30."""
_DISTILLED_STEPS = 50
"""Steps of which LCM and TCD take some, unless their configuration names another number."""
_TURNED_OFF = ("clean_caption", "use_resolution_binning")
"""Options that a call turns off: the first cleans texts only where two more packages are installed, the second draws
at another size than was asked for."""
_PLAIN_CALL = ("guidance_scale", 0.0, ())


@dataclass(frozen=True)
class Family:
    """What the pipeline of a generator can be asked for."""

    name: str
    """Class of the pipeline."""
    own_loop: bool
    """Whether our own loop draws its images: the only one that knows guidance windows and DeepCache."""
    guidance: str
    """Argument of a call that takes the guidance scale; empty if there is none."""
    guidance_offset: float
    """What is added to the guidance scale: -1 where a pipeline counts from 0."""
    is_embedded: bool
    """Whether the network is told the guidance scale, so that 1 is a value like any other."""
    takes_negative: bool
    """Whether negative prompts have an effect."""
    turned_off: tuple[str, ...]
    """Options that a call turns off."""
    parameters: frozenset[str]
    """Arguments of a call; empty for our own loop."""
    scheduler: str
    """Class of the pipeline's own scheduler; empty if it has none."""
    solver: str
    """Class of the scheduler that draws."""
    matches_flows: bool
    """Whether its network predicts flows, which other solvers would take for noise."""
    max_steps: int
    """Most denoising steps that the chosen solver can make; 0 if there is no limit."""
    size_factor: int
    """What a side that our own loop draws must be a multiple of; 1 for other pipelines, which say so themselves."""
    own_size: int
    """Side at which our own loop draws where no other is asked for, px; 0 for other pipelines."""
    components: Mapping[str, tuple[str, str]]
    """Library and class of the parts with weights."""

    @property
    def needs_negative(self) -> bool:
        """Whether guidance needs a negative prompt, be it an empty one."""
        return self.guidance == "true_cfg_scale"

    def check_solver(self, scheduler: str, num_inference_steps: int) -> None:
        """Check that a solver can take the place of the pipeline's own and make so many steps.

        Args:
            scheduler: A key of :data:`SOLVERS`, or ``own``.
            num_inference_steps: Denoising steps.

        Raises:
            ConfigError: If it cannot.
        """
        if scheduler != "own" and self.matches_flows:
            raise ConfigError(
                f"`scheduler` must be own for a generator that matches flows, as {self.name} does here, but is "
                f"{scheduler}. Use scheduler=own, and with profile=balanced set num-inference-steps, too."
            )
        if scheduler != "own" and self.scheduler not in _NOISE_SCHEDULERS:
            raise ConfigError(
                f"`scheduler` {scheduler} cannot take the place of {self.scheduler or 'none'}, the solver of "
                f"{self.name}. Use scheduler=own."
            )
        if self.max_steps and num_inference_steps > self.max_steps:
            raise ConfigError(
                f"`num-inference-steps` must be at most {self.max_steps} for the solver {self.solver} of this "
                f"generator, but is {num_inference_steps}. Use fewer steps or another `scheduler`."
            )

    def is_guided(self, settings: DrawSettings) -> bool:
        """Return whether two texts are told apart at all: whether a negative prompt and a guidance window count."""
        windowed = settings.guidance_start < settings.guidance_stop or not self.own_loop
        return bool(self.guidance) and not self.is_embedded and settings.guidance_scale > 1 and windowed

    def effective(self, settings: DrawSettings) -> DrawSettings:
        """Return settings in which everything that this family ignores is as if nobody had set it."""
        neutral: dict[str, Any] = {}
        if not (self.is_guided(settings) or self.is_embedded):
            neutral["guidance_scale"] = 1.0
        if not self.own_loop:
            neutral |= {"guidance_start": 0.0, "guidance_stop": 1.0, "deep_cache_interval": 1}
        if not (settings.filter or settings.safety_checker):
            neutral |= {"filter_revision": "", "filter_attempts": UNJUDGED_ATTEMPTS}
        side = settings.generation_size or self.own_size
        if 0 < side <= settings.stored_size:  # no image is enlarged
            neutral["stored_size"] = max(side, LARGE_ENOUGH)
        return dataclasses.replace(settings, **neutral, call=self.call)

    def negatives(self, settings: DrawSettings, negatives: Mapping[str, str]) -> dict[str, str]:
        """Return negative prompts as this family draws with them: empty where they have no effect."""
        counts = self.takes_negative and self.is_guided(settings)
        return {domain: text if counts else "" for domain, text in negatives.items()}

    @property
    def call(self) -> str:
        """Say in what a call differs from that of Stable Diffusion's pipeline; empty if in nothing."""
        told = (self.guidance, self.guidance_offset, self.turned_off)
        if self.own_loop or told == _PLAIN_CALL:
            return ""
        return f"{self.guidance}{self.guidance_offset:+g};{','.join(self.turned_off)}"

    def options(self, settings: DrawSettings) -> dict[str, Any]:
        """Return the arguments of a call that are the same for every image."""
        options: dict[str, Any] = {"num_inference_steps": settings.num_inference_steps, "output_type": "pt"}
        options |= dict.fromkeys(self.turned_off, False)
        if settings.generation_size:
            options |= {"height": settings.generation_size, "width": settings.generation_size}
        if self.guidance:
            options[self.guidance] = settings.guidance_scale + self.guidance_offset
        if "guidance_schedule" in self.parameters:  # Ideogram's own, which excludes a scale
            options["guidance_schedule"] = None
        return options


def read_family(generator: str, revision: str, scheduler: str = "own") -> Family:
    """Find out what a generator can be asked for.

    Args:
        generator: ``tiny``, a folder that ``save_pretrained`` of the pipeline wrote, or a hub id.
        revision: Git revision of a hub id; empty for the newest.
        scheduler: Solver that takes the place of the pipeline's own; ``own`` for none.

    Raises:
        ConfigError: If it is no text-to-image pipeline that diffusers loads.
    """
    path, pinned = locate(generator, revision, tiny.DIFFUSION)

    def read(name: str) -> Any:
        return read_json(path, pinned, name)

    try:
        index = read("model_index.json")
        return _family_of(index, read, scheduler)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"`generator` must be a text-to-image pipeline that diffusers loads, but {generator!r} is not "
            f'({type(error).__name__}: {error}). Use "tiny" or a folder or hub id with safetensors weights.'
        ) from None


def _family_of(index: Mapping[str, Any], read: Callable[[str], Any], scheduler: str) -> Family:
    components = pipeline_parts(index)
    _check_tokenizers(index, components, read)
    entry = index.get("scheduler") or [None, None]
    own = str(entry[1] or "")
    solving = read("scheduler/scheduler_config.json") if own else {}
    chosen = own if scheduler == "own" else SOLVERS[scheduler]
    network = next((name for name in ("unet", "transformer") if name in components), "")
    config = read(f"{network}/config.json") if network else {}
    name = str(index["_class_name"])
    distilled = chosen in ("LCMScheduler", "TCDScheduler")
    common: dict[str, Any] = {
        "scheduler": own,
        "solver": chosen,
        "matches_flows": own.startswith("FlowMatch") or solving.get("prediction_type") == "flow_prediction",
        "max_steps": int(solving.get("original_inference_steps") or _DISTILLED_STEPS) if distilled else 0,
        "components": components,
    }
    is_ours = name == "StableDiffusionPipeline" and components["unet"][1] == "UNet2DConditionModel"
    if is_ours and is_plain(config) and isinstance(config.get("sample_size"), int) and _is_linear(chosen, solving):
        factor = 2 ** (len(read("vae/config.json").get("block_out_channels", [0])) - 1)
        return Family(
            name, True, "guidance_scale", 0.0, False, True, (), frozenset(),
            size_factor=factor, own_size=config["sample_size"] * factor, **common,
        )  # fmt: skip
    name, parameters = _signature(name)
    guidance, is_embedded = _guidance_of(name, parameters, index, config)
    return Family(
        name=name,
        own_loop=False,
        guidance=guidance,
        guidance_offset=-1.0 if name.removesuffix("Pipeline") in _FROM_ZERO else 0.0,
        is_embedded=is_embedded,
        takes_negative="negative_prompt" in parameters and bool(guidance) and not is_embedded,
        turned_off=tuple(option for option in _TURNED_OFF if option in parameters),
        parameters=frozenset(parameters),
        size_factor=1,
        own_size=0,
        **common,
    )


def _check_tokenizers(index: Mapping[str, Any], components: Mapping[str, Any], read: Callable[[str], Any]) -> None:
    """Raise ValueError if a text encoder has no tokenizer, or one that does not know where to cut a text."""
    if "text_encoder" in components and "tokenizer" in index and not all(index["tokenizer"]):
        raise ValueError("it has a text encoder and no tokenizer")
    for name, entry in index.items():
        if isinstance(entry, list) and str(entry[-1]).startswith("CLIPTokenizer"):
            longest = read(f"{name}/tokenizer_config.json").get("model_max_length")
            if not (isinstance(longest, int) and longest <= _LONGEST_TEXT):
                raise ValueError(f"{name}/tokenizer_config.json must name a model_max_length such as 77")


def _signature(name: str) -> tuple[str, Mapping[str, inspect.Parameter]]:
    """Return the class that draws from texts with the parts of pipeline ``name``, and the arguments of its calls."""
    from diffusers.pipelines.auto_pipeline import AUTO_TEXT2IMAGE_PIPELINES_MAPPING, _get_task_class

    kind = _get_task_class(AUTO_TEXT2IMAGE_PIPELINES_MAPPING, name)
    return kind.__name__, call_parameters(kind)


def call_parameters(kind: Any) -> Mapping[str, inspect.Parameter]:
    """Return the arguments of the calls of a pipeline's class.

    Raises:
        ValueError: If it does not make one image of one text in a given number of steps.
    """
    parameters = inspect.signature(kind.__call__).parameters
    lacking = [name for name in ("prompt", "num_inference_steps", "generator", "output_type") if name not in parameters]
    if lacking or "num_frames" in parameters or "Control" in kind.__name__:
        why = f"has no {lacking[0]}" if lacking else "makes videos" if "num_frames" in parameters else "needs an image"
        raise ValueError(f"{kind.__name__} {why}")
    return parameters


def _guidance_of(
    name: str, parameters: Mapping[str, inspect.Parameter], index: Mapping[str, Any], network: Mapping[str, Any]
) -> tuple[str, bool]:
    """Return the argument that takes the guidance scale, empty if it is ignored, and whether the network is told it."""
    if network.get("time_cond_proj_dim") is not None:  # distilled by LCM
        return "guidance_scale", True
    if "true_cfg_scale" in parameters and "guidance_scale" in parameters:
        if network.get("guidance_embeds", False):
            return "guidance_scale", True
        # Flux without it (schnell) is drawn without guidance, Qwen-Image with it.
        return ("", False) if parameters["true_cfg_scale"].default == 1 else ("true_cfg_scale", False)
    if name.removesuffix("Pipeline") in _EMBEDDED:
        return ("guidance_scale", True) if network.get("guidance_embeds", True) else ("", False)
    if index.get("is_distilled") and "negative_prompt" not in parameters:  # Flux 2 klein, distilled
        return "", False
    known = ("guidance_scale", "true_cfg_scale", "prior_guidance_scale")
    return next((argument for argument in known if argument in parameters), ""), False


def _is_linear(scheduler: str, config: Mapping[str, Any]) -> bool:
    """Return whether the scheduler's steps are linear in latents and outputs: of a known kind, without clipping."""
    clips = config.get("clip_sample", scheduler == "DDIMScheduler")  # the only one that does by default
    return scheduler in SOLVERS.values() and not clips and not config.get("thresholding", False)
