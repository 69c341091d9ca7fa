"""Distribution metrics against closed forms, scipy and hand-computed cases; features, files, and `--suite fid`."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests import models
from varkit.cli.main import main
from varkit.data.arrays import ArrayImages
from varkit.errors import UserError
from varkit.evaluate import features as features_module
from varkit.evaluate.distribution import (
    Comparison,
    Pairs,
    compare,
    evaluate_distribution,
    fid,
    floor,
    interval,
    reconstruction_fid,
)
from varkit.evaluate.features import (
    BATCH,
    FeatureBatch,
    FeatureSet,
    NetworkFeatures,
    collect,
    load_features,
    resized,
)
from varkit.evaluate.frechet import (
    Gaussian,
    Moments,
    Statistics,
    frechet_distance,
    frechet_resamples,
    load_statistics,
    save_statistics,
)
from varkit.evaluate.inception import InceptionV3
from varkit.evaluate.inception_score import inception_score
from varkit.evaluate.kernel import kernel_distance, kernel_resamples, subset_spread
from varkit.evaluate.manifold import membership
from varkit.evaluate.small_features import SmallFeatures
from varkit.evaluate.sources import chosen_rows, dataset_source, own_side, prompts_like
from varkit.generators.conditioning import ClassConfig
from varkit.generators.text import TextConfig
from varkit.hub.states import write_safetensors
from varkit.train import features_task

class_model = models.class_model
text_model = models.text_model


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def normal(n: int, size: int, seed: int = 0, shift: float = 0.0) -> np.ndarray:
    return rng(seed).standard_normal((n, size)) + shift


def resampled(n: int, times: int, seed: int) -> np.ndarray:
    """How often each of n rows is taken, for each of `times` resamples."""
    drawn = rng(seed).integers(0, n, (times, n))
    return np.array([np.bincount(row, minlength=n) for row in drawn], float)


def covariance(size: int, seed: int, rank: int | None = None) -> np.ndarray:
    root = rng(seed).standard_normal((size, rank or 2 * size))
    return root @ root.T / size


# --- Frechet distance --------------------------------------------------------------


def test_equal_sets_are_at_distance_0() -> None:
    rows = normal(300, 16)
    assert frechet_distance(Gaussian.of(rows), Gaussian.of(rows)) == pytest.approx(0, abs=1e-10)
    few = Gaussian.of(normal(5, 16))  # singular
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-10)


def test_closed_form_of_commuting_covariances() -> None:
    basis = np.linalg.qr(normal(6, 6))[0]
    a, b = rng(1).uniform(0.1, 3, 6), rng(2).uniform(0.1, 3, 6)
    a[0] = b[1] = 0.0
    means = normal(2, 6, seed=3)
    first = Gaussian(means[0], basis * a @ basis.T)
    second = Gaussian(means[1], basis * b @ basis.T)
    truth = ((means[0] - means[1]) ** 2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert frechet_distance(first, second) == pytest.approx(truth, rel=1e-10)


@pytest.mark.parametrize("size", [1, 3, 40])
def test_it_agrees_with_the_matrix_root_of_scipy(size: int) -> None:
    linalg = pytest.importorskip("scipy.linalg")
    a, b = covariance(size, 1), covariance(size, 2)
    means = normal(2, size, seed=3)
    truth = ((means[0] - means[1]) ** 2).sum() + np.trace(a + b - 2 * linalg.sqrtm(a @ b).real)
    assert frechet_distance(Gaussian(means[0], a), Gaussian(means[1], b)) == pytest.approx(truth, rel=1e-8)


def test_singular_covariances_are_exact() -> None:
    """S = u u' and T = v v': Tr (ST)^(1/2) is |u.v|; and nothing is lost where the two share no direction."""
    u, v = normal(2, 30, seed=4)
    zero = np.zeros(30)
    found = frechet_distance(Gaussian(zero, np.outer(u, u)), Gaussian(zero, np.outer(v, v)))
    assert found == pytest.approx(u @ u + v @ v - 2 * abs(u @ v), rel=1e-12)
    left, right = np.diag([1.0, 2, 0, 0]), np.diag([0, 0, 3.0, 4])
    assert frechet_distance(Gaussian(zero[:4], left), Gaussian(zero[:4], right)) == pytest.approx(
        10, rel=1e-12
    )


def test_streaming_and_merging_equal_one_pass() -> None:
    rows = normal(100, 7) * 50 + 1000
    halves = Moments(), Moments()
    for half, part in zip(halves, (rows[:64], rows[64:]), strict=True):
        for start in range(0, len(part), 13):
            half.update(part[start : start + 13])
    halves[0].merge(Moments())
    halves[0].merge(halves[1])
    found = halves[0].gaussian()
    assert halves[0].count == 100
    np.testing.assert_allclose(found.mean, rows.mean(axis=0), rtol=1e-13)
    np.testing.assert_allclose(found.covariance, np.cov(rows, rowvar=False), rtol=1e-9)


def test_different_sizes_and_single_pictures_are_refused() -> None:
    with pytest.raises(UserError, match="3 and of 4 features"):
        frechet_distance(Gaussian.of(normal(9, 3)), Gaussian.of(normal(9, 4)))
    with pytest.raises(UserError, match="at least 2"):
        Gaussian.of(normal(1, 3))


def test_a_resample_is_the_distance_of_its_rows() -> None:
    rows, reference = normal(50, 8), Gaussian.of(normal(80, 8, seed=1, shift=0.3))
    taken = rng(2).integers(0, 50, (3, 50))
    counts = np.array([np.bincount(row, minlength=50) for row in taken], float)
    truth = [frechet_distance(Gaussian.of(rows[row]), reference) for row in taken]
    np.testing.assert_allclose(frechet_resamples(rows, reference, counts), truth, rtol=1e-9)


# --- files of statistics -------------------------------------------------------------


def test_statistics_survive_a_file(tmp_path: Path) -> None:
    pool, spatial = Gaussian.of(normal(9, 4)), Gaussian.of(normal(9, 3))
    whole = Statistics(pool, spatial, "small-12345678", 9)
    save_statistics(tmp_path / "s.npz", whole)
    read = load_statistics(tmp_path / "s.npz")
    assert (read.features, read.pictures) == ("small-12345678", 9)
    assert read.spatial is not None and np.array_equal(read.spatial.covariance, spatial.covariance)
    assert np.array_equal(read.pool.mean, pool.mean) and np.array_equal(read.pool.covariance, pool.covariance)
    with np.load(tmp_path / "s.npz", allow_pickle=False) as arrays:  # as guided-diffusion reads it
        assert {"mu", "sigma", "mu_s", "sigma_s"} <= set(arrays.files)


def test_statistics_of_others_are_read(tmp_path: Path) -> None:
    mean, sigma = normal(1, 4)[0].astype(np.float32), covariance(4, 0).astype(np.float32)
    np.savez(tmp_path / "fid.npz", mu=mean, sigma=sigma)
    read = load_statistics(tmp_path / "fid.npz")
    assert read.pool.covariance.dtype == np.float64 and np.allclose(read.pool.covariance, sigma)
    assert read.spatial is None and read.features is None and read.pictures is None


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.zeros(3)}, "sigma"),
        ({"mu": np.zeros(3), "sigma": np.zeros((2, 2))}, r"shape \(3,\)"),
        ({"mu": np.full(2, np.nan), "sigma": np.zeros((2, 2))}, "not finite"),
        ({"mu": np.array([{}]), "sigma": np.zeros((1, 1))}, "not a file of statistics"),
    ],
)
def test_bad_statistics_are_one_line(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(UserError, match=message):
        load_statistics(tmp_path / "bad.npz")


# --- KID -------------------------------------------------------------------------------


def test_kernel_distance_by_hand() -> None:
    """One feature: k(x, y) = (xy + 1)^3. Samples 0, 1; reference 1, 2."""
    x, y = np.array([[0.0], [1.0]]), np.array([[1.0], [2.0]])
    own, other = 1.0, 27.0  # k(0, 1) and k(1, 2)
    across = (1 + 1 + 8 + 27) / 4
    assert kernel_distance(x, y) == pytest.approx(own + other - 2 * across)


def test_kernel_distance_is_unbiased() -> None:
    """Sets of one distribution: the mean over 200 pairs of sets is within 5 of its standard errors of 0."""
    found = np.array(
        [kernel_distance(normal(20, 6, seed=2 * i), normal(30, 6, seed=2 * i + 1)) for i in range(200)]
    )
    assert abs(found.mean()) < 5 * found.std() / np.sqrt(200)
    assert (found < 0).any()
    apart = kernel_distance(normal(200, 6), normal(300, 6, seed=1, shift=1.0))
    assert apart > 5 * found.std()


def test_the_mean_over_subsets_is_the_estimate_over_all_pairs() -> None:
    x, y = normal(40, 5), normal(40, 5, seed=1, shift=0.5)
    generator = rng(2)
    found = [
        kernel_distance(x[generator.choice(40, 10, False)], y[generator.choice(40, 10, False)])
        for _ in range(400)
    ]
    assert abs(np.mean(found) - kernel_distance(x, y)) < 5 * np.std(found) / 20
    spread = subset_spread(x, y, seed=3)
    assert 0 < spread < 2 * np.std(found)
    assert spread == subset_spread(x, y, seed=3) != subset_spread(x, y, seed=4)


def test_kernel_resamples_do_not_take_copies_for_likeness() -> None:
    x, y = normal(1500, 4), normal(60, 4, seed=1)  # more rows than a block
    ones = np.ones((1, 1500))
    assert kernel_resamples(x, y, ones)[0] == pytest.approx(kernel_distance(x, y), abs=1e-12)
    few = x[:60]
    counts = resampled(60, 400, 2)
    found = kernel_resamples(few, y, counts)
    assert abs(found.mean() - kernel_distance(few, y)) < 5 * found.std() / 20


# --- precision and recall ----------------------------------------------------------------


def clusters(*centres: float, n: int = 50, seed: int = 0) -> np.ndarray:
    return np.concatenate([normal(n, 4, seed + i, shift=c) for i, c in enumerate(centres)])


def test_a_dropped_mode_costs_recall_and_not_precision() -> None:
    found = membership(clusters(0, seed=10), clusters(0, 100))
    assert found.precision > 0.8 and 0.35 < found.recall <= 0.5
    assert not found.recalled[50:].any()


def test_pictures_off_the_manifold_cost_precision_and_not_recall() -> None:
    found = membership(clusters(0, 100, seed=10), clusters(0))
    assert 0.35 < found.precision <= 0.5 and found.recall > 0.8
    assert not found.precise[50:].any()


def test_balls_by_hand() -> None:
    """k = 1: references 0, 1, 10 have radii 1, 1, 9; samples -1.1 and 19.1 are just outside, -0.9 and 18.9 inside."""
    reference = np.array([[0.0], [1.0], [10.0]])
    found = membership(np.array([[-1.1], [-0.9], [18.9], [19.1]]), reference, k=1)
    assert found.precise.tolist() == [False, True, True, False]
    assert found.recalled.tolist() == [False, False, False]  # samples have radii 0.2
    equal = membership(reference, reference, k=1)
    assert equal.precision == equal.recall == 1


def test_copies_of_real_pictures_are_on_the_manifold_also_far_from_the_origin() -> None:
    same = np.repeat(normal(3, 8) + 1e4, 10, axis=0)  # every radius is 0
    found = membership(same[:20], same)
    assert found.precision == 1 and found.recall == pytest.approx(2 / 3)
    assert membership(normal(1100, 3), normal(1200, 3)).precision > 0.9  # more rows than a block


# --- inception score -----------------------------------------------------------------------


def test_scores_of_the_sure_the_unsure_and_the_monotonous() -> None:
    sure = np.eye(10)[np.arange(50) % 10]
    assert inception_score(sure) == pytest.approx(10)
    assert inception_score(np.full((50, 10), 0.1)) == pytest.approx(1)
    assert inception_score(np.eye(10)[np.zeros(50, int)]) == pytest.approx(1)
    assert inception_score(sure, part=5) == pytest.approx(5)


# --- intervals -----------------------------------------------------------------------------


def feature_set(rows: np.ndarray) -> FeatureSet:
    logits = np.exp(rows[:, :3])
    return FeatureSet("toy", rows, logits / logits.sum(axis=1, keepdims=True))


def test_intervals_hold_their_figures() -> None:
    found = compare(feature_set(normal(100, 6, shift=0.2)), feature_set(normal(300, 6, seed=1)), 50).figures
    assert set(found) == {"fid", "kid", "precision", "recall", "inception_score"}
    for figure in found.values():
        low, high = figure.interval or (0, 0)
        assert low < figure.value < high, found


def test_the_reported_bias_is_that_of_few_pictures() -> None:
    """Mean over 30 sets of 100 pictures; the distance of the distributions themselves is 0."""
    reference = Statistics(Gaussian(np.zeros(6), np.eye(6)))
    found = [fid(feature_set(normal(100, 6, seed=i)), reference, resampled(100, 20, i)) for i in range(30)]
    values, biases = np.mean([f.value for f in found]), np.mean([f.details["bias"] for f in found])
    assert values > 0.1 and abs(values - biases) < 0.25 * values


def test_the_interval_of_fid_covers_its_mean_as_often_as_it_says() -> None:
    """150 sets of 80 pictures: 95 % of the intervals hold the mean figure of such sets, give or take 5 deviations."""
    reference = Gaussian.of(normal(5000, 4, seed=10**6))
    values, intervals = [], []
    for i in range(150):
        rows, generator = normal(80, 4, seed=i, shift=0.3), rng(i + 10**5)
        counts = np.array(
            [np.bincount(generator.integers(0, 80, 80), minlength=80) for _ in range(100)], float
        )
        values.append(frechet_distance(Gaussian.of(rows), reference))
        intervals.append(interval(values[-1], frechet_resamples(rows, reference, counts)))
    held = np.mean([low <= np.mean(values) <= high for low, high in intervals])  # type: ignore[misc]
    assert 0.95 - 5 * np.sqrt(0.95 * 0.05 / 150) < held


def test_the_same_figures_twice_and_others_by_seed() -> None:
    samples, reference = feature_set(normal(60, 4)), feature_set(normal(90, 4, seed=1))

    def once(seed: int) -> dict[str, Any]:
        return compare(samples, reference, resamples=20, seed=seed).summary()

    assert once(0) == once(0)
    assert once(0)["fid"]["value"] == once(1)["fid"]["value"]
    assert once(0)["fid"]["interval"] != once(1)["fid"]["interval"]
    assert once(0)["resamples"] == 20 and once(0)["features"] == "toy"


def test_the_floor_is_real_against_real_and_never_the_same_picture_twice() -> None:
    real = feature_set(normal(400, 4))
    found = floor(real, 150)
    assert found is not None and (found.pictures, found.reference_pictures) == (150, 250)
    assert 0 < found.figures["fid"].value < 0.5 and found.figures["fid"].interval is None
    assert floor(real, 9999).pictures == 200  # type: ignore[union-attr]
    assert floor(feature_set(normal(7, 4)), 7) is None


def test_too_few_pictures_are_told() -> None:
    found = compare(feature_set(normal(10, 12)), feature_set(normal(40, 12, seed=1)), resamples=0)
    (warning,) = found.warnings()
    assert "10 pictures are no more than the 12 numbers" in warning
    assert compare(feature_set(normal(40, 12)), feature_set(normal(40, 12, seed=1)), 0).warnings() == []
    with pytest.raises(UserError, match="3 pictures are too few"):
        compare(feature_set(normal(3, 4)), feature_set(normal(40, 4)))


def test_statistics_allow_frechet_distances_only_and_must_be_of_the_same_features() -> None:
    samples, reference = feature_set(normal(60, 4)), feature_set(normal(90, 4, seed=1))
    by_rows, by_statistics = (compare(samples, r, 5).figures for r in (reference, reference.statistics()))
    assert set(by_statistics) == {"fid", "inception_score"}
    assert by_rows["fid"] == by_statistics["fid"]
    with pytest.raises(UserError, match="of the features other, and these pictures are read by toy"):
        compare(samples, Statistics(Gaussian.of(reference.rows), features="other"))


def test_pairs_are_resampled_together() -> None:
    """Reconstructions that are all off by the same amount have one figure, and no resample changes it."""
    rows = normal(100, 4)
    found = reconstruction_fid(FeatureSet("toy", rows), FeatureSet("toy", rows + 1), resamples=20).figures[
        "rfid"
    ]
    assert found.value == pytest.approx(4) and found.interval == pytest.approx((4, 4))
    assert found.details["bias"] == pytest.approx(0, abs=1e-9)


# --- features ------------------------------------------------------------------------------


class Means(torch.nn.Module):
    """Six features: the means of the channels, and their deviations."""

    size, side, antialias = 6, 16, True

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.shape = tuple(images.shape)
        means = images.mean(dim=(2, 3))
        return torch.cat([means, images.std(dim=(2, 3))], dim=1), means.softmax(dim=1), means


def means() -> NetworkFeatures:
    return NetworkFeatures("means", Means())


def test_pictures_are_collected_in_full_batches_whatever_theirs_are() -> None:
    images = torch.rand(BATCH + 5, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    features = means()
    found = collect(features, [images[:3], images[3:]])
    assert features.network.shape == (BATCH, 3, 16, 16)
    assert found.rows.shape == (BATCH + 5, 6) and found.rows.dtype == np.float64 and found.name == "means"
    np.testing.assert_allclose(found.rows[:, :3], images.mean(dim=(2, 3)).numpy(), atol=1e-6)
    assert found.probabilities is not None and found.spatial is not None
    np.testing.assert_allclose(found.spatial.mean, found.rows[:, :3].mean(axis=0), rtol=1e-6)
    with pytest.raises(UserError, match="no pictures"):
        collect(means(), [])


def test_resizing_is_exact_on_a_ramp_and_antialiased_only_where_asked() -> None:
    ramp = torch.linspace(-1, 1, 33)[1::2].expand(1, 3, 16, 16)
    assert resized(ramp, means()) is ramp
    checks = torch.ones(1, 3, 64, 64)
    checks[..., ::2, :] = -1
    smooth, rough = means(), means()
    rough.antialias = False
    shifted = checks.roll(1, dims=2)
    assert (resized(checks, smooth) - resized(shifted, smooth)).abs().max() < 0.2
    rough.side = 64 * 2 // 3
    assert resized(checks, rough).std() > 0.5


def small_file(path: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    write_safetensors(path, {name: value.half() for name, value in SmallFeatures().state_dict().items()})
    return path


def test_small_features_load_from_a_file_and_the_name_tells_the_weights(tmp_path: Path) -> None:
    first, other = small_file(tmp_path / "a.safetensors"), small_file(tmp_path / "b.safetensors", 1)
    loaded = load_features(str(first))
    assert first.stat().st_size < 1_500_000
    assert loaded.name.startswith("small-") and loaded.name != load_features(f"small:{other}").name
    output = loaded(torch.zeros(2, 3, 64, 64))
    assert isinstance(output, FeatureBatch) and output.features.shape == (2, loaded.size)
    assert output.probabilities is not None and torch.allclose(output.probabilities.sum(1), torch.ones(2))
    assert output.features.dtype == torch.float32 and not output.features.requires_grad


def test_features_that_cannot_be_had_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features_module, "SMALL", tmp_path / "none.safetensors")
    with pytest.raises(UserError, match="make them with `varkit train features"):
        load_features()
    with pytest.raises(UserError, match="unknown features 'inception'"):
        load_features("inception")
    with pytest.raises(UserError, match="no file"):
        load_features("inception:nowhere.pth")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="first key is 'weight'"):
        load_features(str(tmp_path / "other.pth"))
    torch.save({"stem.weight": torch.zeros(32, 3, 4, 4)}, tmp_path / "part.pth")
    with pytest.raises(UserError, match="missing stem.bias"):
        load_features(str(tmp_path / "part.pth"))


def test_inception_has_the_published_layout() -> None:
    """Names, and shapes told by the published sizes: 94 convolutions, 21 785 568 weights before the classifier."""
    with torch.device("meta"):
        state = InceptionV3().state_dict()
    convolutions = [name.removesuffix(".conv.weight") for name in state if name.endswith(".conv.weight")]
    assert len(convolutions) == 94
    trained = [
        v.numel()
        for n, v in state.items()
        if "running" not in n and not n.startswith("fc.") and "num_" not in n
    ]
    assert sum(trained) == 21_785_568
    shapes = {
        "Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3),
        "Mixed_5b.branch5x5_2.conv.weight": (64, 48, 5, 5),
        "Mixed_6a.branch3x3dbl_3.conv.weight": (96, 96, 3, 3),
        "Mixed_6b.branch7x7dbl_4.conv.weight": (128, 128, 7, 1),
        "Mixed_7a.branch7x7x3_2.conv.weight": (192, 192, 1, 7),
        "Mixed_7c.branch3x3dbl_3b.conv.weight": (384, 384, 3, 1),
        "Mixed_7c.branch_pool.bn.running_var": (192,),
        "fc.weight": (1008, 2048),
    }
    assert {name: tuple(state[name].shape) for name in shapes} == shapes


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    state = InceptionV3().state_dict()
    torch.save(
        {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}, path
    )
    return path


@pytest.mark.slow
def test_inception_reads_a_file_and_gives_the_same_twice(inception_file: Path, tmp_path: Path) -> None:
    loaded = load_features(f"inception:{inception_file}")
    again = load_features(str(inception_file))
    assert loaded.name == again.name and loaded.name.startswith("inception-")
    assert (loaded.side, loaded.size, loaded.antialias) == (299, 2048, False)
    images = torch.rand(2, 3, 299, 299, generator=torch.Generator().manual_seed(0)) * 2 - 1
    first, second = loaded(images), again(images)
    assert first.features.shape == (2, 2048) and torch.equal(first.features, second.features)
    assert first.probabilities is not None and first.probabilities.shape == (2, 1008)
    assert first.spatial is not None and first.spatial.shape == (2, 17 * 17 * 7)
    state = torch.load(inception_file, weights_only=True)
    del state["Mixed_6c.branch_pool.bn.bias"]
    torch.save(state, tmp_path / "short.pth")
    with pytest.raises(UserError, match="missing Mixed_6c.branch_pool.bn.bias"):
        load_features(str(tmp_path / "short.pth"))


def test_padding_is_not_counted_and_the_last_block_takes_the_maximum() -> None:
    network = InceptionV3()
    ones = torch.ones(1, 2048, 8, 8)
    ones[..., 0, 0] = 5
    seen: list[Tensor] = []
    for block, inside in ((network.Mixed_7b, 1280), (network.Mixed_7c, 2048)):
        block.branch_pool.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        block.eval()(ones[:, :inside])
    average, most = seen
    assert average[0, 0, -1, -1] == 1 and average[0, 0, 0, 0] == 2  # (5 + 1 + 1 + 1) / 4
    assert most[0, 0, 1, 1] == 5 and most[0, 0, -1, -1] == 1


def test_training_of_the_features_runs_and_its_weights_load(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("skimage")
    pytest.importorskip("sklearn")
    monkeypatch.setattr(features_task, "BATCH", 8)
    monkeypatch.setattr(features_task, "HELD_OUT", 8)
    assert main(["train", "features", "--out", str(tmp_path / "run"), "--steps", "2"]) == 0
    path = capsys.readouterr().out.strip()
    assert path.endswith("features.safetensors") and load_features(path).size == 192
    record = json.loads((tmp_path / "run" / "DONE").read_text())
    assert 0 <= record["metrics"]["things_right"] <= 1


# --- sources -------------------------------------------------------------------------------


def noise(n: int, side: int = 6, seed: int = 0) -> np.ndarray:
    return rng(seed).integers(0, 256, (n, side, side, 3), dtype=np.uint8)


def test_pictures_of_the_right_side_are_taken_as_they_are() -> None:
    images = noise(40)
    dataset = ArrayImages(images)
    assert own_side(dataset) == (6, 6) and own_side(ArrayImages(images.transpose(0, 3, 1, 2))) == (6, 6)
    source = dataset_source(dataset, (6, 6))
    found = torch.cat(list(source.batches()))
    assert source.count == 40
    np.testing.assert_array_equal(np.rint((found.numpy().transpose(0, 2, 3, 1) + 1) * 127.5), images)
    rows = chosen_rows(dataset, 7)
    assert len(set(rows.tolist())) == 7 and rows.tolist() == chosen_rows(dataset, 7).tolist() != list(
        range(7)
    )


def test_a_model_is_asked_for_what_the_reference_shows() -> None:
    of_classes = models.tiny_pipeline(ClassConfig(3))
    labelled = ArrayImages(noise(10), np.arange(10) % 2)
    assert prompts_like(of_classes, 5, labelled) == [0, 1, 2, 0, 1]
    labelled.class_names = ["a", "b", "c"]
    assert prompts_like(of_classes, 12, labelled) == [i % 2 for i in range(10)] + [0, 1]
    with pytest.raises(UserError, match="takes captions, and the reference has none"):
        prompts_like(models.tiny_pipeline(TextConfig()), 5, labelled)


def test_the_suite_finds_what_differs() -> None:
    """Real noise against real noise, and against brighter noise."""
    real, alike = (
        dataset_source(ArrayImages(noise(300)), (6, 6)),
        dataset_source(ArrayImages(noise(200, seed=1)), (6, 6)),
    )
    bright = dataset_source(ArrayImages(noise(200, seed=1) // 2 + 128), (6, 6))
    same, other = (evaluate_distribution(s, real, means(), resamples=10) for s in (alike, bright))
    assert same.comparison.figures["fid"].value < 0.05 < 0.3 < other.comparison.figures["fid"].value
    assert other.comparison.figures["precision"].value < 0.1 < same.comparison.figures["precision"].value
    assert other.floor is not None and other.floor.figures["fid"].value < 0.05
    assert same.sheet().size == (16 * 8 - 2, 6 * 8 - 2)


def test_rfid_of_reconstructions() -> None:
    pairs = Pairs(means())
    images = torch.rand(40, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    pairs.add(images, images)
    found: Comparison = pairs.compare(resamples=5)
    assert found.figures["rfid"].value < 1e-4 and found.pictures == found.reference_pictures == 40


# --- the command -----------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Default features with random weights."""
    monkeypatch.setattr(features_module, "SMALL", small_file(tmp_path / "small.safetensors"))


