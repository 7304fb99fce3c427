"""Moments of shards are the moments of all tokens together, and survive their travels bit for bit."""

import numpy as np
import pytest
import torch

from slimllm_ops.moments import Moments, PackedMoments, merge_tree, symmetric_product


def rows(seed: int, count: int, width: int = 13, mean: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator, dtype=torch.float64) + mean


def assert_same(found: Moments, expected: Moments, relative: float = 1e-12) -> None:
    assert found.count == expected.count
    torch.testing.assert_close(found.mean_P, expected.mean_P, rtol=relative, atol=relative)
    size = float(expected.scatter_PP.abs().max())
    torch.testing.assert_close(found.scatter_PP, expected.scatter_PP, rtol=0, atol=relative * size)


def test_equal_numpys_mean_and_covariance() -> None:
    x_NP = rows(0, 50)
    moments = Moments.of(x_NP)
    np.testing.assert_allclose(moments.mean_P, x_NP.numpy().mean(axis=0), rtol=1e-14)
    expected_PP = np.cov(x_NP.numpy(), rowvar=False, bias=True)
    # The centred rows are multiplied in float32.
    np.testing.assert_allclose(moments.covariance_PP, expected_PP, atol=1e-6)


def test_norm_is_that_of_the_uncentred_columns() -> None:
    x_NP = rows(1, 50)
    np.testing.assert_allclose(Moments.of(x_NP).norm_P, np.linalg.norm(x_NP.numpy(), axis=0), rtol=1e-7)


@pytest.mark.parametrize("mean", [0.0, 3.0, 1e4])
@pytest.mark.parametrize("sizes", [(1, 40), (20, 21), (37, 5)])
def test_merging_gives_the_moments_of_all_rows(mean: float, sizes: tuple[int, int]) -> None:
    a_NP, b_NP = (rows(seed, size, mean=mean) for seed, size in enumerate(sizes))
    merged = Moments.of(a_NP).merge(Moments.of(b_NP + 0.5))
    assert_same(merged, Moments.of(torch.cat([a_NP, b_NP + 0.5])), relative=1e-6)


def test_merging_leaves_what_it_merged_unchanged() -> None:
    a, b = Moments.of(rows(0, 9)), Moments.of(rows(1, 7))
    before = [a.mean_P.clone(), a.scatter_PP.clone(), b.mean_P.clone(), b.scatter_PP.clone()]
    a.merge(b)
    for now, then in zip([a.mean_P, a.scatter_PP, b.mean_P, b.scatter_PP], before, strict=True):
        assert torch.equal(now, then)


@pytest.mark.parametrize("mean", [0.0, 1e4])
def test_merging_commutes_and_associates_up_to_rounding(mean: float) -> None:
    a, b, c = (Moments.of(rows(seed, 5 + 8 * seed, mean=mean * (1 + 0.001 * seed))) for seed in range(3))
    assert_same(a.merge(b), b.merge(a))
    assert_same(a.merge(b).merge(c), a.merge(b.merge(c)))


@pytest.mark.parametrize("parts", [1, 2, 3, 5, 8])
def test_a_tree_of_merges_gives_the_moments_of_all_rows(parts: int) -> None:
    pieces = [rows(seed, 4 + seed) for seed in range(parts)]
    merged = merge_tree([Moments.of(piece) for piece in pieces], Moments.merge)
    assert_same(merged, Moments.of(torch.cat(pieces)), relative=1e-6)


def test_the_tree_has_one_order_so_that_the_sum_has_one_value() -> None:
    a, b, c, d, e = (Moments.of(rows(seed, 4 + seed)) for seed in range(5))
    found = merge_tree([a, b, c, d, e], Moments.merge)
    expected = a.merge(b).merge(c.merge(d)).merge(e)
    assert torch.equal(found.scatter_PP, expected.scatter_PP)
    assert torch.equal(found.mean_P, expected.mean_P)


def test_centred_sums_beat_uncentred_ones_where_the_mean_dwarfs_the_spread() -> None:
    x_NP = rows(2, 400, mean=1e4).float()
    exact_PP = np.cov(x_NP.numpy().astype(np.float64), rowvar=False, bias=True)
    shards = [Moments.of(part) for part in x_NP.split(100)]
    centred = np.abs(merge_tree(shards, Moments.merge).covariance_PP.numpy() - exact_PP).max()
    mean_P = x_NP.mean(dim=0)
    uncentred = np.abs(((x_NP.T @ x_NP) / len(x_NP) - mean_P[:, None] * mean_P).numpy() - exact_PP).max()
    assert centred < 1e-5
    assert uncentred > 1e3 * centred


@pytest.mark.parametrize("width", [1, 2, 7, 8, 9, 13, 16, 31, 64, 100])
def test_the_product_by_block_rows_is_the_whole_product(width: int) -> None:
    x_NP = rows(3, 20, width)
    product_PP = symmetric_product(x_NP)
    torch.testing.assert_close(product_PP, x_NP.T @ x_NP, rtol=1e-12, atol=1e-12)
    assert product_PP.dtype == x_NP.dtype


@pytest.mark.parametrize("width", [1, 2, 7, 8, 9, 13, 64])
def test_packing_and_unpacking_is_exact(width: int) -> None:
    moments = Moments.of(rows(4, 30, width))
    again = moments.to_numpy().unpack()
    assert again.count == moments.count
    assert torch.equal(again.mean_P, moments.mean_P)
    assert torch.equal(again.scatter_PP, moments.scatter_PP)


def test_a_triangle_travels_instead_of_the_square() -> None:
    packed = Moments.of(rows(5, 30, 64)).to_numpy()
    assert sum(row.size for row in packed.rows) < 0.6 * 64 * 64


def test_unpacking_read_only_arrays_gives_moments_that_own_their_memory() -> None:
    packed = Moments.of(rows(6, 30)).to_numpy()
    for array in (packed.mean_P, *packed.rows):
        array.setflags(write=False)
    unpacked = PackedMoments(packed.count, packed.mean_P, packed.rows).unpack()
    expected_PP = unpacked.scatter_PP.clone()
    unpacked.scatter_PP.zero_()
    unpacked.mean_P.zero_()
    assert torch.equal(packed.unpack().scatter_PP, expected_PP)
    assert packed.mean_P.any()


def test_bfloat16_activations_lose_nothing_to_the_sum() -> None:
    x_NP = rows(7, 60).bfloat16()
    assert_same(Moments.of(x_NP), Moments.of(x_NP.double()))
    assert Moments.of(x_NP).scatter_PP.dtype == torch.float64
