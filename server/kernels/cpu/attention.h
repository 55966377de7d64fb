// Paged attention for one (request, KV head, range of query tokens, range of positions): online softmax, K and V read once.
//
// A page holds K and V of `page_size` tokens per KV head, as panels: K [tokens, channels], V [channels, tokens], tokens
// and channels padded to 32. The query heads of a KV head are rows of the same blocks, so they share what is read.
#pragma once
#include <vector>

#include "block.h"

namespace boomerang {

constexpr int kPagesInBlock = kMostTerms;  // between two updates of the running softmax: 256 positions of pages of 32
constexpr int kQueryRows = 32;     // rows of one work item, about

// T: type of K and V. Products with them take activations of Act<T>.
template <class T>
struct PageShape {
    int page_size, padded_size, head_dim, padded_dim, num_kv_heads;
    PageShape(int page_size, int head_dim, int num_kv_heads)
        : page_size(page_size), padded_size(round_up(page_size, 32)), head_dim(head_dim), padded_dim(round_up(head_dim, 32)), num_kv_heads(num_kv_heads) {}
    long head_elements() const { return long(padded_size) * padded_dim; }
    long page_elements() const { return head_elements() * num_kv_heads; }
    int k_units() const { return padded_dim / kPerUnit<T>; }   // of a panel of 32 tokens
    int v_units() const { return padded_size / kPerUnit<T>; }  // of a panel of 32 channels
};

// K and V [head_dim] of token `slot` of a page.
template <class T>
inline void write_page(const PageShape<T>& shape, T* k_page, T* v_page, int slot, const float* k, const float* v) {
    // Places that hold no token yet are multiplied by zero, so they must be numbers: the first token clears its page.
    if (slot == 0) std::memset(static_cast<void*>(v_page), 0, shape.head_elements() * sizeof(T));
    const int D = shape.head_dim;
    alignas(64) T row[1024];
    for (int d = 0; d < D; d += 16) store16(row + d, load16(k + d, tail16(D - d)), tail16(D - d));
    for (int d = D; d < shape.padded_dim; d++) row[d] = T{};
    char* line = reinterpret_cast<char*>(k_page + panel_offset<T>(slot, 0, shape.k_units()));
    const char* from = reinterpret_cast<const char*>(row);
    for (int u = 0; u < shape.k_units(); u++) std::memcpy(line + long(u) * kLine<T>, from + 4 * u, 4);
    for (int d = 0; d < D; d += 16) {
        T* to = v_page + panel_offset<T>(d, slot, shape.v_units());
        const F16 values = load16(v + d, tail16(D - d));
        if constexpr (kPerUnit<T> == 1)
            store16(to, values);
        else
            store_every_second16(to - slot % 2, slot % 2, values);
    }
}

template <class T>
struct AttentionItem {
    const Act<T>* q;  // [tokens * group, padded_dim]
    Act<T>* out;      // first token's first head; null: leave the parts for `merge_parts`
    float* part;      // [rows, head_dim + 2]: sums, maximum, total
    long out_stride;  // between tokens
    const T* k_pages;
    const T* v_pages;
    const int32_t* table;
    int head, group, num_tokens;
    int first_position;         // of the first query token; query i sees positions <= first_position + i
    int first_page, end_page;   // range of pages of this item
    float scale;
    const int32_t* next_table = nullptr;  // first pages and head of the item that follows
    int num_next = 0, next_head = 0;
};

template <class T>
struct AttentionScratch {
    std::vector<float> scores, sums, stats;
    std::vector<Act<T>> weights;
};

// Softmax update of one row: writes exp(score - new maximum) for `seen` of `width` columns, zeros for the rest; returns
// the factor for what was accumulated before.
template <class X>
inline float update_row(const float* scores, X* weights, int seen, int width, float scale, float& maximum, float& total) {
    const F16 lowest = set16(-INFINITY);
    F16 top = lowest;
    for (int n = 0; n < seen; n += 16) top = max16(top, choose16(tail16(seen - n), load16(scores + n), lowest));
    // Scores become powers of two: e^(scale x - peak) = 2^(factor x - shift).
    const float peak = std::max(maximum, top16(top) * scale), slope = scale * kLog2E;
    const F16 shift = set16(-peak * kLog2E);
    F16 sum = zero16();
    int n = 0;
    for (; n < seen; n += 16) {
        const F16 e = keep16(tail16(seen - n), power_of_two16<sizeof(X) == 2>(fma16(load16(scores + n), set16(slope), shift)));
        sum = sum + e;
        store16(weights + n, e);
    }
    for (; n < width; n += 16) store16(weights + n, zero16());
    const float factor = maximum == -INFINITY ? 0.0f : std::exp(maximum - peak);
    total = total * factor + sum16(sum);
    maximum = peak;
    return factor;
}

template <class T>
void attend(const AttentionItem<T>& item, const PageShape<T>& shape, AttentionScratch<T>& scratch) {
    const int G = item.group, rows = item.num_tokens * G, Dp = shape.padded_dim, Pp = shape.padded_size, P = shape.page_size;
    const int columns = kPagesInBlock * Pp, head_dim = shape.head_dim;
    const long page_stride = shape.page_elements(), head_offset = item.head * shape.head_elements();
    scratch.scores.resize(size_t(rows) * columns);
    scratch.weights.resize(size_t(rows) * columns);
    scratch.sums.assign(size_t(rows) * Dp, 0.0f);
    scratch.stats.assign(size_t(rows) * 3, 0.0f);
    float *scores = scratch.scores.data(), *acc = scratch.sums.data();
    float *maximum = scratch.stats.data(), *total = maximum + rows, *factor = total + rows;
    Act<T>* weights = scratch.weights.data();
    std::fill(maximum, maximum + rows, -INFINITY);
    TileState tiles;
    alignas(64) float sums[kBlockRows<T> * kPanel];

    for (int page = item.first_page; page < item.end_page; page += kPagesInBlock) {
        const int pages = std::min(kPagesInBlock, item.end_page - page);
        for (int i = 0; i < pages; i++) {
            const T* k = item.k_pages + item.table[page + i] * page_stride + head_offset;
            const T* v = item.v_pages + item.table[page + i] * page_stride + head_offset;
            for (int n = 0; n < Pp; n += kPanel)
                for (int r = 0, size; r < rows; r += size) {
                    size = block_size<T>(rows - r);
                    const Term<T> term = {item.q + long(r) * Dp, Dp, reinterpret_cast<const char*>(k + panel_offset<T>(n, 0, shape.k_units())), shape.k_units()};
                    // V of these tokens is wanted soon.
                    const Ahead ahead = {reinterpret_cast<const char*>(v + long(n) * Dp), r == 0 ? kUnitStep * kLine<T> : 0};
                    block<T>(&term, 1, size, ahead, scores + long(r) * columns + i * Pp + n, columns, tiles);
                }
        }
        const int first = page * P;  // position of the block's first token
        for (int r = 0; r < rows; r++) {
            const int seen = std::min(pages * P, item.first_position + r / G + 1 - first);
            float* row = scores + long(r) * columns;
            if (P < Pp)  // padding between the pages' tokens
                for (int i = 0; i < pages; i++) std::fill(row + i * Pp + P, row + (i + 1) * Pp, -INFINITY);
            factor[r] = seen <= 0 ? 1.0f : 0.0f;
            const int seen_columns = seen <= 0 ? 0 : (seen - 1) / P * Pp + (seen - 1) % P + 1;
            if (seen > 0)
                factor[r] = update_row(row, weights + long(r) * columns, seen_columns, pages * Pp, item.scale, maximum[r], total[r]);
            else
                for (int n = 0; n < pages * Pp; n += 16) store16(weights + long(r) * columns + n, zero16());
        }
        // What comes next is fetched while the block is finished: its own next pages, or the next item's first.
        for (int i = 0; i < kPagesInBlock; i++) {
            const T* k = nullptr;
            if (page + kPagesInBlock + i < item.end_page)
                k = item.k_pages + item.table[page + kPagesInBlock + i] * page_stride + head_offset;
            else if (page + kPagesInBlock >= item.end_page && i < item.num_next)
                k = item.k_pages + item.next_table[i] * page_stride + item.next_head * shape.head_elements();
            for (long byte = 0; k && byte < shape.head_elements() * long(sizeof(T)); byte += 64) _mm_prefetch(reinterpret_cast<const char*>(k) + byte, _MM_HINT_T1);
        }
        for (int d = 0; d < Dp; d += kPanel) {
            Term<T> terms[kPagesInBlock];
            for (int i = 0; i < pages; i++) {
                const T* v = item.v_pages + item.table[page + i] * page_stride + head_offset;
                terms[i] = {weights + i * Pp, columns, reinterpret_cast<const char*>(v + panel_offset<T>(d, 0, shape.v_units())), shape.v_units()};
            }
            for (int r = 0, size; r < rows; r += size) {
                size = block_size<T>(rows - r);
                block<T>(terms, pages, size, Ahead{}, sums, kPanel, tiles);
                for (int i = 0; i < pages; i++) terms[i].x += size * long(columns);
                for (int m = 0; m < size; m++)
                    for (int half = 0; half < kPanel; half += 16) {
                        float* to = acc + long(r + m) * Dp + d + half;
                        store16(to, fma16(load16(to), set16(factor[r + m]), load16(sums + m * kPanel + half)));
                    }
            }
        }
    }
    for (int r = 0; r < rows; r++) {
        const float* from = acc + long(r) * Dp;
        if (item.part) {
            float* part = item.part + long(r) * (head_dim + 2);
            std::memcpy(part, from, sizeof(float) * head_dim);
            part[head_dim] = maximum[r];
            part[head_dim + 1] = total[r];
            continue;
        }
        const F16 scale = set16(1.0f / total[r]);
        Act<T>* to = item.out + (r / G) * item.out_stride + long(r % G) * head_dim;
        for (int d = 0; d < head_dim; d += 16) store16(to + d, load16(from + d, tail16(head_dim - d)) * scale, tail16(head_dim - d));
    }
}

// Joins the parts [num_parts, rows, head_dim + 2] of one token's row into out [head_dim].
template <class X>
inline void merge_parts(const float* part, int num_parts, long stride, int head_dim, X* out) {
    float peak = -INFINITY, total = 0.0f;
    for (int i = 0; i < num_parts; i++) peak = std::max(peak, part[i * stride + head_dim]);
    for (int i = 0; i < num_parts; i++) total += part[i * stride + head_dim + 1] * std::exp(part[i * stride + head_dim] - peak);
    for (int d = 0; d < head_dim; d += 16) {
        const Mask mask = tail16(head_dim - d);
        F16 sum = zero16();
        for (int i = 0; i < num_parts; i++)
            sum = fma16(load16(part + i * stride + d, mask), set16(std::exp(part[i * stride + head_dim] - peak) / total), sum);
        store16(out + d, sum, mask);
    }
}

}  // namespace boomerang
