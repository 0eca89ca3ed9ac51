// RMS norm of a sublayer's input, one token.
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

// Gradients of out = u r weight with r = 1 / rms(u), from grad = dout [C]:
//   du = r (dout weight - u r^2 <u, dout weight> / C)      dweight += dout u r
// u is read again from the streams, into `own` [C].
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
        // <u, dout weight>
        products += u * load(grad + c, width) * load(weight + c, width);
    });
    const float inverse = 1.0f / std::sqrt(sum(squares) / C + eps);
    // Rank-one correction: the factor of u.
    const float share = sum(products) / C * inverse * inverse;
    for_channels(0, C, [&](int64_t c, auto width) {
        const Vec u = load(own + c, width), g = load(grad + c, width);
        store(du + c, inverse * (g * load(weight + c, width) - share * u), width);
        // dweight += dout u r
        store(dweight + c, load(dweight + c, width) + g * u * inverse, width);
    });
}
