// One token of one sequence through a whole MetaLA decoder, as a single launch, for GPUs with bulk
// copies (compute capability 9.0 or later). `megatron_patch.ops.triton.decoder` is for the others.
//
// Such a step takes as long as it takes to read the weights, if the memory is never left idle. But
// a stage needs what the one before it has computed in all blocks, and so many waits, five per layer,
// take longer than the reading. So the two are taken apart here:
//
// What a block reads of the weights does not depend on any result. It is one stream of rows, the
// same at every token. A warp of its own copies the stream into shared memory, a ring of slots, as
// far ahead as the ring is long; the other warps take the rows from there.
//
// What blocks compute for each other goes through global memory, each number by itself: the last bit
// of its mantissa tells the turn, which is another one in every layer. Who needs a number reads until
// the turn is the right one. So there is one way to memory and one back per stage, no fence and no
// counter. No number is overwritten too early: whatever is sent in a layer is needed, by way of other
// blocks, for all that is sent a layer later.
//
// A layer's stages, in each of which a block has its share of the rows:
//
//     project   norm, convolution; rows of the projections to q, gate logits, v and output gate
//     mix       recurrence and read-out of some columns of a head's state
//     emit      LayerNorm and gate of all heads; rows of the output projection, residual
//     expand    norm; rows of the first two products of the MLP, SwiGLU
//     contract  rows of the last product of the MLP, residual
//
// and behind the last layer norm and rows of the logits. Between stages all is float32, and sums have
// a fixed order.
//
// decoder.py compiles this file for a model, with its numbers for names in capital letters.

using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

using Weight = u16;  // bfloat16 or float16

constexpr int K = D / (2 * H), V = D / H;  // widths of a head
constexpr int THREADS = 32 * WARPS;  // that compute; COPIERS more warps copy
constexpr int PARTS = BLOCKS / H;  // blocks of a head

// Fields of a row of the table, in the order of `LayerTensors`.
enum Field {
    TOKEN_NORM, CONVOLUTION, Q, GATE_LOGITS, V_PROJECTION, OUT_GATE, OUT_GATE_BIAS, AUG, OUT,
    CHANNEL_NORM, L1, L1_BIAS, L2, L2_BIAS, L3, L3_BIAS, CONVOLUTION_STATE, STATE, FIELDS
};

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
__host__ __device__ constexpr int smaller(int a, int b) { return a < b ? a : b; }
__host__ __device__ constexpr int larger(int a, int b) { return a > b ? a : b; }
__host__ __device__ constexpr int power_from(int n) { return n <= 1 ? 1 : 2 * power_from((n + 1) / 2); }
__host__ __device__ constexpr int power_to(int n) { return n <= 1 ? 1 : 2 * power_to(n / 2); }

// The larger of a block's shares of so many rows, over so many blocks.
__host__ __device__ constexpr int share(int rows, int blocks) { return ceil_div(rows, blocks); }

constexpr int PROJECTED = share(3 * D, BLOCKS), EXPANDED = 2 * share(F, BLOCKS);
constexpr int OWN = share(D, BLOCKS);  // rows of the other two products
constexpr int HEAD_ROWS = 128;  // of the logits, between two barriers
constexpr int IN_FLIGHT = 3;  // slots: more do not make memory faster, but what blocks send slower

