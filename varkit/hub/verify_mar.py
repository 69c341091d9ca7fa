"""The MAR family's reference cases: the KL autoencoder, or a generator's training pass and iterative sampling.

The reference's orders and noise take the place of the library's own draws; all else is its own loop, cache and canvas.
Legend: B samples, L positions, D token width, M repeats, S diffusion steps.
"""

import numpy as np
import torch
from torch import Tensor

from varkit.canvases.base import gather_positions
from varkit.canvases.grid import GridCanvas
from varkit.decode import state as decoding
from varkit.decode.cache.full import FullCache
from varkit.decode.guidance import Guidance
from varkit.decode.loop import Model, run
from varkit.draws import Draws, Stream
from varkit.generators.mar import MAR
from varkit.heads.diffusion import DiffusionHead
from varkit.heads.gaussian_diffusion import GaussianDiffusion
from varkit.hub import mar
from varkit.hub.fill import image_array
from varkit.hub.states import State, build_empty, load_state
from varkit.hub.verify import Case
from varkit.nn.attention import Packed
from varkit.plans.masked import MaskedPlan
from varkit.tokenizers.kl import KL


def verify(case: Case) -> None:
    """Compare all arrays of a `mar` case."""
    if "image_shape" in case.config:
        _compare_tokenizer(case)
        return
    given = _Given(case)
    generator, head = _generator(case)
    labels = case.input("labels")
    _compare_training(case, given, generator, head, labels)
    _compare_head(case, head)
    for i in range(len(case.entry("samplings"))):
        _compare_sampling(case, given, generator, head, labels, i)


def _compare_tokenizer(case: Case) -> None:
    published = case.state("state")
    height, width = (side // 16 for side in case.entry("image_shape")[2:])
    config = mar.tokenizer_config(published, (height, width))
    tokenizer: KL = build_empty(config.build)
    load_state(tokenizer, mar.tokenizer_from_published(published, config), "the tokenizer")
    tokenizer.eval()
    images = torch.from_numpy(image_array(tuple(case.entry("image_shape")), case.entry("seed")))
    posterior = tokenizer.posterior(images)
    case.compare("moments", torch.cat([posterior.mean, posterior.log_variance], dim=1))
    latents = tokenizer.encode(images, noise=case.input("posterior_noise"))
    case.compare("latent", latents["latents"].mT.unflatten(2, (height, width)))
    every = case.entry("reconstruction_stride")
    drawn = tokenizer.reconstruct(tokenizer.features(latents))
    case.compare("reconstruction", drawn[:, :, ::every, ::every])
    case.compare("reconstruction_of_mean", tokenizer.reconstruct(posterior.mean)[:, :, ::every, ::every])


class _Given:
    """A case's draws: stored, or regenerated as its notes say where the arrays would be large."""

    def __init__(self, case: Case) -> None:
        self.case = case
        config = case.entry("config")
        side = config["img_size"] // config["vae_stride"]
        self.grid, self.channels = (side, side), config["vae_embed_dim"] * config["patch_size"] ** 2
        self.repeats = config["diffusion_batch_mul"]
        self.orders = case.input("orders")

    @property
    def full(self) -> bool:
        """Whether everything is stored."""
        return "latents" in self.case.arrays

    @property
    def shape(self) -> tuple[int, int, int]:
        """(B, L, D)."""
        return (*self.orders.shape, self.channels)  # type: ignore[return-value]

    def latents(self) -> Tensor:
        """(B, L, D)."""
        if self.full:
            return self.case.input("latents").flatten(2).mT
        batch, _, channels = self.shape
        rng = np.random.default_rng([self.case.entry("seed"), 11])
        values = rng.standard_normal((batch, channels, *self.grid)).astype(np.float32)
        return torch.from_numpy(values).flatten(2).mT

    def diffusion_noise(self) -> Tensor:
        """(M B L, D)."""
        if self.full:
            return self.case.input("diffusion_noise")
        batch, positions, channels = self.shape
        rng, rows = np.random.default_rng([self.case.entry("seed"), 13]), self.repeats * batch * positions
        rng.integers(0, 1000, size=rows)
        return torch.from_numpy(rng.standard_normal((rows, channels)).astype(np.float32))

    def sampling_noise(self, i: int, steps: int) -> Tensor:
        """(B, L, S, D): where each token starts, and what each step but the last adds."""
        if self.full:
            start, added = (self.case.input(f"sample{i}_{what}_noise") for what in ("start", "step"))
        else:
            rng = np.random.default_rng([self.case.entry("seed"), 100 + i])
            start, added = (
                torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))
                for shape in (self.shape, (steps, *self.shape))
            )
        return torch.cat([start[None], added[:-1]]).movedim(0, 2)


