// coefficients_and_read: projections, gates and Sinkhorn, and the read they are made for.

#include "coefficients.h"
#include "projection.h"
#include "streams.h"

namespace {

// The three gates, each over its rows: pre, post, res.
INLINE float gate(const float* alpha, int row, int n) {
    return alpha[row < n ? 0 : row < 2 * n ? 1 : 2];
}

template <class X, class N>
void coefficients_and_read(const X* x, const float* phi, const float* alpha, const float* bias,
                           X* u, float* pre, float* post, float* res, float* projected,
                           float* inverse_rms, int64_t tokens, N n, int64_t C, int rows,
                           Settings settings, int threads) {
    const int64_t blocks = (tokens + BLOCK - 1) / BLOCK, size = n * C;
    const bool transposed = settings.sinkhorn.transposed;
    const Chunks chunks(n, C);
    std::vector<float> packed(chunks.floats(rows));
#pragma omp parallel num_threads(threads)
    {
        ProjectionScratch scratch(rows);
        pack(phi, rows, chunks, packed.data());
#pragma omp for schedule(static)
        for (int64_t block = 0; block < blocks; block++) {
            const int64_t first = block * BLOCK, end = std::min(first + BLOCK, tokens);
            project_block(x + first * size, (int)(end - first), chunks, size, packed.data(), rows,
                          settings.norm_eps, projected + first * rows, inverse_rms + first,
                          scratch);
            for (int64_t t = first; t < end; t += LANES) {
                const int count = (int)std::min<int64_t>(LANES, end - t);
                auto logit = [&](int row) {
                    return gather(projected + t * rows + row, rows, count) * gate(alpha, row, n) +
                           bias[row];
                };
                for (int i = 0; i < n; i++) {
                    scatter(pre + t * n + i, n, count, sigmoid(logit(i)) + settings.hc_eps);
                    scatter(post + t * n + i, n, count, 2.0f * sigmoid(logit(n + i)));
                }
                Vec matrix[limit<N> * limit<N>];
                for (int k = 0; k < n * n; k++)
                    matrix[k] = settings.constraint == IDENTITY
                                    ? broadcast(k % (n + 1) ? 0.0f : 1.0f)
                                    : logit(2 * n + k);
                if (settings.constraint == SINKHORN)
                    sinkhorn_forward(n, settings.sinkhorn, matrix, matrix, nullptr);
                scatter_matrix(n, res + t * n * n, count, transposed, matrix);
            }
            for (int64_t t = first; t < end; t++)
                read_token(n, C, x + t * size, pre + t * n, u + t * C);
        }
    }
}

}  // namespace

extern "C" {

void mhc_coefficients_and_read(const void* x, const float* phi, const float* alpha,
                               const float* bias, void* u, float* pre, float* post, float* res,
                               float* projected, float* inverse_rms, int64_t tokens, int64_t n,
                               int64_t C, int64_t rows, int64_t constraint, int64_t iterations, int64_t transposed,
                               float norm_eps, float hc_eps, int64_t is_bfloat16, int64_t threads) {
    const Settings settings =
        settings_of(constraint, iterations, transposed, norm_eps, hc_eps);
    with_dtype(is_bfloat16, [&](auto* type) {
        using X = std::remove_pointer_t<decltype(type)>;
        with_streams(n, [&](auto n) {
            coefficients_and_read((const X*)x, phi, alpha, bias, (X*)u, pre, post, res, projected,
                                  inverse_rms, tokens, n, C, rows, settings, threads);
        });
    });
}
}
