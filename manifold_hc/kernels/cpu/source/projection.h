// Blocks of tokens times phi, with phi's chunks held in the nearest cache.
//
// Rows of phi and of the streams often lie a multiple of 4096 bytes apart, where they evict one
// another from that cache. So the loops work on copies: phi, and the sums of its gradient, as
// [chunk][row][CHUNK], a block of tokens as [token][CHUNK]. A chunk lies within one stream, and
// zeros fill its last vector, so that the loops below take whole vectors only.
#pragma once

#include <algorithm>

#include "calls.h"
#include "vector.h"

constexpr int BLOCK = 16;   // tokens that a thread takes at a time
constexpr int CHUNK = 256;  // values of a token that are worked on together

// Registers: TOKENS x ROWS sums, TOKENS values and one row of phi.
constexpr int TILE_TOKENS = 4;
constexpr int TILE_ROWS = REGISTERS == 32 ? 6 : 2;

// The nC values of a token in chunks; every stream has chunks of its own.
struct Chunks {
    int64_t C;
    int64_t per_stream;
    int64_t count;
    Chunks(int64_t n, int64_t C) : C(C), per_stream((C + CHUNK - 1) / CHUNK), count(n * per_stream) {}
    // Chunks in the order of channels: the first of every stream, the second of every stream, ...;
    // past the last one, from the start again.
    int64_t across(int64_t turn) const {
        const int64_t streams = count / per_stream;
        return turn % streams * per_stream + turn % count / streams;
    }
    int64_t from(int64_t chunk) const { return chunk / per_stream * C + within(chunk); }
    int64_t within(int64_t chunk) const { return chunk % per_stream * CHUNK; }
    int64_t length(int64_t chunk) const { return std::min<int64_t>(CHUNK, C - within(chunk)); }
    int64_t padded(int64_t chunk) const { return (length(chunk) + LANES - 1) / LANES * LANES; }
    int64_t size() const { return count / per_stream * C; }
    int64_t floats(int rows) const { return count * rows * CHUNK; }
};

// phi [rows, nC] as [chunk][row][CHUNK], into zeros; all threads of a team share the work.
inline void pack(const float* phi, int rows, const Chunks& chunks, float* packed) {
#pragma omp for schedule(static)
    for (int64_t chunk = 0; chunk < chunks.count; chunk++)
        for (int r = 0; r < rows; r++)
            std::memcpy(packed + (chunk * rows + r) * CHUNK,
                        phi + r * chunks.size() + chunks.from(chunk),
                        chunks.length(chunk) * sizeof(float));
}

// values [CHUNK] = a piece of a token in float; squares += its squares, unless null. Prefetches the
// values `ahead`.
template <class X>
INLINE void take(const X* piece, int64_t length, int64_t ahead, float* values, Vec* squares) {
    Vec total = squares ? *squares : Vec{};
    for_channels(0, length, [&](int64_t k, auto width) {
        prefetch(piece + k + ahead);
        const Vec v = load(piece + k, width);
        store(values + k, v, Whole{});
        if (squares) total += v * v;
    });
    if (squares) *squares = total;
}

// Memory of one thread for the projection of a block of tokens.
struct ProjectionScratch {
    Room<Vec> sums;      // [BLOCK, rows]
    Room<float> values;  // [TILE_TOKENS][CHUNK] of the streams
    explicit ProjectionScratch(int rows)
        : sums((size_t)BLOCK * rows), values(TILE_TOKENS * CHUNK) {}
};

// sums[t][r] += values[t] * phi[r], lane by lane.
template <int ROWS>
INLINE void multiply_tile(const float* values, const float* phi, int64_t length, Vec* sums,
                          int rows) {
    Vec total[TILE_TOKENS][ROWS];
    for (int t = 0; t < TILE_TOKENS; t++)
        for (int r = 0; r < ROWS; r++) total[t][r] = sums[t * rows + r];
    for (int64_t k = 0; k < length; k += LANES) {
        Vec v[TILE_TOKENS];
        for (int t = 0; t < TILE_TOKENS; t++) v[t] = load(values + t * CHUNK + k, Whole{});
        for (int r = 0; r < ROWS; r++) {
            const Vec row = in_register(load(phi + r * CHUNK + k, Whole{}));
            // <v, phi[r]>, one partial sum a lane
            for (int t = 0; t < TILE_TOKENS; t++) total[t][r] += v[t] * row;
        }
    }
    for (int t = 0; t < TILE_TOKENS; t++)
        for (int r = 0; r < ROWS; r++) sums[t * rows + r] = total[t][r];
}

