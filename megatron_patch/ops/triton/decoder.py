"""One token of one sequence through a whole MetaLA decoder, as a single launch.

Such a step takes as long as it takes to read the weights, if the memory is never left idle. With a
launch per product it is, while the last programs of one launch finish and the first of the next
start. Here one program per multiprocessor stays for the whole step. Together they go through its
stages, four per layer and then the head, and in each a program has its share of the rows of a
weight, for which it asks before it waits for what the others write in the stage before:

    project   norm, convolution; rows of the projections to q, gate logits, v and output gate
    mix       recurrence, read-out, LayerNorm and gate of a head; its share of the output projection
    expand    residual, norm; rows of the first two products of the MLP, SwiGLU
    contract  rows of the last product of the MLP, residual
    head      norm; rows of the logits

`megatron_patch.ops.decoding` has another kernel of the same step, which Hopper runs faster.

All programs of a head compute its read-out, from the state as it was; they write the new state a
stage later, when all have read. Between stages all is float32, and sums have a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_patch.ops.decoding.token_decoder import LayerTensors
from megatron_patch.ops.triton.configuration import precision_of
from megatron_patch.ops.triton.tiles import INTERPRETED, bounded_log_decay, exp2, key, sigmoid

WARPS = 8
BYTES = 65536  # of weights that a program has in registers at a time
LONG_ROW = 4096  # columns, from which on two warps share a row
PROGRAMS_INTERPRETED = 6
LARGEST_STATE = 16384  # entries of a head's state, which a program has in registers

FIELDS = tl.constexpr(len(LayerTensors._fields))
TOKEN_NORM, CONVOLUTION, PROJECTIONS, OUT_GATE_BIAS, AUG, OUT, CHANNEL_NORM = (
    tl.constexpr(LayerTensors._fields.index(name))
    for name in ("token_norm", "convolution", "q", "out_gate_bias", "aug", "out", "channel_norm")
)
L1, L1_BIAS, L2, L2_BIAS, L3, L3_BIAS, CONVOLUTION_STATE, STATE = (
    tl.constexpr(LayerTensors._fields.index(name))
    for name in (
        "l1", "l1_bias", "l2", "l2_bias", "l3", "l3_bias", "convolution_state", "state",
    )
)  # fmt: skip


@triton.jit
def address(layer, field, like):
    """What a layer's row of the table says, as a pointer as `like`. Tensors begin at multiples of
    16 bytes."""
    return tl.multiple_of(tl.load(layer + field).to(like.dtype), 16)


@triton.jit
def wait(arrivals, number):
    """Until so many programs have arrived: what they wrote before can then be read. One thread
    looks, for all would keep the counter from those who arrive."""
    if not INTERPRETED:
        tl.inline_asm_elementwise(
            """{
            .reg .pred early, other;
            .reg .u32 thread;
            mov.u32 $0, 0;
            mov.u32 thread, %tid.x;
            setp.ne.u32 other, thread, 0;
            @other bra done;
            again:
            ld.acquire.gpu.global.s32 $0, [$1];
            setp.lt.s32 early, $0, $2;
            @early bra again;
            done:
            }""",
            "=&r,l,r",
            [arrivals, number],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
        tl.debug_barrier()


@triton.jit
def arrive(arrivals):
    """Hands on what this program has written."""
    if not INTERPRETED:
        tl.debug_barrier()
        tl.inline_asm_elementwise(
            """{
            .reg .u32 thread;
            .reg .pred first;
            mov.u32 thread, %tid.x;
            setp.eq.u32 first, thread, 0;
            @first red.release.gpu.global.add.s32 [$1], 1;
            mov.u32 $0, 0;
            }""",
            "=r,l",
            [arrivals],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def clear(arrivals, total):
    """The last arrival of a launch, which leaves the counter at zero for the next."""
    if not INTERPRETED:
        before = tl.atomic_add(arrivals, 1, sem="relaxed", scope="gpu")
        if before == total - 1:
            tl.store(arrivals, 0)


@triton.jit
def product(tile, x):
    """tile [R, C, L] times x [C, L], in float32: [R]."""
    return tl.sum(tl.sum(tile.to(tl.float32) * x[None, :, :], 1), 1)


@triton.jit
def norm(x, weight, eps, D: tl.constexpr, HAS_WEIGHT: tl.constexpr):
    """x / sqrt(mean(x^2) + eps), times a weight, of x [BD], which is zero from D on."""
    y = x * tl.rsqrt(tl.sum(x * x, 0) / D + eps)
    if HAS_WEIGHT:
        channel = tl.arange(0, x.shape[0])
        y *= tl.load(weight + channel, mask=channel < D, other=0.0).to(tl.float32)
    return y


@triton.jit
def add_bias(y, bias, row, mask, HAS_BIAS: tl.constexpr):
    if HAS_BIAS:
        y += tl.load(bias + row, mask=mask, other=0.0).to(tl.float32)
    return y


@triton.jit
def in_pieces(N: tl.constexpr, L: tl.constexpr):
    """Columns 0 to N as [C, L]: a warp has a piece of a row at a time, so that none waits for
    another to sum up a row."""
    return tl.arange(0, N // L)[:, None] * L + tl.arange(0, L)[None, :]


@triton.jit
def tile_of(rows, row_mask, column, N):
    """Rows that begin at pointers [R], zero where masked and from column N on, as [R, C, L]."""
    mask = row_mask[:, None, None] & (column < N)[None, :, :]
    return tl.load(rows[:, None, None] + column[None, :, :], mask=mask, other=0.0)


@triton.jit
def rows_of(row, weight, end, column, N, STRIDE):
    """Rows [R] below `end` of a weight whose rows are STRIDE apart, as `tile_of` gives them."""
    return tile_of(weight + row.to(tl.int64) * STRIDE, row < end, column, N)


@triton.jit
def ask(tile_at: tl.constexpr, weight, rows, step, SHARE: tl.constexpr):
    """The first tiles of a program's share of a weight: tile_at(row, *weight) of `rows` [R], and of
    those `step` further on each. SHARE: R, tiles asked for at a time, and how often."""
    TILES: tl.constexpr = SHARE[1]
    tiles = ()
    for i in tl.static_range(TILES):
        tiles = tiles + (tile_at(rows + i * step, *weight),)
    return tiles


@triton.jit
def walk(
    tiles,
    tile_at: tl.constexpr,
    weight,
    rows,
    step,
    finish: tl.constexpr,
    arguments,
    SHARE: tl.constexpr,
):
    """Through a share, of which `ask` gave the first tiles: a tile's work is finish(tile, row,
    *arguments), behind which the one for its place in the next group is asked for at once.

    `arguments` has to stand in the call: with a name, a tuple's constexprs become tensors."""
    TILES: tl.constexpr = SHARE[1]
    GROUPS: tl.constexpr = SHARE[2]
    for group in tl.range(GROUPS):
        following = ()
        for i in tl.static_range(TILES):
            row = rows + (group * TILES + i) * step
            finish(tiles[i], row, *arguments)
            if GROUPS > 1:
                following = following + (tile_at(row + TILES * step, *weight),)
        if GROUPS > 1:
            tiles = following


