// The kernel's arguments, which rows of each weight a block multiplies, and what lies where in
// shared memory.

#pragma once

using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

using Weight = u16;  // bfloat16 or float16

constexpr int K = D / (2 * H), V = D / H;         // widths of a head
constexpr int CONSUMER_THREADS = 32 * CONSUMERS;  // CONSUMERS and PRODUCERS count warps
constexpr int HEAD_BLOCKS = BLOCKS / H;           // blocks that share a head's state

// Columns of the table of addresses, in the order of `LayerTensors`.
enum Field {
    TOKEN_NORM,
    CONVOLUTION,
    Q,
    GATE_LOGITS,
    V_PROJECTION,
    OUT_GATE,
    OUT_GATE_BIAS,
    AUG,
    OUT,
    CHANNEL_NORM,
    L1,
    L1_BIAS,
    L2,
    L2_BIAS,
    L3,
    L3_BIAS,
    CONVOLUTION_STATE,
    STATE,
    FIELDS
};

// In the order of `Arguments` in decoder.py.
struct Arguments {
    const void* const* table;        // [LAYERS, FIELDS]
    const Weight *embedding, *head;  // [VOCABULARY, D]
    const Weight* final_norm;        // [D] or null
    float* exchange;                 // [4 (7 D + F)], see exchange.cuh; zero before the first step
    u32* counters;                   // [2]: steps done, blocks that finished; zero at first
    float embedding_scale, scale, inverse_tau, norm_eps, output_norm_eps;
    // These change at every step.
    const long long* token;  // [1]
    Weight* logits;          // [VOCABULARY]
};

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
__host__ __device__ constexpr int min_of(int a, int b) { return a < b ? a : b; }
__host__ __device__ constexpr int max_of(int a, int b) { return a > b ? a : b; }
__host__ __device__ constexpr int next_power_of_2(int n) {
    return n <= 1 ? 1 : 2 * next_power_of_2((n + 1) / 2);
}
__host__ __device__ constexpr int previous_power_of_2(int n) {
    return n <= 1 ? 1 : 2 * previous_power_of_2(n / 2);
}

// The most rows of each product that one block computes.
constexpr int IN_PROJ_ROWS = ceil_div(3 * D, BLOCKS), GATE_UP_ROWS = 2 * ceil_div(F, BLOCKS);
constexpr int CHANNEL_ROWS = ceil_div(D, BLOCKS);  // of the output projection and of l3
constexpr int LOGIT_ROWS = 128;                    // of the head, at a time
constexpr int SUM_BUFFERS = 3;                     // see `signal_reducer`
constexpr int IN_FLIGHT = PRODUCERS + 2;  // stages: more copies in flight delay the exchange

// How a block's threads divide its columns of a head's state: ACROSS threads side by side, DOWN
// rows of them.
struct StateLayout {
    static constexpr int COLUMNS = ceil_div(V, HEAD_BLOCKS);
    static constexpr int ACROSS = next_power_of_2(COLUMNS);
    static constexpr int DOWN = CONSUMER_THREADS / ACROSS;
    static constexpr int ROWS = ceil_div(K, DOWN);        // of a thread
    static constexpr int SUMS = min_of(DOWN, CONSUMERS);  // partial sums of a column
    static_assert(ACROSS <= CONSUMER_THREADS, "a head's value is too wide");
};

// Part number `part` of `parts` nearly equal parts of some rows.
struct RowRange {
    int first, count;
    __device__ RowRange(int rows, int part, int parts) {
        first = (int)((long long)rows * part / parts);
        count = (int)((long long)rows * (part + 1) / parts) - first;
    }
    __device__ bool has(int row) const { return first <= row && row < first + count; }
};

// The rows of each operation that a block computes.
struct BlockRows {
    int block, head = block % H;
    RowRange in_proj{3 * D, block, BLOCKS}, gate_up{F, block, BLOCKS}, channels{D, block, BLOCKS};
    RowRange logits{VOCABULARY, block, BLOCKS};
    RowRange state_columns{block / H < HEAD_BLOCKS ? V : 0, block / H < HEAD_BLOCKS ? block / H : 0,
                           HEAD_BLOCKS};
    __device__ BlockRows(int block) : block(block) {}
};

// The vector of a matrix-vector product, split in two 16-bit parts, x = high + low, which keep
// twice the digits of one. Each 32 entries take sixteen words. A warp writes just the words that it
// reads.
template <int COLUMNS>
struct alignas(16) SplitVector {
    u32 high[16 * ceil_div(COLUMNS, 32)], low[16 * ceil_div(COLUMNS, 32)];
};

