// y = x w^T for many rows of x: the weights of a chunk are repacked on the fly and reused for all rows.
//
// A panel holds 32 rows of w, transposed in units of four bytes (one float, or two bfloat16 that one dot-product
// instruction takes together): unit u of all 32 rows lies in two vectors. Each instruction then multiplies one unit of a
// row of x, broadcast from memory, with 16 rows of w, and sums need no reduction. Packing costs about one pass over w.
#pragma once
#include <algorithm>
#include <cstdlib>
#include <memory>

#include "simd.h"

namespace boomerang {

constexpr int kPanel = 32;     // rows of w in a panel
constexpr int kPackedRows = 96;  // rows of x from which packing pays

template <class W>
struct Unit;
template <>
struct Unit<float> {
    static __m512 fma(__m512 acc, const void* x, __m512i w) {
        return _mm512_fmadd_ps(_mm512_set1_ps(*static_cast<const float*>(x)), _mm512_castsi512_ps(w), acc);
    }
};
template <>
struct Unit<bf16> {
    static __m512 fma(__m512 acc, const void* x, __m512i w) {
        int32_t pair;
        std::memcpy(&pair, x, 4);
        return _mm512_dpbf16_ps(acc, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)w);
    }
};

// 16 x 16 four-byte values, rows to columns.
inline void transpose16(__m512i* r) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

// Pack rows [0, 32) of w (clamped to `rows`) into panel[unit][32].
template <class W>
inline void pack(const W* w, long ldw, int rows, int units, __m512i* panel) {
    for (int half = 0; half < 2; half++)
        for (int u = 0; u < units; u += 16) {
            __m512i block[16];
            __mmask16 mask = tail16(units - u);
            for (int i = 0; i < 16; i++) {
                const W* row = w + std::min(16 * half + i, rows - 1) * ldw;
                block[i] = _mm512_maskz_loadu_epi32(mask, reinterpret_cast<const char*>(row) + 4L * u);
            }
            transpose16(block);
            for (int i = 0; i < std::min(16, units - u); i++) panel[2 * (u + i) + half] = block[i];
        }
}

template <class W, int MR, bool add>
inline void panel_rows(const W* x, long ldx, const __m512i* panel, int units, const float* bias, float* y, long ldy, int columns) {
    __m512 acc[MR][2];
#pragma GCC unroll 16
    for (int m = 0; m < MR; m++) acc[m][0] = acc[m][1] = _mm512_setzero_ps();
    for (int u = 0; u < units; u++) {
        const __m512i b0 = _mm512_load_si512(panel + 2 * u), b1 = _mm512_load_si512(panel + 2 * u + 1);
#pragma GCC unroll 16
        for (int m = 0; m < MR; m++) {
            const char* unit = reinterpret_cast<const char*>(x + m * ldx) + 4L * u;
            acc[m][0] = Unit<W>::fma(acc[m][0], unit, b0);
            acc[m][1] = Unit<W>::fma(acc[m][1], unit, b1);
        }
    }
#pragma GCC unroll 16
    for (int m = 0; m < MR; m++)
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            __mmask16 mask = tail16(columns - 16 * half);
            float* to = y + m * ldy + 16 * half;
            __m512 sum = acc[m][half];
            if (bias) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(mask, bias + 16 * half));
            if (add) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(mask, to));
            _mm512_mask_storeu_ps(to, mask, sum);
        }
}

template <class W>
inline bool packs(int M, int K) {
    return M >= kPackedRows && K * sizeof(W) % 4 == 0;
}

template <class W, bool add>
inline void gemm_packed(const W* x, long ldx, int M, const W* w, long ldw, const float* bias, float* y, long ldy, int N, int K) {
    const int units = int(K * sizeof(W) / 4);
    static thread_local std::unique_ptr<__m512i, decltype(&std::free)> panel(nullptr, &std::free);
    static thread_local int capacity = 0;
    if (capacity < units) {
        panel.reset(static_cast<__m512i*>(std::aligned_alloc(64, size_t(units) * 128)));
        capacity = units;
    }
    for (int n = 0; n < N; n += kPanel) {
        const int columns = std::min(kPanel, N - n);
        pack(w + n * ldw, ldw, columns, units, panel.get());
        const float* b = bias ? bias + n : nullptr;
        int m = 0;
        for (; m + 12 <= M; m += 12) panel_rows<W, 12, add>(x + m * ldx, ldx, panel.get(), units, b, y + m * ldy + n, ldy, columns);
        for (; m + 4 <= M; m += 4) panel_rows<W, 4, add>(x + m * ldx, ldx, panel.get(), units, b, y + m * ldy + n, ldy, columns);
        for (; m < M; m++) panel_rows<W, 1, add>(x + m * ldx, ldx, panel.get(), units, b, y + m * ldy + n, ldy, columns);
    }
}

}  // namespace boomerang