def _generator(case: Case) -> tuple[MAR, DiffusionHead]:
    factors = case.entry("fill_scale")
    published: State = {name: tensor * factors.get(name, 1.0) for name, tensor in case.state("state").items()}
    configs = mar.generator_configs(published, case.entry("config", "encoder_num_heads"))
    generator, head = build_empty(configs[0].build), build_empty(configs[1].build)
    state, head_state = mar.generator_from_published(published, configs)
    load_state(generator, state, "the generator")
    load_state(head, head_state, "the head")
    return generator.eval(), head.eval()


def _compare_training(case: Case, given: _Given, generator: MAR, head: DiffusionHead, labels: Tensor) -> None:
    """One pass over masked inputs, whose vectors are compared at all positions, and the losses of all of them."""
    batch, positions, channels = given.shape
    masked = torch.zeros(batch, positions, dtype=torch.bool)
    masked.scatter_(1, given.orders[:, : case.entry("num_masked")], True)
    case.compare("mask", masked.float())
    latents = given.latents()
    canvas = _canvas(given)
    canvas.fill({"latents": latents})
    plan = MaskedPlan(given.grid, 1, generator.config.buffer)
    step = plan.step(~masked, torch.arange(positions).expand(batch, -1))

    def vectors(asked: Tensor) -> Tensor:
        prepared = generator.prepare({"label": asked[None]})
        return gather_positions(generator(canvas.feed(step.feed), step, prepared, Packed(None)), step.read)

    stored = (slice(None),) if given.full else (slice(None), slice(None, None, 5), slice(None, None, 3))
    dropped = case.input("label_drop_uniform") < case.entry("config", "label_drop_prob")
    z = vectors(torch.where(dropped, case.entry("config", "class_num"), labels))
    case.compare("z", z[stored])
    case.compare("z_eval", vectors(labels)[stored])
    rows = (given.repeats, batch, positions)
    times, noise = case.input("timesteps").view(rows), given.diffusion_noise().view(*rows, channels)
    error, bound = head.terms(z, latents, times.movedim(0, 2), noise.movedim(0, 2))
    case.compare("mse", error.movedim(2, 0).flatten())
    case.compare("vb", bound.movedim(2, 0).flatten(), relative=True)
    case.compare("loss", (error + bound).mean(dim=2)[masked].mean())


def _compare_head(case: Case, head: DiffusionHead) -> None:
    h, x, times = (case.input(f"net_{name}") for name in ("z", "x", "t"))
    case.compare("net_out", head.predict(h, x, times))
    if "head_x" not in case.arrays:
        return
    h, x, noise = (case.input(f"head_{name}") for name in ("z", "x", "noise"))
    before = []
    for i in range(len(head.reverse)):
        step = head.ancestral(h[None, None], x[i][None], i, lambda eps: eps[0])
        before.append((step.draw(noise[i], 0.9) if i else step.mean)[0])
    case.compare("head_x_previous", torch.stack(before), relative=True)


class _Orders(MaskedPlan):
    """The masked plan on given orders (B, L)."""

    given: Tensor

    def orders(self, state: decoding.State) -> Tensor:
        return self.given


class _Noise(Draws):
    """Draws whose normal numbers are given for each sample and position, (B, L, N)."""

    given: Tensor

    def normal(self, purpose: str, step: int | Tensor, positions: Tensor, n: int = 1) -> Tensor:
        return gather_positions(self.given, positions)


def _compare_sampling(
    case: Case, given: _Given, generator: MAR, head: DiffusionHead, labels: Tensor, i: int
) -> None:
    how = case.entry("samplings")[i]
    head.reverse = GaussianDiffusion(how["timesteps"])
    plan = _Orders(given.grid, how["num_iter"], generator.config.buffer)
    plan.given = given.orders
    draws = _Noise([Stream(0, b) for b in range(len(labels))])
    draws.given = given.sampling_noise(i, len(how["timesteps"])).flatten(2)
    guidance = Guidance(how["cfg"], ramp=how["cfg_schedule"] == "linear")
    asked = labels[None]
    if not guidance.off:
        asked = torch.cat([asked, torch.full_like(asked, case.entry("config", "class_num"))])
    state = decoding.State.start(
        _canvas(given),
        FullCache(len(labels), len(asked), plan.slots),
        generator.prepare({"label": asked}),
        draws,
        decoding.Options(combine=guidance, temperature=how["temperature"]),
    )
    run(Model(plan, generator, {"main": head}), state)
    assert state.evaluations.tolist() == [how["num_iter"]] * len(labels), "an iteration settled nothing"
    latents = state.canvas.latents()["latents"].mT.unflatten(2, given.grid)
    case.compare(f"sample{i}_latents", latents, relative=True)


def _canvas(given: _Given) -> GridCanvas:
    batch, positions, channels = given.shape
    return GridCanvas.empty(batch, positions, {"latents": ((channels,), torch.float32)})
