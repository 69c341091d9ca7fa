"""PixelCNN++: the mixture is a distribution over levels and is sampled as such; no place sees itself or a later one;
a run is its training pass, step by step.
"""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.contracts import start
from varkit.canvases.base import gather_positions
from varkit.data.registry import open_dataset
from varkit.decode.guidance import Guidance
from varkit.decode.loop import Model, run
from varkit.decode.sampling import Sampler
from varkit.draws import Draws
from varkit.errors import UserError
from varkit.generators.conditioning import ClassConfig
from varkit.generators.pixelcnn import PixelCNNConfig
from varkit.heads.base import Ask
from varkit.heads.logistic_mixture import LogisticMixtureConfig, LogisticMixtureHead, Mixture, bits_per_dim
from varkit.hub.pipeline import Pipeline, load
from varkit.nn.attention import Packed
from varkit.plans.join import pack
from varkit.plans.raster import RasterConfig
from varkit.plans.step import Slots, Step
from varkit.tokenizers.pixels import PixelsConfig, from_levels, to_levels
from varkit.train.lessons import WholePlan
from varkit.train.objective import NextStepLoss
from varkit.train.recipes import GeneratorRecipe, Recipe, TokenizerRecipe
from varkit.train.run import Request, train_recipe
from varkit.train.task import TrainConfig

SIDE = 8
LEVELS = from_levels(torch.arange(256))