def folder(path: Path, images: np.ndarray) -> str:
    path.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(path / f"{i:03d}.png")
    return str(path)


def fid_json(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main(["evaluate", words[0], "--suite", "fid", "--json", "--resamples", "10", *words[1:]]) == 0
    return dict(json.loads(capsys.readouterr().out))


@pytest.mark.usefixtures("small")
def test_folder_against_folder_gives_the_same_figure_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = folder(tmp_path / "one", noise(12)), folder(tmp_path / "two", noise(20, seed=1))
    first, second = (fid_json(capsys, one, "--data", two) for _ in range(2))
    assert first == second
    assert first["pictures"] == 12 and first["reference_pictures"] == 20 and first["size"] == [6, 6]
    assert first["features"].startswith("small-") and first["resamples"] == 10 and first["settings"] is None
    low, high = first["fid"]["interval"]
    assert 0 <= low <= first["fid"]["value"] <= high and first["floor"]["pictures"] == 10
    assert len(first["warnings"]) == 1
    itself = fid_json(capsys, one, "--data", one)
    assert itself["fid"]["value"] == pytest.approx(0, abs=1e-9) and itself["recall"]["value"] == 1


@pytest.mark.usefixtures("small")
def test_array_files_and_statistics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "batch.npz", arr_0=noise(12))
    np.savez(tmp_path / "real.npz", arr_0=noise(20, seed=1))
    batch, real, kept = (str(tmp_path / name) for name in ("batch.npz", "real.npz", "statistics.npz"))
    by_pictures = fid_json(capsys, batch, "--data", real, "--statistics", kept)
    by_statistics = fid_json(capsys, batch, "--data", kept)
    assert by_pictures["fid"] == by_statistics["fid"] and by_statistics["reference_pictures"] == 20
    assert "kid" not in by_statistics and by_statistics["floor"] is None


