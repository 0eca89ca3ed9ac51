// The backward of coefficients_and_read, with what the write after it passes on.

#include "coefficients.h"
#include "gradient.h"
#include "streams.h"

namespace {

// Everything that reaches the coefficients and the streams of one block of tokens.
template <class X>
struct Gradients {
    const X* u;
    const float *pre, *post, *res;
    const X* link;
};

// What a slice of tokens sums up besides phi's gradient.
struct SliceSums {
    Vec alpha[3] = {};
    std::vector<Vec> bias;
    explicit SliceSums(int rows) : bias(rows) {}
};

// Gradients of the projections of up to LANES tokens, into weights [rows, BLOCK]; pre [BLOCK, n]
// holds the gradient of the read on entry, and the coefficients themselves afterwards.
template <class N>
INLINE void coefficients_backward(N n, int rows, int count, const float* projected,
                                  const float* alpha, const float* bias, const float* dpre,
                                  const float* dpost, const float* dres, const Settings& settings,
                                  float* pre, float* weights, Vec* iterates, SliceSums& sums) {
    auto take = [&](int row, Vec dlogit, Vec p) {
        const int group = row < n ? 0 : row < 2 * n ? 1 : 2;
        sums.alpha[group] += dlogit * p;
        sums.bias[row] += dlogit;
        store(weights + row * BLOCK, dlogit * alpha[group], Whole{});
    };
    auto projection = [&](int row) { return gather(projected + row, rows, count); };
    for (int i = 0; i < n; i++) {
        const Vec p = projection(i), s = sigmoid(p * alpha[0] + bias[i]);
        Vec d = gather(pre + i, n, count);
        if (dpre) d += gather(dpre + i, n, count);
        take(i, d * s * (1.0f - s), p);
        scatter(pre + i, n, count, s + settings.hc_eps);
    }
    for (int i = 0; i < n; i++) {
        const Vec p = projection(n + i), s = sigmoid(p * alpha[1] + bias[n + i]);
        take(n + i, dpost ? 2.0f * gather(dpost + i, n, count) * s * (1.0f - s) : Vec{}, p);
    }
    if (settings.constraint == IDENTITY) return;
    Vec p[limit<N> * limit<N>], matrix[limit<N> * limit<N>];
    for (int k = 0; k < n * n; k++) {
        p[k] = projection(2 * n + k);
        matrix[k] = p[k] * alpha[2] + bias[2 * n + k];
    }
    if (dres && settings.constraint == SINKHORN)
        sinkhorn_forward(n, settings.sinkhorn, matrix, matrix, iterates);
    if (dres)
        gather_matrix(n, dres, count, settings.sinkhorn.transposed, matrix);
    else
        for (int k = 0; k < n * n; k++) matrix[k] = Vec{};
    if (dres && settings.constraint == SINKHORN)
        sinkhorn_backward(n, settings.sinkhorn, iterates, matrix);
    for (int k = 0; k < n * n; k++) take(2 * n + k, matrix[k], p[k]);
}

// out [n][BLOCK][CHUNK] = what reaches a token's streams through the read and through the write.
template <class X, class N>
INLINE void mix_gradients(N n, int64_t C, const Gradients<X>& grad, int64_t token, int64_t from,
                          int64_t length, const float* pre, const float* res, float* out) {
    const X* read = grad.u + token * C + from;
    const X* written = grad.link + token * n * C + from;
    const float* own = res + token * n * n;
    for_channels(0, length, [&](int64_t k, auto width) {
        Vec total[limit<N>] = {};
        if (grad.u) {
            const Vec g = load(read + k, width);
            expect(read + k + CHUNK);
            for (int i = 0; i < n; i++) total[i] = pre[i] * g;
        }
        if (grad.link)
            for (int o = 0; o < n; o++) {
                const Vec g = load(written + o * C + k, width);
                expect(written + o * C + k + CHUNK);
                for (int i = 0; i < n; i++) total[i] += own[o * n + i] * g;
            }
        for (int i = 0; i < n; i++) store(out + i * BLOCK * CHUNK + k, total[i], width);
    });
}

template <class X, class N>
void coefficients_and_read_backward(Gradients<X> grad, const X* x, const float* phi,
                                    const float* alpha, const float* bias, const float* res,
                                    const float* projected, const float* inverse_rms, X* dx,
                                    float* parts, float* small, int64_t tokens, N n, int64_t C,
                                    int rows, Settings settings, int threads) {
    const int count = slices(tokens);
    const int64_t length = slice_length(tokens), size = n * C;
    const Chunks chunks(n, C);
    std::vector<RowEntry<X>> packed(chunks.floats(row_entries<RowEntry<X>>(rows)));
#pragma omp parallel num_threads(threads)
    {
        GradientScratch<X> scratch(rows, n);
        std::vector<Vec> iterates(iterates_size(n, settings.sinkhorn));
        float shares[BLOCK], pre[BLOCK * limit<N>];
        pack(phi, rows, chunks, packed.data());
#pragma omp for schedule(static)
        for (int slice = 0; slice < count; slice++) {
            float* dphi = parts + slice * chunks.floats(rows);
            std::memset(dphi, 0, chunks.floats(rows) * sizeof(float));
            SliceSums sums(rows);
            const int64_t slice_end = std::min((slice + 1) * length, tokens);
            for (int64_t first = slice * length; first < slice_end; first += BLOCK) {
                const int own = (int)std::min<int64_t>(BLOCK, slice_end - first);
                for (int t = 0; t < own; t++) {
                    if (grad.u)
                        dot_streams(n, C, grad.u + (first + t) * C, x + (first + t) * size,
                                    pre + t * n);
                    else
                        for (int i = 0; i < n; i++) pre[t * n + i] = 0;
                }
                for (int t = 0; t < own; t += LANES) {
                    const int64_t at = first + t;
                    coefficients_backward(n, rows, std::min(LANES, own - t), projected + at * rows,
                                          alpha, bias, grad.pre ? grad.pre + at * n : nullptr,
                                          grad.post ? grad.post + at * n : nullptr,
                                          grad.res ? grad.res + at * n * n : nullptr, settings,
                                          pre + t * n, &scratch.weights[t], iterates.data(), sums);
                }
                norm_backward(rows, own, size, projected + first * rows, inverse_rms + first,
                              scratch.weights.data(), shares);
                scratch.weigh();
                // All streams of some channels, so that what was written is read once.
                for (int64_t piece = 0; piece < chunks.per_stream; piece++) {
                    const int64_t c = chunks.within(piece), wide = chunks.length(piece);
                    for (int t = 0; t < own; t++)
                        mix_gradients(n, C, grad, first + t, c, wide, pre + t * n, res,
                                      &scratch.out[t * CHUNK]);
                    for (int i = 0; i < n; i++) {
                        const int64_t chunk = i * chunks.per_stream + piece;
                        const int64_t from = first * size + chunks.from(chunk);
                        take(x + from, size, own, wide, scratch.values.data(), nullptr);
                        scratch.multiply(packed, chunk, i, wide, shares, dx + from, size, own,
                                         dphi);
                    }
                }
            }
            float* totals = small + slice * (rows + 3);
            for (int row = 0; row < rows; row++) totals[row] = sum(sums.bias[row]);
            for (int group = 0; group < 3; group++) totals[rows + group] = sum(sums.alpha[group]);
        }
    }
}

}  // namespace

