"""Which heads and channels of an SSD scan's input share a scale: clusters of like magnitude.

Chiang et al. 2025, Quamba2, arXiv 2503.22879, section 4 ('sort-and-cluster').
"""

from __future__ import annotations

import torch
from torch import Tensor


def sort_and_cluster(maxima: Tensor, heads: int, channels: int) -> tuple[Tensor, Tensor]:
    """An order of the channels of an SSD group, and the cluster that each place in it belongs to.

    maxima [H, P]: the largest magnitude of each channel, by head. Channels are sorted inside their
    heads, heads are joined to at most `heads` clusters, and the sorted channels of each are cut
    into at most `channels` runs, each with a scale of its own. Returns the order (place [h, p]
    takes channel order[h, p], both counted head by head) and the cluster of each place, below
    heads * channels; int64 [H, P]. A head stays whole, and heads of a cluster follow one another.
    """
    width = maxima.shape[1]
    ranked, ranks = maxima.double().sort(dim=1, stable=True)
    order: list[Tensor] = []
    labels: list[Tensor] = []
    for number, cluster in enumerate(join_heads(ranked, heads)):
        cuts = torch.tensor(cut_channels(ranked[cluster].amax(0), channels))
        run = torch.bucketize(torch.arange(width), cuts, right=True)
        order += [head * width + ranks[head] for head in cluster]
        labels += [number * channels + run] * len(cluster)
    return torch.stack(order), torch.stack(labels)


def join_heads(ranked: Tensor, count: int) -> list[list[int]]:
    """The heads, by index, in at most `count` clusters; those of small magnitudes come first.

    ranked [H, P] float64 holds the sorted maxima of each head. Clusters are joined two by two,
    always those whose union adds least to the squared rounding error, in which each channel counts
    as the square of the range that it has to share.
    """
    clusters = [[head] for head in range(len(ranked))]
    peaks = ranked.clone()
    while len(clusters) > count:
        sizes = torch.tensor([len(c) for c in clusters], dtype=torch.float64)
        own = sizes * peaks.square().sum(1)
        joined = torch.maximum(peaks[:, None], peaks[None]).square().sum(2)
        added = (sizes[:, None] + sizes[None]) * joined - own[:, None] - own[None]
        added += torch.full_like(added, torch.inf).tril()
        a, b = divmod(int(added.argmin()), len(clusters))
        peaks[a] = torch.maximum(peaks[a], peaks[b])
        clusters[a] += clusters.pop(b)
        peaks = torch.cat([peaks[:b], peaks[b + 1 :]])
    by_peak = ranked[:, -1].tolist()
    clusters = [sorted(cluster, key=lambda head: (by_peak[head], head)) for cluster in clusters]
    return sorted(clusters, key=lambda cluster: (by_peak[cluster[-1]], cluster))


def cut_channels(profile: Tensor, count: int) -> list[int]:
    """Where to cut ascending magnitudes [P] into at most `count` runs of least rounding error.

    A run costs its length times the square of its largest magnitude; the cuts are the best there
    are (dynamic programming). Fewer than `count` - 1 cuts come back for fewer channels.
    """
    width = len(profile)
    ends = torch.arange(1, width + 1, dtype=torch.float64)
    starts = torch.arange(width, dtype=torch.float64)
    cost = (ends[None] - starts[:, None]) * profile.double().square()[None]
    cost[starts[:, None] >= ends[None]] = torch.inf
    best, origins = cost[0], []
    for _ in range(min(count, width) - 1):
        total = torch.cat([cost[:1], best[:-1, None] + cost[1:]])
        best, origin = total.min(0)
        origins.append(origin)
    cuts, end = [], width
    for origin in reversed(origins):
        end = int(origin[end - 1])
        if end == 0:
            break
        cuts.append(end)
    return cuts[::-1]