// Scale of the values of a token whose sum of squares overflows float.
constexpr float HUGE_SCALE = 0x1p-80f;

// projected [rows] and inverse_rms of such a token, summed in the order of project_block.
template <class X>
NOINLINE void project_huge(const X* x, const Chunks& chunks, const float* phi, int rows, float eps,
                         float* projected, float* inverse_rms) {
    auto scaled = [&](int64_t chunk, int64_t k, auto width) {
        return load(x + chunks.from(chunk) + k, width) * HUGE_SCALE;
    };
    Vec squares{};
    for (int64_t turn = 0; turn < chunks.count; turn++) {
        const int64_t chunk = chunks.across(turn);
        for_channels(0, chunks.length(chunk), [&](int64_t k, auto width) {
            const Vec v = scaled(chunk, k, width);
            squares += v * v;
        });
    }
    const double own_eps = (double)HUGE_SCALE * HUGE_SCALE * eps;
    const float inverse = 1.0f / std::sqrt(sum(squares) / chunks.size() + (float)own_eps);
    for (int r = 0; r < rows; r++) {
        Vec total{};
        for (int64_t turn = 0; turn < chunks.count; turn++) {
            const int64_t chunk = chunks.across(turn);
            const float* own = phi + (chunk * rows + r) * CHUNK;
            for_channels(0, chunks.length(chunk), [&](int64_t k, auto width) {
                total += scaled(chunk, k, width) * load(own + k, width);
            });
        }
        projected[r] = sum(total) * inverse;
    }
    *inverse_rms = inverse * HUGE_SCALE;
}

// projected [tokens, rows] = x phi^T / rms, inverse_rms [tokens] = 1 / sqrt(mean(x^2) + eps); phi
// packed. prepare(from, to) is called before the channels [from, to) of the streams are read.
template <class X, class Prepare>
void project_block(const X* x, int tokens, const Chunks& chunks, const float* phi, int rows,
                   float eps, float* projected, float* inverse_rms, ProjectionScratch& scratch,
                   Prepare prepare) {
    const int64_t size = chunks.size();
    std::fill(scratch.sums.begin(), scratch.sums.end(), Vec{});
    Vec squares[BLOCK] = {};
    float* values = scratch.values.data();
    for (int64_t turn = 0; turn < chunks.count; turn++) {
        const int64_t chunk = chunks.across(turn), length = chunks.padded(chunk);
        const int64_t from = chunks.from(chunk);
        const int64_t ahead = chunks.from(chunks.across(turn + 1)) - from;
        const float* own = phi + chunk * rows * CHUNK;
        if (chunk < chunks.per_stream)
            prepare(chunks.within(chunk), chunks.within(chunk) + chunks.length(chunk));
        // A few tokens at a time, so that prefetched values arrive while others are multiplied;
        // tokens past the block's end repeat the last one.
        for (int first = 0; first < BLOCK; first += TILE_TOKENS) {
            for (int t = 0; t < TILE_TOKENS; t++)
                take(x + std::min(first + t, tokens - 1) * size + from, chunks.length(chunk), ahead,
                     values + t * CHUNK, &squares[first + t]);
            Vec* sums = &scratch.sums[first * rows];
            int r = 0;
            for (; r + TILE_ROWS <= rows; r += TILE_ROWS)
                multiply_tile<TILE_ROWS>(values, own + r * CHUNK, length, sums + r, rows);
            for (; r < rows; r++)
                multiply_tile<1>(values, own + r * CHUNK, length, sums + r, rows);
        }
    }
    for (int t = 0; t < tokens; t++) {
        const float total = sum(squares[t]);
        if (total == INFINITY) {
            project_huge(x + t * size, chunks, phi, rows, eps, projected + t * rows,
                         inverse_rms + t);
            continue;
        }
        // 1 / rms, and the division of the products by rms after the sum
        inverse_rms[t] = 1.0f / std::sqrt(total / size + eps);
        for (int r = 0; r < rows; r++)
            projected[t * rows + r] = sum(scratch.sums[t * rows + r]) * inverse_rms[t];
    }
}
