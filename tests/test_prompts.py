"""Words for models that read features of them, and negative prompts: batches, padding, sizes, what is refused."""

import pytest
import torch

from tests import models, text_models
from tests.text_models import LENGTH, LONG, PROMPTS, SHORT, WIDTH
from varkit.decode.loop import run
from varkit.edit.inpaint import box_mask, inpaint
from varkit.errors import UserError
from varkit.generators.conditioning import ClassConfig
from varkit.generators.text import TextConfig, TextFeaturesConfig
from varkit.hub.pipeline import Pipeline, Settings
from varkit.hub.prompts import padded
from varkit.hub.text_encoders import PretrainedEncoder
from varkit.plans.ratios import scales

t5, clip = text_models.t5, text_models.clip
MODELS = {"infinity": text_models.infinity, "llamagen": text_models.llamagen}
TEXT = TextConfig(models.WORDS, length=8, width=16, depth=1)


class Spelled:
    """A `TextSource` of one random vector a letter."""

    width = WIDTH

    def count(self, prompt: str) -> int:
        return len(prompt)

    def encode(self, prompt: str) -> torch.Tensor:
        table = torch.randn(256, self.width, generator=torch.Generator().manual_seed(1))
        return table[list(prompt.encode())]


def latents(pipeline: Pipeline, prompts: list[str], samples: list[int], **options) -> torch.Tensor:
    """What is drawn, (B, ...)."""
    (values,) = run(pipeline.model, pipeline.start(prompts, 5, samples, **options)).canvas.latents().values()
    return values


def pictures(pipeline: Pipeline, *prompts: str | int, **options) -> list[bytes]:
    return [image.tobytes() for image in pipeline.generate(list(prompts), seed=2, **options)]


# Features of words


@pytest.mark.parametrize("encoder", ["t5", "clip"])
@pytest.mark.parametrize("kind", MODELS)
def test_prompts_of_different_lengths_are_drawn_together_as_alone(kind, encoder, request):
    source = PretrainedEncoder.load(request.getfixturevalue(encoder))
    pipeline = MODELS[kind]().with_text(source)
    assert len({source.count(prompt) for prompt in PROMPTS}) == len(PROMPTS)
    together = latents(pipeline, PROMPTS, [0, 1, 2, 3])
    for i, prompt in enumerate(PROMPTS):
        assert torch.equal(latents(pipeline, [prompt], [i])[0], together[i])
    assert len(set(pictures(pipeline, SHORT) + pictures(pipeline, LONG))) == 2  # the words matter


@pytest.mark.parametrize("kind", MODELS)
def test_negative_prompts_of_any_length_together_as_alone(kind):
    pipeline = MODELS[kind]().with_text(Spelled())
    together = latents(pipeline, ["cat", "a large dog"], [0, 1], negative="blurred")
    for i, prompt in enumerate(["cat", "a large dog"]):
        assert torch.equal(latents(pipeline, [prompt], [i], negative="blurred")[0], together[i])
    assert not torch.equal(together, latents(pipeline, ["cat", "a large dog"], [0, 1]))
    assert not torch.equal(together, latents(pipeline, ["cat", "a large dog"], [0, 1], negative="red"))


def test_words_draw_every_shape():
    pipeline = text_models.infinity(scales(1.0, "0.06M").schedule, stages=5)
    plan = scales(1.0, "0.06M")
    pipeline = pipeline.over(plan).with_text(Spelled())
    tall = pipeline.sized((320, 256))
    assert pipeline.size == (256, 256) and tall.how.text is pipeline.how.text
    assert tall.generate("a cat", negative="a long list of what is not wanted")[0].size == (256, 320)


def test_a_run_over_many_prompts_pads_all_of_them_alike():
    pipeline = text_models.infinity().with_text(Spelled())
    assert pipeline.conditions(["cat"])["mask"].shape == (1, 1, 3)
    reading = pipeline.reading(["cat", "elephant"])
    assert reading.conditions(["cat"])["mask"].shape == (1, 1, 8)
    assert reading.conditions(["cat", "elephant"])["mask"].sum(-1).tolist() == [[3, 8]]
    fixed = pipeline.with_text(Spelled(), tokens=LENGTH)
    states = [fixed.start([prompt], 5, [i]) for i, prompt in enumerate(("cat", "elephant"))]
    merged = run(fixed.model, type(states[0]).concat(states)).canvas.latents()
    assert torch.equal(merged["bits"], latents(pipeline, ["cat", "elephant"], [0, 1]))