struct alignas(16) Shared {
    SplitVector<D> x;
    SplitVector<F> mlp_hidden;  // separate, because other warps may still read x
    float sums[SUM_BUFFERS][CONSUMERS * max_of(max_of(IN_PROJ_ROWS, GATE_UP_ROWS), LOGIT_ROWS)];
    float o[StateLayout::SUMS][StateLayout::ACROSS], aug[StateLayout::SUMS],
        value[StateLayout::ACROSS];
    float squares[CONSUMERS];
    float residual[CHANNEL_ROWS];  // this block's channels of the residual stream
    BlockRows rows;
    const Weight* embedding;  // [D], the token's
    const void* table[LAYERS * FIELDS];
};

// The rest of shared memory holds the stages of the pipeline, each of at least one row of weights,
// and their barriers. Rows are padded so that any eight in succession, of one stage or of several,
// begin in different banks, as ldmatrix needs: `padded` is the next stride of `bank` bytes past a
// multiple of 128.
__host__ __device__ constexpr int padded(int bytes, int bank) {
    return 128 * ceil_div(bytes - bank, 128) + bank;
}
__host__ __device__ constexpr int row_stride(int bytes, int stage_rows) {
    return padded(bytes, 128 / stage_rows);
}
constexpr int STAGE_BYTES = padded(
    max_of(max_of(2 * F, 2 * D), previous_power_of_2(8448 / (2 * D)) * row_stride(2 * D, 4)), 16);
constexpr int STAGES = (SHARED_BYTES - (int)sizeof(Shared)) / (STAGE_BYTES + 2 * (int)sizeof(u64));
__host__ __device__ constexpr int rows_in_stage(int bytes, int most) {
    return most == 1 || most * row_stride(bytes, most) <= STAGE_BYTES
               ? most
               : rows_in_stage(bytes, most / 2);
}

// How rows of COLUMNS weights lie in the pipeline when a block has at most MAX_ROWS of them, and
// how the consumer warps divide their product: each warp takes some units of 32 columns, of all
// rows.
template <int COLUMNS_, int MAX_ROWS>
struct RowLayout {
    static constexpr int COLUMNS = COLUMNS_;
    static constexpr int ROW_BYTES = 2 * COLUMNS, STAGE_ROWS = rows_in_stage(ROW_BYTES, 8),
                         STRIDE = row_stride(ROW_BYTES, STAGE_ROWS);
    static constexpr int UNITS = ceil_div(COLUMNS, 32), WARP_UNITS = ceil_div(UNITS, CONSUMERS);
    // Tiles have the 16 rows of mma.sync, or 8 where a block has so few rows, or the pipeline or
    // the registers take no more.
    static constexpr bool EIGHT_ROWS =
        MAX_ROWS <= 8 || STAGES * STAGE_ROWS < 32 || 8 * WARP_UNITS > PREFETCH_WORDS;
    static constexpr int TILE_ROWS = EIGHT_ROWS ? 8 : 16;
    static constexpr int UNIT_WORDS = TILE_ROWS / 2;  // registers of a lane for a unit of a tile
    // A batch is the tiles that are multiplied together. They must be in the pipeline together.
    static constexpr int PIPELINE_TILES = max_of(1, STAGES / 2 * STAGE_ROWS / TILE_ROWS);
    static constexpr int TILES = min_of(min_of(ceil_div(MAX_ROWS, TILE_ROWS), PIPELINE_TILES),
                                        max_of(1, PREFETCH_WORDS / (UNIT_WORDS * WARP_UNITS)));
    static constexpr int BATCH_ROWS = TILE_ROWS * TILES;
    // Units of each tile that are loaded into registers before the vector is there.
    static constexpr int PREFETCHED = min_of(WARP_UNITS, PREFETCH_WORDS / (TILES * UNIT_WORDS));
    static_assert(ROW_BYTES % 16 == 0, "a row has to be of whole vectors");
    static_assert(BATCH_ROWS / STAGE_ROWS <= min_of(STAGES, 32), "");
};

using InProj = RowLayout<D, IN_PROJ_ROWS>;
using OutProj = RowLayout<D, CHANNEL_ROWS>;
using GateUp = RowLayout<D, GATE_UP_ROWS>;
using Down = RowLayout<F, CHANNEL_ROWS>;
using Logits = RowLayout<D, LOGIT_ROWS>;
