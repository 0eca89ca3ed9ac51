// Reads, writes and inner products of one token's streams, shared by the operators.
#pragma once

#include <algorithm>

#include "vector.h"

// u = sum_i pre[i] x[i], one vector of channels.
template <class N>
INLINE Vec read_vector(N n, const Vec* x, const float* pre) {
    Vec total{};
    for (int i = 0; i < n; i++) total += pre[i] * x[i];
    return total;
}

template <class X, class N>
INLINE void read_token(N n, int64_t C, const X* x, const float* pre, X* u) {
    for_channels(0, C, [&](int64_t c, auto width) {
        Vec stream[limit<N>];
        for (int i = 0; i < n; i++) stream[i] = load(x + i * C + c, width);
        store(u + c, read_vector(n, stream, pre), width);
    });
}

// put(o, x'[o]) of x'[o] = sum_i res[o][i] x[i] + post[o] y, one vector of channels. A sum that
// starts from zero leaves the compiler one way to fuse products and sums, so that all callers get
// the same bits.
template <class N, class Put>
INLINE void write_vector(N n, const Vec* x, Vec y, const float* post, const float* res, Put put) {
    for (int o = 0; o < n; o++) {
        Vec total{};
        total += post[o] * y;  // post[o] y
        // sum_i res[o][i] x[i]
        for (int i = 0; i < n; i++) total += res[o * n + i] * x[i];
        put(o, total);
    }
}

// Rows of inner products, with every stream and y, whose sums fit into registers at once.
template <class N>
constexpr int DOT_ROWS = std::max(1, std::min(limit<N>, REGISTERS * 3 / 4 / (limit<N> + 1)));

constexpr int64_t DOT_CHUNK = 512;

// sums[o][i] += <a[o], x[i]> and sums[o][n] += <a[o], y> over the channels [from, to), OUT rows.
template <int OUT, class X, class Y, class N>
INLINE void dot_tile(N n, int64_t C, const X* a, const X* x, const Y* y, int64_t from, int64_t to,
                     Vec* sums) {
    using F = Factors<X, Y>;
    Vec total[OUT][limit<N> + 1];
    for (int o = 0; o < OUT; o++)
        for (int i = 0; i <= n; i++) total[o][i] = sums[o * (n + 1) + i];
    for_channels<F::STEP>(from, to, [&](int64_t c, auto width) {
        decltype(F::load(a, width)) own[OUT];
        for (int o = 0; o < OUT; o++) {
            own[o] = F::load(a + o * C + c, width);
            prefetch(a + (n + o) * C + c);
        }
        for (int i = 0; i < n; i++) {
            const auto stream = F::load(x + i * C + c, width);
            prefetch(x + (n + i) * C + c);
            // <a[o], x[i]>
            for (int o = 0; o < OUT; o++) total[o][i] = add_products(total[o][i], own[o], stream);
        }
        const auto branch = F::load(y + c, width);
        prefetch(y + C + c);
        // <a[o], y>
        for (int o = 0; o < OUT; o++) total[o][n] = add_products(total[o][n], own[o], branch);
    });
    for (int o = 0; o < OUT; o++)
        for (int i = 0; i <= n; i++) sums[o * (n + 1) + i] = total[o][i];
}

// dots[o][i] = <a[o], x[i]> and dots[o][n] = <a[o], y>, every row n + 1 long. between(from, to) is
// called before the channels [from, to), which then are in cache.
template <class X, class Y, class N, class Between>
INLINE void dot_all(N n, int64_t C, const X* a, const X* x, const Y* y, float* dots,
                    Between between) {
    constexpr int ROWS = DOT_ROWS<N>;
    static_assert(limit<N> % ROWS == 0 && (limit<N> < MAX_STREAMS || ROWS == 1));
    Vec sums[limit<N> * (limit<N> + 1)] = {};
    for (int64_t from = 0; from < C; from += DOT_CHUNK) {
        const int64_t to = std::min(from + DOT_CHUNK, C);
        between(from, to);
        for (int o = 0; o < n; o += ROWS)
            dot_tile<ROWS>(n, C, a + o * C, x, y, from, to, sums + o * (n + 1));
    }
    for (int k = 0; k < n * (n + 1); k++) dots[k] = sum(sums[k]);
}

// dots[i] = <g, x[i]>.
template <class X, class N>
INLINE void dot_streams(N n, int64_t C, const X* g, const X* x, float* dots) {
    using F = Factors<X>;
    Vec sums[limit<N>] = {};
    for_channels<F::STEP>(0, C, [&](int64_t c, auto width) {
        const auto own = F::load(g + c, width);
        prefetch(g + C + c);
        for (int i = 0; i < n; i++) {
            prefetch(x + (n + i) * C + c);
            sums[i] = add_products(sums[i], own, F::load(x + i * C + c, width));
        }
    });
    for (int i = 0; i < n; i++) dots[i] = sum(sums[i]);
}
