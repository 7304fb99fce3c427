"""Moments on disk are read as they were written, and errors for unreadable ones say what to do."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from slimllm_ops.checkpoint.moment_store import MomentStore
from slimllm_ops.decide.paths import LayerPaths, ModulePath
from slimllm_ops.decide.sensitivity import Sensitivity
from slimllm_ops.errors import InputError
from slimllm_ops.models.pair import Pair
from slimllm_ops.moments.observation import PackedObservation
from slimllm_ops.moments.ranking import Ranking
from slimllm_ops.moments.routing import PackedExperts
from tests.slimllm_ops.naive import observe


def observed(seed: int, width: int) -> PackedObservation:
    generator = torch.Generator().manual_seed(seed)
    x_NP = torch.randn(100, width, generator=generator, dtype=torch.float64)
    return observe(x_NP, torch.rand(100, 10, generator=generator))


def path_of(seed: int, units: int) -> ModulePath:
    rng = np.random.default_rng(seed)
    return ModulePath(Ranking(tuple(rng.permutation(units).tolist()), tuple(rng.random(units).tolist())), rng.random())


# What a layer changes is measured where layers may go.
CHANGES = (None, 2 / 3)


@pytest.fixture
def store(tmp_path: Path) -> MomentStore:
    """Two layers, of different widths."""
    store = MomentStore(tmp_path)
    for layer in range(2):
        paths = LayerPaths(path_of(layer, 4), path_of(layer + 10, 30), 1 / 3 + layer, CHANGES[layer])
        store.save(layer, paths, observed(layer, 16), observed(layer + 10, 30))
    store.seal({"model": "a model", "model_digest": "0123", "calibration": {}})
    return store


@pytest.mark.parametrize("layer", [0, 1])
def test_what_is_read_is_what_was_written_to_the_last_bit(store: MomentStore, layer: int) -> None:
    again = MomentStore(store.directory)
    expected = LayerPaths(path_of(layer, 4), path_of(layer + 10, 30), 1 / 3 + layer, CHANGES[layer])
    assert again.load_paths(layer) == expected
    for module, seed, width in (("attention", layer, 16), ("mlp", layer + 10, 30)):
        read, written = again.load_moments(layer, module), observed(seed, width)
        assert read.moments.count == written.moments.count == 100
        np.testing.assert_array_equal(read.moments.mean_P, written.moments.mean_P)
        np.testing.assert_array_equal(read.input_squares_D, written.input_squares_D)
        assert read.moments.mean_P.dtype == np.float64
        assert len(read.moments.rows) == len(written.moments.rows)
        unpacked = read.unpack(torch.device("cpu")).moments
        assert torch.equal(unpacked.covariance_PP, written.unpack(torch.device("cpu")).moments.covariance_PP)


def test_experts_are_read_as_they_were_written_and_one_without_tokens_stays_so(tmp_path: Path) -> None:
    experts = PackedExperts(150, (observed(1, 16), None, observed(2, 16)))
    store = MomentStore(tmp_path)
    store.save(0, LayerPaths(path_of(0, 4), path_of(1, 48), 0.5), observed(0, 12), experts)
    assert store.load_paths(0) == LayerPaths(path_of(0, 4), path_of(1, 48), 0.5)
    assert isinstance(store.load_moments(0, "attention"), PackedObservation)
    read = store.load_moments(0, "mlp")
    assert isinstance(read, PackedExperts)
    assert (read.count, read.idle, read.intercept) == (150, (1,), False)
    for one, other in ((read.experts[0], experts.experts[0]), (read.experts[2], experts.experts[2])):
        assert one is not None
        assert other is not None
        assert one.moments.count == other.moments.count
        np.testing.assert_array_equal(one.input_squares_D, other.input_squares_D)
        assert all(map(np.array_equal, one.moments.rows, other.moments.rows))


@pytest.mark.parametrize("intercept", [True, False])
def test_the_intercept_is_chosen_when_moments_are_read(store: MomentStore, intercept: bool) -> None:
    read = MomentStore(store.directory, intercept).load_moments(1, "mlp")
    assert read.intercept == intercept
    (part,) = read.parts(torch.ones(5, 30, dtype=torch.float64))
    written = observed(11, 30).unpack(torch.device("cpu"))
    expected = written if intercept else written.about_zero()
    assert part.observation is not None
    assert torch.equal(part.observation.moments.mean_P, expected.moments.mean_P)
    assert torch.equal(part.observation.moments.covariance_PP, expected.moments.covariance_PP)


def test_the_scatter_takes_half_the_room_of_the_square(store: MomentStore, tmp_path: Path) -> None:
    store.save(2, LayerPaths(path_of(0, 4), path_of(0, 400), 1.0), observed(0, 16), observed(0, 400))
    assert (tmp_path / "layer-00002.safetensors").stat().st_size < 0.62 * 400 * 400 * 8


def test_sensitivities_are_read_as_they_were_written_and_one_that_is_missing_is_named(store: MomentStore) -> None:
    fishers = Pair(*np.random.default_rng(0).normal(size=(2, 5, 5)).astype(np.float32))
    assert not store.has_sensitivity(1)
    store.save_sensitivity(1, Sensitivity(fishers, 0.3))
    assert store.has_sensitivity(1)
    read = store.load_sensitivity(1)
    assert read.output == 0.3
    for one, other in zip(read.modules, fishers, strict=True):
        assert np.array_equal(one, other)
    with pytest.raises(InputError, match=r"sensitivity-00000.safetensors is missing or broken .*: run `slimllm cal"):
        store.load_sensitivity(0)


def test_the_manifest_has_its_format(store: MomentStore) -> None:
    assert store.manifest() == {"format": 3, "model": "a model", "model_digest": "0123", "calibration": {}}


def test_a_layer_that_is_missing_is_named(store: MomentStore) -> None:
    for read in (lambda: store.load_paths(7), lambda: store.load_moments(7, "mlp")):
        with pytest.raises(InputError, match=r"layer-00007.safetensors is missing or broken \(.*slimllm calibrate"):
            read()


def test_a_layer_that_was_cut_short_is_named(store: MomentStore) -> None:
    path = store.directory / "layer-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    for read in (lambda: store.load_paths(1), lambda: store.load_moments(1, "attention")):
        with pytest.raises(InputError, match=r"layer-00001.safetensors is missing or broken \(.*slimllm calibrate"):
            read()
    # Its neighbour is as good as ever.
    store.load_paths(0)


def test_a_folder_without_a_manifest_holds_no_moments(store: MomentStore) -> None:
    (store.directory / "moments.json").unlink()
    with pytest.raises(InputError, match=r"holds no moments \(moments.json is missing\): run `slimllm calibrate`"):
        store.manifest()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is not valid JSON"),
        ('{"format": 3', "is not valid JSON"),
        ("\0", "is not valid JSON"),
        ("[]", "holds a list, expected a JSON object"),
        ("[" * 100_000, "is nested too deeply"),
        (
            '{"format": 3, "model": "a", "model_digest": "b", "calibration": 3}',
            "has no valid calibration, expected a dict",
        ),
    ],
)
def test_a_manifest_that_is_none_is_refused(store: MomentStore, text: str, said: str) -> None:
    (store.directory / "moments.json").write_text(text)
    with pytest.raises(InputError, match=rf"moments.json {said}"):
        store.manifest()


def test_the_layers_that_are_saved_are_counted_from_the_first(store: MomentStore) -> None:
    assert store.num_saved(5) == 2
    (store.directory / "layer-00000.safetensors").unlink()
    assert store.num_saved(5) == 0


@pytest.mark.parametrize("content", [{"format": 2}, {}, {"model": "a model"}])
def test_another_format_is_refused(store: MomentStore, content: dict[str, object]) -> None:
    (store.directory / "moments.json").write_text(json.dumps(content))
    with pytest.raises(
        InputError, match=r"moments.json has format (2|None), expected 3: run `slimllm calibrate` again"
    ):
        store.manifest()
