"""BAC: when each sub-block is recomputed. Pure arithmetic on matrices and lists of steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch


Steps = tuple[int, ...]
METRICS = ("cosine", "mse", "l1", "l2")
CANDIDATES = ("ffn", "all")


def similarity(features: torch.Tensor, metric: str = "cosine") -> torch.Tensor:
    """S[t, s] of the outputs of one sub-block: how well the output of step t stands in for that of step s.

    Args:
        features: `[n, T, d]`, n samples; the mean over them is returned.
        metric: `"cosine"`, or a distance with its sign turned: `"mse"` and `"l1"` (mean over the elements), `"l2"`
            (Euclidean norm).

    Returns:
        `[T, T]`, float64.
    """
    f = features.double()
    if metric == "cosine":
        f = f / f.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(f.dtype).tiny)
        return (f @ f.mT).mean(0)
    if metric == "l1":
        return -mean_difference(features)
    distance = torch.cdist(f, f, compute_mode="donot_use_mm_for_euclid_dist")
    return -(distance**2 / f.shape[-1] if metric == "mse" else distance).mean(0)


def mean_difference(features: torch.Tensor) -> torch.Tensor:
    """Mean |F[t] - F[s]| over samples and elements of `features` `[n, T, d]`: `[T, T]`, float64."""
    f = features.double()
    return (torch.cdist(f, f, p=1) / f.shape[-1]).mean(0)


def volatility(difference: torch.Tensor) -> float:
    """e_b: the mean of |F_b[t] - F_b[s]| over all pairs of steps t < s, from their `mean_difference`."""
    t, s = torch.triu_indices(*difference.shape, offset=1)
    return difference[t, s].mean().item() if len(t) else 0.0


def gains(similarity: torch.Tensor) -> torch.Tensor:
    """phi(i, j) = sum_{i < s < j} S[i, s]: what reusing step i up to, not including, step j is worth.

    Args:
        similarity: `[..., T, T]`.

    Returns:
        `[..., T, T + 1]`; minus infinity where j <= i.
    """
    total = similarity.double().cumsum(-1)
    before_j = torch.cat([torch.zeros_like(total[..., :1]), total], -1)  # sum over s < j, for j = 0 ... T
    phi = before_j - total.diagonal(dim1=-2, dim2=-1)[..., None]
    i, j = torch.meshgrid(*(torch.arange(n) for n in phi.shape[-2:]), indexing="ij")
    return phi.masked_fill(j <= i, -torch.inf)


def score(similarity: torch.Tensor, steps: Sequence[int]) -> float:
    """sum_m phi(u_m, u_{m+1}) of one schedule, with u_{M+1} = T."""
    total = similarity.shape[-1]
    spans = zip(steps, [*steps[1:], total])
    return sum(similarity[u, u + 1 : end].double().sum().item() for u, end in spans)


def adaptive_schedules(similarity: torch.Tensor, num_updates: int) -> list[Steps]:
    """The Adaptive Caching Scheduler: for each sub-block the M steps with the highest `score`, step 0 among them.

    Dynamic programme over V_m[j], the best score of m updates the last of which is at step j:
    V_m[j] = max_{i < j} V_{m-1}[i] + phi(i, j), and the answer is max_j V_M[j] + phi(j, T).

    Args:
        similarity: `[B, T, T]`, for distances with the sign turned.
        num_updates: M, 1 to T.
    """
    phi = gains(similarity)
    blocks, total, _ = phi.shape
    value = torch.full((blocks, total), -torch.inf, dtype=torch.float64)
    value[:, 0] = 0
    origins = []
    for _ in range(num_updates - 1):
        value, origin = (value[:, :, None] + phi[:, :, :total]).max(1)
        origins.append(origin)
    last = (value + phi[:, :, total]).argmax(1)
    columns = [last]
    for origin in reversed(origins):
        columns.append(origin.gather(1, columns[-1][:, None])[:, 0])
    return [tuple(row) for row in torch.stack(columns[::-1], 1).tolist()]


def even_schedule(total: int, num_updates: int) -> Steps:
    """M steps of T at equal distances, the first of them 0."""
    return tuple(m * total // num_updates for m in range(num_updates))


def bubbling_union(
    schedules: Mapping[str, Steps],
    feed_forward: Sequence[str],
    errors: Mapping[str, float],
    blocks: int,
    candidates: str = "ffn",
) -> dict[str, Steps]:
    """The Bubbling Union Algorithm: volatile sub-blocks are refreshed whenever a later feed-forward is.

    A fresh feed-forward then never reads a stale output of theirs. The deepest goes first, so that what it gained
    reaches those before it.

    Args:
        schedules: Steps by name, in forward order.
        feed_forward: Names of the sub-blocks with a feed-forward network.
        errors: e_b by name.
        blocks: k, how many of the candidates with the largest error are chosen.
        candidates: `"ffn"`, or `"all"` to choose among all sub-blocks.
    """
    names = list(schedules)
    known = names if candidates == "all" else [n for n in names if n in set(feed_forward)]
    chosen = sorted(known, key=lambda name: errors[name], reverse=True)[:blocks]
    union = dict(schedules)
    for name in sorted(chosen, key=names.index, reverse=True):
        later = [n for n in names[names.index(name) + 1 :] if n in set(feed_forward)]
        union[name] = tuple(sorted({*union[name], *(u for n in later for u in union[n])}))
    return union


def stretched(steps: Sequence[int], old: int, new: int) -> Steps:
    """A schedule of `old` steps moved to a run of `new` steps: u -> round(u T' / T), each step once."""
    return tuple(sorted({min(int(u * new / old + 0.5), new - 1) for u in steps}))
