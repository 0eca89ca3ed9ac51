// What the projections pass back: to the streams, and to phi, a block of tokens at a time.
#pragma once

#include "projection.h"

// Registers: TOKENS sums and one row of phi; ROWS sums and the values of one token.
constexpr int OUTER_TOKENS = REGISTERS == 32 ? 16 : 8;
constexpr int OUTER_ROWS = REGISTERS == 32 ? 8 : 4;

// What is multiplied for the gradient of streams X: rows of phi, or pairs of them in bfloat16 where
// one instruction takes two, in half of the time. Rounding phi and the weights makes an error of the
// size that rounding the gradient makes anyway, in the smaller part of it.
template <class X>
using RowEntry =
    std::conditional_t<MULTIPLIES_PAIRS && std::is_same_v<X, bfloat16>, uint32_t, float>;

template <class Entry>
int row_entries(int rows) {
    return std::is_same_v<Entry, float> ? rows : (rows + 1) / 2;
}

INLINE Words round_pairs(const float* low, const float* high) {
    return rounded(load(low, Whole{})) | rounded(load(high, Whole{})) << 16;
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

// out [BLOCK][CHUNK] += weights [entries, BLOCK]^T phi [entry][CHUNK] - shares [BLOCK] values; if
// dx [BLOCK, size] is there, it is put there instead.
template <class Entry, class X>
INLINE void add_rows(const Entry* weights, const Entry* phi, int entries, const float* shares,
                     const float* values, int64_t length, float* out, X* dx, int64_t size) {
    for (int t0 = 0; t0 < BLOCK; t0 += OUTER_TOKENS)
        for (int64_t k = 0; k < length; k += LANES) {
            Vec total[OUTER_TOKENS];
            for (int t = 0; t < OUTER_TOKENS; t++)
                total[t] = load(out + (t0 + t) * CHUNK + k, Whole{}) -
                           shares[t0 + t] * load(values + (t0 + t) * CHUNK + k, Whole{});
            for (int r = 0; r < entries; r++) {
                const auto row = load(phi + r * CHUNK + k, Whole{});
                for (int t = 0; t < OUTER_TOKENS; t++)
                    total[t] = add_products(total[t], row, broadcast(weights[r * BLOCK + t0 + t]));
            }
            for (int t = 0; t < OUTER_TOKENS; t++)
                if (dx)
                    store(dx + (t0 + t) * size + k, total[t], Whole{});
                else
                    store(out + (t0 + t) * CHUNK + k, total[t], Whole{});
        }
}

template <int ROWS>
INLINE void add_outer_tile(const float* weights, const float* values, int64_t length,
                           float* dphi) {
    for (int64_t k = 0; k < length; k += LANES) {
        Vec total[ROWS];
        for (int r = 0; r < ROWS; r++) total[r] = load(dphi + r * CHUNK + k, Whole{});
        for (int t = 0; t < BLOCK; t++) {
            const Vec v = load(values + t * CHUNK + k, Whole{});
            for (int r = 0; r < ROWS; r++) total[r] += weights[r * BLOCK + t] * v;
        }
        for (int r = 0; r < ROWS; r++) store(dphi + r * CHUNK + k, total[r], Whole{});
    }
}

// dphi [row][CHUNK] += weights [rows, BLOCK] values [BLOCK][CHUNK].
INLINE void add_outer(const float* weights, const float* values, int64_t length, float* dphi,
                      int rows) {
    int r = 0;
    for (; r + OUTER_ROWS <= rows; r += OUTER_ROWS)
        add_outer_tile<OUTER_ROWS>(weights + r * BLOCK, values, length, dphi + r * CHUNK);
    for (; r < rows; r++)
        add_outer_tile<1>(weights + r * BLOCK, values, length, dphi + r * CHUNK);
}

// What a thread needs for a block's gradients: of the streams, and the share of phi's.
template <class X>
struct GradientScratch {
    using Entry = RowEntry<X>;

    int rows;
    std::vector<float> weights;  // [rows, BLOCK], and zeros to an even number of rows
    std::vector<float> values;   // [BLOCK][CHUNK] of the streams
    std::vector<float> out;      // [stream][BLOCK][CHUNK] of their gradients
    std::vector<Entry> rounded_weights;

    GradientScratch(int rows, int streams)
        : rows(rows),
          weights((size_t)(rows + 1) * BLOCK),
          values(BLOCK * CHUNK),
          out((size_t)streams * BLOCK * CHUNK),
          rounded_weights(weights.size()) {}

    // To be called when the weights of a block are there.
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

    // dx [tokens, size] = out of one stream + weights^T phi - shares values, dphi += weights
    // values, in one chunk of `length` channels; phi is [chunk][entry][CHUNK].
    void multiply(const std::vector<Entry>& phi, int64_t chunk, int stream, int64_t length,
                  const float* shares, X* dx, int64_t size, int tokens, float* dphi) {
        const int entries = row_entries<Entry>(rows);
        const int64_t padded = (length + LANES - 1) / LANES * LANES;
        const bool whole = tokens == BLOCK && padded == length;
        float* own = &out[stream * BLOCK * CHUNK];
        add_rows(weighed(), &phi[chunk * entries * CHUNK], entries, shares, values.data(), padded,
                 own, whole ? dx : nullptr, size);
        if (!whole) put(own, tokens, length, dx, size);
        add_outer(weights.data(), values.data(), padded, dphi + chunk * rows * CHUNK, rows);
    }

    // values [BLOCK][CHUNK] into dx [tokens, size], `length` channels.
    INLINE static void put(const float* values, int tokens, int64_t length, X* dx, int64_t size) {
        for (int t = 0; t < tokens; t++)
            for_channels(0, length, [&](int64_t k, auto width) {
                store(dx + t * size + k, load(values + t * CHUNK + k, width), width);
            });
    }
};

// weights [rows, BLOCK] = grad / rms; shares [BLOCK] = what the norm takes back of every value.
INLINE void norm_backward(int rows, int tokens, int64_t size, const float* projected,
                          const float* inverse_rms, float* weights, float* shares) {
    for (int t = 0; t < BLOCK; t++) {
        const float inverse = t < tokens ? inverse_rms[t] : 0;
        float total = 0;
        for (int r = 0; r < rows; r++) {
            if (t < tokens) total += weights[r * BLOCK + t] * projected[t * rows + r];
            weights[r * BLOCK + t] = t < tokens ? weights[r * BLOCK + t] * inverse : 0;
        }
        shares[t] = total * inverse * inverse / size;
    }
}

// Slices of tokens whose gradients of phi are summed apart and then in order: as many as the
// tokens ask for, whatever the number of threads, so that every run rounds alike.
inline int slices(int64_t tokens) {
    const int64_t wanted = (tokens + 127) / 128;
    return (int)std::max<int64_t>(1, std::min<int64_t>(wanted, 32));
}

inline int64_t slice_length(int64_t tokens) {
    const int count = slices(tokens);
    const int64_t blocks = (tokens + BLOCK - 1) / BLOCK;
    return (blocks + count - 1) / count * BLOCK;
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
