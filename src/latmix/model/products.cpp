// What rows of a weight make of a few vectors, in float64. The vectors stand side by side in x: (n, VECTORS).

#include <cstdint>

constexpr int VECTORS = 8, ROWS = 8;  // as many rows at a time as sums have room in registers

template <int COUNT>
static inline void products(const float* w, const double* x, double* out, int64_t n, int64_t rows) {
    double sums[COUNT][VECTORS] = {};
    for (int64_t i = 0; i < n; i++)
        for (int r = 0; r < COUNT; r++)
#pragma omp simd
            for (int v = 0; v < VECTORS; v++)
                sums[r][v] = __builtin_fma(double(w[r * n + i]), x[i * VECTORS + v], sums[r][v]);
    for (int r = 0; r < COUNT; r++)
        for (int v = 0; v < VECTORS; v++) out[v * rows + r] = sums[r][v];
}

extern "C" void latmix_products(const float* w, const double* x, double* out, int64_t rows, int64_t n, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; row += ROWS) {
        if (row + ROWS <= rows) products<ROWS>(w + row * n, x, out + row, n, rows);
        else for (int64_t one = row; one < rows; one++) products<1>(w + one * n, x, out + one, n, rows);
    }
}
