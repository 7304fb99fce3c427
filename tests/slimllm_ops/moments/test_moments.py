"""Merged moments of shards are the moments of all tokens, and are sent without losing a bit."""

import numpy as np
import pytest
import torch

from slimllm_ops.moments.moments import Moments, MomentSum, PackedMoments, merge_tree


def rows(seed: int, count: int, width: int = 13, mean: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator, dtype=torch.float64) + mean


def pack(*batches: torch.Tensor) -> PackedMoments:
    total = MomentSum()
    for x_NP in batches:
        total.add(x_NP)
    return total.packed()


def square(packed: PackedMoments) -> torch.Tensor:
    """Return the scatter (P, P)."""
    return packed.unpack().covariance_PP * packed.count


def assert_same(found: PackedMoments, expected: PackedMoments, relative: float = 1e-12) -> None:
    assert found.count == expected.count
    np.testing.assert_allclose(found.mean_P, expected.mean_P, rtol=relative, atol=relative)
    size = float(square(expected).abs().max())
    torch.testing.assert_close(square(found), square(expected), rtol=0, atol=relative * size)


def test_equal_numpys_mean_and_covariance() -> None:
    x_NP = rows(0, 50)
    moments = Moments.of(x_NP)
    np.testing.assert_allclose(moments.mean_P, x_NP.numpy().mean(axis=0), rtol=1e-14)
    np.testing.assert_allclose(moments.covariance_PP, np.cov(x_NP.numpy(), rowvar=False, bias=True), rtol=1e-12)


def test_norm_is_that_of_the_uncentred_columns() -> None:
    x_NP = rows(1, 50)
    np.testing.assert_allclose(Moments.of(x_NP).norm_P, np.linalg.norm(x_NP.numpy(), axis=0), rtol=1e-7)


