// What is done to the streams of one token in more than one operator.
#pragma once

#include "vector.h"

// u = sum_i pre[i] x[i].
template <class X, class N>
INLINE void read_token(N n, int64_t C, const X* x, const float* pre, X* u) {
    for_channels(0, C, [&](int64_t c, auto width) {
        Vec total{};
        for (int i = 0; i < n; i++) total += pre[i] * load(x + i * C + c, width);
        store(u + c, total, width);
    });
}

// dots[i] = <g, x[i]>.
template <class X, class N>
INLINE void dot_streams(N n, int64_t C, const X* g, const X* x, float* dots) {
    using F = Factors<X>;
    Vec sums[limit<N>] = {};
    for_channels<F::STEP>(0, C, [&](int64_t c, auto width) {
        const auto own = F::load(g + c, width);
        expect(g + C + c);
        for (int i = 0; i < n; i++) {
            expect(x + (n + i) * C + c);
            sums[i] = add_products(sums[i], own, F::load(x + i * C + c, width));
        }
    });
    for (int i = 0; i < n; i++) dots[i] = sum(sums[i]);
}
