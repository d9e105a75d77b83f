// The arithmetic of blocks on a CPU, the one that `scales`, `rounding`, `fakequant` and `codes` define: laws hold both to
// the same bits. Rows of whole blocks, float32 or bfloat16, power-of-two scales by a rule that looks at the largest
// magnitude only.
//
// Plain loops that a compiler turns into vectors. Blocks are taken sixteen at a time, so that their scales, a dozen
// operations in float64, fill vectors as well: one block at a time would spend most of its time there. Magnitude and sign
// are kept apart, as bits: no operation here can lose the sign of a zero, and NaN and Inf are the largest integers.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#ifdef __linux__
#include <sys/mman.h>
#endif

struct Format {  // latmix.numerics.native.Format
    int64_t block;
    double unit, carry;                // scale = p * unit, or twice that from amax = p * carry on; p = 2^floor(log2(amax))
    float max, smallest_normal, step;  // of the element; step = 2^-mantissa_bits
    float units;                       // how many of the element's smallest number make 1
    int32_t away, complement, bits, shift, offset;  // its codes are float32's bits >> shift, less the offset
};

struct bfloat16 {
    uint16_t bits;
};

template <class To, class From>
static inline To as(From x) {
    static_assert(sizeof(To) == sizeof(From));
    To y;
    std::memcpy(&y, &x, sizeof y);
    return y;
}