@triton.jit
def projection_rows(row, layer, like, D, KEYS):
    """Pointers to rows of q, gate logits (KEYS rows each), v and output gate (D each), as if one
    below the other."""
    is_wide = row >= 2 * KEYS
    wide = (row - 2 * KEYS) // D
    field = PROJECTIONS + tl.where(is_wide, 2 + wide, row // KEYS)
    first = tl.where(is_wide, 2 * KEYS + wide * D, row // KEYS * KEYS)
    weight = tl.load(layer + field, mask=row < 2 * KEYS + 2 * D, other=0).to(like.dtype)
    return tl.multiple_of(weight, [16]) + (row - first) * D


@triton.jit
def projection_tile(row, layer, like, column, D, KEYS):
    rows = projection_rows(row, layer, like, D, KEYS)
    return tile_of(rows, row < 2 * KEYS + 2 * D, column, D)


@triton.jit
def finish_project(
    tile,
    row,
    mixed,
    projected,
    keys,
    inverse_tau,
    D: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    y = product(tile, mixed)
    is_gate = (row >= KEYS) & (row < 2 * KEYS)
    g = bounded_log_decay(y, inverse_tau, PRECISION)
    tl.store(keys + row - KEYS, key(g, PRECISION), mask=is_gate)
    y = tl.where(is_gate, exp2(g, PRECISION), y)
    tl.store(projected + row, y, mask=row < 2 * KEYS + 2 * D)


@triton.jit
def project(
    layer,
    x,
    normed,
    projected,
    keys,
    arrivals,
    awaited,
    inverse_tau,
    eps,
    D: tl.constexpr,
    KEYS: tl.constexpr,
    W: tl.constexpr,
    BD: tl.constexpr,
    L: tl.constexpr,
    SHARE: tl.constexpr,
    HAS_NORM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    program = tl.program_id(0)
    step = tl.num_programs(0) * SHARE[0]
    channel = tl.arange(0, BD)
    inside = channel < D
    weight = address(layer, CONVOLUTION, normed) + channel * W
    past = address(layer, CONVOLUTION_STATE, normed) + channel * (W - 1)
    total = tl.zeros([BD], tl.float32)
    for tap in tl.static_range(W - 1):
        factor = tl.load(weight + tap, mask=inside, other=0.0).to(tl.float32)
        total += factor * tl.load(past + tap, mask=inside, other=0.0).to(tl.float32)
    newest = tl.load(weight + (W - 1), mask=inside, other=0.0).to(tl.float32)
    scale = address(layer, TOKEN_NORM, normed)
    rows = program + tl.num_programs(0) * tl.arange(0, SHARE[0])
    projections = (layer, normed, in_pieces(BD, L), D, KEYS)
    tiles = ask(projection_tile, projections, rows, step, SHARE)
    wait(arrivals, awaited)

    hidden = tl.load(x + channel, mask=inside, other=0.0)
    # Rounded as in the convolution's state.
    hidden = norm(hidden, scale, eps, D, HAS_NORM).to(normed.dtype.element_ty)
    if program == 0:
        tl.store(normed + channel, hidden, mask=inside)
    total += newest * hidden.to(tl.float32)
    total *= sigmoid(total)
    mixed = tl.reshape(total, (BD // L, L))
    walk(
        tiles, projection_tile, projections, rows, step,
        finish_project, (mixed, projected, keys, inverse_tau, D, KEYS, PRECISION), SHARE,
    )  # fmt: skip


@triton.jit
def shift(layer, normed, D: tl.constexpr, W: tl.constexpr, BC: tl.constexpr):
    """Moves on this program's BC channels of the convolution's state [D, W - 1], oldest first,
    which `project` has read."""
    channel = tl.program_id(0) * BC + tl.arange(0, BC)
    inside = channel < D
    state = address(layer, CONVOLUTION_STATE, normed) + channel * (W - 1)
    inputs = ()
    for tap in tl.static_range(1, W - 1):
        inputs = inputs + (tl.load(state + tap, mask=inside, other=0.0),)
    inputs = inputs + (tl.load(normed + channel, mask=inside, other=0.0),)
    # Every thread has read before any writes over the state.
    tl.debug_barrier()
    for tap in tl.static_range(W - 1):
        tl.store(state + tap, inputs[tap], mask=inside)


@triton.jit
def finish_mix(tile, row, y, shares, head, end, D: tl.constexpr):
    tl.store(shares + head * D + row, product(tile, y), mask=row < end)


@triton.jit
def mix(
    layer,
    normed,
    projected,
    keys,
    shares,
    arrivals,
    awaited,
    scale,
    eps,
    D: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    W: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    LV: tl.constexpr,
    SHARE: tl.constexpr,
    BC: tl.constexpr,
    HAS_AUG: tl.constexpr,
):
    V: tl.constexpr = D // H
    VALUES: tl.constexpr = 2 * H * K  # where they begin in `projected`
    parts = tl.num_programs(0) // H  # programs of a head
    head = tl.program_id(0) % H
    part = tl.program_id(0) // H
    step = parts * SHARE[0]
    k_row = tl.arange(0, BK)
    column = tl.arange(0, BV)
    k_mask = k_row < K
    v_mask = column < V
    rows = part + parts * tl.arange(0, SHARE[0])
    weight = address(layer, OUT, normed) + head * V
    end = tl.where(part < parts, D, 0)
    out = (weight, end, in_pieces(BV, LV), V, D)
    tiles = ask(rows_of, out, rows, step, SHARE)
    state = address(layer, STATE, shares) + head * (K * V)
    mask = k_mask[:, None] & v_mask[None, :]
    past = tl.load(state + k_row[:, None] * V + column[None, :], mask=mask, other=0.0)
    aug = address(layer, AUG, normed) + head * K
    if HAS_AUG:
        balance = tl.load(aug + k_row, mask=k_mask, other=0.0).to(tl.float32)
    bias = address(layer, OUT_GATE_BIAS, normed) + head * V
    gate_bias = tl.load(bias + column, mask=v_mask, other=0.0).to(tl.float32)
    wait(arrivals, awaited)

    query = tl.load(projected + head * K + k_row, mask=k_mask, other=0.0)
    decay = tl.load(projected + (H + head) * K + k_row, mask=k_mask, other=0.0)
    k = tl.load(keys + head * K + k_row, mask=k_mask, other=0.0)
    value = tl.load(projected + VALUES + head * V + column, mask=v_mask, other=0.0)
    gate = tl.load(projected + VALUES + D + head * V + column, mask=v_mask, other=0.0) + gate_bias
    new = decay[:, None] * past + k[:, None] * value[None, :]
    y = tl.sum(query[:, None] * new, 0) * scale
    if HAS_AUG:
        y += sigmoid(tl.sum(query * balance * k, 0) * value)
    y = tl.where(v_mask, y, 0.0)
    centred = tl.where(v_mask, y - tl.sum(y, 0) / V, 0.0)
    y = centred * tl.rsqrt(tl.sum(centred * centred, 0) / V + eps) * gate * sigmoid(gate)
    y = tl.reshape(y, (BV // LV, LV))
    walk(tiles, rows_of, out, rows, step, finish_mix, (y, shares, head, end, D), SHARE)
    if W > 1:
        shift(layer, normed, D, W, BC)


@triton.jit
def rows_of_both(row, l1, l2, end, column, N):
    return rows_of(row, l1, end, column, N, N), rows_of(row, l2, end, column, N, N)


@triton.jit
def finish_expand(
    tiles, row, hidden, l1_bias, l2_bias, activated, F: tl.constexpr, HAS_BIAS: tl.constexpr
):
    mask = row < F
    y = add_bias(product(tiles[0], hidden), l1_bias, row, mask, HAS_BIAS)
    z = add_bias(product(tiles[1], hidden), l2_bias, row, mask, HAS_BIAS)
    tl.store(activated + row, y * sigmoid(y) * z, mask=mask)


@triton.jit
def expand(
    layer,
    x,
    middle,
    projected,
    keys,
    shares,
    activated,
    arrivals,
    awaited,
    eps,
    like,
    D: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    F: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    BS: tl.constexpr,
    BH: tl.constexpr,
    L: tl.constexpr,
    SHARE: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    V: tl.constexpr = D // H
    program = tl.program_id(0)
    step = tl.num_programs(0) * SHARE[0]
    rows = program + tl.num_programs(0) * tl.arange(0, SHARE[0])
    l1 = address(layer, L1, like)
    l2 = address(layer, L2, like)
    l1_bias = address(layer, L1_BIAS, like)
    l2_bias = address(layer, L2_BIAS, like)
    both = (l1, l2, F, in_pieces(BD, L), D)
    tiles = ask(rows_of_both, both, rows, step, SHARE)
    weight = address(layer, CHANNEL_NORM, like)
    # This program's rows of the state of a head.
    parts = tl.num_programs(0) // H
    head = program % H
    part = program // H
    v_column = tl.arange(0, BV)
    k_row = part + parts * tl.arange(0, BS)
    k_mask = k_row < tl.where(part < parts, K, 0)
    v_mask = v_column < V
    state_mask = k_mask[:, None] & v_mask[None, :]
    state = address(layer, STATE, shares) + head * (K * V)
    state = state + k_row[:, None] * V + v_column[None, :]
    past = tl.load(state, mask=state_mask, other=0.0)
    channel = tl.arange(0, BD)
    other = tl.arange(0, BH)
    share_mask = (other < H)[:, None] & (channel < D)[None, :]
    wait(arrivals, awaited)

    hidden = tl.load(x + channel, mask=channel < D, other=0.0)
    added = tl.load(shares + other[:, None] * D + channel[None, :], mask=share_mask, other=0.0)
    decay = tl.load(projected + (H + head) * K + k_row, mask=k_mask, other=0.0)
    k = tl.load(keys + head * K + k_row, mask=k_mask, other=0.0)
    value = tl.load(projected + 2 * H * K + head * V + v_column, mask=v_mask, other=0.0)
    hidden += tl.sum(added, 0)
    new = decay[:, None] * past + k[:, None] * value[None, :]
    tl.store(state, new, mask=state_mask)
    if program == 0:
        tl.store(middle + channel, hidden, mask=channel < D)
    hidden = tl.reshape(norm(hidden, weight, eps, D, HAS_NORM), (BD // L, L))
    walk(
        tiles, rows_of_both, both, rows, step,
        finish_expand, (hidden, l1_bias, l2_bias, activated, F, HAS_BIAS), SHARE,
    )  # fmt: skip


@triton.jit
def finish_contract(tile, row, inner, l3_bias, middle, x, D: tl.constexpr, HAS_BIAS: tl.constexpr):
    mask = row < D
    y = add_bias(product(tile, inner), l3_bias, row, mask, HAS_BIAS)
    tl.store(x + row, y + tl.load(middle + row, mask=mask, other=0.0), mask=mask)


@triton.jit
def contract(
    layer,
    x,
    middle,
    activated,
    arrivals,
    awaited,
    like,
    D: tl.constexpr,
    F: tl.constexpr,
    BF: tl.constexpr,
    L: tl.constexpr,
    SHARE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    step = tl.num_programs(0) * SHARE[0]
    column = in_pieces(BF, L)
    rows = tl.program_id(0) + tl.num_programs(0) * tl.arange(0, SHARE[0])
    l3 = (address(layer, L3, like), D, column, F, F)
    l3_bias = address(layer, L3_BIAS, like)
    tiles = ask(rows_of, l3, rows, step, SHARE)
    wait(arrivals, awaited)
    inner = tl.load(activated + column, mask=column < F, other=0.0)
    walk(
        tiles, rows_of, l3, rows, step,
        finish_contract, (inner, l3_bias, middle, x, D, HAS_BIAS), SHARE,
    )  # fmt: skip


@triton.jit
def decode_head(
    x,
    final_norm,
    head,
    logits,
    arrivals,
    awaited,
    eps,
    vocabulary,
    D: tl.constexpr,
    BD: tl.constexpr,
    L: tl.constexpr,
    SHARE: tl.constexpr,
    HAS_NORM: tl.constexpr,
):
    step = tl.num_programs(0) * SHARE[0]
    rows = tl.program_id(0) + tl.num_programs(0) * tl.arange(0, SHARE[0])
    weight = (head, vocabulary, in_pieces(BD, L), D, D)
    tiles = ask(rows_of, weight, rows, step, SHARE)
    wait(arrivals, awaited)
    channel = tl.arange(0, BD)
    hidden = tl.load(x + channel, mask=channel < D, other=0.0)
    hidden = tl.reshape(norm(hidden, final_norm, eps, D, HAS_NORM), (BD // L, L))
    TILES: tl.constexpr = SHARE[1]
    # `walk` would do, but compiles to other code, which spills more at 1,024 channels: not timed.
    for first in range(0, vocabulary, TILES * step):
        following = ()
        for i in tl.static_range(TILES):
            row = rows + first + i * step
            y = product(tiles[i], hidden).to(logits.dtype.element_ty)
            tl.store(logits + row, y, mask=row < vocabulary)
            following = following + (rows_of(row + TILES * step, *weight),)
        tiles = following


@triton.jit
def decode_token(
    table,
    final_norm,
    head,
    x,
    middle,
    normed,
    projected,
    keys,
    shares,
    activated,
    arrivals,
    logits,
    first_stage,
    last_stage,
    vocabulary,
    scale,
    inverse_tau,
    norm_eps,
    output_norm_eps,
    LAYERS: tl.constexpr,
    D: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    F: tl.constexpr,
    W: tl.constexpr,
    BD: tl.constexpr,
    BF: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BC: tl.constexpr,
    BS: tl.constexpr,
    BH: tl.constexpr,
    L: tl.constexpr,
    LV: tl.constexpr,
    PROJECT: tl.constexpr,
    MIX: tl.constexpr,
    EXPAND: tl.constexpr,
    CONTRACT: tl.constexpr,
    HEAD: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_AUG: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The stages from `first_stage` to before `last_stage`.

    x, middle [D] float32: the residual stream before a layer and between its two parts. From stage
    to stage: normed [D] as the weights; projected [2 H K + 2 D] (decays in place of gate logits),
    keys [H K], shares [H, D], activated [F] float32. PROJECT, ...: rows of a tile, tiles asked for
    at a time, and how often. Grid: as many programs as run at once, at least H.
    """
    programs = tl.num_programs(0)
    for stage in range(first_stage, last_stage):
        layer = table + stage // 4 * FIELDS
        kind = stage % 4
        awaited = (stage - first_stage) * programs
        if stage == 4 * LAYERS:
            decode_head(
                x, final_norm, head, logits, arrivals, awaited, norm_eps, vocabulary, D, BD, L,
                HEAD, HAS_NORM,
            )  # fmt: skip
            clear(arrivals, (stage - first_stage + 1) * programs)
        else:
            if kind == 0:
                project(
                    layer, x, normed, projected, keys, arrivals, awaited, inverse_tau, norm_eps,
                    D, H * K, W, BD, L, PROJECT, HAS_NORM, PRECISION,
                )  # fmt: skip
            elif kind == 1:
                mix(
                    layer, normed, projected, keys, shares, arrivals, awaited, scale,
                    output_norm_eps, D, H, K, W, BK, BV, LV, MIX, BC, HAS_AUG,
                )  # fmt: skip
            elif kind == 2:
                expand(
                    layer, x, middle, projected, keys, shares, activated, arrivals, awaited,
                    norm_eps, normed, D, H, K, F, BD, BV, BS, BH, L, EXPAND, HAS_NORM, HAS_BIAS,
                )  # fmt: skip
            else:
                contract(
                    layer, x, middle, activated, arrivals, awaited, normed, D, F, BF, L,
                    CONTRACT, HAS_BIAS,
                )  # fmt: skip
            arrive(arrivals)


class Decoder:
    """What `megatron_patch.ops.decoding.token_decoder` says."""

    def __init__(
        self,
        layers: Sequence[LayerTensors],
        embedding: Tensor,
        final_norm: Tensor | None,
        head: Tensor,
        embedding_scale: float,
        *numbers: float,  # from `scale` on, as `decode_token` takes them
    ):
        device, dtype, first = head.device, head.dtype, layers[0]
        _, heads, key_width, value_width = first.state.shape
        (inner, dim), (vocabulary, _) = first.l1.shape, head.shape
        width = first.convolution.shape[-1]
        keys = heads * key_width
        programs = _programs(device)
        parts = programs // heads
        self._tensors = layers  # kept alive, for the table has their addresses alone
        self._embedding, self._embedding_scale = embedding.detach(), embedding_scale
        addresses = [[0 if x is None else x.data_ptr() for x in layer] for layer in layers]

        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        self._x = empty(1, dim)
        self._arguments = (
            torch.tensor(addresses, dtype=torch.int64, device=device), final_norm, head,
            self._x, empty(dim), empty(dim, dtype=dtype), empty(2 * keys + 2 * dim), empty(keys),
            empty(heads, dim), empty(inner), torch.zeros(1, dtype=torch.int32, device=device),
        )  # fmt: skip
        self._numbers = (vocabulary, *numbers)

        piece = 512 // head.element_size()  # of a row, as a warp loads it at once
        power = triton.next_power_of_2
        block_d, block_f = max(power(dim), piece), max(power(inner), piece)
        block_v = power(value_width)

        def share(rows: int, programs: int, columns: int, weights: int = 1) -> tuple[int, int, int]:
            """Rows of a tile, tiles at a time, and times, for a program's share of the rows."""
            height = WARPS * max(1, piece // columns) if columns <= LONG_ROW else WARPS // 2
            needed = triton.cdiv(triton.cdiv(rows, programs), height)
            at_a_time = BYTES // (weights * height * columns * head.element_size())
            at_a_time = min(needed, max(1, at_a_time))
            return height, at_a_time, triton.cdiv(needed, at_a_time)

        self._options = dict(
            LAYERS=len(layers), D=dim, H=heads, K=key_width, F=inner, W=width,
            BD=block_d, BF=block_f, BH=power(heads), BK=power(key_width), BV=block_v,
            BC=power(triton.cdiv(dim, programs)), BS=power(triton.cdiv(key_width, parts)),
            L=piece, LV=min(piece, block_v),
            PROJECT=share(2 * keys + 2 * dim, programs, block_d), MIX=share(dim, parts, block_v),
            EXPAND=share(inner, programs, block_d, weights=2),
            CONTRACT=share(dim, programs, block_f), HEAD=share(vocabulary, programs, block_d),
            HAS_NORM=final_norm is not None, HAS_AUG=first.aug is not None,
            HAS_BIAS=first.l1_bias is not None, PRECISION=precision_of(dtype), num_warps=WARPS,
        )  # fmt: skip
        self._grid, self._stages = (programs,), 4 * len(layers) + 1

    def step(self, token: Tensor, logits: Tensor) -> None:
        """See `token_decoder`: the embedding by PyTorch, all else in one launch."""
        # Scaled in the weights' dtype, as the model's own.
        row = self._embedding.index_select(0, token.view(1))
        torch.mul(row, self._embedding_scale, out=self._x)
        if INTERPRETED:  # one program after the other: none can wait for the next
            for stage in range(self._stages):
                self._launch(logits, stage, stage + 1)
        else:
            with torch.cuda.device_of(logits):
                self._launch(logits, 0, self._stages, launch_cooperative_grid=True)

    def _launch(self, logits: Tensor, first: int, last: int, **how) -> None:
        decode_token[self._grid](
            *self._arguments, logits, first, last, *self._numbers, **self._options, **how
        )


def obstacle(
    dtype: torch.dtype, device: torch.device, *, D: int, H: int, K: int, V: int, F: int
) -> str | None:
    """Why a head's state does not fit a program, or the heads a launch; or `None` if they do."""
    if H * V != D:
        return f"found D = {D}, {H} heads of V = {V}, wanted V = D / heads"
    if K * V > LARGEST_STATE:
        return f"found K = {K} and V = {V}, wanted K V ≤ {LARGEST_STATE}"
    if H > (programs := _programs(device)):
        return f"found {H} heads, wanted one for each of {programs} multiprocessors at most"
    return None


def _programs(device: torch.device) -> int:
    """One per multiprocessor."""
    if INTERPRETED:
        return PROGRAMS_INTERPRETED
    return torch.cuda.get_device_properties(device).multi_processor_count
