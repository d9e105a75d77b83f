// Hadamard matrices of order up to 32 in float64: x is (outer, order, inner), and the matrix acts in the middle. The
// result may be in the place of x.

#include <algorithm>
#include <cstdint>
#include <cstring>

constexpr int ORDER = 32, STRIP = 16;

// Neighbours in memory. All passes are the same (Pease 1968): sums to the first half, differences to the second.
static inline __attribute__((always_inline)) void along(const double* x, double* out, const int64_t order, double norm) {
    double one[ORDER], other[ORDER], *from = one, *to = other;
    std::memcpy(from, x, order * sizeof(double));
    for (int64_t done = 1; done < order; done *= 2, std::swap(from, to))
#pragma omp simd
        for (int64_t i = 0; i < order / 2; i++) {
            to[i] = from[2 * i] + from[2 * i + 1];
            to[order / 2 + i] = from[2 * i] - from[2 * i + 1];
        }
    for (int64_t i = 0; i < order; i++) out[i] = from[i] * norm;
}

// Columns `inner` apart, a strip of them at a time, which stays in the nearest cache.
static inline __attribute__((always_inline)) void across(const double* x, double* out, int64_t inner, const int count,
                                                         const int64_t order, double norm) {
    alignas(64) double v[ORDER][STRIP];
    for (int64_t r = 0; r < order; r++) std::memcpy(v[r], x + r * inner, count * sizeof(double));
    for (int64_t half = 1; half < order; half *= 2)
        for (int64_t pair = 0; pair < order; pair += 2 * half)
            for (int64_t r = pair; r < pair + half; r++)
#pragma omp simd
                for (int c = 0; c < count; c++) {
                    double sum = v[r][c] + v[r + half][c];
                    v[r + half][c] = v[r][c] - v[r + half][c], v[r][c] = sum;
                }
    for (int64_t r = 0; r < order; r++)
        for (int c = 0; c < count; c++) out[r * inner + c] = v[r][c] * norm;
}

extern "C" void latmix_hadamard(const double* x, double* out, int64_t outer, int64_t order, int64_t inner, double norm,
                                int threads) {
#pragma omp parallel for collapse(2) num_threads(threads) schedule(static)
    for (int64_t block = 0; block < outer; block++)
        for (int64_t first = 0; first < inner; first += STRIP) {
            int64_t at = block * order * inner + first;
            const double* from = x + at;
            double* to = out + at;
            if (inner == 1) order == ORDER ? along(from, to, ORDER, norm) : along(from, to, order, norm);
            else if (inner - first < STRIP) across(from, to, inner, int(inner - first), order, norm);
            else if (order == ORDER) across(from, to, inner, STRIP, ORDER, norm);
            else across(from, to, inner, STRIP, order, norm);
        }
}
