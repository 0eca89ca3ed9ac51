// Projections, Sinkhorn-Knopp, and the coefficients together with the read they are made for.

#include "gradient.h"
#include "sinkhorn.h"
#include "streams.h"

namespace {

enum Constraint { SINKHORN = 0, IDENTITY = 1, NONE = 2 };

struct Settings {
    int constraint;
    Sinkhorn sinkhorn;
    float norm_eps;
    float hc_eps;
};

Settings settings_of(int64_t constraint, int64_t iterations, int64_t transposed, float norm_eps,
                         float hc_eps) {
    return {(int)constraint, {(int)iterations, (bool)transposed, hc_eps}, norm_eps, hc_eps};
}

// LANES numbers, `stride` apart, as one vector; 0 past `count`.
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
#pragma omp parallel num_threads(threads)
    {
        std::vector<Vec> iterates(iterates_size(n, settings));
#pragma omp for schedule(static)
        for (int64_t group = 0; group < groups; group++) {
            const int count = (int)std::min<int64_t>(LANES, tokens - group * LANES);
            const int64_t at = group * LANES * n * n;
            Vec own[limit<N> * limit<N>], matrix[limit<N> * limit<N>];
            gather_matrix(n, logits + at, count, false, own);
            sinkhorn_forward(n, settings, own, matrix, iterates.data());
            gather_matrix(n, grad + at, count, settings.transposed, matrix);
            sinkhorn_backward(n, settings, iterates.data(), matrix);
            scatter_matrix(n, dlogits + at, count, false, matrix);
        }
    }
}

template <class X>
void project(const X* v, const float* phi, float* projected, float* inverse_rms, int64_t tokens,
             int64_t size, int rows, float norm_eps, int threads) {
    const int64_t blocks = (tokens + BLOCK - 1) / BLOCK;
    const Chunks chunks(1, size);
    std::vector<float> packed(chunks.floats(rows));
#pragma omp parallel num_threads(threads)
    {
        ProjectionScratch scratch(rows);
        pack(phi, rows, chunks, packed.data());
#pragma omp for schedule(static)
        for (int64_t block = 0; block < blocks; block++) {
            const int64_t t = block * BLOCK;
            project_block(v + t * size, (int)std::min<int64_t>(BLOCK, tokens - t), chunks, size,
                          packed.data(), rows, norm_eps, projected + t * rows, inverse_rms + t,
                          scratch);
        }
    }
}

// weights [rows, BLOCK] = grad / rms; shares [BLOCK] = what the norm takes back of every value.
INLINE void norm_backward(int rows, int tokens, int64_t size, const float* projected,
                          const float* inverse_rms, float* weights, float* shares) {
    for (int t = 0; t < BLOCK; t++) {
        const float inverse = t < tokens ? inverse_rms[t] : 0;
        float total = 0;
        for (int r = 0; r < rows; r++) {
            if (t < tokens) total += weights[r * BLOCK + t] * projected[t * rows + r];
            weights[r * BLOCK + t] = t < tokens ? weights[r * BLOCK + t] * inverse : 0;
        }
        shares[t] = total * inverse * inverse / size;
    }
}

template <class X>
void project_backward(const float* grad, const X* v, const float* phi, const float* projected,
                      const float* inverse_rms, X* dv, float* parts, int64_t tokens, int64_t size,
                      int rows, int threads) {
    const int count = slices(tokens);
    const int64_t length = slice_length(tokens);
    const Chunks chunks(1, size);
    std::vector<RowEntry<X>> packed(chunks.floats(row_entries<RowEntry<X>>(rows)));
#pragma omp parallel num_threads(threads)
    {
        GradientScratch<X> scratch(rows, 1);
        float shares[BLOCK];
        pack(phi, rows, chunks, packed.data());
#pragma omp for schedule(static)
        for (int slice = 0; slice < count; slice++) {
            float* dphi = parts + slice * chunks.floats(rows);
            std::memset(dphi, 0, chunks.floats(rows) * sizeof(float));
            const int64_t end = std::min((slice + 1) * length, tokens);
            for (int64_t t = slice * length; t < end; t += BLOCK) {
                const int own = (int)std::min<int64_t>(BLOCK, end - t);
                for (int k = 0; k < own * rows; k++)
                    scratch.weights[k % rows * BLOCK + k / rows] = grad[t * rows + k];
                norm_backward(rows, own, size, projected + t * rows, inverse_rms + t,
                              scratch.weights.data(), shares);
                scratch.weigh();
                for (int64_t chunk = 0; chunk < chunks.count; chunk++) {
                    const int64_t from = t * size + chunks.from(chunk);
                    const int64_t wide = chunks.length(chunk);
                    take(v + from, size, own, wide, scratch.values.data(), nullptr);
                    std::fill(scratch.out.begin(), scratch.out.end(), 0.0f);
                    scratch.multiply(packed, chunk, 0, wide, shares, dv + from, size, own, dphi);
                }
            }
        }
    }
}

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

int64_t mhc_slices(int64_t tokens) { return slices(tokens); }

// Floats of one slice's gradient of phi.
int64_t mhc_slice_floats(int64_t n, int64_t C, int64_t rows) { return Chunks(n, C).floats(rows); }

void mhc_sinkhorn(const float* logits, float* res, int64_t tokens, int64_t n, int64_t iterations,
                  int64_t transposed, float eps, int64_t threads) {
    with_streams(n, [&](auto n) {
        sinkhorn(logits, res, tokens, n, {(int)iterations, (bool)transposed, eps}, threads);
    });
}

void mhc_sinkhorn_backward(const float* grad, const float* logits, float* dlogits, int64_t tokens,
                           int64_t n, int64_t iterations, int64_t transposed, float eps, int64_t threads) {
    with_streams(n, [&](auto n) {
        sinkhorn_backward(grad, logits, dlogits, tokens, n, {(int)iterations, (bool)transposed, eps},
                          threads);
    });
}

void mhc_project(const void* v, const float* phi, float* projected, float* inverse_rms,
                 int64_t tokens, int64_t size, int64_t rows, float norm_eps, int64_t is_bfloat16,
                 int64_t threads) {
    with_dtype(is_bfloat16, [&](auto* type) {
        project((decltype(type))v, phi, projected, inverse_rms, tokens, size, rows, norm_eps,
                threads);
    });
}

// parts: mhc_slices(tokens) gradients of phi of mhc_slice_floats(1, size, rows) each.
void mhc_project_backward(const float* grad, const void* v, const float* phi,
                          const float* projected, const float* inverse_rms, void* dv, float* dphi,
                          float* parts, int64_t tokens, int64_t size, int64_t rows, int64_t is_bfloat16,
                          int64_t threads) {
    with_dtype(is_bfloat16, [&](auto* type) {
        project_backward(grad, (decltype(type))v, phi, projected, inverse_rms,
                         (decltype(type))dv, parts, tokens, size, rows, threads);
    });
    sum_packed_slices(parts, slices(tokens), rows, Chunks(1, size), dphi, threads);
}

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