static inline float wide(float x) { return x; }
static inline float wide(bfloat16 x) { return as<float>(uint32_t(x.bits) << 16); }
static inline void store(float x, float& out) { out = x; }
static inline void store(float x, bfloat16& out) {  // to nearest even; a NaN that was widened has no bits to carry
    uint32_t bits = as<uint32_t>(x);
    out.bits = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

static inline int32_t magnitude(float x) { return as<int32_t>(x) & 0x7fffffff; }
static inline int32_t sign(float x) { return as<int32_t>(x) & INT32_MIN; }

static inline int32_t largest(const bfloat16* x, int64_t block) {
    uint16_t top = 0;
#pragma omp simd reduction(max : top)
    for (int64_t i = 0; i < block; i++) top = std::max<uint16_t>(top, x[i].bits & 0x7fff);
    return top << 16;
}

template <class T>
static inline int32_t largest(const T* x, int64_t block) {
    int32_t top = 0;
#pragma omp simd reduction(max : top)
    for (int64_t i = 0; i < block; i++) top = std::max(top, magnitude(wide(x[i])));
    return top;
}

static inline float scale(float amax, const Format& f) {
    double wide_amax = amax, p = as<double>(as<int64_t>(wide_amax) & 0x7ff0000000000000);
    double scale = p * f.unit * (wide_amax >= p * f.carry ? 2 : 1);
    return float(std::min(std::max(scale, 0x1p-127), 0x1p127) + (wide_amax - wide_amax));  // NaN for Inf and NaN
}

static inline float nearest(float y, const Format& f) {  // the magnitude of the grid's number next to |y|
    float m = std::min(as<float>(magnitude(y)), f.max);
    float spacing = std::max(as<float>(as<int32_t>(m) & 0x7f800000), f.smallest_normal) * f.step;
    float steps = m * as<float>((254 << 23) - as<int32_t>(spacing));  // the reciprocal of a power of two
    return (f.away ? std::trunc(steps + (0.5f - 0x1p-25f)) : std::rint(steps)) * spacing;
}

static inline float with_sign(float m, float y, const Format& f) {  // two's complement has no -0
    return as<float>(as<int32_t>(m) | (f.complement && m == 0 ? 0 : sign(y)));
}

constexpr int TILE = 16;

template <class T, class Each>  // each(which, scale, its reciprocal) of up to TILE blocks, under given scales or the rule's
static inline void tile(const T* x, const float* given, int count, const Format& f, Each each) {
    float amax[TILE] = {}, scales[TILE], inverses[TILE];
    if (given) std::copy(given, given + count, scales);
    else {
        for (int b = 0; b < count; b++) amax[b] = as<float>(largest(x + b * f.block, f.block));
#pragma omp simd
        for (int b = 0; b < TILE; b++) scales[b] = scale(amax[b], f);
    }
    for (int b = 0; b < count; b++) inverses[b] = 1 / scales[b];
    for (int b = 0; b < count; b++) each(b, scales[b], inverses[b]);
}

static inline void put(float x, float& out) { out = x; }
static inline void put(float x, bfloat16& out) { out.bits = as<uint32_t>(x) >> 16; }  // which holds what any format does

template <class T, class U>
static inline void quantize_block(const T* x, U* out, float scale, float inverse, const Format& f) {
#pragma omp simd
    for (int64_t i = 0; i < f.block; i++) {
        float y = wide(x[i]) * inverse;
        put(with_sign(nearest(y, f), y, f) * scale, out[i]);
    }
}

template <class T, class U>
static inline void quantize_as(const T* x, U* out, int count, const Format& f) {
    tile(x, nullptr, count, f,
         [=, &f](int b, float scale, float inverse) { quantize_block(x + b * f.block, out + b * f.block, scale, inverse, f); });
}

template <class T, class U>
static inline void quantize(const T* x, U* out, int count, const Format& f) {
    if (f.block == 32 && !f.away && !f.complement) {
        Format usual = f;
        usual.block = 32, usual.away = usual.complement = 0;
        quantize_as(x, out, count, usual);
    } else quantize_as(x, out, count, f);
}

// E2M1 in bfloat16, as integers of sixteen bits, of which a vector holds twice as many as floats: a magnitude loses its
// last six bits, to nearest even, and below the scale there are three numbers. Blocks of 32 whose scale has neighbours.
static inline void quantize(const bfloat16* x, bfloat16* out, int count, const Format& f) {
    if (f.block != 32 || f.max != 6 || f.smallest_normal != 1 || f.step != 0.5f || f.away)
        return quantize<bfloat16, bfloat16>(x, out, count, f);
    Format usual = f;
    usual.block = 32;
    tile(x, nullptr, count, usual, [=, &f](int b, float scale, float inverse) {
        const bfloat16* from = x + b * 32;
        bfloat16* to = out + b * 32;
        if (!(scale >= 0x1p-120f && scale <= 0x1p120f)) return quantize_block(from, to, scale, inverse, f);
        const int16_t one = as<uint32_t>(scale) >> 16, half = one - 0x80, quarter = one - 0x100, six = one + 0x140;
        const int16_t three_quarters = one - 0x40;
#pragma omp simd
        for (int i = 0; i < 32; i++) {
            int16_t m = from[i].bits & 0x7fff, even = m >> 6 & 1, rounded = (m + 0x1f + even) & ~0x3f;
            int16_t large = rounded < six ? rounded : six, small = m > quarter ? half : int16_t(0);
            small = m < three_quarters ? small : one;
            to[i].bits = (m < one ? small : large) | (from[i].bits & 0x8000);
        }
    });
}

template <class T>
static void values(const T* x, T* out, int64_t blocks, const Format& f, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t b = 0; b < blocks; b += TILE)
        quantize(x + b * f.block, out + b * f.block, std::min<int64_t>(TILE, blocks - b), f);
}

typedef float Eight __attribute__((vector_size(32), aligned(4), may_alias));

// By the Hadamard matrix of order 32, in place, all in registers: first within eights, by shuffles, then between them.
static inline void rotate(float* x, float norm) {
    Eight v[4];
    for (int i = 0; i < 4; i++) {
        Eight p = ((Eight*)x)[i], q = Eight{p[1], p[0], p[3], p[2], p[5], p[4], p[7], p[6]} + p * Eight{1, -1, 1, -1, 1, -1, 1, -1};
        Eight r = Eight{q[2], q[3], q[0], q[1], q[6], q[7], q[4], q[5]} + q * Eight{1, 1, -1, -1, 1, 1, -1, -1};
        v[i] = Eight{r[4], r[5], r[6], r[7], r[0], r[1], r[2], r[3]} + r * Eight{1, 1, 1, 1, -1, -1, -1, -1};
    }
    Eight a = v[0] + v[1], b = v[0] - v[1], c = v[2] + v[3], d = v[2] - v[3], *out = (Eight*)x;
    out[0] = (a + c) * norm, out[1] = (b + d) * norm, out[2] = (a - c) * norm, out[3] = (b - d) * norm;
}

