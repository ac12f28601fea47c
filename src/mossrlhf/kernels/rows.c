/* Rows of logits on a CPU: what torch_rows.py does, each row read once from memory.

Compiled by c_library.py where it is first used, and called by c_rows.py without the interpreter's
lock. A row is worked on in blocks that stay in the first cache: sums are float32 within a block,
a lane of a vector each, and double over blocks, so that 150 000 words lose no digit.

Loops are written for the compiler to make vectors of: `omp simd` says that no two places of arrays
depend on each other (the gradient may overwrite the logits, place by place) and that sums may be
taken in lanes. Infinite and undefined numbers mean what they mean: no -ffast-math. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#ifndef BLOCK /* tests have smaller ones */
#define BLOCK 256
#endif
#define INLINE static inline __attribute__((always_inline))

enum kind { FLOAT32, BFLOAT16 };

/* `Rows` in c_rows.py, field by field. Strides count numbers; columns are next to each other. */
typedef struct {
    const void *logits, *ref; /* ref: NULL where there is none */
    void *out;
    int64_t logits_kind, ref_kind, out_kind;
    int64_t logits_stride, ref_stride, out_stride;
    const int64_t *ids;
    const float *temperature;
    int64_t temperature_stride;
    float *found; /* [5, N]: log-probability, log-sum-exp, entropy, the reference's, KL */
    float *norms; /* [4, N]: max and sum of exponentials, of policy and reference */
    const float *coefs; /* [4, N]: g, alpha, beta, gamma of rows.py */
    double softcap; /* 0 where there is none */
    int64_t rows, width;
} Rows;

INLINE float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

INLINE uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

/* The smallest x whose exponential is a normal number: -126 ln 2. */
#define LEAST -87.33654f

/* What exponentials are taken of: not below LEAST, so that no infinity is multiplied by zero. NaN
   stays NaN. */
INLINE float at_least(float x) { return x < LEAST ? LEAST : x; }

/* exp(x) for LEAST <= x <= 0, and zero for LEAST itself: x = n ln 2 + r, and a polynomial in r that
   is off by 3e-9, fitted for this file. A number of 1.5 * 2^23 and more has no digits behind the
   point, so adding that rounds, and leaves n in the last bits. */
INLINE float exponential(float x) {
    const float whole = 12582912.0f;
    float shifted = x * 1.44269504f + whole;
    float n = shifted - whole;
    float r = x - n * 0.693359375f; /* nine bits: the product is exact */
    r = r + n * 2.12194440e-4f;
    float p = 0x1.6a23dp-10f;
    p = p * r + 0x1.123a2p-7f;
    p = p * r + 0x1.5558f2p-5f;
    p = p * r + 0x1.555492p-3f;
    p = p * r + 0x1.fffffcp-2f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    float power = float_of((bits_of(shifted) << 23) + 0x3f800000u);
    return x == LEAST ? 0.0f : p * power;
}

/* The numbers of a row from `start` on: where they are, or converted into `room`. */
INLINE const float *numbers(const void *row, int64_t kind, int64_t start, int64_t count,
                            float *room) {
    if (kind == FLOAT32) return (const float *)row + start;
    const uint16_t *half = (const uint16_t *)row + start;
#pragma omp simd
    for (int64_t i = 0; i < count; i++) room[i] = float_of((uint32_t)half[i] << 16);
    return room;
}

/* Round to the nearest, ties to even. */
INLINE void store_half(uint16_t *to, const float *from, int64_t count) {
#pragma omp simd
    for (int64_t i = 0; i < count; i++) {
        uint32_t bits = bits_of(from[i]);
        uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
        to[i] = from[i] != from[i] ? 0x7fc0 : (uint16_t)rounded;
    }
}

INLINE const void *row_of(const void *base, int64_t kind, int64_t stride, int64_t row) {
    return (const char *)base + row * stride * (kind == FLOAT32 ? 4 : 2);
}

INLINE float number(const void *row, int64_t kind, int64_t at) {
    float room;
    return *numbers(row, kind, at, 1, &room);
}

