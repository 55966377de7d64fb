// Paged attention for one (request, KV head, range of query tokens): online softmax over blocks of pages.
//
// A page holds K and V of `page_size` tokens, [kv_heads, page_size, head_dim] each. The query heads of a KV head are
// handled together, so K and V are read once for all of them.
#pragma once
#include <vector>

#include "gemm.h"

namespace boomerang {

constexpr int kQueryTokens = 16;   // of one work item
constexpr int kBlock = 256;        // positions between two updates of the running softmax

template <class W>
struct AttentionItem {
    const W* q;              // first query row of the first token and head: [tokens, q_stride] with `group` rows of D each
    long q_stride;           // between tokens
    float* out;              // same shape as q in float
    long out_stride;
    const W* k_pages;        // pool
    const W* v_pages;
    const int32_t* table;    // page of each block of page_size positions
    long page_stride;        // elements between pages
    long head_offset;        // elements from the start of a page to this KV head
    int group;               // query heads per KV head
    int head_dim;
    int page_size;
    int num_tokens;          // query tokens of this item, <= kQueryTokens
    int first_position;      // position of the first of them; query i sees positions <= first_position + i
    float scale;
};

struct AttentionScratch {
    std::vector<float> scores, out, stats;
    std::vector<char> q;
};

// acc[m][:] += sum over n of p[m][n] v[n][:], for R rows at once and up to 64 channels.
template <class W, int R, int C>
inline void accumulate(const float* p, long ldp, const W* v, int D, int num, float* acc, int d, __mmask16 last) {
    __m512 sums[R][C];
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) sums[r][c] = load16(acc + r * D + d + 16 * c, c == C - 1 ? last : 0xffff);
    for (int n = 0; n < num; n++) {
        __m512 values[C];
        for (int c = 0; c < C; c++) values[c] = load16(v + long(n) * D + d + 16 * c, c == C - 1 ? last : 0xffff);
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
            __m512 weight = _mm512_set1_ps(p[r * ldp + n]);
#pragma GCC unroll 4
            for (int c = 0; c < C; c++) sums[r][c] = _mm512_fmadd_ps(weight, values[c], sums[r][c]);
        }
    }
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) store16(acc + r * D + d + 16 * c, sums[r][c], c == C - 1 ? last : 0xffff);
}

template <class W, int R>
inline void accumulate_rows(const float* p, long ldp, const W* v, int D, int num, float* acc) {
    for (int d = 0; d < D; d += 64) {
        int left = std::min(D - d, 64), vectors = (left + 15) / 16;
        __mmask16 last = tail16(left - 16 * (vectors - 1));
        if (vectors == 4) accumulate<W, R, 4>(p, ldp, v, D, num, acc, d, last);
        if (vectors == 3) accumulate<W, R, 3>(p, ldp, v, D, num, acc, d, last);
        if (vectors == 2) accumulate<W, R, 2>(p, ldp, v, D, num, acc, d, last);
        if (vectors == 1) accumulate<W, R, 1>(p, ldp, v, D, num, acc, d, last);
    }
}

// Softmax update of one row: scores become exp(score - new maximum); returns the factor for what was accumulated before.
inline float update_row(float* scores, int num, float scale, float& maximum, float& total) {
    __m512 top = _mm512_set1_ps(-INFINITY);
    for (int n = 0; n < num; n += 16)
        top = _mm512_max_ps(top, _mm512_mask_loadu_ps(_mm512_set1_ps(-INFINITY), tail16(num - n), scores + n));
    float peak = std::max(maximum, _mm512_reduce_max_ps(top) * scale);
    __m512 sum = _mm512_setzero_ps();
    for (int n = 0; n < num; n += 16) {
        __mmask16 mask = tail16(num - n);
        __m512 x = _mm512_fmsub_ps(_mm512_maskz_loadu_ps(mask, scores + n), _mm512_set1_ps(scale), _mm512_set1_ps(peak));
        __m512 e = _mm512_maskz_mov_ps(mask, exp16(x));
        sum = _mm512_add_ps(sum, e);
        _mm512_mask_storeu_ps(scores + n, mask, e);
    }
    float factor = maximum == -INFINITY ? 0.0f : std::exp(maximum - peak);
    total = total * factor + _mm512_reduce_add_ps(sum);
    maximum = peak;
    return factor;
}

template <class W>
void attend(const AttentionItem<W>& item, AttentionScratch& scratch) {
    const int D = item.head_dim, G = item.group, rows = item.num_tokens * G, P = item.page_size;
    scratch.q.resize(size_t(rows) * D * sizeof(W));
    scratch.scores.resize(size_t(rows) * kBlock);
    scratch.out.assign(size_t(rows) * D, 0.0f);
    scratch.stats.assign(size_t(rows) * 2, 0.0f);
    W* q = reinterpret_cast<W*>(scratch.q.data());
    for (int t = 0; t < item.num_tokens; t++) std::memcpy(q + long(t) * G * D, item.q + t * item.q_stride, sizeof(W) * G * D);
    float *scores = scratch.scores.data(), *acc = scratch.out.data(), *maximum = scratch.stats.data(), *total = maximum + rows;
    for (int r = 0; r < rows; r++) maximum[r] = -INFINITY;

    const int end = item.first_position + item.num_tokens;  // positions [0, end) exist for the last query
    const int block = std::max(kBlock / P, 1) * P;
    scratch.scores.resize(size_t(rows) * block);
    scores = scratch.scores.data();
    for (int begin = 0; begin < end; begin += block) {
        const int width = std::min(block, end - begin);
        for (int n = 0; n < width; n += P) {
            const W* k = item.k_pages + item.table[(begin + n) / P] * item.page_stride + item.head_offset;
            gemm<W>(q, D, rows, k, D, nullptr, scores + n, block, std::min(P, width - n), D);
        }
        for (int r = 0; r < rows; r++) {
            int seen = std::min(width, item.first_position + r / G + 1 - begin);
            float* row = scores + long(r) * block;
            if (seen <= 0) {  // only possible after its first block, so the row's maximum is finite
                std::fill(row, row + width, 0.0f);
                continue;
            }
            float factor = update_row(row, seen, item.scale, maximum[r], total[r]);
            std::fill(row + seen, row + width, 0.0f);
            if (begin && factor != 1.0f)
                for (int d = 0; d < D; d++) acc[long(r) * D + d] *= factor;
        }
        for (int n = 0; n < width; n += P) {
            const W* v = item.v_pages + item.table[(begin + n) / P] * item.page_stride + item.head_offset;
            int num = std::min(P, width - n), r = 0;
            for (; r + 4 <= rows; r += 4) accumulate_rows<W, 4>(scores + long(r) * block + n, block, v, D, num, acc + long(r) * D);
            for (; r + 2 <= rows; r += 2) accumulate_rows<W, 2>(scores + long(r) * block + n, block, v, D, num, acc + long(r) * D);
            for (; r < rows; r++) accumulate_rows<W, 1>(scores + long(r) * block + n, block, v, D, num, acc + long(r) * D);
        }
    }
    for (int r = 0; r < rows; r++) {
        float scale = 1.0f / total[r];
        float* to = item.out + (r / G) * item.out_stride + (r % G) * D;
        for (int d = 0; d < D; d++) to[d] = acc[long(r) * D + d] * scale;
    }
}

}  // namespace boomerang
