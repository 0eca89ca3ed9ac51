// sinkhorn, forward and backward; the backward recomputes the iterates.

#include <algorithm>

#include "calls.h"
#include "coefficients.h"
#include "signatures.h"

namespace {

template <class N>
void sinkhorn(const float* logits, float* res, int64_t tokens, N n, Sinkhorn settings,
              int threads) {
    const int64_t groups = (tokens + LANES - 1) / LANES;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t group = 0; group < groups; group++) {
        const int count = (int)std::min<int64_t>(LANES, tokens - group * LANES);
        const int64_t at = group * LANES * n * n;
        Vec matrix[limit<N> * limit<N>];
        gather_matrix(n, logits + at, count, false, matrix);
        sinkhorn_forward(n, settings, matrix, matrix, nullptr);
        scatter_matrix(n, res + at, count, settings.transposed, matrix);
    }
}

template <class N>
void sinkhorn_backward(const float* grad, const float* logits, float* dlogits, int64_t tokens, N n,
                       Sinkhorn settings, int threads) {
    const int64_t groups = (tokens + LANES - 1) / LANES;
    TeamRoom room;
#pragma omp parallel num_threads(threads)
    {
        auto iterates = room.make([&] { return Room<Vec>(iterates_size(n, settings)); });
#pragma omp barrier
        if (room.complete()) {
#pragma omp for schedule(static)
            for (int64_t group = 0; group < groups; group++) {
                const int count = (int)std::min<int64_t>(LANES, tokens - group * LANES);
                const int64_t at = group * LANES * n * n;
                Vec own[limit<N> * limit<N>], matrix[limit<N> * limit<N>];
                gather_matrix(n, logits + at, count, false, own);
                sinkhorn_forward(n, settings, own, matrix, iterates->data());
                gather_matrix(n, grad + at, count, settings.transposed, matrix);
                sinkhorn_backward(n, settings, iterates->data(), matrix);
                scatter_matrix(n, dlogits + at, count, false, matrix);
            }
        }
    }
    room.require();
}

}  // namespace

extern "C" {

int mhc_sinkhorn(const float* logits, float* res, int64_t tokens, int64_t n, int64_t iterations,
                 int64_t transposed, float eps, int64_t threads) {
    return status_of([&] {
        check_sizes(tokens, n, n, threads);
        const Sinkhorn settings = sinkhorn_of(iterations, transposed, eps);
        with_streams(n, [&](auto n) { sinkhorn(logits, res, tokens, n, settings, threads); });
    });
}

int mhc_sinkhorn_backward(const float* grad, const float* logits, float* dlogits, int64_t tokens,
                          int64_t n, int64_t iterations, int64_t transposed, float eps,
                          int64_t threads) {
    return status_of([&] {
        check_sizes(tokens, n, n, threads);
        const Sinkhorn settings = sinkhorn_of(iterations, transposed, eps);
        with_streams(n, [&](auto n) {
            sinkhorn_backward(grad, logits, dlogits, tokens, n, settings, threads);
        });
    });
}
}

EXPORT(mhc_sinkhorn);
EXPORT(mhc_sinkhorn_backward);
