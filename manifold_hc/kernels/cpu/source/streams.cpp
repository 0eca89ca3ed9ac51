// read, write and rebuild: the passes over the streams, forward and backward.

#include "calls.h"
#include "norm.h"
#include "signatures.h"
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
        dot_streams(n, C, grad + t * C, own, dpre + t * n);  // dpre[i] = <du, x[i]>
        for_channels(0, C, [&](int64_t c, auto width) {
            const Vec g = load(grad + t * C + c, width);
            // dx[i] = pre[i] du
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
                prefetch(own + (n + i) * C + c);
            }
            prefetch(y + (t + 1) * C + c);
            write_vector(n, stream, load(y + t * C + c, width), post + t * n, res + t * n * n,
                         [&](int o, Vec v) { store(out + (t * n + o) * C + c, v, width); });
        });
    }
}

// dy = sum_o post[o] g[o] of one token, the channels [from, to).
template <class X, class Y, class N>
INLINE void gather_branch(N n, int64_t C, const X* g, const float* post, Y* dy, int64_t from,
                          int64_t to) {
    for_channels(from, to, [&](int64_t c, auto width) {
        Vec total{};
        for (int o = 0; o < n; o++) {
            total += post[o] * load(g + o * C + c, width);
            prefetch(g + (n + o) * C + c);
        }
        store(dy + c, total, width);
    });
}

template <class X, class Y, class N>
void branch_backward(const X* grad, const Y* y, const float* post, Y* dy, float* dpost,
                     int64_t tokens, N n, int64_t C, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t t = 0; t < tokens; t++) {
        const X* g = grad + t * n * C;
        const Y* branch = y + t * C;
        using F = Factors<X, Y>;
        Vec sums[limit<N>] = {};
        for (int64_t from = 0; from < C; from += DOT_CHUNK) {
            const int64_t to = std::min(from + DOT_CHUNK, C);
            gather_branch(n, C, g, post + t * n, dy + t * C, from, to);
            for_channels<F::STEP>(from, to, [&](int64_t c, auto width) {
                const auto own = F::load(branch + c, width);
                prefetch(branch + C + c);
                // dpost[o] = <g[o], y>
                for (int o = 0; o < n; o++)
                    sums[o] = add_products(sums[o], F::load(g + o * C + c, width), own);
            });
        }
        for (int o = 0; o < n; o++) dpost[t * n + o] = sum(sums[o]);
    }
}

template <class X, class Y, class N>
void write_backward(const X* grad, const X* x, const Y* y, const float* post, const float* res,
                    X* dx, Y* dy, float* dpost, float* dres, int64_t tokens, N n, int64_t C,
                    int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t t = 0; t < tokens; t++) {
        const X* g = grad + t * n * C;
        float dots[limit<N> * (limit<N> + 1)];
        dot_all(n, C, g, x + t * n * C, y + t * C, dots, [&](int64_t from, int64_t to) {
            gather_branch(n, C, g, post + t * n, dy + t * C, from, to);
            for_channels(from, to, [&](int64_t c, auto width) {
                Vec out[limit<N>];
                for (int o = 0; o < n; o++) out[o] = load(g + o * C + c, width);
                for (int i = 0; i < n; i++) {
                    Vec mixed{};  // dx[i] = sum_o res[o][i] g[o]
                    for (int o = 0; o < n; o++) mixed += res[(t * n + o) * n + i] * out[o];
                    store(dx + (t * n + i) * C + c, mixed, width);
                }
            });
        });
        for (int o = 0; o < n; o++) {
            dpost[t * n + o] = dots[o * (n + 1) + n];  // dpost[o] = <g[o], y>
            // dres[o][i] = <g[o], x[i]>
            for (int i = 0; i < n; i++) dres[(t * n + o) * n + i] = dots[o * (n + 1) + i];
        }
    }
}

// Streams stay in registers from one write to the next. outs[l]: streams after y[l], post[l] and
// res[l]; inputs[l]: read by pre[l] from the streams before that write, normalised where weight[l]
// is not null. There are `writes` writes and one read more.
template <class X, class Y, class N>
void rebuild(const X* x, const Y* const* y, const float* const* post, const float* const* res,
             const float* const* pre, const float* const* weight, const float* eps,
             X* const* outs, X* const* inputs, int writes, int64_t tokens, N n, int64_t C,
             int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t t = 0; t < tokens; t++) {
        for_channels(0, C, [&](int64_t c, auto width) {
            Vec stream[limit<N>];
            for (int i = 0; i < n; i++) {
                stream[i] = load(x + (t * n + i) * C + c, width);
                prefetch(x + ((t + 1) * n + i) * C + c);
            }
            for (int l = 0;; l++) {
                store(inputs[l] + t * C + c, read_vector(n, stream, pre[l] + t * n), width);
                if (l == writes) return;
                prefetch(y[l] + (t + 1) * C + c);
                Vec next[limit<N>];
                write_vector(n, stream, load(y[l] + t * C + c, width), post[l] + t * n,
                             res[l] + t * n * n, [&](int o, Vec v) {
                                 store(outs[l] + (t * n + o) * C + c, v, width);
                                 next[o] = held(x, v);  // rounded as in memory: the same bits
                             });
                for (int i = 0; i < n; i++) stream[i] = next[i];
            }
        });
        for (int l = 0; l <= writes; l++)
            if (weight[l]) normalise(C, inputs[l] + t * C, weight[l], eps[l]);
    }
}

}  // namespace