def test_editing_without_a_prompt_asks_for_nothing_learned():
    pipeline = text_models.infinity().with_text(Spelled())
    empty = pipeline.unconditional(2)
    learned = pipeline.generator.conditioner.null_features
    assert torch.equal(empty["features"], learned[:1].expand(1, 2, 1, WIDTH)) and bool(empty["mask"].all())
    image = pipeline.generate("cat")[0]
    assert inpaint(pipeline, image, box_mask((8, 8), (0.0, 0.5, 1.0, 1.0)))[0].size == (8, 8)


def test_features_that_do_not_fit():
    pipeline = text_models.infinity()
    with pytest.raises(
        UserError, match="takes features of 32 channels from a text encoder, not words; give --text"
    ):
        pipeline.generate("a cat")
    narrow = Spelled()
    narrow.width = 16
    with pytest.raises(UserError, match="features of 16 channels do not fit this model, which takes 32"):
        pipeline.with_text(narrow)
    reading = pipeline.with_text(Spelled())
    with pytest.raises(UserError, match=f"has 49 tokens; this model reads at most {LENGTH}: shorten it"):
        reading.generate("x" * 49)
    with pytest.raises(UserError, match="has 49 tokens"):
        reading.reading(["cat", "x" * 49])
    with pytest.raises(UserError, match="label 3 was given to a text model"):
        reading.reading([3])


@pytest.mark.parametrize(("condition", "reads"), [(ClassConfig(3), "labels"), (TEXT, "words by itself")])
def test_models_that_take_no_features(condition, reads):
    with pytest.raises(UserError, match=f"reads {reads} and takes no features; leave the text encoder out"):
        models.tiny_pipeline(condition).with_text(Spelled())


def test_padding_lies_behind_and_is_masked():
    rows = [torch.ones(2, 3), torch.full((4, 3), 2.0)]
    condition = padded(rows)
    assert condition["features"].shape == (1, 2, 4, 3) and condition["mask"].sum(-1).tolist() == [[2, 4]]
    assert torch.equal(condition["features"][0, 0, :2], rows[0]) and not condition["features"][0, 0, 2:].any()
    assert padded(rows, 7)["mask"].shape == (1, 2, 7)


# Negative prompts


@pytest.mark.parametrize(
    ("condition", "prompt", "negative"),
    [
        (ClassConfig(3, models.CLASSES), 1, "owl"),
        (ClassConfig(3), 1, 2),
        (TEXT, "a red circle", "a blue square"),
    ],
    ids=["name", "label", "words"],
)
def test_guidance_leads_away_from_a_negative_prompt(condition, prompt, negative):
    pipeline = models.tiny_pipeline(condition, adaln_init=1.0)
    pipeline.model.heads["main"].out.weight.data.mul_(50.0)  # or a random head hardly tells classes apart
    plain = pictures(pipeline, prompt, guidance=6.0)
    assert pictures(pipeline, prompt, negative=negative, guidance=6.0) != plain
    assert pictures(pipeline, prompt, negative=prompt, guidance=6.0) == pictures(
        pipeline, prompt, guidance=1.0
    )
    with pytest.raises(UserError, match="a negative prompt needs guidance, which is 1.0; set it above 1"):
        pipeline.generate(prompt, negative=negative, guidance=1.0)


def test_the_empty_prompt_as_negative_is_the_null_condition():
    pipeline = models.tiny_pipeline(TEXT)
    assert pictures(pipeline, "a red circle", negative="") == pictures(pipeline, "a red circle")


@pytest.mark.parametrize(
    "pipeline",
    [models.tiny_pipeline(ClassConfig(3)), models.tiny_pipeline(TEXT), text_models.infinity().with_text(Spelled()),
     text_models.llamagen().with_text(Spelled())],
    ids=["class", "words", "infinity", "llamagen"],
)  # fmt: skip
def test_the_null_condition_given_as_negative_changes_nothing(pipeline: Pipeline):
    prompt = 1 if isinstance(pipeline.condition, ClassConfig) else "red"
    condition, settings = pipeline.conditions([prompt]), Settings(guidance=4.0)
    null = pipeline.generator.conditioner.null(condition)
    drawn = [
        run(pipeline.model, pipeline.start_from(condition, 0, [0], settings, negative)).canvas.preview()
        for negative in (None, null)
    ]
    assert torch.equal(*drawn)


def test_negatives_that_the_model_does_not_know():
    with pytest.raises(UserError, match="unknown class 'cow'"):
        models.tiny_pipeline(ClassConfig(3, models.CLASSES)).generate(1, negative="cow")
    with pytest.raises(UserError, match="unknown word 'green'"):
        models.tiny_pipeline(TEXT).generate("red", negative="green")
    assert isinstance(text_models.infinity().condition, TextFeaturesConfig)
    with pytest.raises(UserError, match="not words"):
        text_models.infinity().generate("red", negative="green")
