// The RMS norm of a sublayer's input, one token.
#pragma once

#include "streams.h"

// u / sqrt(mean(u^2) + eps) * weight, in place.
template <class X>
INLINE void normalise(int64_t C, X* u, const float* weight, float eps) {
    Vec squares{};
    for_channels(0, C, [&](int64_t c, auto width) {
        const Vec v = load(u + c, width);
        squares += v * v;
    });
    const float inverse = 1.0f / std::sqrt(sum(squares) / C + eps);
    for_channels(0, C, [&](int64_t c, auto width) {
        store(u + c, load(u + c, width) * inverse * load(weight + c, width), width);
    });
}

// The gradient of u from that of the norm: du [C], and dweight [C] += its own. u is read once more
// from the streams; `own` [C] is room for it.
template <class X, class N>
NOINLINE void normalise_backward(N n, int64_t C, const X* x, const float* pre, const X* grad,
                               const float* weight, float eps, float* own, X* du, float* dweight) {
    Vec squares{}, products{};
    for_channels(0, C, [&](int64_t c, auto width) {
        Vec stream[limit<N>];
        for (int i = 0; i < n; i++) stream[i] = load(x + i * C + c, width);
        const Vec u = held(x, read_vector(n, stream, pre));
        store(own + c, u, width);
        squares += u * u;
        products += u * load(grad + c, width) * load(weight + c, width);
    });
    const float inverse = 1.0f / std::sqrt(sum(squares) / C + eps);
    const float share = sum(products) / C * inverse * inverse;
    for_channels(0, C, [&](int64_t c, auto width) {
        const Vec u = load(own + c, width), g = load(grad + c, width);
        store(du + c, inverse * (g * load(weight + c, width) - share * u), width);
        store(dweight + c, load(dweight + c, width) + g * u * inverse, width);
    });
}