// Which threads take the columns of a block's part of a head's state.
struct OfState {
    static constexpr int COLUMNS = share(V, PARTS);
    static constexpr int ACROSS = power_from(COLUMNS);
    static constexpr int DOWN = THREADS / ACROSS;
    static constexpr int ROWS = ceil_div(K, DOWN);  // of a thread
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

constexpr int FACTOR = 16 * ceil_div(larger(D, F), 32);  // words of a product's right side

struct alignas(16) Shared {
    // A product's right side, as the sum of two numbers of the weights' type.
    alignas(16) u32 factor[2][FACTOR];
    // Of rows, by warps; in turn, for one warp reads while the others go on.
    float sums[2][WARPS * larger(larger(PROJECTED, EXPANDED), HEAD_ROWS)];
    float read_out[OfState::SUMS][OfState::ACROSS], aug[OfState::SUMS], value[OfState::ACROSS];
    float squares[WARPS];
    float residual[OWN];  // this block's share of the residual stream
    Place place;
    const void* table[LAYERS * FIELDS];
};

// The rest is the ring: slots, which take at least a row, and their barriers. Eight rows in succession,
// of a slot or of several, begin in different banks of four words.
__host__ __device__ constexpr int padded(int bytes, int bank) { return 128 * ceil_div(bytes - bank, 128) + bank; }
__host__ __device__ constexpr int stride_of(int bytes, int in_slot) { return padded(bytes, 128 / in_slot); }
constexpr int SLOT = padded(larger(larger(2 * F, 2 * D), power_to(8448 / (2 * D)) * stride_of(2 * D, 4)), 16);
constexpr int SLOTS = (SHARED_BYTES - (int)sizeof(Shared)) / (SLOT + 2 * (int)sizeof(u64));
__host__ __device__ constexpr int rows_in_slot(int bytes, int most) {
    return most == 1 || most * stride_of(bytes, most) <= SLOT ? most : rows_in_slot(bytes, most / 2);
}

// How rows of so many weights lie in the ring, of which a share has at most MOST, and who takes what:
// each warp some units of 32 columns of all rows.
template <int COLUMNS, int MOST>
struct Rows {
    static constexpr int SIZE = 2 * COLUMNS, IN_SLOT = rows_in_slot(SIZE, 8), STRIDE = stride_of(SIZE, IN_SLOT);
    static constexpr int UNITS = ceil_div(COLUMNS, 32), TURNS = ceil_div(UNITS, WARPS);
    // Tiles at a time, which have to be in the ring together; of eight rows, if that is all.
    static constexpr int HEIGHT = MOST <= 8 || SLOTS * IN_SLOT < 32 ? 8 : 16, WORDS = HEIGHT / 2;  // of a lane, of a unit
    static constexpr int IN_RING = larger(1, SLOTS / 2 * IN_SLOT / HEIGHT);
    static constexpr int TILES = smaller(smaller(ceil_div(MOST, HEIGHT), IN_RING), 3);
    static constexpr int BATCH = HEIGHT * TILES;
    // Units that a thread has in registers ahead, of each tile.
    static constexpr int HELD = smaller(TURNS, 64 / (TILES * WORDS));
    static_assert(SIZE % 16 == 0, "a row has to be of whole vectors");
    static_assert(BATCH / IN_SLOT <= smaller(SLOTS, 32), "");
};

using ProjectRows = Rows<D, PROJECTED>;
using EmitRows = Rows<D, OWN>;
using ExpandRows = Rows<D, EXPANDED>;
using ContractRows = Rows<F, OWN>;
using HeadRows = Rows<D, HEAD_ROWS>;

// --- Numbers ---

#if BFLOAT16
#define TYPE "bf16"
#else
#define TYPE "f16"
#endif

__device__ float widen(Weight x) {
    float y;
    asm("cvt.f32." TYPE " %0, %1;" : "=f"(y) : "h"(x));
    return y;
}

__device__ Weight narrow(float x) {
    Weight y;
    asm("cvt.rn." TYPE ".f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}

// Number i of those that lie side by side in words; i is known to the compiler.
__device__ Weight pick(const uint2* words, int i) {
    const u32 word = i / 2 % 2 ? words[i / 4].y : words[i / 4].x;
    return (Weight)(i % 2 ? word >> 16 : word);
}

// Two numbers side by side, the first below.
__device__ u32 pack(float first, float second) {
    u32 word;
    asm("cvt.rn." TYPE "x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
    return word;
}
__device__ uint2 pack(const float (&x)[4]) { return make_uint2(pack(x[0], x[1]), pack(x[2], x[3])); }

// c [16, 8] += a [16, 16] b [16, 8] by a warp. Of a lane: of a, columns 2 (lane % 4) and the next of
// rows lane / 4 and 8 further, then the same with columns from 8 on; of b, such rows of column
// lane / 4; of c, columns 2 (lane % 4) and the next of the row, then of that 8 further.
__device__ void multiply_add(float (&c)[4], const u32* a, u32 b, u32 b_from_8) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE ".f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "r"(b_from_8));
}

// Such words of four matrices of 8 rows of 16 bytes, of which each lane says where one begins.
__device__ void load_matrices(u32* words, u32 row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3]) : "r"(row) : "memory");
}

__device__ float sigmoid(float x) { return __fdividef(1.0f, 1.0f + __expf(-x)); }

// A log decay, and 1 - exp(g), with all digits where they are close to zero.
__device__ float log_decay(float logit, float inverse_tau) {
    const float x = __expf(-fabsf(logit));
    const float log1p = x < 0.02f ? x * (1 - x * (0.5f - x * (1.0f / 3))) : __logf(1 + x);
    return (fminf(logit, 0) - log1p) * inverse_tau;
}
__device__ float key_of(float g) {
    return g > -0.03f ? -g * (1 + g * (0.5f + g * (1.0f / 6))) : 1 - __expf(g);
}

__device__ float warp_sum(float x) {
#pragma unroll
    for (int offset = 16; offset; offset /= 2) x += __shfl_xor_sync(~0u, x, offset);
    return x;
}

// --- Between threads ---

// Among all threads that compute.
__device__ void barrier() { asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory"); }

// From these to the warp that sends: sums of a stage are there. Which of two barriers and of two places
// for sums it is changes with every stage, for who computes need not wait for who sends.
__device__ void hand_over(int side) { asm volatile("bar.arrive %0, %1;" ::"r"(2 + side), "n"(THREADS + 32) : "memory"); }
__device__ void await_sums(int side) { asm volatile("bar.sync %0, %1;" ::"r"(2 + side), "n"(THREADS + 32) : "memory"); }

__device__ u32 shared_address(const void* pointer) {
    return (u32)__cvta_generic_to_shared(pointer);
}

__device__ void await_phase(u32 at, u32 parity) {
    asm volatile(
        "{.reg .pred done;\n"
        "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;}"
        ::"r"(at), "r"(parity) : "memory");
}

// Where blocks find each other's numbers: residual stream behind the mixer and behind the MLP [D],
// projections [3 D] with decays in place of gate logits, keys [D / 2], read-outs [D], the MLP's inner
// values [F]. Eight numbers lie on a line of memory: the more blocks write and read on one, the later
// they find what they look for.
constexpr int MIDDLE = 0, OUTER = D, PROJECTIONS = 2 * D, KEYS = 5 * D, READ_OUT = 6 * D, INNER = 7 * D;
[[maybe_unused]] constexpr int EXCHANGED = 32 * ceil_div(7 * D + F, 8);
__device__ int place_of(int number) { return number / 8 * 32 + number % 8; }

// To all blocks, with the turn in the last bit.
__device__ void send(float* exchange, int number, float x, u32 turn) {
    const u32 word = (__float_as_uint(x) & ~1u) | turn;
    asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(exchange + place_of(number)), "r"(word) : "memory");
}

