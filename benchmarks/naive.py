"""Prunes one layer by the published code's algorithm, written plainly; `benchmarks/speed.py` measures ours against it.

It follows the equations over raw activations: it keeps every head's output, computes correlations from it, sums outputs
again for each exchange, takes eigenvectors from `numpy.linalg.eig`, and fits each output dim separately.

Shapes: N tokens, P inputs of an output projection, D hidden size, H heads, S inputs kept. All float32.
"""

import numpy as np


def prune_heads(x_NP: np.ndarray, weight_PD: np.ndarray, num_heads: int, num_removed: int) -> list[int]:
    """Return the heads that stay, after the exchange and a fit of every output dim."""
    width = x_NP.shape[1] // num_heads
    parts = [slice(head * width, (head + 1) * width) for head in range(num_heads)]
    outputs_NDH = np.stack([x_NP[:, part] @ weight_PD[part] for part in parts], axis=-1)
    whole_ND = outputs_NDH.sum(axis=-1)
    scores = [_similarity(whole_ND - outputs_NDH[:, :, head], whole_ND) for head in range(num_heads)]
    order = sorted(range(num_heads), key=lambda head: -scores[head])
    dropped, kept = order[:num_removed], order[num_removed:]
    best = _similarity(outputs_NDH[:, :, kept].sum(axis=-1), whole_ND)
    for candidate in dropped:
        trials = [[*kept[:slot], candidate, *kept[slot + 1 :]] for slot in range(len(kept))]
        found = [_similarity(outputs_NDH[:, :, trial].sum(axis=-1), whole_ND) for trial in trials]
        if max(found) > best:
            best, kept = max(found), trials[int(np.argmax(found))]
    _fit(outputs_NDH[:, :, kept].sum(axis=-1), whole_ND)
    return sorted(kept)


def prune_channels(
    x_NP: np.ndarray,
    weight_PD: np.ndarray,
    input_ND: np.ndarray,
    input_weights_PD: tuple[np.ndarray, ...],
    num_removed: int,
) -> list[int]:
    """Return the channels that stay; like the published code, keep the lowest 1 % and remove those above."""
    output_ND = x_NP @ weight_PD
    eigenvalues_D, directions_DD = np.linalg.eig(np.cov(output_ND, rowvar=False))
    magnitude_D = np.abs(eigenvalues_D)
    importance_D = 1 / (1 + np.exp(-magnitude_D / magnitude_D.mean()))
    norm_D = np.linalg.norm(input_ND, axis=0)
    scores_P = np.linalg.norm(x_NP, axis=0) * np.linalg.norm((weight_PD @ directions_DD) * importance_D, axis=1)
    for into_PD in input_weights_PD:
        scores_P = scores_P + np.linalg.norm(into_PD * norm_D, axis=1)
    order = np.argsort(scores_P, kind="stable")
    tail = round(0.01 * len(order))
    kept = np.concatenate([order[:tail], order[tail + num_removed :]])
    _fit(x_NP[:, kept] @ weight_PD[kept], output_ND)
    return sorted(kept.tolist())


def _similarity(part_ND: np.ndarray, whole_ND: np.ndarray) -> float:
    """Return the absolute correlation of two outputs, summed over the dims."""
    part, whole = part_ND - part_ND.mean(axis=0), whole_ND - whole_ND.mean(axis=0)
    spread_D = np.sqrt((part**2).sum(axis=0) * (whole**2).sum(axis=0))
    return float(np.abs((part * whole).sum(axis=0) / spread_D).sum())


def _fit(part_ND: np.ndarray, whole_ND: np.ndarray) -> list[np.ndarray]:
    return [np.polyfit(part_ND[:, j], whole_ND[:, j], 1) for j in range(whole_ND.shape[1])]