@pytest.mark.parametrize("width", [1, 2, 7, 8, 9, 13, 16, 31, 64, 100])
def test_the_product_by_block_rows_is_the_whole_product(width: int) -> None:
    x_NP = rows(3, 20, width)
    centred_NP = x_NP - x_NP.mean(dim=0)
    torch.testing.assert_close(square(pack(x_NP)), centred_NP.T @ centred_NP, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mean", [0.0, 3.0, 1e4])
@pytest.mark.parametrize("sizes", [(1, 40), (20, 21), (37, 5)])
def test_batches_and_merged_shards_give_the_moments_of_all_rows(mean: float, sizes: tuple[int, int]) -> None:
    a_NP, b_NP = (rows(seed, size, mean=mean) for seed, size in enumerate(sizes))
    together = pack(torch.cat([a_NP, b_NP + 0.5]))
    assert_same(pack(a_NP, b_NP + 0.5), together, relative=1e-10)
    assert_same(pack(a_NP).merge(pack(b_NP + 0.5)), together, relative=1e-10)


def test_a_sum_goes_on_after_it_was_packed() -> None:
    total = MomentSum()
    total.add(rows(0, 9))
    first = total.packed()
    assert_same(first, pack(rows(0, 9)), relative=0)
    total.add(rows(1, 7))
    assert_same(total.packed(), pack(rows(0, 9), rows(1, 7)), relative=0)
    assert_same(first, pack(rows(0, 9)), relative=0)


def test_merging_leaves_what_it_merged_unchanged() -> None:
    a, b = pack(rows(0, 9)), pack(rows(1, 7))
    for array in (a.mean_P, *a.rows, b.mean_P, *b.rows):
        array.setflags(write=False)
    merged = a.merge(b)
    assert not any(np.shares_memory(row, other) for row in merged.rows for other in (*a.rows, *b.rows))


@pytest.mark.parametrize("mean", [0.0, 1e4])
def test_merging_commutes_and_associates_up_to_rounding(mean: float) -> None:
    a, b, c = (pack(rows(seed, 5 + 8 * seed, mean=mean * (1 + 0.001 * seed))) for seed in range(3))
    assert_same(a.merge(b), b.merge(a))
    assert_same(a.merge(b).merge(c), a.merge(b.merge(c)))


@pytest.mark.parametrize("parts", [1, 2, 3, 5, 8])
def test_a_tree_of_merges_gives_the_moments_of_all_rows(parts: int) -> None:
    pieces = [rows(seed, 4 + seed) for seed in range(parts)]
    merged = merge_tree([pack(piece) for piece in pieces], PackedMoments.merge)
    assert_same(merged, pack(torch.cat(pieces)))


def test_the_tree_has_one_order_so_that_the_sum_has_one_value() -> None:
    a, b, c, d, e = (pack(rows(seed, 4 + seed)) for seed in range(5))
    found = merge_tree([a, b, c, d, e], PackedMoments.merge)
    expected = a.merge(b).merge(c.merge(d)).merge(e)
    assert torch.equal(square(found), square(expected))
    assert np.array_equal(found.mean_P, expected.mean_P)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_centred_sums_beat_uncentred_ones_where_the_mean_dwarfs_the_spread(dtype: torch.dtype) -> None:
    mean = {torch.float32: 1e4, torch.bfloat16: 200.0}[dtype]
    x_NP = rows(2, 400, mean=mean).to(dtype)
    # Beside a feature without a mean, which is not centred in bfloat16.
    x_NP[:, 0] -= mean
    exact_PP = np.cov(x_NP.double().numpy(), rowvar=False, bias=True)
    shards = [pack(*part.split(20)) for part in x_NP.split(100)]
    centred = np.abs(merge_tree(shards, PackedMoments.merge).unpack().covariance_PP.numpy() - exact_PP).max()
    x_NP, mean_P = x_NP.float(), x_NP.float().mean(dim=0)
    uncentred = np.abs(((x_NP.T @ x_NP) / len(x_NP) - mean_P[:, None] * mean_P).numpy() - exact_PP).max()
    assert centred < 1e-5
    assert uncentred > 100 * centred


@pytest.mark.parametrize("mean", [0.0, 1.0, 7.0, 9.0, 100.0])
def test_bfloat16_activations_are_summed_as_exactly_as_float32_ones(mean: float) -> None:
    x_NP = rows(7, 600, mean=mean).bfloat16()
    exact_PP = np.cov(x_NP.double().numpy(), rowvar=False, bias=True)
    found = pack(*x_NP.split(50)).unpack()
    assert np.abs(found.covariance_PP.numpy() - exact_PP).max() < 3e-6 * exact_PP.max()
    np.testing.assert_allclose(found.mean_P, x_NP.double().mean(dim=0), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_sums_are_kept_in_float64(dtype: torch.dtype) -> None:
    packed = pack(rows(8, 20).to(dtype))
    assert {packed.mean_P.dtype, *(row.dtype for row in packed.rows)} == {np.dtype(np.float64)}


def test_a_triangle_travels_instead_of_the_square() -> None:
    packed = pack(rows(5, 30, 64))
    assert packed.num_bytes == 64 * 8 + 64 * 64 * 8 * 9 // 16


def test_unpacking_read_only_arrays_gives_moments_that_own_their_memory() -> None:
    packed = pack(rows(6, 30))
    for array in (packed.mean_P, *packed.rows):
        array.setflags(write=False)
    unpacked = packed.unpack()
    expected_PP = unpacked.covariance_PP.clone()
    unpacked.covariance_PP.zero_()
    unpacked.mean_P.zero_()
    assert torch.equal(packed.unpack().covariance_PP, expected_PP)
    assert packed.mean_P.any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_seen(bad: float) -> None:
    x_NP = rows(9, 20).float()
    assert pack(x_NP).is_finite()
    x_NP[3, 11] = bad
    assert not pack(x_NP).is_finite()


def test_an_overflow_of_the_squares_is_seen() -> None:
    assert not pack(rows(10, 20).float() * 1e30).is_finite()
