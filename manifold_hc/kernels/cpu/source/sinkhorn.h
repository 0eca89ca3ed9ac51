// Sinkhorn-Knopp on LANES matrices at once, one in every lane, and its exact derivative.
//
// Iterates are kept after every division: M_1 (first axis), M_2 (second axis), ... In terms of the
// gradient G with respect to the logarithm of an iterate, a division by the sums of an axis has the
// derivative G <- G - M sum(G), M being the iterate after it. No step of it divides.
#pragma once

#include "vector.h"

// Below this sum, float loses terms of it.
constexpr float FAINT = 1e-25f;

struct Sinkhorn {
    int iterations;
    bool transposed;  // DeepSeek-V4: logits are comb[source][target], rows first, epsilons
    float eps;
};

// Number of vectors that sinkhorn_forward writes as iterates.
inline size_t iterates_size(int n, const Sinkhorn& settings) {
    return (size_t)(2 * settings.iterations + 1) * n * n;
}

// One lane in float64 logarithms, for a matrix whose rows or columns underflow in float.
inline void sinkhorn_lane(int n, int iterations, Vec* matrix, Vec* iterates, int lane,
                          const Vec* logits) {
    double m[MAX_STREAMS * MAX_STREAMS];
    for (int k = 0; k < n * n; k++) m[k] = logits[k][lane];
    for (int step = 0; step < 2 * iterations; step++) {
        // Columns (entries i, i + n, ...) at even steps, rows at odd ones.
        const int stride = step % 2 ? 1 : n, next = step % 2 ? n : 1;
        for (int line = 0; line < n; line++) {
            double* first = m + line * next;
            double most = first[0], total = 0;
            for (int k = 1; k < n; k++) most = std::fmax(most, first[k * stride]);
            for (int k = 0; k < n; k++) total += std::exp(first[k * stride] - most);
            // log m -= log sum exp(log m)
            const double log_sum = most + std::log(total);
            for (int k = 0; k < n; k++) first[k * stride] -= log_sum;
        }
        if (iterates)
            for (int k = 0; k < n * n; k++) iterates[step * n * n + k][lane] = std::exp(m[k]);
    }
    for (int k = 0; k < n * n; k++) matrix[k][lane] = std::exp(m[k]);
}

// Divides every line of one axis by its sum (+ eps); returns the smallest sum. A product with the
// inverse is faster and shares its rounding between the entries of a line; the last division has
// none to share, so that the sums of `res` are 1 up to the rounding of single entries.
template <class N>
INLINE Vec normalise(N n, Vec* m, int stride, int next, float eps, bool last = false) {
    Vec least = broadcast(INFINITY);
    for (int line = 0; line < n; line++) {
        Vec total = m[line * next];
        for (int k = 1; k < n; k++) total += m[line * next + k * stride];
        least = smaller(least, total);
        const Vec inverse = 1.0f / (total + eps);
        for (int k = 0; k < n; k++) {
            Vec& entry = m[line * next + k * stride];
            entry = last ? entry / (total + eps) : entry * inverse;
        }
    }
    return least;
}

// logits [n*n] -> matrix [n*n], in the logits' own orientation; both may be the same, and
// `iterates` null.
template <class N>
NOINLINE void sinkhorn_forward(N n, const Sinkhorn& settings, const Vec* logits, Vec* matrix,
                             Vec* iterates) {
    Vec m[limit<N> * limit<N>];
    // The axis that is normalised first: columns in the paper, rows in DeepSeek-V4.
    const int stride = settings.transposed ? 1 : (int)n, next = settings.transposed ? (int)n : 1;
    for (int line = 0; line < n; line++) {
        const Vec* own = logits + line * next;
        Vec most = own[0];
        for (int k = 1; k < n; k++) most = larger(most, own[k * stride]);
        for (int k = 0; k < n; k++) m[line * next + k * stride] = exponential(own[k * stride] - most);
    }
    // M_0 = exp(logits - largest of the line)
    Vec least = broadcast(INFINITY);
    auto keep = [&](int step) {
        if (iterates)
            for (int k = 0; k < n * n; k++) iterates[step * n * n + k] = m[k];
    };
    for (int iteration = 0; iteration < settings.iterations; iteration++) {
        const bool softmax = settings.transposed && iteration == 0;
        least = smaller(least, normalise(n, m, stride, next, softmax ? 0.0f : settings.eps));
        keep(2 * iteration);
        if (softmax)  // DeepSeek-V4: comb = softmax + eps
            for (int k = 0; k < n * n; k++) m[k] += settings.eps;
        const bool last = iteration + 1 == settings.iterations;
        least = smaller(least, normalise(n, m, next, stride, settings.eps, last));
        keep(2 * iteration + 1);
    }
    for (int lane = 0; lane < LANES && !settings.transposed; lane++)
        if (least[lane] < FAINT) sinkhorn_lane(n, settings.iterations, m, iterates, lane, logits);
    for (int k = 0; k < n * n; k++) matrix[k] = m[k];
}

// Reverse sweep: grad is the gradient of the matrix, replaced by that of the logits.
template <class N>
NOINLINE void sinkhorn_backward(N n, const Sinkhorn& settings, const Vec* iterates, Vec* grad) {
    Vec g[limit<N> * limit<N>];
    const int stride = settings.transposed ? 1 : (int)n, next = settings.transposed ? (int)n : 1;
    const int last = 2 * settings.iterations - 1;
    // G = dM * M, the gradient of log M
    for (int k = 0; k < n * n; k++) g[k] = grad[k] * iterates[last * n * n + k];
    // G <- G - M sum(G) over the axis that made M sum to 1
    auto undo = [&](const Vec* m, int along, int across) {
        for (int line = 0; line < n; line++) {
            Vec total = g[line * across];
            for (int k = 1; k < n; k++) total += g[line * across + k * along];
            for (int k = 0; k < n; k++) {
                const int entry = line * across + k * along;
                g[entry] -= m[entry] * total;
            }
        }
    };
    // From the last division to the first.
    for (int step = last; step >= 0; step--) {
        const Vec* m = iterates + step * n * n;
        if (step == 0 && settings.transposed)
            // The first rows are a softmax S; the next step divides S + eps: G *= S / (S + eps).
            for (int k = 0; k < n * n; k++) g[k] *= m[k] / (m[k] + settings.eps);
        if (step % 2)
            undo(m, next, stride);
        else
            undo(m, stride, next);
    }
    for (int k = 0; k < n * n; k++) grad[k] = g[k];
}
