// project, forward and backward: p = v phi^T / rms(v), dphi = dq^T v and dv = dq phi - the rank-one
// correction of the norm, with dq = dp / rms.

#include "gradient.h"
#include "signatures.h"

namespace {

template <class X>
void project(const X* v, const float* phi, float* projected, float* inverse_rms, int64_t tokens,
             int64_t size, int rows, float norm_eps, int threads) {
    const int64_t blocks = (tokens + BLOCK - 1) / BLOCK;
    const Chunks chunks(1, size);
    Room<float> packed(chunks.floats(rows));
    TeamRoom room;
#pragma omp parallel num_threads(threads)
    {
        auto scratch = room.make([&] { return ProjectionScratch(rows); });
        pack(phi, rows, chunks, packed.data());
        if (room.complete()) {
#pragma omp for schedule(static)
            for (int64_t block = 0; block < blocks; block++) {
                const int64_t t = block * BLOCK;
                project_block(v + t * size, (int)std::min<int64_t>(BLOCK, tokens - t), chunks,
                              packed.data(), rows, norm_eps, projected + t * rows,
                              inverse_rms + t, *scratch, [](int64_t, int64_t) {});
            }
        }
    }
    room.require();
}

template <class X>
void project_backward(const float* grad, const X* v, const float* phi, const float* projected,
                      const float* inverse_rms, X* dv, float* parts, int64_t tokens, int64_t size,
                      int rows, int threads) {
    const int count = slices(tokens);
    const int64_t length = slice_length(tokens);
    const Chunks chunks(1, size);
    Room<RowEntry<X>> packed(chunks.floats(row_entries<RowEntry<X>>(rows)));
    TeamRoom room;
#pragma omp parallel num_threads(threads)
    {
        auto own_scratch = room.make([&] { return GradientScratch<X>(rows, 1); });
        pack(phi, rows, chunks, packed.data());
        if (room.complete()) {
            GradientScratch<X>& scratch = *own_scratch;
            Shares shares;
#pragma omp for schedule(static)
            for (int slice = 0; slice < count; slice++) {
                float* dphi = parts + slice * chunks.floats(rows);
                const int64_t end = std::min((slice + 1) * length, tokens);
                for (int64_t t = slice * length; t < end; t += BLOCK) {
                    const int own = (int)std::min<int64_t>(BLOCK, end - t);
                    for (int k = 0; k < own * rows; k++)
                        scratch.weights[k % rows * BLOCK + k / rows] = grad[t * rows + k];
                    norm_backward(rows, own, size, projected + t * rows, inverse_rms + t,
                                  scratch.weights.data(), shares);
                    scratch.weigh();
                    for (int64_t turn = 0; turn < chunks.count; turn++) {
                        std::fill(scratch.out.begin(), scratch.out.end(), 0.0f);
                        scratch.multiply(chunks, turn, v + t * size, packed, shares, dv + t * size,
                                         own, dphi, t == slice * length);
                    }
                }
            }
        }
    }
    room.require();
}

}  // namespace

extern "C" {

int64_t mhc_slices(int64_t tokens) { return slices(tokens); }

// Floats of the partial gradient of phi that one slice sums.
int64_t mhc_slice_floats(int64_t n, int64_t C, int64_t rows) { return Chunks(n, C).floats(rows); }

int mhc_project(const void* v, const float* phi, float* projected, float* inverse_rms,
                int64_t tokens, int64_t size, int64_t rows, float norm_eps, int64_t is_bfloat16,
                int64_t threads) {
    return status_of([&] {
        check_sizes(tokens, 1, size, threads);
        check_range(rows, 1, MAX_ROWS);
        with_dtype(is_bfloat16, [&](auto* type) {
            project((decltype(type))v, phi, projected, inverse_rms, tokens, size, rows, norm_eps,
                    threads);
        });
    });
}

// partial_dphi: mhc_slices(tokens) gradients of phi of mhc_slice_floats(1, size, rows) each.
int mhc_project_backward(const float* grad, const void* v, const float* phi,
                         const float* projected, const float* inverse_rms, void* dv, float* dphi,
                         float* partial_dphi, int64_t tokens, int64_t size, int64_t rows,
                         int64_t is_bfloat16, int64_t threads) {
    return status_of([&] {
        check_sizes(tokens, 1, size, threads);
        check_range(rows, 1, MAX_ROWS);
        with_dtype(is_bfloat16, [&](auto* type) {
            project_backward(grad, (decltype(type))v, phi, projected, inverse_rms,
                             (decltype(type))dv, partial_dphi, tokens, size, rows, threads);
        });
        sum_packed_slices(partial_dphi, slices(tokens), rows, Chunks(1, size), dphi, threads);
    });
}
}

EXPORT(mhc_slices);
EXPORT(mhc_slice_floats);
EXPORT(mhc_project);
EXPORT(mhc_project_backward);
