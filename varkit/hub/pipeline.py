"""What users hold: a tokenizer, an order, a generator and its head, ready to make pictures.

    pipeline = varkit.load("scenes")
    images = pipeline.generate(["two red circles on a beige background"], seed=0)

Legend: R condition branches, B samples.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from varkit.decode.cache.base import Cache
from varkit.decode.cache.full import FullCache
from varkit.decode.loop import Model, decode, run
from varkit.decode.settings import Settings as Settings
from varkit.decode.state import Override, State
from varkit.errors import UserError, unknown_name
from varkit.files import StrPath
from varkit.generators.base import Condition
from varkit.hub.config import from_json, to_json
from varkit.hub.fit import NEEDED
from varkit.hub.folder import CONFIG, load_parts, save_parts
from varkit.hub.orders import at_size, by_schedule, diffused, refined, scheduled
from varkit.hub.prompts import Prompt, TextSource, check_source, condition_of, longest_prompt, nothing
from varkit.hub.starting import state_of
from varkit.nn.linear import pack
from varkit.nn.ports import Ports
from varkit.pictures import to_pil
from varkit.plans.scales import ScalesConfig
from varkit.plans.schedule import Schedule, Side
from varkit.tokenizers.tiled import set_tile

WEIGHTS = Path(__file__).resolve().parent.parent / "weights"
DEFAULT_BATCH = 8


@dataclass(frozen=True)
class How:
    """What a method changes in decoding, beside the parts: see `Pipeline.using`.

    cache(batch, branches, slots) makes a run's cache. ports and override are those of `varkit.decode.state.Options`;
    wrap(pick) may replace the sampler of ids. text gives features of words, padded to `tokens` of them or to the
    longest of a batch: see `Pipeline.with_text`.
    """

    cache: Callable[[int, int, int | None], Cache] = FullCache
    ports: Ports | None = None
    override: Override | None = None
    wrap: Callable[[Any], Any] = lambda pick: pick
    text: TextSource | None = None
    tokens: int | None = None


class Pipeline:
    """The parts of one model, by name, their configurations, default settings, and what is told about it.

    The parts are `tokenizer`, `plan`, `generator`, `head`, and `head_NAME` for each further route of the plan.
    """

    def __init__(
        self,
        parts: dict[str, Any],
        configs: dict[str, Any],
        settings: Settings,
        about: dict[str, Any] | None = None,
    ):
        self.parts, self.configs, self.settings, self.about = parts, configs, settings, about or {}
        self.tokenizer, self.generator = parts["tokenizer"].eval(), parts["generator"].eval()
        heads = {route: part.eval() for name, part in parts.items() if (route := route_of(name))}
        self.model = Model(parts["plan"], self.generator, heads)
        self.how = How()
        plan = configs["plan"]
        self.schedule = Schedule.parse(plan.schedule) if isinstance(plan, ScalesConfig) else None

    def using(self, **changes: Any) -> "Pipeline":
        """The same model (no weight is copied), decoded otherwise: `cache=`, `ports=`, ... of `How`."""
        other = copy(self)
        other.how = replace(self.how, **changes)
        return other

    def over(self, plan: Any) -> "Pipeline":
        """The same model by the plan of another configuration, where its generator takes any: another size or shape of
        pictures, or another number of steps.
        """
        return self.swapped({"plan": plan.build()}, {"plan": plan})

    def swapped(self, parts: Mapping[str, Any], configs: Mapping[str, Any]) -> "Pipeline":
        """The same model with some parts in place of its own, and their configurations (no weight is copied)."""
        other = Pipeline({**self.parts, **parts}, {**self.configs, **configs}, self.settings, self.about)
        other.how = self.how
        return other

    def refined(self, counts: str) -> "Pipeline":
        """The same model with other steps within scales, where it refines them: "2:1,3 3:1,1,2,5", or "none".

        Raises `UserError` for a model that does not refine, and for counts that do not make up a scale.
        """
        return refined(self, counts)

    def diffused(self, steps: int) -> "Pipeline":
        """The same model with so many steps in which a diffusion head draws a token (MAR).

        Raises `UserError` for a model without such a head, and for fewer than 2 steps or more than it has times.
        """
        return diffused(self, steps)

    def with_text(self, source: TextSource, tokens: int | None = None) -> "Pipeline":
        """The same model, where it takes features of words, reading words by a text encoder or a file of embeddings.

        Each batch is padded to its longest prompt, or to `tokens`, which makes states of any prompts alike in shape.
        Raises `UserError` for features of another width, and for a model that takes none.
        """
        check_source(self.condition, source)
        return self.using(text=source, tokens=tokens)

    def reading(self, prompts: Sequence[Prompt]) -> "Pipeline":
        """This pipeline for a run over all of `prompts`, whatever batches they come in: features are padded alike.

        Raises `UserError` for a prompt that the model does not know, before any is drawn.
        """
        source = self.how.text
        if source is None:
            self.conditions(prompts)
            return self
        return self.using(tokens=longest_prompt(self.condition, prompts, source))

    @property
    def condition(self) -> Any:
        """The configuration of what steers the model: a `ClassConfig`, `TextConfig` or `TextFeaturesConfig`."""
        return self.configs["generator"].condition

    @property
    def device(self) -> torch.device:
        """Where the generator's weights are."""
        return next(self.generator.parameters()).device

    def to(self, *args: Any, **kwargs: Any) -> "Pipeline":
        """Move or cast every part, as `torch.nn.Module.to` does."""
        for part in self.parts.values():
            if isinstance(part, torch.nn.Module):
                part.to(*args, **kwargs)
        return self

    def tiled(self, pixels: int) -> "Pipeline":
        """This pipeline, decoding pictures in tiles of pixels x pixels: less memory (`varkit.tokenizers.tiled`).

        Raises `UserError` for a size that is no multiple of the tokenizer's stride.
        """
        set_tile(self.tokenizer, pixels)
        return self

    def packed(self) -> "Pipeline":
        """This pipeline with its generator's and heads' weights laid out for oneDNN, beside themselves: faster on CPUs
        where few rows meet large weights, at twice the memory.
        """
        for part in (self.generator, *self.model.heads.values()):
            pack(part)
        return self

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of its pictures, in pixels."""
        return self.tokenizer.image_size(self.schedule)

    def sized(
        self, size: tuple[int, int] | None, greedy_unseen: bool | None = None, clamp: bool | None = None
    ) -> "Pipeline":
        """The model for pictures of (height, width) pixels, else as `scheduled`. Raises `UserError` for other sizes."""
        return at_size(self, size, greedy_unseen, clamp)

    def scheduled(
        self, schedule: Sequence[Side] | int, greedy_unseen: bool | None = None, clamp: bool | None = None
    ) -> "Pipeline":
        """The same model in another schedule, where it takes any (FlexVAR): its sides, or a number of steps, which a
        masked order takes too (MAR's iterations).

        greedy_unseen: scales of sides that training never drew take the likeliest codes (True at first). clamp: a ramp
        of guidance ends at the scale given, also in more than ten steps (False at first). Both stay as they were unless
        given. Raises `UserError` for a model of one schedule.
        """
        return scheduled(self, schedule, greedy_unseen, clamp)

    def chosen(self, given: Mapping[str, Any]) -> Settings:
        """The model's own settings with some replaced; guidance given for each step is not raised by a ramp as well.

        Raises `UserError` for those that its heads cannot use.
        """
        if not any(head.picks for head in self.model.heads.values()):
            for name in ("top_k", "top_p"):
                if given.get(name):
                    raise UserError(
                        f"{name} {given[name]} keeps the likeliest of several codes, and this model draws real "
                        "numbers; leave it out"
                    )
        if isinstance(given.get("guidance"), list | tuple):
            given = {"ramp": False, **given}
        return replace(self.settings, **given)

    def sampling(self, settings: Settings | None = None) -> Settings:
        """Settings, by default the model's own, as a run applies them: in any schedule, by its steps."""
        return by_schedule(settings or self.settings, self.configs["plan"])

    def check_size(self, size: tuple[int, int] | None) -> None:
        """Raise `UserError` for a size that this model's schedule cannot make."""
        if size is not None and size != self.size:
            (h, w), (own_h, own_w) = size, self.size
            raise UserError(
                f"size {h}x{w} cannot be made by this model; its schedule makes {own_h}x{own_w}: leave --size out"
            )

    def conditions(self, prompts: Sequence[Prompt]) -> Condition:
        """Labels, class names or captions -> the condition (1, B, ...). Raises `UserError` for what the model does
        not know.
        """
        told = condition_of(self.condition, prompts, self.how.text, self.how.tokens)
        if "features" in told:
            _check_finite(told["features"], prompts)
        return {name: values.to(self.device) for name, values in told.items()}

    def unconditional(self, batch: int) -> Condition:
        """The condition (1, B, ...) that asks for nothing."""
        like = nothing(self.condition, batch)
        return self.generator.conditioner.null({k: v.to(self.device) for k, v in like.items()})

    def start(
        self,
        prompts: Sequence[Prompt],
        seed: int = 0,
        samples: Sequence[int] | None = None,
        settings: Settings | None = None,
        negative: Prompt | None = None,
    ) -> State:
        """A decoding state for B prompts; `samples` are their numbers in the seed's stream (0 to B - 1).

        negative: what guidance leads away from, in place of nothing in particular.
        """
        numbers = range(len(prompts)) if samples is None else samples
        # Read together, since features of both are padded alike.
        asked = self.conditions(prompts if negative is None else [*prompts, negative])
        away = None
        if negative is not None:
            away = {name: values[:, -1:].expand_as(values[:, :-1]) for name, values in asked.items()}
            asked = {name: values[:, :-1] for name, values in asked.items()}
        return self.start_from(asked, seed, numbers, settings or self.settings, away)

    def start_from(
        self,
        condition: Condition,
        seed: int,
        samples: Sequence[int],
        settings: Settings,
        negative: Condition | None = None,
    ) -> State:
        """A decoding state for a condition (1, B, ...); guidance adds the null condition, or `negative`, as a second
        branch. Raises `UserError` for a negative condition without guidance.
        """
        return state_of(self, condition, seed, samples, settings, negative)

    def starts(
        self,
        prompts: Sequence[Prompt],
        seed: int = 0,
        batch_size: int = DEFAULT_BATCH,
        settings: Settings | None = None,
        samples: Sequence[int] | None = None,
        negative: Prompt | None = None,
    ) -> Iterator[State]:
        """A state for each batch of prompts, in order: prompt i draws from sample i of `seed`, whatever the batch, or
        from the i-th of `samples`.
        """
        numbers = range(len(prompts)) if samples is None else samples
        for first in range(0, len(prompts), batch_size):
            batch = slice(first, first + batch_size)
            yield self.start(prompts[batch], seed, numbers[batch], settings, negative)

    def stream(
        self, prompts: Sequence[Prompt], seed: int = 0, negative: Prompt | None = None, **settings: Any
    ) -> Iterator[list[Image.Image]]:
        """The pictures so far, after each step; the last are the finished ones. `settings` replace the model's own."""
        state = self.start(prompts, seed, settings=self.chosen(settings), negative=negative)
        for _ in decode(self.model, state):
            yield self.pictures(state)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        n: int = 1,
        seed: int = 0,
        batch_size: int = DEFAULT_BATCH,
        negative: Prompt | None = None,
        **settings: Any,
    ) -> list[Image.Image]:
        """`n` pictures for each prompt, prompt after prompt.

        Picture i draws from sample i of `seed`, whatever the batch size. negative: a prompt that guidance leads away
        from. `settings` replace the model's own: guidance, temperature, top_k, top_p, smooth; they follow the schedule
        (`sampling`). Raises `UserError` for unknown words or labels, n below 1, a negative seed.
        """
        chosen = self.chosen(settings)
        states = self.starts(self.jobs(prompts, n), seed, batch_size, chosen, negative=negative)
        return [image for state in states for image in self.pictures(run(self.model, state))]

    def jobs(self, prompts: Prompt | Sequence[Prompt], n: int) -> Sequence[Prompt]:
        """Each prompt n times. Raises `UserError` for no prompt or n below 1."""
        if n < 1:
            raise UserError(f"n is {n}; ask for at least 1 picture")
        listed = [prompts] if isinstance(prompts, str | int) else list(prompts)
        if not listed:
            raise UserError("no prompt was given; give at least one caption or label")
        return [p for p in listed for _ in range(n)]

    @torch.no_grad()
    def pictures(self, state: State) -> list[Image.Image]:
        """What each sample of a state shows so far."""
        return to_pil(state.canvas.preview())

    def save(self, folder: StrPath, replace: bool = False, dtype: torch.dtype | None = None) -> None:
        """Write config.json and one safetensors file a part, atomically.

        `dtype` stores the weights smaller; loading brings them back to the dtype that this pipeline computes in. A
        folder with files is refused unless `replace`.
        """
        parts = {name: (built, self.configs[name]) for name, built in self.parts.items()}
        rest: dict[str, Any] = {"defaults": to_json(self.settings), "about": self.about}
        if dtype is not None:
            rest["compute_dtype"] = str(next(self.generator.parameters()).dtype).removeprefix("torch.")
        save_parts(folder, parts, rest, replace, dtype)

    @classmethod
    def from_folder(cls, folder: StrPath, dtype: str | None = None, offload: str | None = None) -> "Pipeline":
        """Read what `save` wrote; `dtype` and `offload` as in `load`."""
        loaded = load_parts(folder, dtype, offload)
        missing = set(NEEDED) - set(loaded.built)
        if missing:
            raise UserError(
                f"{str(Path(folder) / CONFIG)!r} lacks the parts {', '.join(sorted(missing))}; it is not a whole model"
            )
        settings = from_json(loaded.rest.get("defaults", {}), Settings, "defaults")
        return cls(loaded.built, loaded.configs, settings, loaded.rest.get("about"))

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        variant: str | None = None,
        revision: str | None = None,
        dtype: str | None = None,
        offload: str | None = None,
    ) -> "Pipeline":
        """A bundled model, a folder, or a repository of the Hugging Face hub (the only case that uses the network).

        Repositories that models were published in hold several variants, such as "d16" of "FoundationVision/var"; their
        files are converted on the way (`varkit.hub.released`). `dtype` and `offload` as in `load`.
        """
        from varkit.hub.released import pretrained

        return pretrained(name, variant, revision, dtype, offload)

    def push_to_hub(self, repository: str, private: bool = False) -> str:
        """Upload the folder form to a repository of the Hugging Face hub; returns its address."""
        import tempfile

        from huggingface_hub import HfApi

        api = HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "model"
            self.save(folder)
            return str(api.upload_folder(repo_id=repository, folder_path=folder))


