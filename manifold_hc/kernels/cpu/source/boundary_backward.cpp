// Backward of a boundary between two sublayers, a block of tokens at a time.
//
// With p = x phi^T / rms(x), dp the gradient of p, dq = dp / rms and g the gradient of the streams
// that the next write makes (it arrives through the link):
//   dpre[i]   = <du, x[i]>              dres[o][i] = <g[o], x[i]>
//   dx[i]     = dx' + pre[i] du + sum_o res[o][i] g[o] + dq phi[i] - <dp, p> / (rms^2 n C) x[i]
//   dphi      = dq^T x
// The last term of dx is the rank-one correction of the RMS norm. The same pass makes the gradients
// of the write before: dy = sum_o post[o] dx[o], dpost[o] = <dx[o], y>.

#include "coefficients.h"
#include "gradient.h"
#include "norm.h"
#include "signatures.h"
#include "streams.h"

namespace {

// Gradients of the results; any may be null.
template <class X>
struct Gradients {
    const X *u, *streams;
    const float *pre, *post, *res;
    const X* link;  // gradient of the streams that the next write makes
};

// The read: its weights, null where they are the coefficients' own, and the norm after it.
template <class X>
struct Read {
    const float* pre;
    float* dpre;
    const float* weight;
    float eps;
    float* dweight;  // [slices, C]
};

// The write that made the streams, with its gradients; `piece` is null without one.
struct Before {
    const void* y;
    const float* post;
    void* dy;
    float* dpost;
    void (*piece)(const Before&, int n, int64_t C, int64_t token, int64_t from, int64_t to,
                  const void* g, Vec* sums);
};

// dy of one token for the channels [from, to), and sums[o] += <g[o], y>.
template <class X, class Y, class N>
void branch_piece(const Before& before, int streams, int64_t C, int64_t token, int64_t from,
                  int64_t to, const void* grad, Vec* sums) {
    const N n = number<N>(streams);
    const X* g = (const X*)grad;
    const Y* y = (const Y*)before.y + token * C;
    Y* dy = (Y*)before.dy + token * C;
    const float* post = before.post + token * n;
    Vec products[limit<N>] = {};
    for_channels(from, to, [&](int64_t c, auto width) {
        const Vec branch = load(y + c, width);
        prefetch(y + c + CHUNK);
        Vec total{};
        for (int o = 0; o < n; o++) {
            const Vec own = load(g + o * C + c, width);
            total += post[o] * own;       // dy = sum_o post[o] g[o]
            products[o] += own * branch;  // dpost[o] = <g[o], y>
        }
        store(dy + c, total, width);
    });
    for (int o = 0; o < n; o++) sums[o] += products[o];
}

// Gradients of alpha and bias, summed over a slice of tokens.
struct SliceSums {
    Vec alpha[3] = {};
    Room<Vec> bias;
    explicit SliceSums(int rows) : bias(rows) {}
    void clear() {
        std::fill(alpha, alpha + 3, Vec{});
        std::fill(bias.begin(), bias.end(), Vec{});
    }
};

// Memory of one thread.
template <class X>
struct OwnRoom {
    GradientScratch<X> scratch;
    Room<Vec> iterates;
    Room<X> inputs;     // [BLOCK, C] gradients of u before the norm
    Room<float> input;  // [C] u before the norm
    SliceSums sums;
};

// Gradients of the projections of up to LANES tokens, into weights [rows, BLOCK], from those of
// the coefficients, each [tokens, n or n*n] or null.
template <class N>
NOINLINE void coefficients_backward(N n, int rows, int count, const float* projected,
                                  const float* alpha, const float* bias, const float* read,
                                  const float* dpre, const float* dpost, const float* dres,
                                  const Settings& settings, float* weights, Vec* iterates,
                                  SliceSums& sums) {
    auto take = [&](int row, Vec dlogit, Vec p) {
        sums.alpha[group(row, n)] += dlogit * p;  // dalpha = sum dlogit p
        sums.bias[row] += dlogit;                 // dbias = dlogit
        // dp = dlogit alpha
        store(weights + row * BLOCK, dlogit * alpha[group(row, n)], Whole{});
    };
    auto projection = [&](int row) { return gather(projected + row, rows, count); };
    for (int row = 0; row < 2 * n; row++) {
        const bool reads = row < n;
        const Vec p = projection(row), s = sigmoid(p * alpha[group(row, n)] + bias[row]);
        Vec d{};
        if (reads && read) d += gather(read + row, n, count);
        if (reads && dpre) d += gather(dpre + row, n, count);
        if (!reads && dpost) d = 2.0f * gather(dpost + row - n, n, count);
        take(row, d * s * (1.0f - s), p);  // through the sigmoid: d s (1 - s)
    }
    if (settings.constraint == IDENTITY) return;
    Vec p[limit<N> * limit<N>], matrix[limit<N> * limit<N>];
    for (int k = 0; k < n * n; k++) {
        p[k] = projection(2 * n + k);
        matrix[k] = p[k] * alpha[2] + bias[2 * n + k];
    }
    if (dres && settings.constraint == SINKHORN)
        sinkhorn_forward(n, settings.sinkhorn, matrix, matrix, iterates);
    // Gradient of res, in the logits' orientation, then of the logits.
    if (dres)
        gather_matrix(n, dres, count, settings.sinkhorn.transposed, matrix);
    else
        for (int k = 0; k < n * n; k++) matrix[k] = Vec{};
    if (dres && settings.constraint == SINKHORN)
        sinkhorn_backward(n, settings.sinkhorn, iterates, matrix);
    for (int k = 0; k < n * n; k++) take(2 * n + k, matrix[k], p[k]);
}

// dpre[i] = <du, x[i]> and dres[o][i] += <link[o], x[i]> of one token; du or link may be null.
template <class X, class N>
NOINLINE void coefficient_gradients(N n, int64_t C, const X* x, const X* du, const X* link,
                                  float* dpre, float* dres) {
    if (!link) {
        if (du) dot_streams(n, C, du, x, dpre);
        return;
    }
    float dots[limit<N> * (limit<N> + 1)];
    // Without du the last column is not used.
    dot_all(n, C, x, link, du ? du : link, dots, [](int64_t, int64_t) {});
    for (int i = 0; i < n; i++) {
        // dres[o][i] += <g[o], x[i]>
        for (int o = 0; o < n; o++) dres[o * n + i] += dots[i * (n + 1) + o];
        // dpre[i] = <du, x[i]>
        if (du) dpre[i] = dots[i * (n + 1) + n];
    }
}

// out [n][BLOCK][CHUNK] = dx' + pre[i] du + sum_o res[o][i] g[o]: all but the projections' part.
template <class X, class N>
INLINE void mix_gradients(N n, int64_t C, const X* du, const X* streams, const X* link,
                          const float* pre, const float* res, int64_t from, int64_t length,
                          float* out) {
    for_channels(0, length, [&](int64_t k, auto width) {
        const int64_t c = from + k;
        Vec total[limit<N>] = {};
        if (du) {
            const Vec g = load(du + c, width);
            prefetch(du + c + CHUNK);
            for (int i = 0; i < n; i++) total[i] = pre[i] * g;  // pre[i] du
        }
        if (streams)  // dx'
            for (int i = 0; i < n; i++) total[i] += load(streams + i * C + c, width);
        if (link)  // sum_o res[o][i] g[o]
            for (int o = 0; o < n; o++) {
                const Vec g = load(link + o * C + c, width);
                prefetch(link + o * C + c + CHUNK);
                for (int i = 0; i < n; i++) total[i] += res[o * n + i] * g;
            }
        for (int i = 0; i < n; i++) store(out + i * BLOCK * CHUNK + k, total[i], width);
    });
}

template <class X, class N>
void boundary_backward(const Gradients<X>& grad, const Read<X>& read, const Before& before,
                       const X* x, const float* phi, const float* alpha, const float* bias,
                       const float* res, const float* projected, const float* inverse_rms, X* dx,
                       float* parts, float* small, int64_t tokens, N n, int64_t C, int rows,
                       Settings settings, bool learns, int threads) {
    const int count = slices(tokens);
    const int64_t length = slice_length(tokens), size = n * C;
    const bool mixes = settings.constraint != IDENTITY, passes_res = mixes && learns && grad.link;
    const Chunks chunks(n, C);
    Room<RowEntry<X>> packed(chunks.floats(row_entries<RowEntry<X>>(rows)));
    TeamRoom room;
#pragma omp parallel num_threads(threads)
    {
        auto own_room = room.make([&] {
            return OwnRoom<X>{GradientScratch<X>(rows, n),
                              Room<Vec>(mixes ? iterates_size(n, settings.sinkhorn) : 0),
                              Room<X>(read.weight ? BLOCK * C : 0),
                              Room<float>(read.weight ? C : 0), SliceSums(rows)};
        });
        pack(phi, rows, chunks, packed.data());
        if (room.complete()) {
            auto& [scratch, iterates, inputs, input, sums] = *own_room;
            Shares shares;
            float pre[BLOCK * limit<N>], dpre[BLOCK * limit<N>];
            float dres[BLOCK * limit<N> * limit<N>];
#pragma omp for schedule(static)
            for (int slice = 0; slice < count; slice++) {
                float* dphi = parts + slice * chunks.floats(rows);
                if (read.weight) std::memset(read.dweight + slice * C, 0, C * sizeof(float));
                sums.clear();
                const int64_t slice_end = std::min((slice + 1) * length, tokens);
                for (int64_t first = slice * length; first < slice_end; first += BLOCK) {
                    const int own = (int)std::min<int64_t>(BLOCK, slice_end - first);
                    // pre again, from the saved projections
                    for (int t = 0; t < own; t += LANES)
                        gate_reads(n, rows, std::min(LANES, own - t), projected + (first + t) * rows,
                                   alpha, bias, settings.hc_eps, pre + t * n);
                    const float* weights = read.pre ? read.pre + first * n : pre;
                    const X* du = grad.u ? grad.u + first * C : nullptr;
                    for (int t = 0; t < own; t++) {
                        const X* streams = x + (first + t) * size;
                        const X* link = passes_res ? grad.link + (first + t) * size : nullptr;
                        float *own_res = dres + t * n * n, *own_pre = dpre + t * n;
                        for (int i = 0; i < n; i++) own_pre[i] = 0;
                        for (int k = 0; k < n * n; k++)
                            own_res[k] = grad.res ? grad.res[(first + t) * n * n + k] : 0;
                        if (du && read.weight)
                            normalise_backward(n, C, streams, weights + t * n, du + t * C,
                                               read.weight, read.eps, input.data(),
                                               &inputs[t * C], read.dweight + slice * C);
                        const X* own_du = !du ? nullptr : read.weight ? &inputs[t * C] : du + t * C;
                        coefficient_gradients(n, C, streams, own_du, link, own_pre, own_res);
                        if (read.pre)
                            for (int i = 0; i < n; i++) read.dpre[(first + t) * n + i] = own_pre[i];
                    }
                    if (du && read.weight) du = inputs.data();
                    for (int t = 0; t < own; t += LANES) {
                        const int64_t at = first + t;
                        coefficients_backward(
                            n, rows, std::min(LANES, own - t), projected + at * rows, alpha, bias,
                            read.pre ? nullptr : dpre + t * n, grad.pre ? grad.pre + at * n : nullptr,
                            grad.post ? grad.post + at * n : nullptr,
                            passes_res || grad.res ? dres + t * n * n : nullptr, settings,
                            &scratch.weights[t], iterates.data(), sums);
                    }
                    // dq = dp / rms, and the factor of the rank-one correction
                    norm_backward(rows, own, size, projected + first * rows, inverse_rms + first,
                                  scratch.weights.data(), shares);
                    scratch.weigh();
                    Vec branches[BLOCK * limit<N>] = {};
                    // Some channels of all streams at a time, so that dx is read from cache.
                    for (int64_t piece = 0; piece < chunks.per_stream; piece++) {
                        const int64_t c = chunks.within(piece), wide = chunks.length(piece);
                        for (int t = 0; t < own; t++) {
                            const int64_t at = (first + t) * size;
                            mix_gradients(n, C, du ? du + t * C : nullptr,
                                          grad.streams ? grad.streams + at : nullptr,
                                          grad.link ? grad.link + at : nullptr, weights + t * n,
                                          res + (first + t) * n * n, c, wide,
                                          &scratch.out[t * CHUNK]);
                        }
                        for (int i = 0; i < n; i++)
                            scratch.multiply(chunks, piece * n + i, x + first * size, packed, shares,
                                             dx + first * size, own, dphi, first == slice * length);
                        for (int t = 0; t < own && before.piece; t++)
                            before.piece(before, n, C, first + t, c, c + wide,
                                         dx + (first + t) * size, branches + t * n);
                    }
                    for (int k = 0; k < own * n && before.piece; k++)
                        before.dpost[first * n + k] = sum(branches[k]);
                }
                float* totals = small + slice * (rows + 3);
                for (int row = 0; row < rows; row++) totals[row] = sum(sums.bias[row]);
                for (int kind = 0; kind < 3; kind++) totals[rows + kind] = sum(sums.alpha[kind]);
            }
        }
    }
    room.require();
}

}  // namespace