// COUNT of them, from the addresses at(i); all are asked for before any is looked at.
template <int COUNT, typename At>
__device__ void receive(float (&x)[COUNT], u32 turn, At at) {
    bool all;
    do {
        all = true;
        u32 words[COUNT];
#pragma unroll
        for (int i = 0; i < COUNT; ++i)
            asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(words[i]) : "l"(at(i)) : "memory");
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            all &= (words[i] & 1) == turn;
            x[i] = __uint_as_float(words[i]);
        }
    } while (!all);
}

// The same with four at each address, a multiple of 16 bytes.
template <int COUNT, typename At>
__device__ void receive(float4 (&x)[COUNT], u32 turn, At at) {
    bool all;
    do {
        all = true;
        uint4 words[COUNT];
#pragma unroll
        for (int i = 0; i < COUNT; ++i)
            asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                         : "=r"(words[i].x), "=r"(words[i].y), "=r"(words[i].z), "=r"(words[i].w)
                         : "l"(at(i)) : "memory");
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            const uint4 w = words[i];
            all &= ((turn ? w.x & w.y & w.z & w.w : w.x | w.y | w.z | w.w) & 1) == turn;
            x[i] = make_float4(__uint_as_float(w.x), __uint_as_float(w.y), __uint_as_float(w.z),
                               __uint_as_float(w.w));
        }
    } while (!all);
}

// --- The stream of rows ---

// One end of the ring: `position` counts the slots that were filled and emptied before.
struct Ring {
    u32 slots, full, empty;  // addresses in shared memory: of slots and of their barriers
    u32 position;

    // Copies `count` rows into the ring, each from where source(row) says.
    template <typename R, typename Source>
    __device__ void copy(int count, Source source) {
        const int lane = threadIdx.x % 32, copier = threadIdx.x / 32 - WARPS - 1;
        for (int first = 0; first < count; first += R::IN_SLOT, ++position) {
            if (position % COPIERS != copier) continue;
            const int rows = smaller(R::IN_SLOT, count - first);
            const u32 slot = position % SLOTS;
            if (position >= SLOTS) await_phase(empty + 8 * slot, (position / SLOTS - 1) & 1);
            if (position >= IN_FLIGHT) {
                const u32 landed = position - IN_FLIGHT;
                await_phase(full + 8 * (landed % SLOTS), landed / SLOTS & 1);
            }
            const u32 filled = full + 8 * slot;
            if (lane == 0)
                asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
                             ::"r"(filled), "r"(rows * R::SIZE) : "memory");
            __syncwarp();
            for (int row = lane; row < rows; row += 32)
                asm volatile(
                    "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
                    "[%0], [%1], %2, [%3];"
                    ::"r"(slots + slot * SLOT + row * R::STRIDE),
                      "l"(source(first + row)), "n"(R::SIZE), "r"(filled) : "memory");
        }
    }

    // Until so many slots, from the next on, are full.
    __device__ void await_slots(int count) {
        const u32 at = position + threadIdx.x % 32;
        if (at - position < count) await_phase(full + 8 * (at % SLOTS), at / SLOTS & 1);
        __syncwarp();
    }

    // This warp has read them.
    __device__ void release(int count) {
        const u32 at = position + threadIdx.x % 32;
        __syncwarp();
        if (at - position < count)
            asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];"
                         ::"r"(empty + 8 * (at % SLOTS)) : "memory");
        position += count;
    }
};

// The products of the next `count` rows of the stream with a factor, as sums [WARPS, stride] by warps.
//
// On tensor cores: tiles of 16 rows are the left side of `multiply_add`, the factor's higher and lower
// part by turns the columns of the right side. Of a tile of eight rows, other columns stand where rows
// 8 to 15 would: two products have each a half that counts. What registers can hold is read from the
// ring before the factor is there.
template <typename R>
struct Product {
    Ring& ring;
    const int count;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int first = 0;     // of the rows at hand
    u32 rows[R::TILES];  // where this lane's of each tile begins
    u32 held[R::TILES][R::HELD][R::WORDS];

    __device__ Product(Ring& ring, int count) : ring(ring), count(count) { read(); }

    __device__ int slots() { return ceil_div(smaller(R::BATCH, count - first), R::IN_SLOT); }