// The same of any order. All passes are the same: sums of neighbours to the first half, differences to the second.
static inline void rotate(float* v, float* u, int64_t block, float norm) {
    for (int64_t order = 1; order < block; order *= 2) {
        std::memcpy(u, v, block * sizeof(float));
#pragma omp simd
        for (int64_t i = 0; i < block / 2; i++) {
            v[i] = u[2 * i] + u[2 * i + 1];
            v[block / 2 + i] = u[2 * i] - u[2 * i + 1];
        }
    }
    for (int64_t i = 0; i < block; i++) v[i] *= norm;
}

struct alignas(64) Line {  // of the cache: vectors that lie across two take twice the time
    float numbers[16];
};

template <class T>
static void rotated_values(const T* x, T* out, int64_t blocks, const Format& f, int threads) {
    const float norm = 1 / std::sqrt(float(f.block));
#pragma omp parallel num_threads(threads)
    {
        std::vector<Line> lines(TILE * f.block / 16 + 1), before(f.block / 16 + 1);
        float* tile = lines.data()->numbers;
#pragma omp for schedule(static)
        for (int64_t b = 0; b < blocks; b += TILE) {
            int count = std::min<int64_t>(TILE, blocks - b);
            for (int c = 0; c < count; c++) {
                float *v = tile + c * f.block, *u = before.data()->numbers;
                for (int64_t i = 0; i < f.block; i++) v[i] = wide(x[(b + c) * f.block + i]);
                f.block == 32 ? rotate(v, norm) : rotate(v, u, f.block, norm);
            }
            quantize<float>(tile, out + b * f.block, count, f);
        }
    }
}

template <class T>
static inline void encode_as(const T* x, const float* given, uint8_t* out, uint8_t* scale_bytes, int count, const Format& f) {
    tile(x, given, count, f, [=, &f](int b, float scale, float inverse) {
        const T* from = x + b * f.block;
        uint8_t* to = out + b * f.block;
        int32_t kept = scale == scale ? -1 : 0;  // of a NaN scale's block codes are 0
        scale_bytes[b] = kept ? std::ilogb(scale) + 127 : 0xff;
#pragma omp simd
        for (int64_t i = 0; i < f.block; i++) {
            float y = wide(from[i]) * inverse, m = nearest(y, f);
            int32_t negative = as<int32_t>(y) >> 31, code = (as<int32_t>(m) >> f.shift) - f.offset;
            code = m < f.smallest_normal ? int32_t(m * f.units) : code;  // no subnormal float: they are slow
            code = f.complement ? (code ^ negative) - negative : code | (negative & 1 << (f.bits - 1));
            to[i] = code & ((1 << f.bits) - 1) & kept;
        }
    });
}

template <class T>
static inline void encode(const T* x, const float* given, uint8_t* out, uint8_t* scale_bytes, int count, const Format& f) {
    if (f.block == 32 && !f.away && !f.complement && f.bits == 4) {
        Format usual = f;
        usual.block = 32, usual.away = usual.complement = 0, usual.bits = 4;
        encode_as(x, given, out, scale_bytes, count, usual);
    } else encode_as(x, given, out, scale_bytes, count, f);
}

template <class T>
static void codes(const T* x, const float* given, uint8_t* out, uint8_t* scale_bytes, int64_t blocks, const Format& f,
                  int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t b = 0; b < blocks; b += TILE)
        encode(x + b * f.block, given ? given + b : nullptr, out + b * f.block, scale_bytes + b,
               std::min<int64_t>(TILE, blocks - b), f);
}

template <class T>
static void gradient(const T* g, const T* x, const T* q, T* out, int64_t blocks, const Format& f, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t b = 0; b < blocks; b++) {
        int64_t start = b * f.block, place = 0;
        float along = 0, peak = as<float>(largest(x + start, f.block));
#pragma omp simd reduction(+ : along)
        for (int64_t i = 0; i < f.block; i++) along += wide(g[start + i]) * (wide(q[start + i]) - wide(x[start + i]));
        std::copy(g + start, g + start + f.block, out + start);
        while (magnitude(wide(x[start + place])) != as<int32_t>(peak)) place++;
        float gain = peak == 0 ? 0 : along / peak;
        store(wide(g[start + place]) + as<float>(as<int32_t>(gain) ^ sign(wide(x[start + place]))), out[start + place]);
    }
}