/* NaN is passed over: the sum of exponentials will be NaN. */
static float highest(const void *row, int64_t kind, int64_t width) {
    float room[BLOCK], most = -INFINITY;
    for (int64_t start = 0; start < width; start += BLOCK) {
        int64_t count = width - start < BLOCK ? width - start : BLOCK;
        const float *z = numbers(row, kind, start, count, room);
#pragma omp simd reduction(max : most)
        for (int64_t i = 0; i < count; i++) most = z[i] > most ? z[i] : most;
    }
    return most;
}

typedef struct {
    double d, weighted, ref_d, cross; /* sums of e, e x, exp(r), e r */
} Sums;

/* `warm` and `with_ref` are constants where this is called: a loop of its own for each. The highest
   is subtracted before it is divided by the temperature: logits far from zero keep their digits. */
INLINE void add_block(Sums *sums, const float *z, const float *zr, int64_t count, float m,
                      float ref_m, float t, const int warm, const int with_ref) {
    float d = 0, weighted = 0, ref_d = 0, cross = 0;
#pragma omp simd reduction(+ : d, weighted, ref_d, cross)
    for (int64_t i = 0; i < count; i++) {
        float x = at_least(warm ? (z[i] - m) / t : z[i] - m);
        float e = exponential(x);
        d += e;
        weighted += e * x;
        if (with_ref) {
            float r = warm ? (zr[i] - ref_m) / t : zr[i] - ref_m;
            ref_d += exponential(at_least(r));
            cross += e == 0.0f ? 0.0f : e * r; /* infinite where the reference's support is less */
        }
    }
    sums->d += d;
    sums->weighted += weighted;
    sums->ref_d += ref_d;
    sums->cross += cross;
}

static void stats_of_row(const Rows *w, int64_t row) {
    const int64_t label = w->ids[row], n = w->rows;
    const void *logits = row_of(w->logits, w->logits_kind, w->logits_stride, row);
    const void *ref = w->ref ? row_of(w->ref, w->ref_kind, w->ref_stride, row) : 0;
    const float t = w->temperature[row * w->temperature_stride];
    const float m = highest(logits, w->logits_kind, w->width);
    const float ref_m = ref ? highest(ref, w->ref_kind, w->width) : 0;
    float room[BLOCK], ref_room[BLOCK];
    Sums sums = {0, 0, 0, 0};
    for (int64_t start = 0; start < w->width; start += BLOCK) {
        int64_t count = w->width - start < BLOCK ? w->width - start : BLOCK;
        const float *z = numbers(logits, w->logits_kind, start, count, room);
        const float *zr = ref ? numbers(ref, w->ref_kind, start, count, ref_room) : z;
        switch ((t != 1.0f) + 2 * (ref != 0)) {
            case 0: add_block(&sums, z, zr, count, m, ref_m, t, 0, 0); break;
            case 1: add_block(&sums, z, zr, count, m, ref_m, t, 1, 0); break;
            case 2: add_block(&sums, z, zr, count, m, ref_m, t, 0, 1); break;
            case 3: add_block(&sums, z, zr, count, m, ref_m, t, 1, 1); break;
        }
    }
    const double log_d = log(sums.d), log_ref_d = log(sums.ref_d);
    const float chosen = number(logits, w->logits_kind, label) - m;
    w->found[row] = (float)((double)chosen / t - log_d);
    w->found[n + row] = (float)((double)m / t + log_d);
    w->found[2 * n + row] = (float)(log_d - sums.weighted / sums.d);
    w->norms[row] = m;
    w->norms[n + row] = (float)sums.d;
    if (!ref) return;
    const float ref_chosen = number(ref, w->ref_kind, label) - ref_m;
    w->found[3 * n + row] = (float)((double)ref_chosen / t - log_ref_d);
    w->found[4 * n + row] =
        (float)((sums.weighted - sums.cross) / sums.d - log_d + log_ref_d);
    w->norms[2 * n + row] = ref_m;
    w->norms[3 * n + row] = (float)sums.ref_d;
}

/* What the gradient of a row is made of: coefficients over temperature and sum of exponentials. */
typedef struct {
    float m, ref_m, t, alpha, beta, gamma, cap; /* cap: 1 / softcap^2 */
} Slope;