def _check_finite(features: torch.Tensor, prompts: Sequence[Prompt]) -> None:
    """Raise `UserError` for features (1, B, T, D) that would make a picture of nothing, whoever computed them."""
    good = features.isfinite().all(-1).all(-1)[0]
    if not bool(good.all()):
        raise UserError(
            f"the features of {str(prompts[int((~good).nonzero()[0])])[:60]!r} have NaN or infinity; compute them anew "
            "in float32, as by varkit embed"
        )


def route_of(part: str) -> str | None:
    """The plan's route that a part serves: "main" for `head`, NAME for `head_NAME`, None for what is no head."""
    if part == "head":
        return "main"
    return part.removeprefix("head_") if part.startswith("head_") else None


def bundled() -> list[str]:
    """Names of the models that come with the package."""
    return sorted(p.name for p in WEIGHTS.iterdir() if (p / CONFIG).is_file()) if WEIGHTS.is_dir() else []


def load(name_or_folder: StrPath, dtype: str | None = None, offload: str | None = None) -> Pipeline:
    """A bundled model by name, a saved folder, the output folder of a training, or a folder of published checkpoints.

    dtype: what weights are cast to, as they are read ("bfloat16", ...). offload: the generator's blocks stay on "disk"
    or in "ram" until their turn, for models larger than memory or than the device's. Raises `UserError` naming the
    nearest known model.
    """
    name = str(name_or_folder)
    if name in bundled():
        return Pipeline.from_folder(WEIGHTS / name, dtype, offload)
    folder = Path(name)
    if (folder / "model" / CONFIG).is_file():  # a training's output
        return Pipeline.from_folder(folder / "model", dtype, offload)
    if (folder / "request.json").is_file():
        raise UserError(f"the training in {name!r} has made no model yet; go on with varkit train --resume")
    if folder.is_dir():
        from varkit.hub.released import from_files, holds_files

        if holds_files(folder):
            return from_files(folder, dtype=dtype, offload=offload)
        return Pipeline.from_folder(folder, dtype, offload)
    raise unknown_name(
        "model", name, bundled(), "A folder saved by varkit, or a training's output folder, works too."
    )