extern "C" {

// Every incoming gradient may be null. y is null without a write before, pre where the read uses
// the coefficients' own, weight without a norm. partial_dphi: mhc_slices(tokens)
// gradients of phi of mhc_slice_floats(n, C, rows) each; partial_dbias_dalpha [slices, rows + 3] is
// summed into dbias_dalpha (bias, alpha), and partial_dweight [slices, C] into dweight.
int mhc_boundary_backward(
    const void* grad_streams, const void* grad_u, const float* grad_pre, const float* grad_post,
    const float* grad_res, const void* grad_link, const void* x, const void* y, const float* post,
    const float* pre, const float* phi, const float* alpha, const float* bias, const float* weight,
    float input_eps, const float* res, const float* projected, const float* inverse_rms, void* dx,
    void* dy, float* dpost, float* dpre, float* dphi, float* dbias_dalpha, float* dweight,
    float* partial_dphi, float* partial_dbias_dalpha, float* partial_dweight, int64_t tokens,
    int64_t n, int64_t C, int64_t rows, int64_t constraint, int64_t iterations, int64_t transposed,
    float norm_eps, float hc_eps, int64_t learns, int64_t x_is_bfloat16, int64_t y_is_bfloat16,
    int64_t threads) {
    return status_of([&] {
        check_sizes(tokens, n, C, threads);
        check_rows(rows, n, constraint);
        const Settings settings = settings_of(constraint, iterations, transposed, norm_eps, hc_eps);
        with_dtype(x_is_bfloat16, [&](auto* type) {
            using X = std::remove_pointer_t<decltype(type)>;
            const Gradients<X> grad{(const X*)grad_u, (const X*)grad_streams, grad_pre,
                                    grad_post,        grad_res,               (const X*)grad_link};
            const Read<X> read{pre, dpre, weight, input_eps, partial_dweight};
            with_streams(n, [&](auto n) {
                using N = decltype(n);
                const Before before{y, post, dy, dpost,
                                    !y              ? nullptr
                                    : y_is_bfloat16 ? &branch_piece<X, bfloat16, N>
                                                    : &branch_piece<X, float, N>};
                boundary_backward(grad, read, before, (const X*)x, phi, alpha, bias, res, projected,
                                  inverse_rms, (X*)dx, partial_dphi, partial_dbias_dalpha, tokens,
                                  n, C, rows, settings, learns, threads);
            });
        });
        sum_packed_slices(partial_dphi, slices(tokens), rows, Chunks(n, C), dphi, threads);
        sum_slices(partial_dbias_dalpha, slices(tokens), rows + 3, dbias_dalpha);
        if (weight) sum_slices(partial_dweight, slices(tokens), C, dweight);
    });
}
}

EXPORT(mhc_boundary_backward);