def some_mixture(components: int = 3, seed: int = 0) -> Mixture:
    """Parameters (30,) whose scales are away from the clamp: 0.03 to 0.2."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(10, components, generator=generator, dtype=torch.float64) * 0.5
    table[4:7] = table[4:7] * 0.5 - 2.5
    return Mixture.of(table.flatten())


def pixels_at(*levels: int) -> Tensor:
    return from_levels(torch.tensor(levels))


# --- the distribution ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [(), (17,), (0, 255)])
def test_the_levels_of_a_channel_have_probability_one_together(before: tuple[int, ...]):
    for seed in range(5):
        total = some_mixture(seed=seed).level_log_probs(pixels_at(*before)).exp().sum()
        assert total.dtype == torch.float64 and abs(total.item() - 1) < 1e-6


def test_the_channels_multiply_to_the_probability_of_the_pixel():
    mixture, levels = some_mixture(), (40, 200, 0)
    channels = [mixture.level_log_probs(pixels_at(*levels[:c]))[levels[c]] for c in range(3)]
    assert mixture.log_prob(pixels_at(*levels)).item() == pytest.approx(sum(channels).item(), abs=1e-6)


def sigmoid(a: float) -> float:
    return 1 / (1 + math.exp(-a))


def slow_log_prob(table: list[list[float]], pixel: list[float]) -> float:
    """The definition, number by number: 10 rows of K, and a pixel."""
    highest = max(table[0])
    weights = [math.exp(logit - highest) for logit in table[0]]
    total = 0.0
    for k, weight in enumerate(weights):
        r, g, _ = pixel
        c0, c1, c2 = (math.tanh(table[7 + i][k]) for i in range(3))
        means = (table[1][k], table[2][k] + c0 * r, table[3][k] + c1 * r + c2 * g)
        product = weight / sum(weights)
        for c in range(3):
            scale = math.exp(max(table[4 + c][k], -7.0))
            below = sigmoid((pixel[c] - means[c] + 1 / 255) / scale) if pixel[c] < 0.999 else 1.0
            less = sigmoid((pixel[c] - means[c] - 1 / 255) / scale) if pixel[c] > -0.999 else 0.0
            product *= below - less
        total += product
    return math.log(total)


def test_the_loss_is_that_of_a_slow_twin():
    torch.manual_seed(0)
    head = LogisticMixtureHead(6, 4).double()
    h = torch.randn(2, 5, 6, dtype=torch.float64)
    pixels = from_levels(torch.randint(0, 256, (2, 5, 3)))
    pixels[0, 0], pixels[0, 1] = pixels_at(0, 255, 0), pixels_at(255, 0, 128)
    loss = head.loss(h, {"pixels": pixels})
    for b in range(2):
        for t in range(5):
            table = head.out(h[b, t]).view(10, 4).tolist()
            assert loss[b, t].item() == pytest.approx(-slow_log_prob(table, pixels[b, t].tolist()), abs=1e-9)


def test_far_tails_have_finite_losses_and_gradients():
    table = torch.zeros(10, 1)
    table[1:4], table[4:7] = 50.0, -30.0
    parameters = table.flatten().requires_grad_()
    log_prob = Mixture.of(parameters).log_prob(pixels_at(0, 100, 255))
    log_prob.backward()
    assert log_prob.item() < -1e4 and bool(parameters.grad.isfinite().all())


def test_a_uniform_guess_costs_eight_bits():
    """256 narrow components, one a level, make red uniform; three such channels are 3 ln 256 nats a pixel."""
    table = torch.zeros(10, 256, dtype=torch.float64)
    table[1], table[4] = LEVELS, -7.0
    red = Mixture.of(table.flatten()).level_log_probs(pixels_at())
    assert (red + math.log(256)).abs().max() < 1e-4
    assert bits_per_dim(-3 * red.mean().item()) == pytest.approx(8.0, abs=1e-4)
    assert bits_per_dim(torch.tensor(3 * math.log(256))).item() == pytest.approx(8.0)


# --- sampling -----------------------------------------------------------------------------------------------------


def ask_for(targets: int, pick, branches: int = 1, **changes) -> Ask:
    ids = torch.arange(targets)
    step = Step.of(Slots.of(ids, ids, torch.zeros(targets, 2, dtype=torch.int64)), target=ids)
    progress = torch.full((1, 1), 0.5)
    guidance = Guidance(1.0 if branches == 1 else 3.0)
    ask = Ask(step, Draws.start(5, 1), torch.zeros(1, 1, dtype=torch.int64), progress, guidance, pick)
    return replace(ask, **changes)


def head_of(mixture_parameters: Tensor) -> LogisticMixtureHead:
    """A head that gives this mixture whatever it is shown."""
    head = LogisticMixtureHead(1, mixture_parameters.numel() // 10)
    with torch.no_grad():
        head.out.weight.zero_()
        head.out.bias.copy_(mixture_parameters)
    return head


def parameters(seed: int = 0) -> Tensor:
    table = torch.randn(10, 2, generator=torch.Generator().manual_seed(seed)) * 0.5
    table[4:7] = table[4:7] * 0.5 - 2.5
    return table.flatten()


@torch.no_grad()
def sampled_levels(pick) -> tuple[Tensor, Mixture]:
    """Levels (100 000, 3), and what they are drawn from."""
    head, h = head_of(parameters()), torch.zeros(1, 1, 5000, 1)
    parts = [
        head.sample(h, ask_for(5000, pick, draws=Draws.start(seed, 1)))["pixels"][0] for seed in range(20)
    ]
    values = torch.cat(parts)
    assert torch.equal(values, from_levels(to_levels(values))), "samples are levels"
    return to_levels(values), head.mixture(torch.zeros(1))


@pytest.mark.parametrize("pick", [None, Sampler()], ids=["component", "levels"])
def test_samples_match_the_probabilities(pick):
    """100 000 draws, both ways of drawing: each channel, and how green and blue go with the channels before."""
    levels, mixture = sampled_levels(pick)
    red = mixture.level_log_probs(pixels_at()).exp()
    assert distance(levels[:, 0], red) < 0.03
    all_green = mixture.level_log_probs(LEVELS[:, None]).exp()
    assert distance(levels[:, 1], red @ all_green) < 0.03
    # The joint in cells of 16 x 16 levels: blue given the two others would need too many draws level by level.
    grouped = levels // 16
    pairs = (red[:, None] * all_green).view(16, 16, 16, 16).sum(dim=(1, 3)).flatten()
    assert distance(grouped[:, 0] * 16 + grouped[:, 1], pairs) < 0.03
    # Blue's conditional means agree with what follows from the drawn red and green.
    chosen = levels[:4000]
    blue = mixture_rows(mixture, 4000).level_log_probs(from_levels(chosen[:, :2])).exp()
    mean, square = (blue * LEVELS).sum(1), (blue * LEVELS**2).sum(1)
    z = (from_levels(chosen[:, 2]) - mean) / (square - mean**2).sqrt()
    assert abs(z.mean()) < 5 / 4000**0.5 and abs(z.square().mean() - 1) < 0.2


def mixture_rows(mixture: Mixture, count: int) -> Mixture:
    tables = (mixture.log_weights, mixture.means, mixture.log_scales, mixture.coefficients)
    return Mixture(*(t.expand(count, *t.shape) for t in tables))


def distance(values: Tensor, probabilities: Tensor) -> float:
    """Total variation between draws and probabilities."""
    seen = torch.bincount(values, minlength=len(probabilities)) / len(values)
    return 0.5 * (seen - probabilities).abs().sum().item()


@torch.no_grad()
def test_guidance_sharpens_each_channel_and_needs_a_sampler():
    head, branches = head_of(parameters()), torch.zeros(2, 1, 50, 1)
    plain = head.sample(branches[:1], ask_for(50, Sampler()))["pixels"]
    assert torch.equal(head.sample(branches, ask_for(50, Sampler(), branches=2))["pixels"], plain)
    head.out.weight.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    branches[0] = 1.0
    guided = head.sample(branches, ask_for(50, Sampler(temperature=0), branches=2))["pixels"][0, 0]
    rows = [head.mixture(torch.tensor([one])).level_log_probs(pixels_at()) for one in (1.0, 0.0)]
    assert to_levels(guided)[0] == (3 * rows[0] - 2 * rows[1]).argmax()
    with pytest.raises(UserError, match="2 condition branches.*sampler"):
        head.sample(branches, ask_for(50, None, branches=2))


@torch.no_grad()
@pytest.mark.parametrize("pick", [None, Sampler()], ids=["component", "levels"])
def test_samples_are_a_function_of_the_draws(pick):
    head, h = head_of(parameters()), torch.zeros(1, 1, 40, 1)
    torch.manual_seed(1)
    first = head.sample(h, ask_for(40, pick))["pixels"]
    torch.manual_seed(2)
    assert torch.equal(head.sample(h, ask_for(40, pick))["pixels"], first)
    tail = ask_for(40, pick).step
    tail = replace(tail, target=tail.target[30:], read=tail.read[:10], reveal=tail.reveal[30:])
    assert torch.equal(head.sample(h[:, :, :10], ask_for(40, pick, step=tail))["pixels"], first[:, 30:])
    other = head.sample(h, ask_for(40, pick, draws=Draws.start(6, 1)))["pixels"]
    assert not torch.equal(other, first)


# --- the network --------------------------------------------------------------------------------------------------


def network(side: int = SIDE, dtype: torch.dtype = torch.float64, **changes) -> tuple[Model, object]:
    torch.manual_seed(0)
    options = {"width": 8, "levels": 3} | changes
    configs = PixelCNNConfig(ClassConfig(3), **options).fitted(PixelsConfig(side))
    built = {name: config.build() for name, config in configs.items()}
    generator, head = built["generator"].to(dtype).eval(), built["head"].to(dtype).eval()
    return Model(built["plan"], generator, {"main": head}), PixelsConfig(side).build()


def states(model: Model, pixels: Tensor, steps: int | None = None) -> Tensor:
    """Hidden states (B, L, F) of the first steps together, over pixels (B, P, 3)."""
    step = model.plan.training_step(steps)
    fed = {"pixels": gather_positions(pixels, step.feed.shows)}
    prepared = model.generator.prepare({"label": torch.zeros(1, len(pixels), dtype=torch.int64)})
    return model.generator(fed, step, prepared, Packed(step.sees.own))


@pytest.mark.parametrize("place", [(0, 0), (0, 5), (3, 0), (3, 4), (4, 7), (7, 7)])
def test_a_place_sees_what_is_before_it_and_nothing_else(place: tuple[int, int]):
    """The Jacobian of the whole picture's features: exactly zero from the place itself on, in all channels."""
    model, _ = network()
    step, p = model.plan.training_step(), place[0] * SIDE + place[1]
    prepared = model.generator.prepare({"label": torch.zeros(1, 1, dtype=torch.int64)})
    picture = torch.randn(1, 3, SIDE, SIDE, dtype=torch.float64, requires_grad=True)
    features = model.generator.features(picture, step, prepared)[0, :, place[0], place[1]]
    weights = torch.randn(len(features), dtype=torch.float64)
    (gradient,) = torch.autograd.grad((features * weights).sum(), picture)
    gradient = gradient[0].flatten(1)
    assert bool((gradient[:, p:] == 0).all())
    neighbours = [n for n, there in ((p - 1, place[1]), (p - SIDE, place[0])) if there]
    assert bool((gradient[:, neighbours] != 0).all())
    assert (gradient[:, :p] != 0).double().mean() > 0.6 if p else True