extern "C" {

// Every gradient may be null. parts: mhc_slices(tokens) gradients of phi of
// mhc_slice_floats(n, C, rows) each; small [slices, rows + 3] is summed into dsmall: bias, alpha.
void mhc_coefficients_and_read_backward(
    const void* grad_u, const float* grad_pre, const float* grad_post, const float* grad_res,
    const void* grad_link, const void* x, const float* phi, const float* alpha, const float* bias,
    const float* res, const float* projected, const float* inverse_rms, void* dx, float* dphi,
    float* dsmall, float* parts, float* small, int64_t tokens, int64_t n, int64_t C, int64_t rows,
    int64_t constraint, int64_t iterations, int64_t transposed, float norm_eps, float hc_eps, int64_t is_bfloat16,
    int64_t threads) {
    const Settings settings =
        settings_of(constraint, iterations, transposed, norm_eps, hc_eps);
    with_dtype(is_bfloat16, [&](auto* type) {
        using X = std::remove_pointer_t<decltype(type)>;
        const Gradients<X> grad{(const X*)grad_u, grad_pre, grad_post, grad_res,
                                (const X*)grad_link};
        with_streams(n, [&](auto n) {
            coefficients_and_read_backward(grad, (const X*)x, phi, alpha, bias, res, projected,
                                           inverse_rms, (X*)dx, parts, small, tokens, n, C, rows,
                                           settings, threads);
        });
    });
    sum_packed_slices(parts, slices(tokens), rows, Chunks(n, C), dphi, threads);
    sum_slices(small, slices(tokens), rows + 3, dsmall);
}
}
