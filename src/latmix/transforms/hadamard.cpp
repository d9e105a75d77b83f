// Hadamard matrices of order up to 32 in float64: x is (outer, order, inner), and the matrix acts in the middle. The
// result may be in the place of x.

#include <cstdint>
#include <cstring>

constexpr int ORDER = 32, STRIP = 64;

typedef double Quad __attribute__((vector_size(32), aligned(8), may_alias));

template <int HALF, int COUNT>
static inline __attribute__((always_inline)) void passes(Quad (&v)[COUNT]) {
    for (int i = 0; i < COUNT; i++)
        if (!(i & HALF)) {
            Quad sum = v[i] + v[i + HALF];
            v[i + HALF] = v[i] - v[i + HALF], v[i] = sum;
        }
    if constexpr (2 * HALF < COUNT) passes<2 * HALF>(v);
}

// Neighbours in memory, all in registers: first within fours, by shuffles, then between them.
template <int COUNT>
static inline __attribute__((always_inline)) void along(const Quad* x, Quad* out, double norm) {
    Quad v[COUNT];
    for (int i = 0; i < COUNT; i++) {
        Quad p = x[i], q = Quad{p[1], p[0], p[3], p[2]} + p * Quad{1, -1, 1, -1};
        v[i] = Quad{q[2], q[3], q[0], q[1]} + q * Quad{1, 1, -1, -1};
    }
    passes<1>(v);
#pragma GCC unroll 8
    for (int i = 0; i < COUNT; i++) out[i] = v[i] * norm;
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
            if (inner == 1 && order == 32) along<8>((const Quad*)from, (Quad*)to, norm);
            else if (inner == 1 && order == 16) along<4>((const Quad*)from, (Quad*)to, norm);
            else if (inner - first < STRIP) across(from, to, inner, int(inner - first), order, norm);
            else if (order == ORDER) across(from, to, inner, STRIP, ORDER, norm);
            else across(from, to, inner, STRIP, order, norm);
        }
}