INLINE void write_block(float *out, const float *z, const float *zr, int64_t count, Slope s,
                        const int warm, const int with_ref, const int capped) {
#pragma omp simd
    for (int64_t i = 0; i < count; i++) {
        float x = at_least(warm ? (z[i] - s.m) / s.t : z[i] - s.m);
        float e = exponential(x);
        float slope = s.alpha + s.beta * x;
        if (with_ref) {
            float r = warm ? (zr[i] - s.ref_m) / s.t : zr[i] - s.ref_m;
            slope += s.gamma * (e == 0.0f ? 0.0f : r);
        }
        float dz = e * slope;
        out[i] = capped ? dz * (1.0f - z[i] * z[i] * s.cap) : dz;
    }
}

static void gradient_of_row(const Rows *w, int64_t row) {
    const int64_t label = w->ids[row], n = w->rows, width = w->width;
    const float *coef = w->coefs + row, *norm = w->norms + row;
    void *out = (void *)row_of(w->out, w->out_kind, w->out_stride, row);
    /* Not even read where nothing comes of it: NaN times zero is NaN. */
    if (label < 0 || (coef[0] == 0 && coef[n] == 0 && coef[2 * n] == 0 && coef[3 * n] == 0)) {
        memset(out, 0, width * (w->out_kind == FLOAT32 ? 4 : 2));
        return;
    }
    const void *logits = row_of(w->logits, w->logits_kind, w->logits_stride, row);
    /* Nor is the reference, whose -inf times zero is NaN. */
    const void *ref =
        w->ref && coef[3 * n] != 0 ? row_of(w->ref, w->ref_kind, w->ref_stride, row) : 0;
    const float t = w->temperature[row * w->temperature_stride];
    const double over = (double)t * norm[n], c = w->softcap, cap = c ? 1 / (c * c) : 0;
    const Slope s = {norm[0], norm[2 * n], t, (float)(coef[n] / over), (float)(coef[2 * n] / over),
                     (float)(coef[3 * n] / over), (float)cap};
    const double chosen = number(logits, w->logits_kind, label); /* before it is overwritten */
    const float at_label = (float)(coef[0] / t * (cap ? 1 - chosen * chosen * cap : 1));
    float room[BLOCK], ref_room[BLOCK], out_room[BLOCK];
    for (int64_t start = 0; start < width; start += BLOCK) {
        int64_t count = width - start < BLOCK ? width - start : BLOCK;
        const float *z = numbers(logits, w->logits_kind, start, count, room);
        const float *zr = ref ? numbers(ref, w->ref_kind, start, count, ref_room) : z;
        float *to = w->out_kind == FLOAT32 ? (float *)out + start : out_room;
        switch ((t != 1.0f) + 2 * (ref != 0) + 4 * (cap != 0)) {
            case 0: write_block(to, z, zr, count, s, 0, 0, 0); break;
            case 1: write_block(to, z, zr, count, s, 1, 0, 0); break;
            case 2: write_block(to, z, zr, count, s, 0, 1, 0); break;
            case 3: write_block(to, z, zr, count, s, 1, 1, 0); break;
            case 4: write_block(to, z, zr, count, s, 0, 0, 1); break;
            case 5: write_block(to, z, zr, count, s, 1, 0, 1); break;
            case 6: write_block(to, z, zr, count, s, 0, 1, 1); break;
            case 7: write_block(to, z, zr, count, s, 1, 1, 1); break;
        }
        if (start <= label && label < start + count) to[label - start] += at_label;
        if (w->out_kind == BFLOAT16) store_half((uint16_t *)out + start, to, count);
    }
}

/* Every `step`-th row from `first` on: what one thread does. Labels are below the width: the
   caller has looked. */
void mossrlhf_stats(const Rows *w, int64_t first, int64_t step) {
    for (int64_t row = first; row < w->rows; row += step)
        if (w->ids[row] >= 0) stats_of_row(w, row);
}

void mossrlhf_gradient(const Rows *w, int64_t first, int64_t step) {
    for (int64_t row = first; row < w->rows; row += step) gradient_of_row(w, row);
}