def test_the_step_lays_pixels_where_they_belong():
    """The same through `forward`, where a slot shows one place and predicts another."""
    model, _ = network()
    pixels = torch.rand(1, SIDE**2, 3, dtype=torch.float64, requires_grad=True)
    h = states(model, pixels)
    for target in (0, 5, 24, 28, 63):
        (gradient,) = torch.autograd.grad(h[0, target].square().sum(), pixels, retain_graph=True)
        assert bool((gradient[0, target:] == 0).all())
        assert target == 0 or bool((gradient[0, target - 1] != 0).all() or target % SIDE == 0)
        assert target < SIDE or bool((gradient[0, target - SIDE] != 0).all())


def test_decoding_equals_the_parallel_pass_over_the_same_pixels():
    model, tokenizer = network()
    state, seen = start(tokenizer, model, {"label": torch.zeros(1, 2, dtype=torch.int64)}, guidance=1.0), []

    def port(h: Tensor, step: Step, prepared) -> Tensor:
        seen.append(h)
        return h

    state.options = replace(state.options, ports={("output", 0): port})
    pixels = run(model, state).canvas.latents()["pixels"]
    with torch.no_grad():
        parallel = states(model, pixels)
    assert len(seen) == SIDE**2 and (torch.cat(seen, dim=1) - parallel).abs().max() < 1e-9


