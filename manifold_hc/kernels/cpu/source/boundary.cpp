// Boundary between two sublayers: the write of one, coefficients and read of the next.
//
// A block of tokens stays in cache from the write to the read. The first sublayer has no write
// before it.

#include "coefficients.h"
#include "norm.h"
#include "projection.h"
#include "signatures.h"
#include "streams.h"

namespace {

// The write that makes the streams; `piece` is null where they exist already.
struct Before {
    const void *x, *y;
    const float *post, *res;
    void (*piece)(const Before&, int n, int64_t C, int64_t first, int64_t end, int64_t from,
                  int64_t to, void* out);
};

// x' of the tokens [first, end) and the channels [from, to).
template <class X, class Y, class N>
void write_piece(const Before& before, int streams, int64_t C, int64_t first, int64_t end,
                 int64_t from, int64_t to, void* out) {
    const N n = number<N>(streams);
    for (int64_t t = first; t < end; t++) {
        const X* x = (const X*)before.x + t * n * C;
        const Y* y = (const Y*)before.y + t * C;
        for_channels(from, to, [&](int64_t c, auto width) {
            Vec stream[limit<N>];
            for (int i = 0; i < n; i++) {
                stream[i] = load(x + i * C + c, width);
                prefetch(x + i * C + c + CHUNK);
            }
            prefetch(y + c + CHUNK);
            write_vector(
                n, stream, load(y + c, width), before.post + t * n, before.res + t * n * n,
                [&](int o, Vec v) { store((X*)out + (t * n + o) * C + c, v, width); });
        });
    }
}

// Read weights of the next sublayer, and the norm of its input.
struct Read {
    const float* pre;     // null: the coefficients that are made here
    const float* weight;  // weight of the norm, or null without a norm
    float eps;
};

// The coefficients of the new streams x.
struct Made {
    float *pre, *post, *res, *projected, *inverse_rms;
};

template <class X, class N>
void boundary(const Before& before, const Read& read, X* x, const float* phi, const float* alpha,
              const float* bias, X* u, const Made& made, int64_t tokens, N n, int64_t C, int rows,
              Settings settings, int threads) {
    const int64_t blocks = (tokens + BLOCK - 1) / BLOCK, size = n * C;
    const Chunks chunks(n, C);
    Room<float> packed(chunks.floats(rows));
    TeamRoom room;
#pragma omp parallel num_threads(threads)
    {
        auto scratch = room.make([&] { return ProjectionScratch(rows); });
        pack(phi, rows, chunks, packed.data());
        if (room.complete()) {
#pragma omp for schedule(static)
            for (int64_t block = 0; block < blocks; block++) {
                const int64_t first = block * BLOCK, end = std::min(first + BLOCK, tokens);
                // x' into cache, then p = x' phi^T / rms(x')
                project_block(x + first * size, (int)(end - first), chunks, packed.data(), rows,
                              settings.norm_eps, made.projected + first * rows,
                              made.inverse_rms + first, *scratch, [&](int64_t from, int64_t to) {
                                  if (before.piece)
                                      before.piece(before, n, C, first, end, from, to, x);
                              });
                for (int64_t t = first; t < end; t += LANES) {
                    const int count = (int)std::min<int64_t>(LANES, end - t);
                    const float* projected = made.projected + t * rows;
                    auto logits = [&](int row) {
                        return logit(row, n, rows, count, projected, alpha, bias);
                    };
                    // pre' = sigmoid(alpha p + bias) + hc_eps
                    gate_reads(n, rows, count, projected, alpha, bias, settings.hc_eps,
                               made.pre + t * n);
                    // post' = 2 sigmoid(alpha p + bias)
                    for (int i = 0; i < n; i++)
                        scatter(made.post + t * n + i, n, count, 2.0f * sigmoid(logits(n + i)));
                    // res' = I, the logits themselves, or their Sinkhorn projection
                    Vec matrix[limit<N> * limit<N>];
                    for (int k = 0; k < n * n; k++)
                        matrix[k] = settings.constraint == IDENTITY
                                        ? broadcast(k % (n + 1) ? 0.0f : 1.0f)
                                        : logits(2 * n + k);
                    if (settings.constraint == SINKHORN)
                        sinkhorn_forward(n, settings.sinkhorn, matrix, matrix, nullptr);
                    scatter_matrix(n, made.res + t * n * n, count, settings.sinkhorn.transposed,
                                   matrix);
                }
                // u = sum_i pre[i] x'[i], then its norm
                const float* weights = read.pre ? read.pre : made.pre;
                for (int64_t t = first; t < end && u; t++) {
                    read_token(n, C, x + t * size, weights + t * n, u + t * C);
                    if (read.weight) normalise(C, u + t * C, read.weight, read.eps);
                }
            }
        }
    }
    room.require();
}

}  // namespace

extern "C" {

// Without y there is no write: x is null, and `streams` hold values already. Without u there is no
// read.
int mhc_boundary(const void* x, const void* y, const float* post, const float* res,
                 const float* pre, const float* weight, float input_eps, void* streams,
                 const float* phi, const float* alpha, const float* bias, void* u, float* new_pre,
                 float* new_post, float* new_res, float* projected, float* inverse_rms,
                 int64_t tokens, int64_t n, int64_t C, int64_t rows, int64_t constraint,
                 int64_t iterations, int64_t transposed, float norm_eps, float hc_eps,
                 int64_t x_is_bfloat16, int64_t y_is_bfloat16, int64_t threads) {
    return status_of([&] {
        check_sizes(tokens, n, C, threads);
        check_rows(rows, n, constraint);
        const Settings settings = settings_of(constraint, iterations, transposed, norm_eps, hc_eps);
        const Made made{new_pre, new_post, new_res, projected, inverse_rms};
        with_dtype(x_is_bfloat16, [&](auto* type) {
            using X = std::remove_pointer_t<decltype(type)>;
            with_streams(n, [&](auto n) {
                using N = decltype(n);
                const Before before{x, y, post, res,
                                    !y              ? nullptr
                                    : y_is_bfloat16 ? &write_piece<X, bfloat16, N>
                                                    : &write_piece<X, float, N>};
                boundary(before, Read{pre, weight, input_eps}, (X*)streams, phi, alpha, bias, (X*)u,
                         made, tokens, n, C, rows, settings, threads);
            });
        });
    });
}
}

EXPORT(mhc_boundary);