// GPTQ within a panel of columns: column c rounds wanted[c] + sum over j < c of feedback[c, j] * error[j], which makes
// error[c]. Columns are contiguous, and rows know nothing of each other: a strip of them at a time, whose errors fit the
// nearest cache. `weight` becomes the rounded values. Scales may be any numbers.
constexpr int STRIP = 64;

static inline void strip(float* weight, const float* wanted, float* error, const float* feedback, const float* scales,
                         int64_t columns, int64_t rows, int count, float* errors, const Format& f) {
    for (int64_t c = 0; c < columns; c++) {
        float target[STRIP];
        for (int r = 0; r < count; r++) target[r] = wanted[c * rows + r];
        for (int64_t j = 0; j < c; j++)
            for (int r = 0; r < count; r++) target[r] += feedback[c * columns + j] * errors[j * STRIP + r];
#pragma omp simd
        for (int r = 0; r < count; r++) {
            float scale = scales[c * rows + r], y = target[r] / scale;
            float rounded = with_sign(nearest(y, f), y, f) * scale;
            error[c * rows + r] = errors[c * STRIP + r] = weight[c * rows + r] - rounded;
            weight[c * rows + r] = rounded;
        }
    }
}

extern "C" {

void latmix_columns(float* weight, const float* wanted, float* error, const float* feedback, const float* scales,
                    int64_t columns, int64_t rows, const Format* f, int threads) {
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> errors(columns * STRIP);
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; r += STRIP) {
            int64_t count = std::min<int64_t>(STRIP, rows - r);
            if (count == STRIP)  // a constant, for which the compiler writes other loops
                strip(weight + r, wanted + r, error + r, feedback, scales + r, columns, rows, STRIP, errors.data(), *f);
            else
                strip(weight + r, wanted + r, error + r, feedback, scales + r, columns, rows, count, errors.data(), *f);
        }
    }
}

void latmix_values(bool half, const void* x, void* out, int64_t blocks, const Format* f, int threads) {
    if (half) values((const bfloat16*)x, (bfloat16*)out, blocks, *f, threads);
    else values((const float*)x, (float*)out, blocks, *f, threads);
}

void latmix_rotated_values(bool half, const void* x, void* out, int64_t blocks, const Format* f, int threads) {
    if (half) rotated_values((const bfloat16*)x, (bfloat16*)out, blocks, *f, threads);
    else rotated_values((const float*)x, (float*)out, blocks, *f, threads);
}

void latmix_gradient(bool half, const void* g, const void* x, const void* q, void* out, int64_t blocks, const Format* f,
                     int threads) {
    using H = const bfloat16*;
    using F = const float*;
    if (half) gradient((H)g, (H)x, (H)q, (bfloat16*)out, blocks, *f, threads);
    else gradient((F)g, (F)x, (F)q, (float*)out, blocks, *f, threads);
}

void latmix_codes(bool half, const void* x, const float* given, uint8_t* out, uint8_t* scale_bytes, int64_t blocks,
                  const Format* f, int threads) {
    if (half) codes((const bfloat16*)x, given, out, scale_bytes, blocks, *f, threads);
    else codes((const float*)x, given, out, scale_bytes, blocks, *f, threads);
}

void latmix_pack(const uint8_t* codes, uint8_t* out, int64_t bytes, int threads) {
#pragma omp parallel for simd num_threads(threads)
    for (int64_t i = 0; i < bytes; i++) out[i] = codes[2 * i] | codes[2 * i + 1] << 4;
}

// Memory fresh from the system comes in pages of 4 KiB, each at the price of an interrupt; whoever writes all of it does
// better with 2 MiB. A hint: where it is refused, nothing changes.
void latmix_expect_writing(char* memory, int64_t bytes) {
#ifdef MADV_HUGEPAGE
    char* page = (char*)((uintptr_t(memory) + 4095) & ~uintptr_t(4095));
    madvise(page, memory + bytes - page, MADV_HUGEPAGE);
#endif
}
}