    // The matrices of a unit's 64 bytes: lanes of eight say where the rows of one begin.
    __device__ void load_unit(u32* words, int tile, int turn) {
        const int unit = warp * R::TURNS + turn, matrix = lane / 8;
        if (R::UNITS < R::TURNS * WARPS && unit >= R::UNITS) return;
        const auto column = [&](int eight) {  // the last unit may be short: what is there twice meets zeros
            return rows[tile] + smaller(unit * 64 + eight * 16, R::SIZE - 16);
        };
        if (R::HEIGHT == 8) {
            load_matrices(words, column(matrix % 2 * 2 + matrix / 2));
        } else {
            load_matrices(words, column(matrix / 2));
            load_matrices(words + R::WORDS / 2, column(2 + matrix / 2));
        }
    }

    __device__ void read() {
        ring.await_slots(slots());
        const u32 first_slot = ring.position % SLOTS;
#pragma unroll
        for (int tile = 0; tile < R::TILES; ++tile) {
            // Rows that are not there have some sum too, which nobody reads.
            const int index = tile * R::HEIGHT + lane % R::HEIGHT;
            u32 slot = first_slot + index / R::IN_SLOT;
            if (slot >= SLOTS) slot -= SLOTS;
            rows[tile] = ring.slots + slot * SLOT + index % R::IN_SLOT * R::STRIDE;
#pragma unroll
            for (int turn = 0; turn < R::HELD; ++turn) load_unit(held[tile][turn], tile, turn);
        }
        if (R::HELD == R::TURNS) ring.release(slots());
    }

    __device__ void multiply(const u32 (&factor)[2][FACTOR], float* sums, int stride) {
        while (true) {
            float y[R::TILES][2][4] = {};
#pragma unroll
            for (int turn = 0; turn < R::TURNS; ++turn) {
                const int unit = warp * R::TURNS + turn;
                if (R::UNITS < R::TURNS * WARPS && unit >= R::UNITS) break;
                uint4 x = *(const uint4*)(factor[lane / 4 % 2] + unit * 16 + lane % 4 * 4);
                if (R::SIZE % 64 && unit == R::UNITS - 1) {
                    if (R::SIZE % 64 <= 16) x.y = 0;
                    if (R::SIZE % 64 <= 32) x.z = 0;
                    if (R::SIZE % 64 <= 48) x.w = 0;
                }
#pragma unroll
                for (int tile = 0; tile < R::TILES; ++tile) {
                    u32 w[R::WORDS];
                    if (turn >= R::HELD) load_unit(w, tile, turn);
                    const u32* words = turn < R::HELD ? held[tile][turn % R::HELD] : w;
                    multiply_add(y[tile][0], words, x.x, x.y);
                    multiply_add(y[tile][1], words + R::WORDS - 4, x.z, x.w);
                }
            }
            if (R::HELD < R::TURNS) ring.release(slots());
            const int done = first;
            if ((first += R::BATCH) < count) read();
#pragma unroll
            for (int tile = 0; tile < R::TILES; ++tile) {
                const int row = done + tile * R::HEIGHT + lane / 4;
                float* sum = sums + warp * stride + row;
                const auto upper = [&](int half) { return y[tile][half][0] + y[tile][half][1]; };
                const auto lower = [&](int half) { return y[tile][half][2] + y[tile][half][3]; };
                if (lane % 4 == 0 && row < count) sum[0] = upper(0) + (R::HEIGHT == 8 ? lower(1) : upper(1));
                if (R::HEIGHT == 16 && lane % 4 == 0 && row + 8 < count) sum[8] = lower(0) + lower(1);
            }
            if (first >= count) break;
        }
    }
};

__device__ float sum_of_squares(const float* squares) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < WARPS; ++i) sum += squares[i];
    return sum;
}

__device__ float sum_of_row(const float* sums, int stride, int row) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < WARPS; ++i) sum += sums[i * stride + row];
    return sum;
}

// --- The step ---

struct Arguments {
    const void* const* table;         // [LAYERS, FIELDS]
    const Weight *final_norm, *head;  // [D] or null, [VOCABULARY, D]
    const float* x;                   // [D], the embedding
    float* exchange;                  // [EXCHANGED], from stage to stage, zero before the first step
    Weight* logits;                   // [VOCABULARY]
    u32* counters;                    // [2], zero before the first step: steps made, blocks at the end
    float scale, inverse_tau, norm_eps, output_norm_eps;
};

// Asks for all that a layer reads beside the large weights, a line by each of all blocks' lanes.
__device__ void prefetch_layer(const void* const* table) {
    const auto prefetch = [](const void* from, int bytes) {
        if (!from) return;
        for (int line = threadIdx.x % 32 * BLOCKS + blockIdx.x; line * 128 < bytes; line += 32 * BLOCKS)
            asm volatile("prefetch.global.L2 [%0];" ::"l"((const char*)from + line * 128));
    };
    prefetch(table[STATE], H * K * V * 4);
    prefetch(table[TOKEN_NORM], D * (int)sizeof(Weight));
    prefetch(table[CONVOLUTION], D * TAPS * (int)sizeof(Weight));
    prefetch(table[CONVOLUTION_STATE], D * (TAPS - 1) * (int)sizeof(Weight));
    prefetch(table[OUT_GATE_BIAS], D * (int)sizeof(Weight));
    prefetch(table[AUG], D / 2 * (int)sizeof(Weight));
    prefetch(table[CHANNEL_NORM], D * (int)sizeof(Weight));
    prefetch(table[L1_BIAS], F * (int)sizeof(Weight));
    prefetch(table[L2_BIAS], F * (int)sizeof(Weight));
    prefetch(table[L3_BIAS], D * (int)sizeof(Weight));
}

