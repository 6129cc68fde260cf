r"""Ordinary N:M masks of groups that lie one behind the other, for M of 4, 8, 16 and 32.

A lane reads a group in words of 16 bytes and sorts it in its registers, by Batcher's bitonic network, of
which the compiler keeps what leads to t, the N-th largest. Kept are the scores above t, then those equal to t
from the left until N are kept: the masks of :mod:`nmsolve.kernels.nm`. Nothing is exchanged between lanes.
"""

import triton
import triton.language as tl


@triton.jit
def wide_scores(at, inside, WIDTH: tl.constexpr, GROUPS: tl.constexpr):
    """``WIDTH`` (2, 4 or 8) neighbouring scores of ``GROUPS`` groups, as so many vectors in their order."""
    x = tl.load(at, mask=inside, other=0.0)
    if WIDTH == 8:
        even, odd = tl.split(tl.reshape(x, (GROUPS, 4, 2)))
        x0, x2, x4, x6 = quads(even, GROUPS)
        x1, x3, x5, x7 = quads(odd, GROUPS)
        return (x0, x1, x2, x3, x4, x5, x6, x7)
    elif WIDTH == 4:
        return quads(x, GROUPS)
    else:
        x0, x1 = tl.split(x)
        return (x0, x1)


@triton.jit
def quads(x, GROUPS: tl.constexpr):
    """The four columns of ``(GROUPS, 4)``."""
    even, odd = tl.split(tl.reshape(x, (GROUPS, 2, 2)))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return (x0, x1, x2, x3)


@triton.jit
def bitonic_sort(x, LOG: tl.constexpr):
    """2^LOG vectors, elementwise in descending order; -0.0 and 0.0 may stay as they are."""
    for run in tl.static_range(1, LOG + 1):
        for step in tl.static_range(run):
            y = ()
            # Each with its partner; runs ascend and descend in turn, the last one descends.
            for i in tl.static_range(1 << LOG):
                if (i < i ^ (1 << (run - 1 - step))) == (((i >> run) & 1) == 0):
                    y = y + (tl.maximum(x[i], x[i ^ (1 << (run - 1 - step))]),)
                else:
                    y = y + (tl.minimum(x[i], x[i ^ (1 << (run - 1 - step))]),)
            x = y
    return x


@triton.jit(do_not_specialize=["groups"])
def nm_groups_kernel(
    scores_ptr,  # (groups, M) contiguous
    mask_ptr,  # (groups, M / 4) int32, contiguous: a byte for each score
    groups,
    N: tl.constexpr,
    M: tl.constexpr,  # 4, 8, 16 or 32
    LOG: tl.constexpr,  # its logarithm
    WIDTH: tl.constexpr,  # scores of one word that is read
    LANES: tl.constexpr,
    TILES: tl.constexpr,
):
    """One program: ``TILES`` times ``LANES`` groups. ``grid = (ceil(groups / (TILES * LANES)),)``."""
    first = tl.program_id(0).to(tl.int64) * (TILES * LANES)
    lane = tl.arange(0, LANES)
    raw = ()
    for tile in tl.static_range(TILES):  # all are read before the first is solved
        at = scores_ptr + (first + tile * LANES) * M + (lane[:, None] * M + tl.arange(0, WIDTH)[None, :])
        inside = (lane < groups - first - tile * LANES)[:, None]
        for word in tl.static_range(M // WIDTH):
            raw = raw + wide_scores(at + word * WIDTH, inside, WIDTH, LANES)
    for tile in tl.static_range(TILES):
        x = ()
        for i in tl.static_range(M):
            score = raw[tile * M + i]
            x = x + (score if score.dtype == tl.float64 else score.to(tl.float32),)
        threshold = bitonic_sort(x, LOG)[N - 1]
        left = tl.full((LANES,), N, tl.int32)  # kept of what equals the threshold
        for i in tl.static_range(M):
            left -= tl.where(x[i] > threshold, 1, 0)
        words = ()
        for word in tl.static_range(M // 4):
            kept = tl.zeros((LANES,), tl.int32)
            for byte in tl.static_range(4):
                equal = x[4 * word + byte] == threshold
                kept |= tl.where((x[4 * word + byte] > threshold) | (equal & (left > 0)), 1 << 8 * byte, 0)
                left -= tl.where(equal, 1, 0)
            words = words + (kept,)
        store_words(mask_ptr + (first + tile * LANES) * (M // 4), words, groups - first - tile * LANES, M)


@triton.jit
def store_words(mask_ptr, words, groups, M: tl.constexpr):
    """Groups of M / 4 words each, from one vector for each word; at most ``groups`` of them."""
    lane = tl.arange(0, words[0].shape[0])
    inside = lane < groups
    if M == 4:
        tl.store(mask_ptr + lane, words[0], mask=inside)
    elif M == 8:
        pair = tl.join(words[0], words[1])
        tl.store(mask_ptr + (lane[:, None] * 2 + tl.arange(0, 2)[None, :]), pair, mask=inside[:, None])
    else:
        at = mask_ptr + (lane[:, None] * (M // 4) + tl.arange(0, 4)[None, :])
        for i in tl.static_range(0, M // 4, 4):
            even, odd = tl.join(words[i], words[i + 2]), tl.join(words[i + 1], words[i + 3])
            four = tl.reshape(tl.join(even, odd), (words[0].shape[0], 4))
            tl.store(at + i, four, mask=inside[:, None])
