// read and write: the passes over the streams, forward and backward.

#include <algorithm>

#include "streams.h"

namespace {

template <class X, class N>
void read(const X* x, const float* pre, X* u, int64_t tokens, N n, int64_t C, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t t = 0; t < tokens; t++) read_token(n, C, x + t * n * C, pre + t * n, u + t * C);
}

template <class X, class N>
void read_backward(const X* grad, const X* x, const float* pre, X* dx, float* dpre, int64_t tokens,
                   N n, int64_t C, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t t = 0; t < tokens; t++) {
        const X* own = x + t * n * C;
        dot_streams(n, C, grad + t * C, own, dpre + t * n);
        for_channels(0, C, [&](int64_t c, auto width) {
            const Vec g = load(grad + t * C + c, width);
            for (int i = 0; i < n; i++)
                store(dx + (t * n + i) * C + c, pre[t * n + i] * g, width);
        });
    }
}

template <class X, class Y, class N>
void write(const X* x, const Y* y, const float* post, const float* res, X* out, int64_t tokens,
           N n, int64_t C, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t t = 0; t < tokens; t++) {
        const X* own = x + t * n * C;
        for_channels(0, C, [&](int64_t c, auto width) {
            Vec stream[limit<N>];
            for (int i = 0; i < n; i++) {
                stream[i] = load(own + i * C + c, width);
                expect(own + (n + i) * C + c);
            }
            expect(y + (t + 1) * C + c);
            const Vec branch = load(y + t * C + c, width);
            for (int o = 0; o < n; o++) {
                Vec total = post[t * n + o] * branch;
                for (int i = 0; i < n; i++) total += res[(t * n + o) * n + i] * stream[i];
                store(out + (t * n + o) * C + c, total, width);
            }
        });
    }
}

constexpr int64_t WRITE_CHUNK = 512;

// sums[o][i] += <grad[o], x[i]> and sums[o][n] += <grad[o], y> over the channels [from, to).
template <int OUT, class X, class Y, class N>
INLINE void dot_tile(N n, int64_t C, const X* grad, const X* x, const Y* y, int64_t from,
                     int64_t to, Vec* sums) {
    using F = Factors<X, Y>;
    Vec total[OUT][limit<N> + 1];
    for (int o = 0; o < OUT; o++)
        for (int i = 0; i <= n; i++) total[o][i] = sums[o * (n + 1) + i];
    for_channels<F::STEP>(from, to, [&](int64_t c, auto width) {
        decltype(F::load(grad, width)) g[OUT];
        for (int o = 0; o < OUT; o++) g[o] = F::load(grad + o * C + c, width);
        for (int i = 0; i < n; i++) {
            const auto stream = F::load(x + i * C + c, width);
            expect(x + (n + i) * C + c);
            for (int o = 0; o < OUT; o++) total[o][i] = add_products(total[o][i], g[o], stream);
        }
        const auto branch = F::load(y + c, width);
        expect(y + C + c);
        for (int o = 0; o < OUT; o++) total[o][n] = add_products(total[o][n], g[o], branch);
    });
    for (int o = 0; o < OUT; o++)
        for (int i = 0; i <= n; i++) sums[o * (n + 1) + i] = total[o][i];
}

template <class X, class Y, class N>
void write_backward(const X* grad, const X* x, const Y* y, const float* post, const float* res,
                    X* dx, Y* dy, float* dpost, float* dres, int64_t tokens, N n, int64_t C,
                    int threads) {
    // As many rows of res at once as their sums fit into registers.
    constexpr int ROWS = std::max(1, std::min(limit<N>, REGISTERS * 3 / 4 / (limit<N> + 1)));
    static_assert(limit<N> % ROWS == 0 && (limit<N> < MAX_STREAMS || ROWS == 1));
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t t = 0; t < tokens; t++) {
        const X *g = grad + t * n * C, *own = x + t * n * C;
        const Y* branch = y + t * C;
        Vec sums[limit<N> * (limit<N> + 1)] = {};
        for (int64_t from = 0; from < C; from += WRITE_CHUNK) {
            const int64_t to = std::min(from + WRITE_CHUNK, C);
            for_channels(from, to, [&](int64_t c, auto width) {
                Vec out[limit<N>], total{};
                for (int o = 0; o < n; o++) {
                    out[o] = load(g + o * C + c, width);
                    expect(g + (n + o) * C + c);
                    total += post[t * n + o] * out[o];
                }
                store(dy + t * C + c, total, width);
                if (dx) {
                    for (int i = 0; i < n; i++) {
                        Vec mixed{};
                        for (int o = 0; o < n; o++) mixed += res[(t * n + o) * n + i] * out[o];
                        store(dx + (t * n + i) * C + c, mixed, width);
                    }
                }
            });
            for (int o = 0; o < n; o += ROWS)
                dot_tile<ROWS>(n, C, g + o * C, own, branch, from, to, sums + o * (n + 1));
        }
        for (int o = 0; o < n; o++) {
            dpost[t * n + o] = sum(sums[o * (n + 1) + n]);
            for (int i = 0; i < n; i++) dres[(t * n + o) * n + i] = sum(sums[o * (n + 1) + i]);
        }
    }
}

}  // namespace

extern "C" {

void mhc_read(const void* x, const float* pre, void* u, int64_t tokens, int64_t n, int64_t C,
              int64_t is_bfloat16, int64_t threads) {
    with_dtype(is_bfloat16, [&](auto* type) {
        using X = std::remove_pointer_t<decltype(type)>;
        with_streams(n, [&](auto n) { read((const X*)x, pre, (X*)u, tokens, n, C, threads); });
    });
}

void mhc_read_backward(const void* grad, const void* x, const float* pre, void* dx, float* dpre,
                       int64_t tokens, int64_t n, int64_t C, int64_t is_bfloat16, int64_t threads) {
    with_dtype(is_bfloat16, [&](auto* type) {
        using X = std::remove_pointer_t<decltype(type)>;
        with_streams(n, [&](auto n) {
            read_backward((const X*)grad, (const X*)x, pre, (X*)dx, dpre, tokens, n, C, threads);
        });
    });
}

void mhc_write(const void* x, const void* y, const float* post, const float* res, void* out,
               int64_t tokens, int64_t n, int64_t C, int64_t is_bfloat16, int64_t y_is_bfloat16, int64_t threads) {
    with_dtype(is_bfloat16, [&](auto* x_type) {
        with_dtype(y_is_bfloat16, [&](auto* y_type) {
            using X = std::remove_pointer_t<decltype(x_type)>;
            using Y = std::remove_pointer_t<decltype(y_type)>;
            with_streams(n, [&](auto n) {
                write((const X*)x, (const Y*)y, post, res, (X*)out, tokens, n, C, threads);
            });
        });
    });
}

// dx may be null.
void mhc_write_backward(const void* grad, const void* x, const void* y, const float* post,
                        const float* res, void* dx, void* dy, float* dpost, float* dres,
                        int64_t tokens, int64_t n, int64_t C, int64_t is_bfloat16, int64_t y_is_bfloat16,
                        int64_t threads) {
    with_dtype(is_bfloat16, [&](auto* x_type) {
        with_dtype(y_is_bfloat16, [&](auto* y_type) {
            using X = std::remove_pointer_t<decltype(x_type)>;
            using Y = std::remove_pointer_t<decltype(y_type)>;
            with_streams(n, [&](auto n) {
                write_backward((const X*)grad, (const X*)x, (const Y*)y, post, res, (X*)dx, (Y*)dy,
                               dpost, dres, tokens, n, C, threads);
            });
        });
    });
}
}
