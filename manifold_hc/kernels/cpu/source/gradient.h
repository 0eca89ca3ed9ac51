// Backward of the projections p = x phi^T / rms(x), a block of tokens at a time:
//   dq = dp / rms      dphi += dq^T x      dx += dq phi - <dp, p> / (rms^2 n C) x
// The last term is the rank-one correction of the RMS norm; its factor is the token's `share`.
#pragma once

#include "projection.h"

// Registers: TOKENS or ROWS x VECTORS sums, VECTORS of phi or of a token, and one weight.
constexpr int OUTER_TOKENS = REGISTERS == 32 ? 4 : 2;
constexpr int OUTER_ROWS = REGISTERS == 32 ? 6 : 2;
constexpr int OUTER_VECTORS = 4;

// Operand of dq phi for streams X: rows of phi, or pairs of rows in bfloat16 where one instruction
// takes two, in half of the time. Rounding phi and dq adds an error of the size that rounding dx
// has anyway, in the smaller part of it.
template <class X>
using RowEntry =
    std::conditional_t<MULTIPLIES_PAIRS && std::is_same_v<X, bfloat16>, uint32_t, float>;

template <class Entry>
int row_entries(int rows) {
    return std::is_same_v<Entry, float> ? rows : (rows + 1) / 2;
}

INLINE Words round_pairs(const float* low, const float* high) {
    return widened(rounded(load(low, Whole{}))) | widened(rounded(load(high, Whole{}))) << 16;
}

// phi [rows, nC] as [chunk][pair of rows][CHUNK]; all threads of a team share the work.
inline void pack(const float* phi, int rows, const Chunks& chunks, uint32_t* packed) {
    const int pairs = row_entries<uint32_t>(rows);
#pragma omp for schedule(static)
    for (int64_t chunk = 0; chunk < chunks.count; chunk++)
        for (int pair = 0; pair < pairs; pair++) {
            float both[2][CHUNK] = {};
            for (int r = 2 * pair; r < std::min(2 * pair + 2, rows); r++)
                std::memcpy(both[r % 2], phi + r * chunks.size() + chunks.from(chunk),
                            chunks.length(chunk) * sizeof(float));
            for (int k = 0; k < CHUNK; k += LANES)
                store(packed + (chunk * pairs + pair) * CHUNK + k,
                      round_pairs(both[0] + k, both[1] + k));
        }
}

// tile(k, VECTORS) for the vectors of `length` values: OUTER_VECTORS together, then one by one.
template <class Tile>
INLINE void for_vectors(int64_t length, Tile tile) {
    int64_t k = 0;
    for (; k + OUTER_VECTORS * LANES <= length; k += OUTER_VECTORS * LANES)
        tile(k, std::integral_constant<int, OUTER_VECTORS>{});
    for (; k < length; k += LANES) tile(k, std::integral_constant<int, 1>{});
}

// Factors <dp, p> / (rms^2 n C) of the rank-one correction, one a token. For one whose 1 / rms^2
// underflows float the factor is in `huge`, over HUGE_SHARE, and 0 in `ordinary`.
struct Shares {
    float ordinary[BLOCK];
    float huge[BLOCK];
    bool any_huge;
};

constexpr float HUGE_INVERSE = 0x1p-50f, HUGE_SHARE = 0x1p-126f, HUGE_ROOT = 0x1p63f;

// out [BLOCK][CHUNK] -= share x, of the huge tokens.
NOINLINE inline void take_huge_shares(const Shares& shares, const float* values, int64_t length,
                                    float* out) {
    for (int t = 0; t < BLOCK; t++)
        for (int64_t k = 0; k < length && shares.huge[t] != 0; k += LANES) {
            float* own = out + t * CHUNK + k;
            const Vec value = load(values + t * CHUNK + k, Whole{}) * HUGE_SHARE;
            store(own, load(own, Whole{}) - shares.huge[t] * value, Whole{});
        }
}

template <int VECTORS, class Entry, class X>
INLINE void add_rows_tile(const Entry* weights, const Entry* phi, int entries, const float* shares,
                          const float* values, float* out, X* dx, int64_t size) {
    Vec total[OUTER_TOKENS][VECTORS];
    for (int t = 0; t < OUTER_TOKENS; t++)
        for (int k = 0; k < VECTORS; k++)
            // - share x, the rank-one correction
            total[t][k] = load(out + t * CHUNK + k * LANES, Whole{}) -
                          shares[t] * load(values + t * CHUNK + k * LANES, Whole{});
    for (int r = 0; r < entries; r++) {
        decltype(load(phi, Whole{})) row[VECTORS];
        for (int k = 0; k < VECTORS; k++)
            row[k] = in_register(load(phi + r * CHUNK + k * LANES, Whole{}));
        for (int t = 0; t < OUTER_TOKENS; t++) {
            const auto weight = in_register(broadcast(weights[r * BLOCK + t]));
            // + sum_r dq[r] phi[r]
            for (int k = 0; k < VECTORS; k++)
                total[t][k] = add_products(total[t][k], row[k], weight);
        }
    }
    for (int t = 0; t < OUTER_TOKENS; t++)
        for (int k = 0; k < VECTORS; k++)
            if (dx)
                store(dx + t * size + k * LANES, total[t][k], Whole{});
            else
                store(out + t * CHUNK + k * LANES, total[t][k], Whole{});
}