__device__ void copy_stream(const Arguments& a, const Shared& s, Ring ring) {
    const Place& place = s.place;
    for (int layer = 0; layer < LAYERS; ++layer) {
        const void* const* table = s.table + layer * FIELDS;
        const auto weight = [&](int field) { return (const Weight*)table[field]; };
        if (threadIdx.x / 32 == WARPS + 1) prefetch_layer(table);
        ring.copy<ProjectRows>(place.project.count, [&](int i) {
            const int row = place.project.first + i;
            return row < D / 2 ? weight(Q) + row * D
                : row < D      ? weight(GATE_LOGITS) + (row - D / 2) * D
                : row < 2 * D  ? weight(V_PROJECTION) + (row - D) * D
                               : weight(OUT_GATE) + (row - 2 * D) * D;
        });
        ring.copy<EmitRows>(place.own.count, [&](int i) { return weight(OUT) + (place.own.first + i) * D; });
        ring.copy<ExpandRows>(2 * place.expand.count, [&](int i) {
            return weight(i % 2 ? L2 : L1) + (place.expand.first + i / 2) * D;
        });
        ring.copy<ContractRows>(place.own.count, [&](int i) {
            return weight(L3) + (place.own.first + i) * F;
        });
    }
    ring.copy<HeadRows>(place.logits.count, [&](int i) {
        return a.head + (long long)(place.logits.first + i) * D;
    });
}

// Fours of a factor's entries that a lane has: a warp makes just those that it multiplies.
template <int COLUMNS>
struct Fours {
    static constexpr int OF_WARP = 8 * ceil_div(ceil_div(COLUMNS, 32), WARPS), COUNT = ceil_div(OF_WARP, 32);
    const int at = threadIdx.x / 32 * OF_WARP + threadIdx.x % 32;

    __device__ int clamped(int i) const { return smaller(at + 32 * i, COLUMNS / 4 - 1); }
    template <typename Work>
    __device__ void for_each(Work work) const {
#pragma unroll
        for (int i = 0; i < COUNT; ++i)
            if ((OF_WARP % 32 == 0 || threadIdx.x % 32 + 32 * i < OF_WARP) && at + 32 * i < COLUMNS / 4)
                work(i, at + 32 * i);
    }
};
constexpr int FOURS = Fours<D>::COUNT;

// A number of a vector of weights that may not be there.
__device__ float entry(const void* vector, int index) {
    return vector ? widen(__ldg((const Weight*)vector + index)) : 0.0f;
}

// What a warp of its own does: sums up what others have, and sends it to all blocks.
struct Sender {
    const Arguments& a;
    Shared& s;
    const void* const* table;  // of the layer at hand
    u32 turn;
    const Place& place = s.place;
    const int lane = threadIdx.x % 32;
    int side = 0;

    // Work for each row of a share, of which there are sums [WARPS, stride].
    template <typename Work>
    __device__ void for_rows(const Share& share, Work work) {
        await_sums(side);
        for (int i = lane; i < share.count; i += 32) work(i, share.first + i, s.sums[side]);
        side ^= 1;
    }

    __device__ float norm_factor() { return rsqrtf(sum_of_squares(s.squares) / D + a.norm_eps); }

    __device__ void project() {
        for_rows(place.project, [&](int i, int row, const float* sums) {
            float y = sum_of_row(sums, PROJECTED, i);
            if (D / 2 <= row && row < D) {
                const float g = log_decay(y, a.inverse_tau);
                send(a.exchange, KEYS + row - D / 2, key_of(g), turn);
                y = __expf(g);
            }
            send(a.exchange, PROJECTIONS + row, y, turn);
        });
    }

    __device__ void mix() {
        for_rows(place.columns, [&](int i, int column, const float*) {
            float y = 0, aug = 0;
#pragma unroll
            for (int part = 0; part < OfState::SUMS; ++part) {
                y += s.read_out[part][i];
                aug += s.aug[part];
            }
            y *= a.scale;
            if (table[AUG]) y += sigmoid(aug * s.value[i]);
            send(a.exchange, READ_OUT + place.head * V + column, y, turn);
        });
    }

    __device__ void emit() {
        for_rows(place.own, [&](int i, int row, const float* sums) {
            s.residual[i] += sum_of_row(sums, OWN, i);
            send(a.exchange, MIDDLE + row, s.residual[i], turn);
        });
    }

    __device__ void expand() {
        for_rows(place.expand, [&](int i, int row, const float* sums) {
            const float factor = norm_factor();
            const float y = sum_of_row(sums, EXPANDED, 2 * i) * factor + entry(table[L1_BIAS], row);
            const float z = sum_of_row(sums, EXPANDED, 2 * i + 1) * factor + entry(table[L2_BIAS], row);
            const float x = y * sigmoid(y) * z;
            // As the next factor's two parts, of which the lower one loses a bit.
            const Weight high = narrow(x);
            send(a.exchange, INNER + row, __uint_as_float((u32)high << 16 | narrow(x - widen(high))), turn);
        });
    }

    __device__ void contract() {
        for_rows(place.own, [&](int i, int row, const float* sums) {
            s.residual[i] += sum_of_row(sums, OWN, i) + entry(table[L3_BIAS], row);
            send(a.exchange, OUTER + row, s.residual[i], turn);
        });
    }

