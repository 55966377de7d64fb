// y = x w^T for row-major x [M, K] and w [N, K], both of type W, sums in float32.
//
// Weights stay as they are in the checkpoint. A register tile is MR rows of x by NR rows of w with MR * NR = 16, and its
// 16 vectors of partial sums are reduced together.
#pragma once
#include <algorithm>

#include "packed.h"
#include "simd.h"

namespace boomerang {

// How far ahead weights are fetched into the second-level cache: steps of a dot product when one tile uses a row,
// groups of rows when several do. Measured; the first-level cache is too small for either.
constexpr int kAhead = 18;
constexpr int kGroups = 4;

// Sums of one tile; lane m * NR + n belongs to row m of x and row n of w. Rows beyond the last are clamped to it: their
// sums are computed and not stored.
template <class W, int MR, int NR, bool prefetch>
inline __m512 tile(const W* x, long ldx, int x_left, const W* w, long ldw, int w_left, int K) {
    using D = Dot<W>;
    static_assert(MR * NR == 16);
    const W *xs[MR], *ws[NR];
    for (int m = 0; m < MR; m++) xs[m] = x + std::min(m, x_left - 1) * ldx;
    for (int n = 0; n < NR; n++) ws[n] = w + std::min(n, w_left - 1) * ldw;
    __m512 acc[16];
    for (auto& a : acc) a = _mm512_setzero_ps();
    int k = 0;
    for (; k + D::width <= K; k += D::width) {
        typename D::Vec xv[MR];
        for (int m = 0; m < MR; m++) xv[m] = D::load(xs[m] + k);
        // Ahead in this group of rows, or at the start of the next: the hardware does not follow as many short streams.
        const long ahead = k + kAhead * D::width < K ? k + kAhead * D::width : NR * ldw + k + kAhead * D::width - K;
        for (int n = 0; n < NR; n++) {
            if (prefetch) _mm_prefetch(reinterpret_cast<const char*>(ws[n] + ahead), _MM_HINT_T1);
            typename D::Vec wv = D::load(ws[n] + k);
            for (int m = 0; m < MR; m++) acc[m * NR + n] = D::fma(acc[m * NR + n], xv[m], wv);
        }
    }
    if (k < K) {
        typename D::Vec xv[MR];
        for (int m = 0; m < MR; m++) xv[m] = D::load_tail(xs[m] + k, K - k);
        for (int n = 0; n < NR; n++) {
            typename D::Vec wv = D::load_tail(ws[n] + k, K - k);
            for (int m = 0; m < MR; m++) acc[m * NR + n] = D::fma(acc[m * NR + n], xv[m], wv);
        }
    }
    return reduce16(acc);
}

// Store one tile's sums. `add`: y += (residual), else y =.
template <int MR, int NR, bool add>
inline void put(__m512 sums, float* y, long ldy, int x_left, const float* bias, int w_left) {
    const __mmask16 columns = tail16(std::min(NR, w_left));
    for (int m = 0; m < std::min(MR, x_left); m++) {
        __m512 row = sums;
        if (NR == 4) {
            __m128 lanes = m == 0   ? _mm512_castps512_ps128(sums)
                           : m == 1 ? _mm512_extractf32x4_ps(sums, 1)
                           : m == 2 ? _mm512_extractf32x4_ps(sums, 2)
                                    : _mm512_extractf32x4_ps(sums, 3);
            __mmask8 mask = __mmask8(columns);
            if (bias) lanes = _mm_add_ps(lanes, _mm_maskz_loadu_ps(mask, bias));
            if (add) lanes = _mm_add_ps(lanes, _mm_maskz_loadu_ps(mask, y + m * ldy));
            _mm_mask_storeu_ps(y + m * ldy, mask, lanes);
            continue;
        }
        if (NR == 8 && m == 1) row = _mm512_shuffle_f32x4(sums, sums, 0xee);
        if (bias) row = _mm512_add_ps(row, _mm512_maskz_loadu_ps(columns, bias));
        if (add) row = _mm512_add_ps(row, _mm512_maskz_loadu_ps(columns, y + m * ldy));
        _mm512_mask_storeu_ps(y + m * ldy, columns, row);
    }
}

template <class W, int MR, int NR, bool add>
inline void sweep(const W* x, long ldx, int M, const W* w, long ldw, const float* bias, float* y, long ldy, int N, int K) {
    const int tiles = (M + MR - 1) / MR;
    const long lines = (long(NR) * ldw * sizeof(W) + 63) / 64;
    for (int n = 0; n < N; n += NR) {
        const W* rows = w + n * ldw;
        for (int i = 0; i < tiles; i++) {
            const int m = i * MR;
            __m512 sums;
            if (tiles == 1) {
                sums = tile<W, MR, NR, true>(x, ldx, M, rows, ldw, N - n, K);
            } else {
                // Each tile fetches its share of the next group of rows, so that memory and arithmetic overlap.
                // Past the end of the matrix this fetches what is not used, which is harmless.
                for (long line = lines * i / tiles; line < lines * (i + 1) / tiles; line++)
                    _mm_prefetch(reinterpret_cast<const char*>(rows + kGroups * NR * ldw) + 64 * line, _MM_HINT_T1);
                sums = tile<W, MR, NR, false>(x + m * ldx, ldx, M - m, rows, ldw, N - n, K);
            }
            put<MR, NR, add>(sums, y + m * ldy + n, ldy, M - m, bias ? bias + n : nullptr, N - n);
        }
    }
}

template <class W, bool add = false>
inline void gemm(const W* x, long ldx, int M, const W* w, long ldw, const float* bias, float* y, long ldy, int N, int K) {
    if (packs<W>(M, K)) return gemm_packed<W, add>(x, ldx, M, w, ldw, bias, y, ldy, N, K);
    if (M == 1) return sweep<W, 1, 16, add>(x, ldx, M, w, ldw, bias, y, ldy, N, K);
    if (M == 2) return sweep<W, 2, 8, add>(x, ldx, M, w, ldw, bias, y, ldy, N, K);
    // Rows of x stay in the second-level cache while the rows of w pass by, and the chunk of w stays there for the next.
    const int block = std::max(4, int(256 * 1024 / (long(K) * sizeof(W))) / 4 * 4);
    for (int m = 0; m < M; m += block)
        sweep<W, 4, 4, add>(x + m * ldx, ldx, std::min(block, M - m), w, ldw, bias, y + m * ldy, ldy, N, K);
}

}  // namespace boomerang
