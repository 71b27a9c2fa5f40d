// The model's numbers, who has which share of its rows, and what lies where in shared memory.

#pragma once

using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

using Weight = u16;  // bfloat16 or float16

constexpr int K = D / (2 * H), V = D / H;  // widths of a head
constexpr int THREADS = 32 * WARPS;        // that compute; COPIERS more warps copy
constexpr int PARTS = BLOCKS / H;          // blocks of a head

// Fields of a row of the table, in the order of `LayerTensors`.
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

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
__host__ __device__ constexpr int smaller(int a, int b) { return a < b ? a : b; }
__host__ __device__ constexpr int larger(int a, int b) { return a > b ? a : b; }
__host__ __device__ constexpr int power_from(int n) {
    return n <= 1 ? 1 : 2 * power_from((n + 1) / 2);
}
__host__ __device__ constexpr int power_to(int n) { return n <= 1 ? 1 : 2 * power_to(n / 2); }

// The larger of a block's shares of so many rows, over so many blocks.
__host__ __device__ constexpr int share(int rows, int blocks) { return ceil_div(rows, blocks); }

constexpr int PROJECTED = share(3 * D, BLOCKS), EXPANDED = 2 * share(F, BLOCKS);
constexpr int OWN = share(D, BLOCKS);   // rows of the other two products
constexpr int HEAD_ROWS = 128;          // of the logits, between two barriers
constexpr int SIDES = 3;                // see `hand_over`
constexpr int IN_FLIGHT = COPIERS + 2;  // slots: with more, what blocks send each other comes later

// Which threads take the columns of a block's part of a head's state.
struct OfState {
    static constexpr int COLUMNS = share(V, PARTS);
    static constexpr int ACROSS = power_from(COLUMNS);
    static constexpr int DOWN = THREADS / ACROSS;
    static constexpr int ROWS = ceil_div(K, DOWN);     // of a thread
    static constexpr int SUMS = smaller(DOWN, WARPS);  // of a column
    static_assert(ACROSS <= THREADS, "a head's value is too wide");
};

// A part's share of so many rows.
struct Share {
    int first, count;
    __device__ Share(int rows, int part, int parts) {
        first = (int)((long long)rows * part / parts);
        count = (int)((long long)rows * (part + 1) / parts) - first;
    }
    __device__ bool has(int row) const { return first <= row && row < first + count; }
};

// A block's.
struct Place {
    int block, head = block % H;
    Share project{3 * D, block, BLOCKS}, expand{F, block, BLOCKS}, own{D, block, BLOCKS};
    Share logits{VOCABULARY, block, BLOCKS};
    Share columns{block / H < PARTS ? V : 0, block / H < PARTS ? block / H : 0, PARTS};
    __device__ Place(int block) : block(block) {}
};

// The right side of a product: each number is the sum of two of the weights' type. Words are
// sixteen for 32 numbers; a warp makes those that it reads.
template <int COLUMNS>
struct alignas(16) Factor {
    u32 high[16 * ceil_div(COLUMNS, 32)], low[16 * ceil_div(COLUMNS, 32)];
};

struct alignas(16) Shared {
    Factor<D> channels;
    Factor<F> inner;  // of its own, for other warps may still read the former
    float sums[SIDES][WARPS * larger(larger(PROJECTED, EXPANDED), HEAD_ROWS)];
    float read_out[OfState::SUMS][OfState::ACROSS], aug[OfState::SUMS], value[OfState::ACROSS];
    float squares[WARPS];
    float residual[OWN];  // this block's share of the residual stream
    Place place;
    const Weight* embedding;  // [D], the token's
    const void* table[LAYERS * FIELDS];
};

// The rest is the ring: slots, which take at least a row, and their barriers. Eight rows in
// succession, of a slot or of several, begin in different banks of four words.
__host__ __device__ constexpr int padded(int bytes, int bank) {
    return 128 * ceil_div(bytes - bank, 128) + bank;
}
__host__ __device__ constexpr int stride_of(int bytes, int in_slot) {
    return padded(bytes, 128 / in_slot);
}
constexpr int SLOT =
    padded(larger(larger(2 * F, 2 * D), power_to(8448 / (2 * D)) * stride_of(2 * D, 4)), 16);
constexpr int SLOTS = (SHARED_BYTES - (int)sizeof(Shared)) / (SLOT + 2 * (int)sizeof(u64));
__host__ __device__ constexpr int rows_in_slot(int bytes, int most) {
    return most == 1 || most * stride_of(bytes, most) <= SLOT ? most
                                                              : rows_in_slot(bytes, most / 2);
}

// How rows of so many weights lie in the ring, of which a share has at most MOST, and who takes
// what: each warp some units of 32 columns of all rows.
template <int COLUMNS_, int MOST>
struct Rows {
    static constexpr int COLUMNS = COLUMNS_;
    static constexpr int SIZE = 2 * COLUMNS, IN_SLOT = rows_in_slot(SIZE, 8),
                         STRIDE = stride_of(SIZE, IN_SLOT);
    static constexpr int UNITS = ceil_div(COLUMNS, 32), TURNS = ceil_div(UNITS, WARPS);
    // Tiles at a time, which have to be in the ring together; of eight rows, if that is all.
    static constexpr bool LOW = MOST <= 8 || SLOTS * IN_SLOT < 32 || 8 * TURNS > HELD_WORDS;
    static constexpr int HEIGHT = LOW ? 8 : 16, WORDS = HEIGHT / 2;  // of a lane, of a unit
    static constexpr int IN_RING = larger(1, SLOTS / 2 * IN_SLOT / HEIGHT);
    static constexpr int TILES =
        smaller(smaller(ceil_div(MOST, HEIGHT), IN_RING), larger(1, HELD_WORDS / (WORDS * TURNS)));
    static constexpr int BATCH = HEIGHT * TILES;
    // Units that a thread has in registers ahead, of each tile.
    static constexpr int HELD = smaller(TURNS, HELD_WORDS / (TILES * WORDS));
    static_assert(SIZE % 16 == 0, "a row has to be of whole vectors");
    static_assert(BATCH / IN_SLOT <= smaller(SLOTS, 32), "");
};

using ProjectRows = Rows<D, PROJECTED>;
using EmitRows = Rows<D, OWN>;
using ExpandRows = Rows<D, EXPANDED>;
using ContractRows = Rows<F, OWN>;
using HeadRows = Rows<D, HEAD_ROWS>;