extern "C" {

int mhc_read(const void* x, const float* pre, void* u, int64_t tokens, int64_t n, int64_t C,
             int64_t is_bfloat16, int64_t threads) {
    return status_of([&] {
        check_sizes(tokens, n, C, threads);
        with_dtype(is_bfloat16, [&](auto* type) {
            using X = std::remove_pointer_t<decltype(type)>;
            with_streams(n, [&](auto n) { read((const X*)x, pre, (X*)u, tokens, n, C, threads); });
        });
    });
}

int mhc_read_backward(const void* grad, const void* x, const float* pre, void* dx, float* dpre,
                      int64_t tokens, int64_t n, int64_t C, int64_t is_bfloat16, int64_t threads) {
    return status_of([&] {
        check_sizes(tokens, n, C, threads);
        with_dtype(is_bfloat16, [&](auto* type) {
            using X = std::remove_pointer_t<decltype(type)>;
            with_streams(n, [&](auto n) {
                read_backward((const X*)grad, (const X*)x, pre, (X*)dx, dpre, tokens, n, C, threads);
            });
        });
    });
}

int mhc_write(const void* x, const void* y, const float* post, const float* res, void* out,
              int64_t tokens, int64_t n, int64_t C, int64_t x_is_bfloat16, int64_t y_is_bfloat16,
              int64_t threads) {
    return status_of([&] {
        check_sizes(tokens, n, C, threads);
        with_dtypes(x_is_bfloat16, y_is_bfloat16, [&](auto* x_type, auto* y_type) {
            using X = std::remove_pointer_t<decltype(x_type)>;
            using Y = std::remove_pointer_t<decltype(y_type)>;
            with_streams(n, [&](auto n) {
                write((const X*)x, (const Y*)y, post, res, (X*)out, tokens, n, C, threads);
            });
        });
    });
}

int mhc_branch_backward(const void* grad, const void* y, const float* post, void* dy, float* dpost,
                        int64_t tokens, int64_t n, int64_t C, int64_t x_is_bfloat16,
                        int64_t y_is_bfloat16, int64_t threads) {
    return status_of([&] {
        check_sizes(tokens, n, C, threads);
        with_dtypes(x_is_bfloat16, y_is_bfloat16, [&](auto* x_type, auto* y_type) {
            using X = std::remove_pointer_t<decltype(x_type)>;
            using Y = std::remove_pointer_t<decltype(y_type)>;
            with_streams(n, [&](auto n) {
                branch_backward((const X*)grad, (const Y*)y, post, (Y*)dy, dpost, tokens, n, C,
                                threads);
            });
        });
    });
}

int mhc_write_backward(const void* grad, const void* x, const void* y, const float* post,
                       const float* res, void* dx, void* dy, float* dpost, float* dres,
                       int64_t tokens, int64_t n, int64_t C, int64_t x_is_bfloat16,
                       int64_t y_is_bfloat16, int64_t threads) {
    return status_of([&] {
        check_sizes(tokens, n, C, threads);
        with_dtypes(x_is_bfloat16, y_is_bfloat16, [&](auto* x_type, auto* y_type) {
            using X = std::remove_pointer_t<decltype(x_type)>;
            using Y = std::remove_pointer_t<decltype(y_type)>;
            with_streams(n, [&](auto n) {
                write_backward((const X*)grad, (const X*)x, (const Y*)y, post, res, (X*)dx, (Y*)dy,
                               dpost, dres, tokens, n, C, threads);
            });
        });
    });
}

int mhc_rebuild(const void* x, const void* const* y, const float* const* post,
                const float* const* res, const float* const* pre, const float* const* weight,
                const float* eps, void* const* outs, void* const* inputs, int64_t writes,
                int64_t tokens, int64_t n, int64_t C, int64_t x_is_bfloat16, int64_t y_is_bfloat16,
                int64_t threads) {
    return status_of([&] {
        check_sizes(tokens, n, C, threads);
        check_range(writes, 0, INT_MAX);
        with_dtypes(x_is_bfloat16, y_is_bfloat16, [&](auto* x_type, auto* y_type) {
            using X = std::remove_pointer_t<decltype(x_type)>;
            using Y = std::remove_pointer_t<decltype(y_type)>;
            with_streams(n, [&](auto n) {
                rebuild((const X*)x, (const Y* const*)y, post, res, pre, weight, eps,
                        (X* const*)outs, (X* const*)inputs, writes, tokens, n, C, threads);
            });
        });
    });
}
}

EXPORT(mhc_read);
EXPORT(mhc_read_backward);
EXPORT(mhc_write);
EXPORT(mhc_branch_backward);
EXPORT(mhc_write_backward);
EXPORT(mhc_rebuild);