    __device__ void logits() {
        for (int first = 0; first < place.logits.count; first += HEAD_ROWS) {
            Share rows = place.logits;
            rows.first += first;
            rows.count = smaller(HEAD_ROWS, rows.count - first);
            for_rows(rows, [&](int i, int row, const float* sums) {
                a.logits[row] = narrow(sum_of_row(sums, HEAD_ROWS, i) * norm_factor());
            });
        }
    }

    __device__ void run() {
        for (int i = lane; i < place.own.count; i += 32) s.residual[i] = a.x[place.own.first + i];
        for (int layer = 0; layer < LAYERS; ++layer, table += FIELDS, turn ^= 1) {
            if (place.project.count) project();
            if (place.columns.count) mix();
            if (place.own.count) emit();
            if (place.expand.count) expand();
            if (place.own.count) contract();
        }
        logits();
    }
};

// What the warps that compute do, thread by thread.
struct Compute {
    const Arguments& a;
    Shared& s;
    Ring ring;
    int side = 0;
    const void* const* table = s.table;  // of the layer at hand
    u32 turn;
    const Place& place = s.place;
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const Fours<D> fours;

    template <typename P>
    __device__ void finish(P& product, int stride) {
        product.multiply(s.factor, s.sums[side], stride);
        hand_over(side);
        side ^= 1;
    }

    // Of this lane's fours of channels: a norm's weights; the convolution's, and
    // its inputs so far, oldest first.
    uint2 norm[FOURS], taps[FOURS][TAPS], past[FOURS][TAPS];
    // Of this thread's entries of the state.
    float state[OfState::ROWS];
    Weight balance[OfState::ROWS];

    // Words of a product's factor, that with the first of four entries and the next, to where a lane of
    // `Product` finds its four of a unit side by side.
    __device__ void put(u32 (&part)[FACTOR], int four, u32 first, u32 second) {
        u32* const words = part + four / 8 * 16 + four % 2 * 8 + four % 8 / 2;
        words[0] = first;
        words[4] = second;
    }
    __device__ void put(int four, const float (&x)[4]) {
        const uint2 high = pack(x);
        float low[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) low[j] = x[j] - widen(pick(&high, j));
        put(s.factor[0], four, high.x, high.y);
        put(s.factor[1], four, pack(low[0], low[1]), pack(low[2], low[3]));
    }

    __device__ void receive_fours(float4 (&x)[FOURS], int at, u32 turn) {
        receive(x, turn, [&](int i) { return a.exchange + place_of(at + 4 * fours.clamped(i)); });
    }

    // For a norm's factor, by warps.
    __device__ void square(const float4 (&x)[FOURS]) {
        float sum = 0;
        fours.for_each([&](int i, int) {
            sum += (x[i].x * x[i].x + x[i].y * x[i].y) + (x[i].z * x[i].z + x[i].w * x[i].w);
        });
        sum = warp_sum(sum);
        if (lane == 0) s.squares[warp] = sum;
    }
    __device__ void load_norm(const void* weight) {
        const float ones[4] = {1, 1, 1, 1};
        fours.for_each([&](int i, int four) { norm[i] = weight ? __ldg((const uint2*)weight + four) : pack(ones); });
    }
    // x times the norm's weights, as a product's right side.
    __device__ void put_normed(const float4 (&x)[FOURS]) {
        fours.for_each([&](int i, int four) {
            const float y[4] = {x[i].x * widen(pick(norm + i, 0)), x[i].y * widen(pick(norm + i, 1)),
                                x[i].z * widen(pick(norm + i, 2)), x[i].w * widen(pick(norm + i, 3))};
            put(four, y);
        });
    }

    // Ahead of `project`: what it reads that no other block writes meanwhile.
    __device__ void prepare_project(const void* const* table) {
        load_norm(table[TOKEN_NORM]);
        fours.for_each([&](int i, int four) {
#pragma unroll
            for (int k = 0; k < TAPS; ++k)
                taps[i][k] = __ldg((const uint2*)table[CONVOLUTION] + four * TAPS + k);
#pragma unroll
            for (int k = 0; k < TAPS - 1; ++k)
                past[i][k] = ((const uint2*)table[CONVOLUTION_STATE])[four * (TAPS - 1) + k];
        });
    }

