// Settings, and coefficients of up to LANES tokens in vectors, one token a lane.
#pragma once

#include "calls.h"
#include "sinkhorn.h"
#include "vector.h"

enum Constraint { SINKHORN = 0, IDENTITY = 1, NONE = 2 };

struct Settings {
    int constraint;
    Sinkhorn sinkhorn;
    float norm_eps;
    float hc_eps;
};

inline Sinkhorn sinkhorn_of(int64_t iterations, int64_t transposed, float eps) {
    check_range(iterations, 1, MAX_ITERATIONS);
    return {(int)iterations, (bool)transposed, eps};
}

inline Settings settings_of(int64_t constraint, int64_t iterations, int64_t transposed,
                            float norm_eps, float hc_eps) {
    check_range(constraint, SINKHORN, NONE);
    return {(int)constraint, sinkhorn_of(iterations, transposed, hc_eps), norm_eps, hc_eps};
}

// Rows of phi: pre (n), post (n), and the logits of res (n*n, or none for the identity).
inline void check_rows(int64_t rows, int64_t n, int64_t constraint) {
    const int64_t wanted = 2 * n + (constraint == IDENTITY ? 0 : n * n);
    check_range(rows, wanted, wanted);
}

// Index in alpha of a row's gate: pre, post, res.
INLINE int group(int row, int n) { return row < n ? 0 : row < 2 * n ? 1 : 2; }

// LANES numbers at distance `stride` as one vector; 0 past `count`.
INLINE Vec gather(const float* p, int64_t stride, int count) {
    Vec v{};
    for (int lane = 0; lane < count; lane++) v[lane] = p[lane * stride];
    return v;
}

INLINE void scatter(float* p, int64_t stride, int count, Vec v) {
    for (int lane = 0; lane < count; lane++) p[lane * stride] = v[lane];
}

// Entry k of the logits' matrix is entry turned(k) of res[o][i].
INLINE int turned(int k, int n, bool transposed) { return transposed ? k % n * n + k / n : k; }

template <class N>
INLINE void gather_matrix(N n, const float* p, int count, bool transposed, Vec* matrix) {
    for (int k = 0; k < n * n; k++)
        matrix[k] = gather(p + turned(k, n, transposed), n * n, count);
}

template <class N>
INLINE void scatter_matrix(N n, float* p, int count, bool transposed, const Vec* matrix) {
    for (int k = 0; k < n * n; k++)
        scatter(p + turned(k, n, transposed), n * n, count, matrix[k]);
}

// Logit alpha p + bias of a row, p being the projections of up to LANES tokens.
INLINE Vec logit(int row, int n, int rows, int count, const float* projected, const float* alpha,
                 const float* bias) {
    return gather(projected + row, rows, count) * alpha[group(row, n)] + bias[row];
}

// pre[i] = sigmoid(logit) + hc_eps.
INLINE void gate_reads(int n, int rows, int count, const float* projected, const float* alpha,
                       const float* bias, float hc_eps, float* pre) {
    for (int i = 0; i < n; i++)
        scatter(pre + i, n, count,
                sigmoid(logit(i, n, rows, count, projected, alpha, bias)) + hc_eps);
}
