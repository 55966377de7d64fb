// y = x w^T for row-major x [M, K] and w [N, K], both of type W, sums in float32.
//
// Weights stay as they are in the checkpoint: each row is streamed once per group of rows of x, and the 16 partial sums
// of a register tile are reduced together. Tiles are MR rows of x by NR rows of w with MR * NR = 16.
#pragma once
#include <algorithm>

#include "simd.h"

namespace boomerang {

template <class W, int MR, int NR>
inline __m512 tile(const W* x, long ldx, const W* w, long ldw, int rows_left, int K, bool prefetch) {
    using D = Dot<W>;
    static_assert(MR * NR == 16);
    const W* rows[NR];
    // Beyond the last row the last one is computed again; its sums are not stored.
    for (int n = 0; n < NR; n++) rows[n] = w + std::min(n, rows_left - 1) * ldw;
    __m512 acc[16];
    for (auto& a : acc) a = _mm512_setzero_ps();
    int k = 0;
    for (; k + D::width <= K; k += D::width) {
        typename D::Vec xv[MR];
        for (int m = 0; m < MR; m++) xv[m] = D::load(x + m * ldx + k);
        for (int n = 0; n < NR; n++) {
            if (prefetch) _mm_prefetch(reinterpret_cast<const char*>(rows[n] + NR * ldw + k), _MM_HINT_T0);
            typename D::Vec wv = D::load(rows[n] + k);
            for (int m = 0; m < MR; m++) acc[m * NR + n] = D::fma(acc[m * NR + n], xv[m], wv);
        }
    }
    if (k < K) {
        typename D::Vec xv[MR];
        for (int m = 0; m < MR; m++) xv[m] = D::load_tail(x + m * ldx + k, K - k);
        for (int n = 0; n < NR; n++) {
            typename D::Vec wv = D::load_tail(rows[n] + k, K - k);
            for (int m = 0; m < MR; m++) acc[m * NR + n] = D::fma(acc[m * NR + n], xv[m], wv);
        }
    }
    return reduce16(acc);
}

// Store one tile's sums: row m takes lanes [m * NR, (m + 1) * NR). `add`: y += (residual), else y =.
template <int MR, int NR, bool add>
inline void put(__m512 sums, float* y, long ldy, const float* bias, int rows_left) {
    int width = std::min(NR, rows_left);
    if (MR == 1) {
        __mmask16 mask = tail16(width);
        if (bias) sums = _mm512_add_ps(sums, _mm512_maskz_loadu_ps(mask, bias));
        if (add) sums = _mm512_add_ps(sums, _mm512_maskz_loadu_ps(mask, y));
        _mm512_mask_storeu_ps(y, mask, sums);
        return;
    }
    alignas(64) float lanes[16];
    _mm512_store_ps(lanes, sums);
    for (int m = 0; m < MR; m++)
        for (int n = 0; n < width; n++) {
            float value = lanes[m * NR + n] + (bias ? bias[n] : 0.0f);
            y[m * ldy + n] = add ? y[m * ldy + n] + value : value;
        }
}

template <class W, int MR, int NR, bool add>
inline void strip(const W* x, long ldx, const W* w, long ldw, const float* bias, float* y, long ldy, int N, int K) {
    for (int n = 0; n < N; n += NR) {
        bool more = MR <= 2 && n + 2 * NR <= N;
        put<MR, NR, add>(tile<W, MR, NR>(x, ldx, w + n * ldw, ldw, N - n, K, more), y + n, ldy, bias ? bias + n : nullptr, N - n);
    }
}

template <class W, bool add = false>
inline void gemm(const W* x, long ldx, int M, const W* w, long ldw, const float* bias, float* y, long ldy, int N, int K) {
    int m = 0;
    for (; m + 4 <= M; m += 4) strip<W, 4, 4, add>(x + m * ldx, ldx, w, ldw, bias, y + m * ldy, ldy, N, K);
    for (; m + 2 <= M; m += 2) strip<W, 2, 8, add>(x + m * ldx, ldx, w, ldw, bias, y + m * ldy, ldy, N, K);
    if (m < M) strip<W, 1, 16, add>(x + m * ldx, ldx, w, ldw, bias, y + m * ldy, ldy, N, K);
}

}  // namespace boomerang