    __device__ void project(bool first) {
        Product<ProjectRows> product(ring, place.project.count);
        if (place.columns.count) prepare_mix();
        float mixed[FOURS][4];
        fours.for_each([&](int i, int) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                mixed[i][j] = 0;
#pragma unroll
                for (int tap = 0; tap < TAPS - 1; ++tap)
                    mixed[i][j] += widen(pick(taps[i], j * TAPS + tap)) * widen(pick(past[i], j * (TAPS - 1) + tap));
            }
        });
        float4 x[FOURS];
        if (first) fours.for_each([&](int i, int four) { x[i] = ((const float4*)a.x)[four]; });
        else receive_fours(x, OUTER, turn ^ 1);
        square(x);
        barrier();
        const float factor = rsqrtf(sum_of_squares(s.squares) / D + a.norm_eps);
        fours.for_each([&](int i, int four) {
            const float of_channel[4] = {x[i].x, x[i].y, x[i].z, x[i].w};
            float normed[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) normed[j] = of_channel[j] * factor * widen(pick(norm + i, j));
            past[i][TAPS - 1] = pack(normed);  // rounded as in the convolution's state
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                mixed[i][j] += widen(pick(taps[i], j * TAPS + TAPS - 1)) * widen(pick(past[i] + TAPS - 1, j));
                mixed[i][j] *= sigmoid(mixed[i][j]);
            }
            put(four, mixed[i]);
        });
        __syncwarp();
        finish(product, PROJECTED);
    }

    // The state's column and row of a thread's entry; the columns are this block's.
    __device__ int column() { return thread % OfState::ACROSS; }
    __device__ int state_row(int i) { return thread / OfState::ACROSS + i * OfState::DOWN; }
    __device__ float* state_at(int row) {
        return (float*)table[STATE] + (place.head * K + row) * V + place.columns.first + column();
    }

    __device__ void prepare_mix() {
        const int inside = smaller(column(), place.columns.count - 1) - column();
#pragma unroll
        for (int i = 0; i < OfState::ROWS; ++i) {
            const int row = smaller(state_row(i), K - 1);
            state[i] = state_at(row)[inside];
            if (table[AUG]) balance[i] = __ldg((const Weight*)table[AUG] + place.head * K + row);
        }
    }

    __device__ void mix() {
        const Share columns = place.columns;
        const int head = place.head;
        constexpr int DECAYS = PROJECTIONS + D / 2, VALUES = PROJECTIONS + D;
        float sum = 0, aug = 0;
        if (column() < columns.count) {
            float x[3 * OfState::ROWS + 1];
            receive(x, turn, [&](int i) {
                const int row = head * K + smaller(state_row(i / 3), K - 1);
                return a.exchange + place_of(
                    i == 3 * OfState::ROWS ? VALUES + head * V + columns.first + column()
                    : i % 3 == 0 ? PROJECTIONS + row : i % 3 == 1 ? DECAYS + row : KEYS + row);
            });
            if (thread < OfState::ACROSS) s.value[column()] = x[3 * OfState::ROWS];
#pragma unroll
            for (int i = 0; i < OfState::ROWS; ++i) {
                const float q = x[3 * i], decay = x[3 * i + 1], key = x[3 * i + 2];
                if (state_row(i) >= K) continue;
                state[i] = decay * state[i] + key * x[3 * OfState::ROWS];
                *state_at(state_row(i)) = state[i];
                sum += q * state[i];
                if (table[AUG]) aug += q * key * widen(balance[i]);
            }
        }
#pragma unroll
        for (int offset = OfState::ACROSS; offset < 32; offset *= 2) {
            sum += __shfl_xor_sync(~0u, sum, offset);
            aug += __shfl_xor_sync(~0u, aug, offset);
        }
        const int part = OfState::ACROSS < 32 ? warp : thread / OfState::ACROSS;
        if (OfState::ACROSS >= 32 || lane < OfState::ACROSS) s.read_out[part][column()] = sum;
        if (column() == 0) s.aug[part] = aug;
        hand_over(side);
        side ^= 1;
    }

    __device__ void emit() {
        Product<EmitRows> product(ring, place.own.count);
        // A warp has a head, of which a lane has some four columns.
        constexpr int OF_LANE = ceil_div(V / 4, 32);
        // If a warp's part of the factor is of whole heads, these are its heads, and it need not wait.
        constexpr int OF_WARP = 4 * Fours<D>::OF_WARP;
        constexpr bool WHOLE = OF_WARP % V == 0;
        const int first_head = WHOLE ? warp * (OF_WARP / V) : warp;
        for (int i = 0; i < (WHOLE ? OF_WARP / V : ceil_div(H, WARPS)); ++i) {
            const int head = first_head + (WHOLE ? i : i * WARPS);
            if (head >= H) break;
            float y[OF_LANE][4], gate[OF_LANE][4], sum = 0, squares = 0;
            const auto four = [&](int i) { return smaller(lane + 32 * i, V / 4 - 1); };
            const auto inside = [&](int i) { return lane + 32 * i < V / 4; };
            uint2 bias[OF_LANE];
#pragma unroll
            for (int i = 0; i < OF_LANE; ++i)
                bias[i] = __ldg((const uint2*)table[OUT_GATE_BIAS] + head * (V / 4) + four(i));
            float4 x[OF_LANE];
            receive(x, turn, [&](int i) {
                return a.exchange + place_of(PROJECTIONS + 2 * D + head * V + 4 * four(i));
            });
#pragma unroll
            for (int i = 0; i < OF_LANE; ++i) {
                const float gates[4] = {x[i].x, x[i].y, x[i].z, x[i].w};
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    gate[i][j] = gates[j] + widen(pick(bias + i, j));
                    gate[i][j] *= sigmoid(gate[i][j]);
                }
            }
            receive(x, turn, [&](int i) { return a.exchange + place_of(READ_OUT + head * V + 4 * four(i)); });
#pragma unroll
            for (int i = 0; i < OF_LANE; ++i) {
                y[i][0] = x[i].x, y[i][1] = x[i].y, y[i][2] = x[i].z, y[i][3] = x[i].w;
                if (inside(i)) sum += (y[i][0] + y[i][1]) + (y[i][2] + y[i][3]);
            }
            const float mean = warp_sum(sum) / V;
#pragma unroll
            for (int i = 0; i < OF_LANE; ++i)
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    y[i][j] -= mean;
                    if (inside(i)) squares += y[i][j] * y[i][j];
                }
            const float factor = rsqrtf(warp_sum(squares) / V + a.output_norm_eps);