def test_rows_not_reached_yet_change_nothing():
    model, _ = network()
    pixels = from_levels(torch.randint(0, 256, (2, SIDE**2, 3))).double()
    with torch.no_grad():
        whole, part = states(model, pixels), states(model, pixels, steps=20)
    assert (whole[:, :20] - part).abs().max() < 1e-12


def test_a_window_over_the_cache_equals_the_parallel_pass():
    """What speculation needs: several steps at once, after some that were taken and some taken back."""
    model, tokenizer = network()
    state = start(tokenizer, model, {"label": torch.zeros(1, 2, dtype=torch.int64)}, guidance=1.0)
    pixels = from_levels(torch.randint(0, 256, (2, SIDE**2, 3)))
    state.canvas.fill({"pixels": pixels})

    def outputs(step: Step) -> Tensor:
        window = state.cache.open(step, state.cursor)
        h = model.generator(state.canvas.feed(step.feed), step, state.prepared, window)
        state.cache.close()
        state.cursor = state.cursor + step.turns
        return h

    with torch.no_grad():
        parallel = states(model, pixels)
        outputs(pack(model.plan.steps[:9]))
        state.canvas.values["pixels"][:, 8:30] = 0.5  # drafts, to be forgotten
        outputs(pack(model.plan.steps[9:30]))
        state.canvas.values["pixels"].copy_(pixels)
        state.cache.rollback(torch.full((2,), 9))
        state.cursor = torch.full((2,), 9)
        assert (outputs(pack(model.plan.steps[9:14])) - parallel[:, 9:14]).abs().max() < 1e-9