// out [BLOCK][CHUNK] += dq [entries, BLOCK]^T phi [entry][CHUNK] - shares [BLOCK] x; the sum goes
// to dx [BLOCK, size] instead unless dx is null.
template <class Entry, class X>
INLINE void add_rows(const Entry* weights, const Entry* phi, int entries, const float* shares,
                     const float* values, int64_t length, float* out, X* dx, int64_t size) {
    for (int t = 0; t < BLOCK; t += OUTER_TOKENS)
        for_vectors(length, [&](int64_t k, auto vectors) {
            add_rows_tile<vectors>(weights + t, phi + k, entries, shares + t,
                                   values + t * CHUNK + k, out + t * CHUNK + k,
                                   dx ? dx + t * size + k : nullptr, size);
        });
}

template <int ROWS, int VECTORS>
INLINE void add_outer_tile(const float* weights, const float* values, float* dphi, int64_t ahead,
                           bool fresh) {
    Vec total[ROWS][VECTORS];
    for (int r = 0; r < ROWS; r++)
        for (int k = 0; k < VECTORS; k++) {
            float* own = dphi + r * CHUNK + k * LANES;
            total[r][k] = fresh ? Vec{} : load(own, Whole{});
            prefetch(own + ahead);
        }
    for (int t = 0; t < BLOCK; t++) {
        Vec v[VECTORS];
        for (int k = 0; k < VECTORS; k++) v[k] = load(values + t * CHUNK + k * LANES, Whole{});
        for (int r = 0; r < ROWS; r++) {
            const Vec weight = broadcast(weights[r * BLOCK + t]);
            // dphi[r] += dq[r] x
            for (int k = 0; k < VECTORS; k++) total[r][k] += weight * v[k];
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int k = 0; k < VECTORS; k++)
            store(dphi + r * CHUNK + k * LANES, total[r][k], Whole{});
}

// dphi [row][CHUNK] += dq [rows, BLOCK] x [BLOCK][CHUNK]; prefetches the sums `ahead`. fresh: dphi
// is overwritten, as it holds no sum yet.
INLINE void add_outer(const float* weights, const float* values, int64_t length, float* dphi,
                      int64_t ahead, int rows, bool fresh) {
    auto tiles = [&](int r, auto count) {
        for_vectors(length, [&](int64_t k, auto vectors) {
            add_outer_tile<count, vectors>(weights + r * BLOCK, values + k, dphi + r * CHUNK + k,
                                           ahead, fresh);
        });
    };
    int r = 0;
    for (; r + OUTER_ROWS <= rows; r += OUTER_ROWS)
        tiles(r, std::integral_constant<int, OUTER_ROWS>{});
    for (; r < rows; r++) tiles(r, std::integral_constant<int, 1>{});
}

// Memory of one thread for a block's gradients of the streams and of phi.
template <class X>
struct GradientScratch {
    using Entry = RowEntry<X>;

    int rows;
    Room<float> weights;  // dq [rows, BLOCK], and zeros to an even number of rows
    Room<float> values;   // [BLOCK][CHUNK] of the streams
    Room<float> out;      // [stream][BLOCK][CHUNK] of their gradients
    Room<Entry> rounded_weights;

    GradientScratch(int rows, int streams)
        : rows(rows),
          weights((size_t)(rows + 1) * BLOCK),
          values(BLOCK * CHUNK),
          out((size_t)streams * BLOCK * CHUNK),
          rounded_weights(weights.size()) {}

    // Rounds the block's dq where products take pairs; call it once dq is complete.
    void weigh() {
        if constexpr (!std::is_same_v<Entry, float>)
            for (int pair = 0; pair < row_entries<Entry>(rows); pair++)
                for (int t = 0; t < BLOCK; t += LANES) {
                    const float* low = &weights[2 * pair * BLOCK + t];
                    store(&rounded_weights[pair * BLOCK + t], round_pairs(low, low + BLOCK));
                }
    }

    const Entry* weighed() const {
        if constexpr (std::is_same_v<Entry, float>)
            return weights.data();
        else
            return rounded_weights.data();
    }

    // In the channels of one chunk: dx [tokens, size] = out of its stream + dq^T phi - share x and
    // dphi += dq x; phi is [chunk][entry][CHUNK]. fresh: dphi holds no sum yet.
    void multiply(const Chunks& chunks, int64_t turn, const X* x, const Room<Entry>& phi,
                  const Shares& shares, X* dx, int tokens, float* dphi, bool fresh) {
        const int entries = row_entries<Entry>(rows);
        const int64_t chunk = chunks.across(turn), next = chunks.across(turn + 1);
        const int64_t size = chunks.size(), from = chunks.from(chunk);
        const int64_t length = chunks.length(chunk), padded = chunks.padded(chunk);
        // Tokens past the block's end repeat the last one, with dq of zero.
        for (int t = 0; t < BLOCK; t++)
            take(x + std::min(t, tokens - 1) * size + from, length, chunks.from(next) - from,
                 &values[t * CHUNK], nullptr);
        const bool whole = tokens == BLOCK && padded == length;
        float* own = &out[chunk / chunks.per_stream * BLOCK * CHUNK];
        if (shares.any_huge) take_huge_shares(shares, values.data(), padded, own);
        add_rows(weighed(), &phi[chunk * entries * CHUNK], entries, shares.ordinary,
                 values.data(), padded, own, whole ? dx + from : nullptr, size);
        if (!whole) put(own, tokens, length, dx + from, size);
        const int64_t floats = rows * CHUNK;
        add_outer(weights.data(), values.data(), padded, dphi + chunk * floats,
                  (next - chunk) * floats, rows, fresh);
    }

    // values [BLOCK][CHUNK] into dx [tokens, size], `length` channels.
    INLINE static void put(const float* values, int tokens, int64_t length, X* dx, int64_t size) {
        for (int t = 0; t < tokens; t++)
            for_channels(0, length, [&](int64_t k, auto width) {
                store(dx + t * size + k, load(values + t * CHUNK + k, width), width);
            });
    }
};

// weights [rows, BLOCK]: dp in, dq = dp / rms out; shares = <dp, p> / (rms^2 size).
INLINE void norm_backward(int rows, int tokens, int64_t size, const float* projected,
                          const float* inverse_rms, float* weights, Shares& shares) {
    shares.any_huge = false;
    for (int t = 0; t < BLOCK; t++) {
        const float inverse = t < tokens ? inverse_rms[t] : 0;
        float total = 0;
        for (int r = 0; r < rows; r++) {
            // <dp, p>
            if (t < tokens) total += weights[r * BLOCK + t] * projected[t * rows + r];
            weights[r * BLOCK + t] = t < tokens ? weights[r * BLOCK + t] * inverse : 0;
        }
        const bool huge = t < tokens && inverse < HUGE_INVERSE;
        const float root = inverse * HUGE_ROOT;
        shares.ordinary[t] = huge ? 0 : total * inverse * inverse / size;
        shares.huge[t] = huge ? total * root * root / size : 0;
        shares.any_huge |= huge;
    }
}

// Tokens of a slice, a range of tokens whose gradient of phi has a sum of its own; the sums are
// added in order. The length depends on the number of tokens alone, so that any number of threads
// rounds alike.
inline int64_t slice_length(int64_t tokens) {
    const int64_t count = std::max<int64_t>(1, std::min<int64_t>((tokens + 127) / 128, 32));
    const int64_t blocks = (tokens + BLOCK - 1) / BLOCK;
    return (blocks + count - 1) / count * BLOCK;
}

// Number of slices, none of them empty.
inline int slices(int64_t tokens) {
    const int64_t length = std::max<int64_t>(1, slice_length(tokens));
    return (int)((tokens + length - 1) / length);
}

// total [length] = the sum of parts [count, length], in order.
inline void sum_slices(const float* parts, int count, int64_t length, float* total) {
    for_channels(0, length, [&](int64_t k, auto width) {
        Vec v{};
        for (int s = 0; s < count; s++) v += load(parts + s * length + k, width);
        store(total + k, v, width);
    });
}

// dphi [rows, nC] = the sum of parts [count][chunk][row][CHUNK], in order.
inline void sum_packed_slices(const float* parts, int count, int rows, const Chunks& chunks,
                              float* dphi, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t chunk = 0; chunk < chunks.count; chunk++)
        for (int r = 0; r < rows; r++)
            for_channels(0, chunks.length(chunk), [&](int64_t k, auto width) {
                Vec v{};
                for (int s = 0; s < count; s++)
                    v += load(parts + s * chunks.floats(rows) + (chunk * rows + r) * CHUNK + k,
                              width);
                store(dphi + r * chunks.size() + chunks.from(chunk) + k, v, width);
            });
}