#pragma unroll
            for (int i = 0; i < OF_LANE; ++i) {
#pragma unroll
                for (int j = 0; j < 4; ++j) y[i][j] *= factor * gate[i][j];
                if (inside(i)) put(head * (V / 4) + four(i), y[i]);
            }
        }
        if (WHOLE) {
            __syncwarp();
        } else {
            barrier();
        }
        finish(product, OWN);
        const Share own = place.own;
        // All blocks have read the convolution's state, since all heads are here.
        fours.for_each([&](int i, int four) {
            if (4 * four + 4 <= own.first || own.first + own.count <= 4 * four) return;
#pragma unroll
            for (int j = 0; j < 4; ++j)
                if (own.has(4 * four + j))
#pragma unroll
                    for (int tap = 0; tap < TAPS - 1; ++tap)
                        ((Weight*)table[CONVOLUTION_STATE])[(4 * four + j) * (TAPS - 1) + tap] =
                            tap < TAPS - 2 ? pick(past[i], j * (TAPS - 1) + tap + 1) : pick(past[i] + TAPS - 1, j);
        });
    }

    __device__ void expand() {
        Product<ExpandRows> product(ring, 2 * place.expand.count);
        float4 x[FOURS];
        load_norm(table[CHANNEL_NORM]);
        receive_fours(x, MIDDLE, turn);
        put_normed(x);
        __syncwarp();
        square(x);
        finish(product, EXPANDED);
    }

    __device__ void contract() {
        Product<ContractRows> product(ring, place.own.count);
        const Fours<F> fours;
        float4 x[Fours<F>::COUNT];
        receive(x, turn, [&](int i) { return a.exchange + place_of(INNER + 4 * fours.clamped(i)); });
        fours.for_each([&](int i, int four) {
            const u32 parts[4] = {__float_as_uint(x[i].x), __float_as_uint(x[i].y), __float_as_uint(x[i].z),
                                  __float_as_uint(x[i].w)};
            put(s.factor[0], four, __byte_perm(parts[0], parts[1], 0x7632),
                __byte_perm(parts[2], parts[3], 0x7632));
            put(s.factor[1], four, __byte_perm(parts[0], parts[1], 0x5410),
                __byte_perm(parts[2], parts[3], 0x5410));
        });
        __syncwarp();
        finish(product, OWN);
    }

    __device__ void logits() {
        float4 x[FOURS];
        load_norm(a.final_norm);
        receive_fours(x, OUTER, turn ^ 1);
        put_normed(x);
        __syncwarp();
        square(x);
        for (int first = 0; first < place.logits.count; first += HEAD_ROWS) {
            Product<HeadRows> product(ring, smaller(HEAD_ROWS, place.logits.count - first));
            product.multiply(s.factor, s.sums[side], HEAD_ROWS);
            await_sums(side);  // nobody is more than one part ahead of who sends
            side ^= 1;
        }
    }

    __device__ void run() {
        prepare_project(table);
        for (int layer = 0; layer < LAYERS; ++layer, table += FIELDS, turn ^= 1) {
            if (place.project.count) project(layer == 0);
            if (place.columns.count) mix();
            if (place.own.count) emit();
            if (place.expand.count) expand();
            if (layer + 1 < LAYERS) prepare_project(table + FIELDS);
            if (place.own.count) contract();
        }
        if (place.logits.count) logits();
    }
};

extern "C" __global__ void __launch_bounds__(THREADS + 32 + 32 * COPIERS, 1) decode_token(const Arguments a) {
    extern __shared__ __align__(128) char memory[];
    Shared& s = *(Shared*)(memory + SLOTS * SLOT);
    const u32 slots = shared_address(memory), full = shared_address(&s + 1), empty = full + 8 * SLOTS;
    const Ring ring{slots, full, empty, 0};
    for (int i = threadIdx.x; i < LAYERS * FIELDS; i += blockDim.x) s.table[i] = a.table[i];
    if (threadIdx.x < SLOTS) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(full + 8 * threadIdx.x));
        asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(empty + 8 * threadIdx.x), "n"(WARPS));
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    const u32 steps = *(volatile u32*)a.counters;
    if (threadIdx.x == 0) s.place = Place(blockIdx.x);
    __syncthreads();
    const u32 turn = (steps * LAYERS + 1) & 1;
    if (threadIdx.x < THREADS) {
        Compute{a, s, ring, 0, s.table, turn}.run();
    } else if (threadIdx.x < THREADS + 32) {
        Sender{a, s, s.table, turn}.run();
    } else {
        copy_stream(a, s, ring);
    }
    // All blocks have read the number of steps when the last of them is here.
    if (threadIdx.x == 0 && atomicAdd(a.counters + 1, 1) == BLOCKS - 1) {
        a.counters[0] = steps + 1;
        a.counters[1] = 0;
    }
}