@pytest.mark.usefixtures("small")
def test_a_model_against_pictures_and_the_table(
    class_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "real.npy", noise(20))
    sheet = tmp_path / "sheet.png"
    words = ["evaluate", str(class_model), "--suite", "fid", "--data", str(tmp_path / "real.npy"), "--n", "9"]
    assert main([*words, "--resamples", "5", "--guidance", "3", "--sheet", str(sheet)]) == 0
    out, err = capsys.readouterr()
    rows = {line.split()[0]: line.split() for line in out.splitlines()}
    assert rows["pictures"][3:] == ["9", ":", "20", "9", ":", "11"]
    assert {"features", "FID", "KID", "precision", "recall", "inception"} < set(rows)
    assert "warning: 9 pictures are no more than the 192" in err and sheet.exists()


@pytest.mark.usefixtures("small")
def test_a_model_is_compared_with_what_was_held_out_of_its_own_data(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = fid_json(capsys, "digits", "--n", "16")
    assert found["data"] == "digits" and found["part"] == "validation"
    assert found["reference_pictures"] == 252 and found["floor"]["pictures"] == 16
    assert fid_json(capsys, "digits", "--n", "16", "--data", "digits")["reference_pictures"] == 1797


@pytest.mark.usefixtures("small")
def test_rfid_is_measured_where_there_are_enough_pictures(
    class_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    np.save(tmp_path / "real.npy", noise(200))
    monkeypatch.setattr(features_module, "load_features", lambda spec: means())
    words = ["evaluate", str(class_model), "--suite", "reconstruction", "--data", str(tmp_path / "real.npy")]
    assert main([*words, "--json", "--resamples", "2", "--n", "7"]) == 0
    rfid = json.loads(capsys.readouterr().out)["rfid"]
    assert rfid["pictures"] == 7 and rfid["rfid"]["value"] > 0 and rfid["features"] == "means"
    assert main([*words, "--resamples", "2", "--n", "7"]) == 0
    assert "rFID" in capsys.readouterr().out
    assert main([*words, "--json", "--n", "6"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["rfid"] is None and "rFID is left out: 6 pictures" in err


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["PICTURES", "--suite", "fid"], "add --data"),
        (["PICTURES", "--suite", "fid", "--data", "PICTURES", "--top-k", "3"], "--top_k is for drawing"),
        (["PICTURES", "--suite", "fid", "--data", "PICTURES", "--resamples", "-1"], "--resamples is -1"),
        (["PICTURES", "--suite", "fid", "--data", "PICTURES", "--features", "vgg"], "unknown features 'vgg'"),
        (["PICTURES", "--suite", "fid", "--data", "PICTURES", "--statistics", "s.txt"], "end"),
        (["nowhere", "--suite", "fid", "--data", "PICTURES"], "unknown dataset 'nowhere'"),
        (["MODEL", "--suite", "digits", "--statistics", "s.npz"], "--statistics is for the suite fid"),
        (["MODEL", "--suite", "fid", "--data", "PICTURES"], "takes captions"),
    ],
)
def test_mistakes_are_one_line(
    text_model: Path, tmp_path: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = {"MODEL": str(text_model), "PICTURES": folder(tmp_path / "pictures", noise(4))}
    assert main(["evaluate", *(paths.get(word, word) for word in words)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and message in err, err