def test_published_size_has_its_layers():
    """5 blocks up and 5, 6 and 6 down; both streams; first layer, resizing, and the class."""
    model = PixelCNNConfig(ClassConfig(10), (32, 32), width=2, blocks=5, dropout=0.5).build()
    assert model.depth == 3 * 5 + 5 + 6 + 6
    assert (len(model.shrink), len(model.grow)) == (2, 2)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"grid": (10, 12)}, "grid (10, 12)"),
        ({"width": 0}, "width is 0"),
        ({"dropout": 1.0}, "dropout 1.0"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(changes: dict, says: str):
    with pytest.raises(UserError) as error:
        PixelCNNConfig(ClassConfig(2), **changes)
    assert says in str(error.value) and "\n" not in str(error.value)


# --- the whole ----------------------------------------------------------------------------------------------------


def test_pixels_are_their_own_latents():
    tokenizer = PixelsConfig((2, 3)).build()
    images = torch.rand(4, 3, 2, 3) * 2 - 1
    latents = tokenizer.encode(images)
    assert latents["pixels"].shape == (4, 6, 3) and latents["pixels"].dtype == torch.float32
    assert torch.equal(latents["pixels"][1, 4], tokenizer.decode(latents)[1, :, 1, 1])
    assert (tokenizer.decode(latents) - images).abs().max() <= 1 / 255 + 1e-6
    assert torch.equal(tokenizer.encode(tokenizer.decode(latents))["pixels"], latents["pixels"])
    with pytest.raises(UserError, match=r"\(B, 3, 2, 3\)"):
        tokenizer.encode(images[..., :2])


def test_a_trained_model_beats_a_histogram_of_independent_pixels():
    """Pictures of one random colour each: independent pixels cost 8 bits, but all after the first can be foreseen."""
    model, tokenizer = network(4, torch.float32, levels=2, dropout=0.0)
    objective = NextStepLoss(model.generator.train(), model.heads["main"], condition_drop=0.0)
    adam = torch.optim.Adam(objective.parameters(), lr=1e-2)
    lessons, condition = WholePlan(tokenizer, model.plan), {"label": torch.zeros(32, dtype=torch.int64)}
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(120):
        colours = torch.randint(0, 256, (32, 1, 3), generator=generator).expand(-1, 16, -1)
        loss = objective(lessons.lesson({"pixels": from_levels(colours)}), condition)
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(bits_per_dim(loss.item()))
    assert sum(losses[-10:]) / 10 < 6.5


def test_a_recipe_whose_tokenizer_has_nothing_to_learn(tmp_path):
    generator = PixelCNNConfig(ClassConfig(10), width=4, levels=1, mixtures=2)
    recipe = Recipe(
        "pixels", "digits",
        TokenizerRecipe(PixelsConfig(16), train=None),
        GeneratorRecipe(generator, TrainConfig(steps=2), batch_size=4, pictures=8),
        prompts=(3,),
    )  # fmt: skip
    said: list[str] = []
    train_recipe(
        Request("pixels", steps=2), recipe, open_dataset("digits"), tmp_path / "run", say=said.append
    )
    assert not (tmp_path / "run" / "tokenizer").exists() and "training the tokenizer" not in said
    pipeline = load(tmp_path / "run")
    assert isinstance(pipeline, Pipeline) and pipeline.size == (16, 16)
    assert pipeline.configs["plan"] == RasterConfig((16, 16))
    assert pipeline.configs["head"] == LogisticMixtureConfig(4, 2)
